//! How the layers walk over tokens: tile by tile, tiles in fixed partitions, sums over partitions in order.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::context::Context;
use crate::error::Result;
use crate::memory::{collected, lengthen, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::widen;
use crate::problem::rows::Rows;

/// Tokens a tile: enough for a fast product, few enough that a tile of hidden units stays in the cache.
pub(crate) const TILE: usize = 256;
/// Numbers of a tile in one buffer at most: rows of more than 32,768 numbers make shorter tiles.
const TILE_NUMBERS: usize = TILE << 15;
/// Partitions are run in parallel, the tiles of one in order.
const PARTITIONS: usize = 32;
/// With fewer, many threads would have nothing to do.
const FEW_PARTITIONS: usize = 4;
/// The partial sums of all partitions together hold at most so many numbers, 128 MiB. Weights for which that leaves
/// fewer than four partitions are summed in another way, by [`super::panels`].
const PARTIAL_SUMS: usize = 1 << 24;

/// Whether so many sums are too many for [`for_each_tile`].
pub(crate) fn are_many(sums: usize) -> bool {
    sums > PARTIAL_SUMS / FEW_PARTITIONS
}

/// Runs `body(tile, outputs, sums, scratch)` on every tile of `rows` tokens.
///
/// An output `(slice, width)` is cut into the tile's own `width` numbers a row. `sums` are float64 accumulators of the
/// given lengths, returned with the partitions added up in order. `scratch` keeps its allocations from tile to tile.
/// `width` is that of the widest row in a buffer of `scratch`. The partitions depend on sizes alone, so the bits do not
/// depend on the number of threads.
///
/// Memory: the sums once a partition, at most `PARTIAL_SUMS` unless they [`are_many`]; and a thread its scratch, no more
/// than `TILE_NUMBERS` a buffer that holds rows of tokens.
pub(crate) fn for_each_tile<T: Real, const OUT: usize, const SUM: usize, const SCRATCH: usize>(
    ctx: &Context,
    rows: usize,
    width: usize,
    outputs: [(&mut [T], usize); OUT],
    sums: [usize; SUM],
    body: impl Fn(Range<usize>, [&mut [T]; OUT], &mut [Vec<f64>; SUM], &mut [Vec<T>; SCRATCH]) -> Result<()> + Sync,
) -> Result<[Vec<f64>; SUM]> {
    // Nothing is written, however many rows of no columns there are.
    let rows = if outputs.iter().all(|(_, width)| *width == 0) && sums == [0; SUM] { 0 } else { rows };
    let partitions = (PARTIAL_SUMS / sums.iter().sum::<usize>().max(1)).clamp(FEW_PARTITIONS, PARTITIONS);
    let partition = rows.div_ceil(TILE).div_ceil(partitions).max(1) * TILE;
    let size = (TILE_NUMBERS / width.max(1)).clamp(1, TILE);
    let partials = split(0..rows, partition, outputs)
        .into_par_iter()
        .map(|(range, outputs)| {
            let mut partial = zeros(sums)?;
            let mut scratch = std::array::from_fn(|_| Vec::new());
            for (tile, outputs) in split(range, size, outputs) {
                ctx.check()?;
                body(tile, outputs.map(|(slice, _)| slice), &mut partial, &mut scratch)?;
            }
            Ok(partial)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut partials = partials.into_iter();
    let mut total = partials.next().map_or_else(|| zeros(sums), Ok)?;
    for partial in partials {
        for (total, partial) in total.iter_mut().zip(&partial) {
            (total.par_chunks_mut(4096), partial.par_chunks(4096))
                .into_par_iter()
                .for_each(|(total, partial)| total.iter_mut().zip(partial).for_each(|(a, b)| *a += b));
        }
    }
    Ok(total)
}

/// Accumulators of these lengths.
fn zeros<const SUM: usize>(lens: [usize; SUM]) -> Result<[Vec<f64>; SUM]> {
    let mut sums = [const { Vec::new() }; SUM];
    for (sum, len) in sums.iter_mut().zip(lens) {
        *sum = zeroed(len, "sums of gradients")?;
    }
    Ok(sums)
}

/// A range of rows, and for every output its slice there and its width.
type Part<'a, T, const OUT: usize> = (Range<usize>, [(&'a mut [T], usize); OUT]);

/// Cuts the rows `range`, and the outputs with them, into parts of `size` rows.
fn split<T, const OUT: usize>(
    range: Range<usize>,
    size: usize,
    mut outputs: [(&mut [T], usize); OUT],
) -> Vec<Part<'_, T, OUT>> {
    range
        .clone()
        .step_by(size)
        .map(|start| {
            let end = (start + size).min(range.end);
            let outputs = outputs.each_mut().map(|(slice, width)| {
                let (part, rest) = std::mem::take(slice).split_at_mut((end - start) * *width);
                *slice = rest;
                (part, *width)
            });
            (start..end, outputs)
        })
        .collect()
}

/// The first `len` numbers of a buffer that grows as needed; what they hold is left over from earlier use.
pub(crate) fn sized<T: Real>(buffer: &mut Vec<T>, len: usize) -> Result<&mut [T]> {
    lengthen(buffer, len, "a tile of tokens")?;
    Ok(&mut buffer[..len])
}

/// Copies the rows `range` of `x`, its sequences one after the other, to a contiguous buffer.
pub(crate) fn load<'s, T: Real>(x: &Rows<'_, T>, range: Range<usize>, buffer: &'s mut Vec<T>) -> Result<&'s [T]> {
    let out = sized(buffer, range.len() * x.d())?;
    copy_rows(x, range, 0..x.d(), out);
    Ok(out)
}

/// Copies some columns of the rows `range` of `x`, its sequences one after the other, to contiguous rows.
pub(crate) fn copy_rows<T: Real>(x: &Rows<'_, T>, range: Range<usize>, columns: Range<usize>, out: &mut [T]) {
    let d = columns.len();
    let mut row = range.start;
    while row < range.end && d > 0 {
        let first = row % x.n();
        let count = (x.n() - first).min(range.end - row);
        let block = x.blocks()[row / x.n()].submatrix(first, columns.start, count, d);
        let out = &mut out[(row - range.start) * d..][..count * d];
        match block.try_as_row_major() {
            Some(block) => {
                for (out, x) in out.chunks_exact_mut(d).zip(block.row_iter()) {
                    out.copy_from_slice(x.as_slice());
                }
            }
            None => MatMut::from_row_major_slice_mut(out, count, d).copy_from(block),
        }
        row += count;
    }
}

/// `out = lhs rhs`, or `out += lhs rhs`; `out` is row-major.
pub(crate) fn product<T: Real>(out: &mut [T], accum: Accum, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>) {
    let out = MatMut::from_row_major_slice_mut(out, lhs.nrows(), rhs.ncols());
    matmul(out, accum, lhs, rhs, T::ONE, Par::Seq);
}

/// `sum += lhs^T rhs`, the product in `T` and the sum in float64.
pub(crate) fn accumulate_transposed<T: Real>(
    sum: &mut [f64],
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
    buffer: &mut Vec<T>,
) -> Result<()> {
    let tile = sized(buffer, sum.len())?;
    product(tile, Accum::Replace, lhs.transpose(), rhs);
    widen(tile, sum);
    Ok(())
}

/// Rounds a float64 sum to its place in the results.
pub(crate) fn round<T: Real>(sum: &[f64], out: &mut [T]) {
    for (out, sum) in out.iter_mut().zip(sum) {
        *out = T::of(*sum);
    }
}

/// A float64 sum rounded to `T`.
pub(crate) fn rounded<T: Real>(sum: &[f64]) -> Result<Vec<T>> {
    collected(sum.iter().map(|x| T::of(*x)), "the gradient of a weight")
}

/// `y += x`.
pub(crate) fn add_into<T: Real>(y: &mut [T], x: &[T]) {
    (y.par_chunks_mut(TILE * TILE), x.par_chunks(TILE * TILE))
        .into_par_iter()
        .for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| *y += *x));
}

/// The sum of `f` over the entries of one row, in float64, in eight interleaved parts so that it vectorises.
#[inline(always)]
pub(crate) fn row_sum<T: Real>(x: &[T], f: impl Fn(f64) -> f64) -> f64 {
    row_dot(x, x, |x, _| f(x))
}

/// The sum of `f(x_i, y_i)`, as [`row_sum`].
#[inline(always)]
pub(crate) fn row_dot<T: Real>(x: &[T], y: &[T], f: impl Fn(f64, f64) -> f64) -> f64 {
    let mut lanes = [0.0; 8];
    let (x8, x_rest) = x.as_chunks::<8>();
    let (y8, y_rest) = y.as_chunks::<8>();
    for (x, y) in x8.iter().zip(y8) {
        for l in 0..8 {
            lanes[l] += f(x[l].to_f64(), y[l].to_f64());
        }
    }
    let mut sum = 0.0;
    for (x, y) in x_rest.iter().zip(y_rest) {
        sum += f(x.to_f64(), y.to_f64());
    }
    lanes.iter().fold(sum, |sum, lane| sum + lane)
}

//! Gradients of large weights: by panels of a weight's columns, one after another, and in a panel by chunks of tokens.
//!
//! The float64 sums of a small weight are kept once a partition of the tokens (see [`super::tiles`]). Of a large one
//! that would be many times the gradient: 8 GiB for a head of 2048 x 128,000, whose gradient is 1 GiB. Here there is
//! one sum, of one panel at a time; threads share the blocks of the panel and not the tokens, so that each number is
//! summed by one thread in the order of the tokens, whatever the number of threads.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::tiles::{TILE, copy_rows, product, sized};
use crate::context::Context;
use crate::error::Result;
use crate::memory::lengthen;
use crate::numerics::real::Real;
use crate::numerics::tile::{tiles, widen};
use crate::problem::rows::Rows;

/// Rows and columns of what one task multiplies: with 256 tokens large enough for a fast product, and its float64 sums,
/// 1 MiB, small enough for the second-level cache.
const BLOCK: (usize, usize) = (256, 512);
/// Columns of a panel at most, so that a chunk has a few hundred tokens where columns are short.
const COLUMNS: usize = 1 << 14;

/// How much is computed at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Split {
    /// Float64 sums of a panel.
    pub sums: usize,
    /// Numbers of all arrays of a chunk of tokens together.
    pub chunk: usize,
}

impl Split {
    /// 128 MiB of sums, as many as small weights may take, and 64 MiB of float32 or 128 MiB of float64. Measured on
    /// the gradients of 2048 x 128,000: panels and chunks of a quarter cost 5% of the time, four times as large ones
    /// gain nothing.
    pub(crate) const USUAL: Self = Self { sums: 1 << 24, chunk: 1 << 24 };

    /// Panels of so many columns, each with so many sums.
    pub(crate) fn panels(&self, columns: usize, sums_a_column: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let most = (self.sums / sums_a_column.max(1)).clamp(1, COLUMNS);
        let step = if most < 64 { most } else { most / 64 * 64 };
        (0..columns).step_by(step).map(move |start| start..columns.min(start + step))
    }

    /// Chunks of so many tokens, each with `width` numbers in all arrays together: whole tiles where there is room.
    pub(crate) fn chunks(&self, tokens: usize, width: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let most = (self.chunk / width.max(1)).max(1);
        let step = if most < TILE { most } else { most / TILE * TILE };
        (0..tokens).step_by(step).map(move |start| start..tokens.min(start + step))
    }
}

/// So many zeros, the sums of a panel.
pub(crate) fn sums(buffer: &mut Vec<f64>, len: usize) -> Result<&mut [f64]> {
    let is_new = buffer.is_empty();
    lengthen(buffer, len, "sums of gradients")?;
    if !is_new {
        buffer[..len].par_chunks_mut(TILE * TILE).for_each(|sum| sum.fill(0.0));
    }
    Ok(&mut buffer[..len])
}

/// The columns of some rows of `x`, contiguous.
pub(crate) fn load<'s, T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    tokens: Range<usize>,
    columns: Range<usize>,
    buffer: &'s mut Vec<T>,
) -> Result<MatRef<'s, T>> {
    filled(ctx, tokens, columns.len(), buffer, |tile, out| copy_rows(x, tile, columns.clone(), out))
}

/// Rows of `width` numbers, which `fill(tokens, rows)` writes tile by tile, on all threads.
pub(crate) fn filled<'s, T: Real>(
    ctx: &Context,
    tokens: Range<usize>,
    width: usize,
    buffer: &'s mut Vec<T>,
    fill: impl Fn(Range<usize>, &mut [T]) + Sync,
) -> Result<MatRef<'s, T>> {
    const ROWS: usize = 32;
    let out = sized(buffer, tokens.len() * width)?;
    out.par_chunks_mut((ROWS * width).max(1)).enumerate().try_for_each(|(i, out)| {
        ctx.check()?;
        let start = tokens.start + i * ROWS;
        fill(start..tokens.end.min(start + ROWS), out);
        Ok(())
    })?;
    Ok(MatRef::from_row_major_slice(out, tokens.len(), width))
}

/// `out = lhs rhs`, or `out += lhs rhs`, on all threads; `out` is row-major.
pub(crate) fn multiply<T: Real>(
    ctx: &Context,
    out: &mut [T],
    accum: Accum,
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
) -> Result<()> {
    let out = MatMut::from_row_major_slice_mut(out, lhs.nrows(), rhs.ncols());
    blocks(out).into_par_iter().try_for_each(|(i, j, out)| {
        ctx.check()?;
        let (lhs, rhs) = (lhs.subrows(i, out.nrows()), rhs.subcols(j, out.ncols()));
        matmul(out, accum, lhs, rhs, T::ONE, Par::Seq);
        Ok(())
    })
}

/// `sum += lhs^T rhs` over the tokens along the rows of both, on all threads: the products of a tile of tokens in `T`,
/// their sum in float64. `sum` is row-major.
///
/// Memory a block of sums a thread.
pub(crate) fn accumulate<T: Real>(
    ctx: &Context,
    sum: &mut [f64],
    lhs: MatRef<'_, T>,
    rhs: MatRef<'_, T>,
) -> Result<()> {
    let sum = MatMut::from_row_major_slice_mut(sum, lhs.ncols(), rhs.ncols());
    blocks(sum).into_par_iter().try_for_each_init(Vec::new, |buffer, (i, j, mut sum)| {
        let (rows, columns) = sum.shape();
        let buffer = sized(buffer, rows * columns)?;
        for (start, len) in tiles(0..lhs.nrows(), TILE) {
            ctx.check()?;
            let (lhs, rhs) = (lhs.submatrix(start, i, len, rows), rhs.submatrix(start, j, len, columns));
            product(buffer, Accum::Replace, lhs.transpose(), rhs);
            for (row, x) in sum.as_mut().row_iter_mut().zip(buffer.chunks_exact(columns)) {
                let row = row.try_as_row_major_mut().expect("rows of a row-major matrix are contiguous");
                widen(x, row.as_slice_mut());
            }
        }
        Ok(())
    })
}

/// Rounds the sums of a panel to its place, the columns `columns` of `out`, which has `width` of them.
pub(crate) fn round<T: Real>(sum: &[f64], out: &mut [T], width: usize, columns: Range<usize>) {
    (out.par_chunks_mut(width.max(1)), sum.par_chunks(columns.len().max(1))).into_par_iter().for_each(|(out, sum)| {
        for (out, sum) in out[columns.clone()].iter_mut().zip(sum) {
            *out = T::of(*sum);
        }
    });
}

/// `f` of pieces of two equally long arrays, on all threads.
pub(crate) fn for_each<T: Real>(x: &mut [T], y: &mut [T], f: impl Fn(&mut [T], &mut [T]) + Sync) {
    const NUMBERS: usize = 1 << 14;
    (x.par_chunks_mut(NUMBERS), y.par_chunks_mut(NUMBERS)).into_par_iter().for_each(|(x, y)| f(x, y));
}

/// A matrix in blocks, each with the row and column where it starts.
fn blocks<T>(matrix: MatMut<'_, T>) -> Vec<(usize, usize, MatMut<'_, T>)> {
    let (rows, columns) = matrix.shape();
    let mut all = Vec::with_capacity(rows.div_ceil(BLOCK.0) * columns.div_ceil(BLOCK.1));
    let mut below = matrix;
    for (i, height) in tiles(0..rows, BLOCK.0) {
        let (mut strip, rest) = below.split_at_row_mut(height);
        below = rest;
        for (j, width) in tiles(0..columns, BLOCK.1) {
            let (block, rest) = strip.split_at_col_mut(width);
            strip = rest;
            all.push((i, j, block));
        }
    }
    all
}

#[cfg(test)]
mod tests;

//! Small pieces that every engine's tiles are made of. A tile's numbers lie row-major, tokens along the rows' lanes
//! unless a name says otherwise.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::numerics::product;
use crate::numerics::real::{Real, vectorised};
use crate::numerics::stored::Stored;

/// Queries, and keys, of one tile of scores: in a product eight blocks of 12 rows by three of two vectors, where 112, of
/// seven vectors, leaves one to go alone, and 4 rows. With float32 and AVX-512 products are 12% faster than at 112.
pub(crate) const TILE: usize = 96;

/// The first token and the length of each tile of a range.
pub(crate) fn tiles(tokens: Range<usize>, tile: usize) -> impl Iterator<Item = (usize, usize)> {
    tokens.clone().step_by(tile).map(move |start| (start, tile.min(tokens.end - start)))
}

/// The first `rows * cols` numbers of a buffer as a `(rows, cols)` matrix.
pub(crate) fn view<T>(buffer: &[T], rows: usize, cols: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(&buffer[..rows * cols], rows, cols)
}

/// The first `rows * cols` numbers of a buffer as a `(rows, cols)` matrix.
pub(crate) fn view_mut<T>(buffer: &mut [T], rows: usize, cols: usize) -> MatMut<'_, T> {
    MatMut::from_row_major_slice_mut(&mut buffer[..rows * cols], rows, cols)
}

/// `dst = alpha lhs rhs`, on this thread.
pub(crate) fn product<T: Real>(dst: MatMut<'_, T>, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>, alpha: T) {
    multiply(dst, Accum::Replace, lhs, rhs, alpha);
}

/// `dst += alpha lhs rhs`, on this thread.
pub(crate) fn add_product<T: Real>(dst: MatMut<'_, T>, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>, alpha: T) {
    multiply(dst, Accum::Add, lhs, rhs, alpha);
}

/// [`product`] or [`add_product`]: by the small kernel where rows are contiguous, else by a general one. `rhs` may have
/// more columns than `dst`.
pub(crate) fn multiply<T: Real>(dst: MatMut<'_, T>, accum: Accum, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>, alpha: T) {
    if dst.col_stride() == 1 && rhs.col_stride() == 1 {
        product::multiply(dst, accum, lhs, rhs, alpha);
    } else {
        let rhs = rhs.subcols(0, dst.ncols());
        matmul(dst, accum, lhs, rhs, alpha, Par::Seq);
    }
}

/// `sum += x`.
pub(crate) fn widen<T: Real>(x: &[T], sum: &mut [f64]) {
    vectorised(
        #[inline(always)]
        || {
            for (sum, &x) in sum.iter_mut().zip(x) {
                *sum += x.to_f64();
            }
        },
    );
}

/// Copies rows `start..start + len` of `x`, less `shift`, into the rows of `dst`, each `width` long.
pub(crate) fn load_rows<T: Real, E: Stored<T>>(
    x: MatRef<'_, E>,
    start: usize,
    len: usize,
    shift: &[T],
    width: usize,
    dst: &mut [T],
) {
    let d = x.ncols();
    for (row, dst) in x.subrows(start, len).row_iter().zip(dst.chunks_exact_mut(width)) {
        match row.try_as_row_major() {
            Some(row) => E::widen_all(row.as_slice(), &mut dst[..d]),
            None => dst.iter_mut().zip(row.iter()).for_each(|(dst, x)| *dst = x.widen()),
        }
        for (dst, shift) in dst.iter_mut().zip(shift) {
            *dst -= *shift;
        }
    }
}

/// Copies rows `start..start + len` of `x` into `dst` as `(d, len)`, less `shift`.
pub(crate) fn load_transposed<T: Real, E: Stored<T>>(
    x: MatRef<'_, E>,
    start: usize,
    len: usize,
    shift: &[T],
    dst: &mut [T],
) {
    for c in 0..x.ncols() {
        let column = x.col(c).subrows(start, len);
        let shift = shift.get(c).copied().unwrap_or(T::ZERO);
        for (dst, &x) in dst[c * len..(c + 1) * len].iter_mut().zip(column.iter()) {
            *dst = x.widen() - shift;
        }
    }
}

/// Writes a `(width, len)` tile to the contiguous rows `dst` of shape `(len, width)`, token `t` times `factor(t)`.
pub(crate) fn store_transposed<T: Real>(
    tile: &[T],
    len: usize,
    width: usize,
    dst: &mut [T],
    factor: impl Fn(usize) -> T,
) {
    for t in 0..len {
        let f = factor(t);
        for c in 0..width {
            dst[t * width + c] = tile[c * len + t] * f;
        }
    }
}

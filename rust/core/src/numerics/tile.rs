//! Small pieces that every engine's tiles are made of. A tile's numbers lie row-major, tokens along the rows' lanes
//! unless a name says otherwise.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::numerics::product;
use crate::numerics::real::{Real, vectorised};

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
pub(crate) fn load_rows<T: Real>(x: MatRef<'_, T>, start: usize, len: usize, shift: &[T], width: usize, dst: &mut [T]) {
    let d = x.ncols();
    for (row, dst) in x.subrows(start, len).row_iter().zip(dst.chunks_exact_mut(width)) {
        match row.try_as_row_major() {
            Some(row) => dst[..d].copy_from_slice(row.as_slice()),
            None => dst.iter_mut().zip(row.iter()).for_each(|(dst, x)| *dst = *x),
        }
        for (dst, by) in dst.iter_mut().zip(shift) {
            *dst -= *by;
        }
    }
}

/// Copies rows `start..start + len` of `x` into `dst` as `(d, len)`, less `shift`.
pub(crate) fn load_transposed<T: Real>(x: MatRef<'_, T>, start: usize, len: usize, shift: &[T], dst: &mut [T]) {
    for c in 0..x.ncols() {
        let column = x.col(c).subrows(start, len);
        let by = shift.get(c).copied().unwrap_or(T::ZERO);
        for (dst, &x) in dst[c * len..(c + 1) * len].iter_mut().zip(column.iter()) {
            *dst = x - by;
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

/// Raises `max` to the largest of each column of `s`, `(rows, max.len())`, writes `e^(s - max)` in place of `s`, and its
/// sums over the rows to `sum`. Where a column's maximum is `-inf`, all of it is 0.
pub(crate) fn exponentials<T: Real>(s: &mut [T], max: &mut [T], sum: &mut [T]) {
    vectorised(
        #[inline(always)]
        || {
            let columns = max.len();
            let whole = columns / COLUMNS * COLUMNS;
            for first in (0..whole).step_by(COLUMNS) {
                exponentials_of::<T, COLUMNS>(s, first, max, sum);
            }
            for first in whole..columns {
                exponentials_of::<T, 1>(s, first, max, sum);
            }
        },
    );
}

/// Columns whose running maxima and sums stay in registers.
const COLUMNS: usize = 16;

#[inline(always)]
fn exponentials_of<T: Real, const COUNT: usize>(s: &mut [T], first: usize, max: &mut [T], sum: &mut [T]) {
    let columns = max.len();
    let mut m = [T::ZERO; COUNT];
    m.copy_from_slice(&max[first..first + COUNT]);
    for row in s.chunks_exact(columns) {
        let row = &row[first..first + COUNT];
        for l in 0..COUNT {
            m[l] = row[l].larger(m[l]);
        }
    }
    max[first..first + COUNT].copy_from_slice(&m);
    for m in &mut m {
        *m = if *m == T::NEG_INFINITY { T::ZERO } else { *m };
    }
    let mut total = [T::ZERO; COUNT];
    for row in s.chunks_exact_mut(columns) {
        let row = &mut row[first..first + COUNT];
        for l in 0..COUNT {
            let e = (row[l] - m[l]).exp_nonpositive();
            row[l] = e;
            total[l] += e;
        }
    }
    sum[first..first + COUNT].copy_from_slice(&total);
}

//! A small matrix product, for the thin and short shapes that tiles of tokens make.
//!
//! Packing its operands costs a general product as much as multiplying them where one side is a head's 16 columns. Here
//! nothing is packed: rows of `rhs` and of the result lie along the lanes, numbers of `lhs` are broadcast, and a block
//! of the result stays in registers.

use faer::{Accum, MatMut, MatRef};
use pulp::{Arch, Simd, WithSimd};

use crate::numerics::real::Real;

/// Rows of `rhs` that are multiplied at a time: so many of a panel stay in the first-level cache.
const DEPTH: usize = 256;

/// `dst = alpha lhs rhs`, or that added to it. Rows of `dst` and `rhs` must be contiguous.
///
/// `rhs` may have more columns than `dst`: they are not used, but save the time that it takes to leave them alone.
pub(crate) fn multiply<T: Real>(dst: MatMut<'_, T>, accum: Accum, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>, alpha: T) {
    if dst.nrows() > 0 && dst.ncols() > 0 {
        Arch::new().dispatch(Product::new(dst, accum, lhs, rhs, alpha));
    }
}

/// The operands: `a (m, k)` of any strides, `b (k, b_columns)` and `c (m, n)` with contiguous rows.
struct Product<T> {
    m: usize,
    k: usize,
    n: usize,
    b_columns: usize,
    a: *const T,
    a_row: isize,
    a_col: isize,
    b: *const T,
    b_row: isize,
    c: *mut T,
    c_row: isize,
    alpha: T,
    add: bool,
}

impl<T: Real> Product<T> {
    fn new(dst: MatMut<'_, T>, accum: Accum, lhs: MatRef<'_, T>, rhs: MatRef<'_, T>, alpha: T) -> Self {
        let (m, k, n) = (lhs.nrows(), lhs.ncols(), dst.ncols());
        assert!(dst.nrows() == m && rhs.nrows() == k && rhs.ncols() >= n, "shapes of a product");
        assert!(dst.col_stride() == 1 && rhs.col_stride() == 1, "rows of a product must be contiguous");
        Self {
            m,
            k,
            n,
            b_columns: rhs.ncols(),
            a: lhs.as_ptr(),
            a_row: lhs.row_stride(),
            a_col: lhs.col_stride(),
            b: rhs.as_ptr(),
            b_row: rhs.row_stride(),
            c_row: dst.row_stride(),
            c: dst.as_ptr_mut(),
            alpha,
            add: matches!(accum, Accum::Add),
        }
    }
}

impl<T: Real> WithSimd for Product<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = T::lanes::<S>();
        // Accumulators fill the registers but for one broadcast and two rows of b.
        let rows = if S::REGISTER_COUNT >= 32 { 12 } else { 6 };
        let rows = self.m.div_ceil(self.m.div_ceil(rows));
        let mut depth = 0;
        let mut add = self.add;
        loop {
            let k = (self.k - depth).min(DEPTH);
            let mut column = 0;
            while column < self.n {
                let left = self.n - column;
                let (vectors, last) = if left > lanes { (2, (left - lanes).min(lanes)) } else { (1, left) };
                let mut row = 0;
                while row < self.m {
                    let count = rows.min(self.m - row);
                    // SAFETY: `row + count <= m`, `column + (vectors - 1) lanes + last <= n` and `depth + k <= self.k`,
                    // so that everything the block reads and writes lies within the three matrices; whole vectors of
                    // b are read only where it has the columns.
                    unsafe {
                        let block = Block {
                            k,
                            a: self.a.wrapping_offset(row as isize * self.a_row + depth as isize * self.a_col),
                            b: self.b.wrapping_offset(depth as isize * self.b_row + column as isize),
                            c: self.c.offset(row as isize * self.c_row + column as isize),
                            add,
                            last,
                            whole: last == lanes,
                            product: &self,
                        };
                        match (vectors, column + vectors * lanes <= self.b_columns) {
                            (2, true) => block.of_rows::<S, 2, true>(simd, count),
                            (2, false) => block.of_rows::<S, 2, false>(simd, count),
                            (_, true) => block.of_rows::<S, 1, true>(simd, count),
                            (_, false) => block.of_rows::<S, 1, false>(simd, count),
                        }
                    }
                    row += count;
                }
                column += (vectors - 1) * lanes + last;
            }
            depth += k;
            add = true;
            if depth >= self.k {
                break;
            }
        }
    }
}

/// One block of a product, a few rows by one or two vectors of the result, from where its operands start.
struct Block<'a, T> {
    k: usize,
    a: *const T,
    b: *const T,
    c: *mut T,
    add: bool,
    /// Numbers in the last vector, and whether they fill it.
    last: usize,
    whole: bool,
    product: &'a Product<T>,
}

impl<T: Real> Block<'_, T> {
    /// # Safety
    /// The pointers must be valid for the block's shapes; where `WHOLE`, whole vectors of b.
    #[inline(always)]
    unsafe fn of_rows<S: Simd, const VECTORS: usize, const WHOLE: bool>(self, simd: S, rows: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            match rows {
                1 => self.compute::<S, 1, VECTORS, WHOLE>(simd),
                2 => self.compute::<S, 2, VECTORS, WHOLE>(simd),
                3 => self.compute::<S, 3, VECTORS, WHOLE>(simd),
                4 => self.compute::<S, 4, VECTORS, WHOLE>(simd),
                5 => self.compute::<S, 5, VECTORS, WHOLE>(simd),
                6 => self.compute::<S, 6, VECTORS, WHOLE>(simd),
                7 => self.compute::<S, 7, VECTORS, WHOLE>(simd),
                8 => self.compute::<S, 8, VECTORS, WHOLE>(simd),
                9 => self.compute::<S, 9, VECTORS, WHOLE>(simd),
                10 => self.compute::<S, 10, VECTORS, WHOLE>(simd),
                11 => self.compute::<S, 11, VECTORS, WHOLE>(simd),
                _ => self.compute::<S, 12, VECTORS, WHOLE>(simd),
            }
        }
    }

    /// # Safety
    /// As [`of_rows`](Self::of_rows), for `ROWS` rows.
    #[inline(always)]
    unsafe fn compute<S: Simd, const ROWS: usize, const VECTORS: usize, const WHOLE: bool>(self, simd: S) {
        let &Product { a_row, a_col, b_row, c_row, alpha, .. } = self.product;
        let lanes = T::lanes::<S>();
        let readable = |vector: usize| WHOLE || vector + 1 < VECTORS;
        let mut sums = [[T::splat(simd, T::ZERO); VECTORS]; ROWS];
        let (mut a, mut b) = (self.a, self.b);
        for _ in 0..self.k {
            // SAFETY: row `p < k` of b and column p of a.
            unsafe {
                let mut row = [T::splat(simd, T::ZERO); VECTORS];
                for (vector, x) in row.iter_mut().enumerate() {
                    let at = b.add(vector * lanes);
                    *x = if readable(vector) { T::load(simd, at) } else { T::load_first(simd, at, self.last) };
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = T::splat(simd, *a.offset(i as isize * a_row));
                    for (sum, &row) in sums.iter_mut().zip(&row) {
                        *sum = T::multiply_add(simd, x, row, *sum);
                    }
                }
                a = a.wrapping_offset(a_col);
                b = b.wrapping_offset(b_row);
            }
        }
        let alpha = T::splat(simd, alpha);
        // SAFETY: rows `i < ROWS` of c, and whole vectors of them where the last one is whole.
        unsafe {
            // Two loops without a branch, which are unrolled, so that the sums never leave their registers. With one loop for
            // all cases they did, and exact attention took a tenth longer.
            if self.whole && self.add {
                for (i, sums) in sums.iter().enumerate() {
                    for (vector, &sum) in sums.iter().enumerate() {
                        let at = self.c.offset(i as isize * c_row).add(vector * lanes);
                        T::store(simd, at, T::multiply_add(simd, alpha, sum, T::load(simd, at)));
                    }
                }
            } else if self.whole {
                for (i, sums) in sums.iter().enumerate() {
                    for (vector, &sum) in sums.iter().enumerate() {
                        let at = self.c.offset(i as isize * c_row).add(vector * lanes);
                        T::store(simd, at, T::multiply(simd, alpha, sum));
                    }
                }
            } else {
                // A copy, which may lie in memory.
                let sums = sums;
                for (i, sums) in sums.iter().enumerate() {
                    for (vector, &sum) in sums.iter().enumerate() {
                        let at = self.c.offset(i as isize * c_row).add(vector * lanes);
                        let count = if vector + 1 < VECTORS { lanes } else { self.last };
                        let old = if self.add { T::load_first(simd, at, count) } else { T::splat(simd, T::ZERO) };
                        T::store_first(simd, at, count, T::multiply_add(simd, alpha, sum, old));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use faer::prelude::ReborrowMut;
    use pulp::Scalar;

    use super::*;

    /// Numbers whose products and sums are exact in either type.
    fn number<T: Real>(i: usize) -> T {
        T::of((i * 37 % 19) as f64 - 9.0)
    }

    /// Every product of a shape, by definition, on the machine's widest vectors and on none, with lhs stored by rows or
    /// by columns, and with or without slack.
    fn check<T: Real>(m: usize, k: usize, n: usize) {
        check_with::<T>(m, k, n, |product| Arch::new().dispatch(product));
        check_with::<T>(m, k, n, |product| Scalar::new().vectorize(product));
    }

    fn check_with<T: Real>(m: usize, k: usize, n: usize, run: impl Fn(Product<T>)) {
        for (by_columns, slack, add) in [(false, 0, false), (true, 0, true), (false, 16, true), (true, 3, false)] {
            let a: Vec<T> = (0..m * k).map(number).collect();
            let mut b: Vec<T> = (0..k * (n + slack)).map(|i| number(i + 5)).collect();
            b.chunks_mut((n + slack).max(1)).for_each(|row| row[n..].fill(T::of(f64::NAN)));
            let lhs = if by_columns {
                MatRef::from_column_major_slice(&a, m, k)
            } else {
                MatRef::from_row_major_slice(&a, m, k)
            };
            let rhs = MatRef::from_row_major_slice(&b, k, n + slack);
            // A border that must not be touched, of NaN.
            let (rows, columns) = (m + 1, n + 2);
            let mut c = vec![T::of(f64::NAN); rows * columns];
            let mut whole = MatMut::from_row_major_slice_mut(&mut c, rows, columns);
            let mut inner = whole.rb_mut().submatrix_mut(0, 1, m, n);
            if add {
                inner.fill(T::ONE);
            }
            let accum = if add { Accum::Add } else { Accum::Replace };
            if m > 0 && n > 0 {
                run(Product::new(inner.rb_mut(), accum, lhs, rhs, T::of(2.0)));
            }
            for i in 0..rows {
                for j in 0..columns {
                    let got = whole[(i, j)].to_f64();
                    if i < m && (1..=n).contains(&j) {
                        let sum: f64 = (0..k).map(|p| lhs[(i, p)].to_f64() * rhs[(p, j - 1)].to_f64()).sum();
                        assert_eq!(got, 2.0 * sum + f64::from(u8::from(add)), "({m}, {k}, {n}) at ({i}, {j})");
                    } else {
                        assert!(got.is_nan(), "({m}, {k}, {n}) wrote ({i}, {j})");
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_every_small_shape_are_exact() {
        for m in 0..15 {
            for n in [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40] {
                for k in [0, 1, 2, 17, DEPTH, DEPTH + 1] {
                    check::<f32>(m, k, n);
                    check::<f64>(m, k, n);
                }
            }
        }
    }
}

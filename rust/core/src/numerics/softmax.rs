//! Exponentials of tiles of scores, relative to running maxima.

use super::real::{Real, vectorised};

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

//! Checks that numbers are finite, of inputs and of results.

use faer::MatRef;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::stored::Stored;

/// An error naming a head of `views` that holds NaN or infinity (the first, of those that run side by side).
pub fn check_finite<T: Real>(name: &str, views: &[MatRef<'_, T>]) -> Result<()> {
    views.par_iter().enumerate().try_for_each(|(h, x)| {
        let x = if x.row_stride() == 1 { x.transpose() } else { *x };
        // Of entries that are all the same one, one is looked at: there may be more of them than any memory holds; and of
        // rows without entries, none.
        let x = if x.ncols() == 0 { x.subrows(0, 0) } else { x };
        let x = if x.row_stride() == 0 { x.subrows(0, x.nrows().min(1)) } else { x };
        let x = if x.col_stride() == 0 { x.subcols(0, x.ncols().min(1)) } else { x };
        (0..x.nrows().div_ceil(ROWS_A_CHECK)).into_par_iter().try_for_each(|tile| {
            let start = tile * ROWS_A_CHECK;
            let rows = x.subrows(start, ROWS_A_CHECK.min(x.nrows() - start));
            if rows_are_finite(rows) {
                return Ok(());
            }
            Err(not_finite(name, h))
        })
    })
}

/// The same of arrays in half precision.
pub(crate) fn check_stored<T: Real, E: Stored<T>>(name: &str, views: &[MatRef<'_, E>]) -> Result<()> {
    let plain: Vec<_> = views.iter().filter_map(|x| E::plain(*x)).collect();
    if plain.len() == views.len() {
        return check_finite(name, &plain);
    }
    views.par_iter().enumerate().try_for_each(|(h, x)| {
        let x = if x.row_stride() == 0 { x.subrows(0, x.nrows().min(1)) } else { *x };
        let x = if x.col_stride() == 0 { x.subcols(0, x.ncols().min(1)) } else { x };
        let good = (0..x.nrows())
            .into_par_iter()
            .with_min_len(ROWS_A_CHECK / 16)
            .all(|i| x.row(i).iter().all(|x| x.widen().finite()));
        if good { Ok(()) } else { Err(not_finite(name, h)) }
    })
}

fn not_finite(name: &str, head: usize) -> Error {
    Error::NonFinite(format!("{name} holds NaN or infinity (in head {head}, counting from 0); expected finite numbers"))
}

const ROWS_A_CHECK: usize = 4096;

fn rows_are_finite<T: Real>(rows: MatRef<'_, T>) -> bool {
    if rows.col_stride() == 1 && rows.row_stride() == rows.ncols() as isize {
        // SAFETY: the rows follow each other without a gap, so that they are one slice.
        return all_finite(unsafe { std::slice::from_raw_parts(rows.as_ptr(), rows.nrows() * rows.ncols()) });
    }
    rows.row_iter().all(|row| match row.try_as_row_major() {
        Some(row) => all_finite(row.as_slice()),
        None => row.iter().all(|x| x.finite()),
    })
}

/// Whether no number is NaN or infinite.
///
/// 0 x is 0 for finite x and NaN otherwise, so sums tell of all; many of them, so that they vectorise.
pub fn all_finite<T: Real>(x: &[T]) -> bool {
    const SUMS: usize = 32;
    vectorised(
        #[inline(always)]
        || {
            let mut sums = [T::ZERO; SUMS];
            let (whole, rest) = x.as_chunks::<SUMS>();
            for x in whole {
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum += *x * T::ZERO;
                }
            }
            sums.iter().chain(rest).all(|x| x.finite())
        },
    )
}

/// An error where a result of one head is not finite: its inputs were, so something overflowed.
pub(crate) fn check_result<T: Real>(name: &str, result: &[T], head: usize) -> Result<()> {
    let bad = result.par_chunks(head).position_first(|x| !all_finite(x));
    match bad {
        None => Ok(()),
        Some(h) => Err(Error::NonFinite(format!(
            "{name} overflows in head {h} (counting from 0): its inputs are too large for their dtype; scale them down, or use \
             float64"
        ))),
    }
}

//! Rows drawn at random, and what their errors say of all rows.
//!
//! An error that sits in a few rows is invisible to even draws, so rows are drawn by a mixture of `guides`:
//! row i with a chance `pi_i` that is the mean of every guide's share in it, times the draws. The first rows of each guide,
//! and those whose chance would be 1 or more, are taken for certain; the others are drawn one in each of equal parts of
//! the mixture. With `e_i` the squared error, `x_i` the squared size of the exact row and `y_i` that of the given one,
//! `sum e_i / pi_i` over the draws estimates the squared error without bias, and `sum_all y_i + sum (x_i - y_i) / pi_i`
//! the squared size, nearly without scatter since the given rows are known all. The square of the relative error is the
//! ratio of the two.
//!
//! The interval takes the ratio's standard error on a logarithmic scale, as if two draws more had been made and had each
//! found what the worst of the drawn rows stands for: squared errors have heavy tails, and what a few draws have seen of
//! such a tail is too little more often than too much.

use faer::Mat;
use rayon::prelude::*;
use serde::Serialize;

use crate::error::Result;
use crate::memory::{collected, filled, room, zeroed};
use crate::numerics::draws::uniform;
use crate::numerics::real::Real;

/// An estimate of a relative Frobenius error, with its 95% confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ErrorEstimate {
    /// The estimate.
    pub relative: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Rows that were computed exactly.
    pub rows: usize,
}

/// Half the width of a normal distribution's 95% interval, in standard deviations.
const NORMAL_95: f64 = 1.96;
/// The draws that an interval is widened by. Of results of low-rank engines where a few tokens carry much
/// (`benches/tolerance.py --rare-tokens`), 2.3% lay above the upper end with one and 1.2% with two.
const MORE_DRAWS: f64 = 2.0;
/// Numbers whose squares one task adds up.
const NUMBERS_A_TASK: usize = 3584;

/// Rows drawn out of `total`, in order, each once.
#[derive(Debug, Clone)]
pub(crate) struct Draw {
    pub rows: Vec<usize>,
    /// `(times drawn) / pi_i`; 1 for rows that are taken for certain, and more for all others.
    pub weights: Vec<f64>,
    /// Of how many.
    pub total: usize,
}

/// What errors call them.
pub(super) const DRAWN: &str = "drawn rows";

/// One guide takes one of so many draws for its first rows, of equal ones those that come first: all guides together, of
/// which there are at most nine, little more than half of them.
const FIRST_OF_GUIDE: usize = 16;

impl Draw {
    /// `count` draws, or all rows where there are no more, by the guides: each holds a number for every row, and one whose
    /// numbers have no sum is left out. Rows that every guide gives 0 are drawn evenly with the others only where no guide
    /// gives anything.
    pub fn new(total: usize, count: usize, seed: u64, guides: &[Vec<f64>]) -> Result<Self> {
        if count >= total {
            let (rows, weights) = (collected(0..total, DRAWN)?, filled(total, 1.0, DRAWN)?);
            return Ok(Self { rows, weights, total });
        }
        let mut shares = zeroed(total, "the chances of rows")?;
        let mut certain = filled(total, false, "the chances of rows")?;
        let mut guided = false;
        for guide in guides {
            // Relative to the largest, so that no sum overflows.
            let largest = guide.iter().copied().fold(0.0, f64::max);
            let sum: f64 = guide.iter().map(|x| x / largest).sum();
            if !(sum > 0.0 && sum.is_finite()) {
                continue;
            }
            guided = true;
            for (share, x) in shares.iter_mut().zip(guide) {
                *share += x / largest / sum;
            }
            for row in first_rows(guide, count / FIRST_OF_GUIDE)? {
                certain[row] = true;
            }
        }
        if !guided {
            shares.fill(1.0);
        }
        let mut left = count.saturating_sub(certain.iter().filter(|&&c| c).count()).max(1);
        let mut sum;
        // Rows whose chance is 1 or more leave less to the others, which may then have rows of that kind.
        loop {
            sum = (0..total).filter(|&i| !certain[i]).map(|i| shares[i]).sum::<f64>();
            let sure: Vec<usize> =
                (0..total).filter(|&i| !certain[i] && left as f64 * shares[i] >= sum && shares[i] > 0.0).collect();
            if sure.is_empty() || left == 1 {
                break;
            }
            left = left.saturating_sub(sure.len()).max(1);
            sure.into_iter().for_each(|i| certain[i] = true);
        }
        let mut draw = Self { rows: room(count, DRAWN)?, weights: room(count, DRAWN)?, total };
        let (mut stratum, mut before) = (0, 0.0);
        let place = |stratum: usize| (stratum as f64 + uniform(seed, stratum as u64)) / left as f64 * sum;
        for row in 0..total {
            if certain[row] {
                draw.rows.push(row);
                draw.weights.push(1.0);
                continue;
            }
            before += shares[row];
            let first = stratum;
            while stratum < left && place(stratum) < before {
                stratum += 1;
            }
            if stratum > first {
                draw.rows.push(row);
                draw.weights.push((stratum - first) as f64 * sum / (left as f64 * shares[row]));
            }
        }
        Ok(draw)
    }

    /// The estimate from the rows' squares, and what all given rows' squares add up to, where that is known.
    pub fn estimate(&self, squares: &[Squares], given: Option<f64>) -> ErrorEstimate {
        let rows = squares.len();
        // Squares of the smallest numbers would be 0.
        let largest = squares.iter().fold(0.0, |largest: f64, s| largest.max(s.error).max(s.exact));
        let unit = if largest > 0.0 { largest } else { 1.0 };
        let weighted = || squares.iter().zip(&self.weights);
        let error: f64 = weighted().map(|(s, w)| w * ((s.error + s.unseen) / unit)).sum();
        let plain: f64 = weighted().map(|(s, w)| w * (s.exact / unit)).sum();
        let difference = |s: &Squares| s.exact / unit - s.given / unit;
        // What is known of all given rows is of use where they are near the exact ones.
        let known = given.map(|given| given / unit + weighted().map(|(s, w)| w * difference(s)).sum::<f64>());
        let known = known.filter(|size| size.is_finite() && *size > 0.0 && error < plain);
        let size = known.unwrap_or(plain);
        let exactly = |relative: f64| ErrorEstimate { relative, low: relative, high: relative, rows };
        if error == 0.0 {
            return exactly(0.0);
        }
        if size == 0.0 || !(error / size).is_finite() {
            return exactly(f64::INFINITY);
        }
        let r = error / size;
        // The sum of the unseen errors scatters as chi-square does, the more the fewer rows it is over; and they may lie
        // along the seen ones.
        let squared: f64 = weighted().map(|(s, w)| (w * (s.unseen / unit)).powi(2)).sum::<f64>();
        let along: f64 = weighted().map(|(s, w)| w * w * (s.error / unit) * (s.unseen / unit)).sum();
        let beyond = 2.0 * NORMAL_95 * (squared.sqrt() + along.sqrt()) / size;
        if rows == self.total {
            return ErrorEstimate { relative: r.sqrt(), low: r.sqrt(), high: (r + beyond).sqrt(), rows };
        }
        // The standard error of a ratio: that of the sum of e_i - r x_i, over the sum of x_i.
        let drawn: Vec<(f64, f64)> = weighted()
            .filter(|(_, w)| **w != 1.0)
            .map(|(s, w)| {
                let size = if known.is_some() { difference(s) } else { s.exact / unit };
                (w * (s.error / unit), w * (s.error / unit - r * size))
            })
            .collect();
        let worst = drawn.iter().map(|d| d.0).fold(0.0, f64::max);
        let count = drawn.len() as f64;
        let mean = drawn.iter().map(|d| d.1).sum::<f64>() / count.max(1.0);
        let spread = drawn.iter().map(|d| (d.1 - mean).powi(2)).sum::<f64>() + MORE_DRAWS * worst * worst;
        let deviation = (spread * count / (count - 1.0).max(1.0)).sqrt() / size;
        let with_worst = r + MORE_DRAWS * worst / size;
        let factor = |around: f64| (NORMAL_95 * deviation / around).exp();
        let (low, high) =
            if count < 2.0 { (0.0, f64::INFINITY) } else { (r / factor(r), with_worst * factor(with_worst) + beyond) };
        let high = if high.is_nan() { f64::INFINITY } else { high };
        ErrorEstimate { relative: r.sqrt(), low: low.sqrt(), high: high.sqrt(), rows }
    }

    /// The estimate for given rows, `width` numbers each, against exact ones in the order of [`rows`](Self::rows).
    pub fn compare<T: Real>(&self, exact: &Mat<f64>, given: &[T], width: usize) -> Result<ErrorEstimate> {
        self.compare_with(exact, given, width, |_| 0.0)
    }

    /// The same, where a squared error `unseen(i)` of unknown direction is expected beside that of the i-th drawn row.
    pub fn compare_with<T: Real>(
        &self,
        exact: &Mat<f64>,
        given: &[T],
        width: usize,
        unseen: impl Fn(usize) -> f64,
    ) -> Result<ErrorEstimate> {
        let all = given.par_chunks(NUMBERS_A_TASK).map(|x| x.iter().map(|x| x.to_f64().powi(2)).sum::<f64>());
        let all: Vec<f64> = all.collect();
        let mut squares = squares(exact, |i, c| given[self.rows[i] * width + c].to_f64())?;
        squares.iter_mut().enumerate().for_each(|(i, squares)| squares.unseen = unseen(i));
        Ok(self.estimate(&squares, Some(all.iter().sum())))
    }

    /// The estimate for rows that are in the order of [`rows`](Self::rows) too, where the others are not known.
    pub fn compare_drawn(&self, exact: &Mat<f64>, got: &Mat<f64>) -> Result<ErrorEstimate> {
        Ok(self.estimate(&squares(exact, |i, c| got[(i, c)])?, None))
    }
}

/// The rows with the `count` largest numbers of a guide, in no order; none of those whose number is 0.
pub(crate) fn first_rows(guide: &[f64], count: usize) -> Result<Vec<usize>> {
    let mut rows = room(guide.len(), DRAWN)?;
    rows.extend((0..guide.len()).filter(|&i| guide[i] > 0.0));
    if count < rows.len() {
        rows.select_nth_unstable_by(count, |&a, &b| guide[b].total_cmp(&guide[a]).then(a.cmp(&b)));
        rows.truncate(count);
    }
    Ok(rows)
}

/// Squared lengths of a row: of its error, of the exact row and of the given one.
#[derive(Debug, Clone, Copy)]
pub struct Squares {
    /// `|given - exact|^2`.
    pub error: f64,
    /// `|exact|^2`.
    pub exact: f64,
    /// `|given|^2`.
    pub given: f64,
    /// The squared error that is expected beside `error`: the mean square of a change whose direction is not known.
    pub unseen: f64,
}

pub(super) fn squares(exact: &Mat<f64>, given: impl Fn(usize, usize) -> f64) -> Result<Vec<Squares>> {
    let sum = |of: &dyn Fn(usize) -> f64| (0..exact.ncols()).map(of).sum();
    let rows = (0..exact.nrows()).map(|i| Squares {
        error: sum(&|c| (exact[(i, c)] - given(i, c)).powi(2)),
        exact: sum(&|c| exact[(i, c)] * exact[(i, c)]),
        given: sum(&|c| given(i, c) * given(i, c)),
        unseen: 0.0,
    });
    collected(rows, DRAWN)
}

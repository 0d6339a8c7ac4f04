//! Polynomial coefficients fitted to a sample of the scores.
//!
//! Attention with weights `p(s)` in place of `e^s` errs, row by row, by about `sum_j w_j (p(s_ij) - e^{s_ij}) v_j /
//! D_i`. So the coefficients minimise, over sampled queries `i` and keys `j` with key weights `w_j` and sampled row
//! sums `D_i`,
//!
//! ```text
//! sum_ij (w_j / D_i)^2 (p(s_ij) - e^{s_ij})^2
//! ```
//!
//! The unknowns are the differences from Taylor's coefficients, with a tiny ridge: where the scores do not determine
//! them (all equal, or no sampled key has a weight) the fit stays at or near Taylor's.

use faer::prelude::Solve;
use faer::{Mat, MatRef};

use crate::error::{Error, Result};
use crate::numerics::draws::stratified;
use crate::numerics::real::{Real, vectorised};

/// Rows, and columns, of the sample at the most.
const SAMPLE: usize = 256;
/// Above this score `e^s` says nothing about a polynomial any more.
const LARGEST_SCORE: f64 = 80.0;
const RIDGE: f64 = 1e-13;
/// Far beyond what scores up to the largest need; a fit takes time and memory by the cube and the square of the degree.
const LARGEST_DEGREE: usize = 512;

/// `1/j!` for `j = 0 .. degree`.
pub(crate) fn taylor(degree: usize) -> Vec<f64> {
    let mut a = vec![1.0; degree + 1];
    for j in 1..=degree {
        a[j] = a[j - 1] / j as f64;
    }
    a
}

/// Sampled scores, which polynomials of any degree are fitted to.
pub(crate) struct Sample {
    /// Of every pair that is seen: its score, the exponential of that, and (w / D)^2.
    scores: Vec<f64>,
    exponentials: Vec<f64>,
    squares: Vec<f64>,
    largest: f64,
}

impl Sample {
    /// Of the scores `scale q.k` of rows of `q` and of those rows of `k` that `keys` names, in order, both less their
    /// shifts. `weight(j)` is key j's weight, and `sees(i, j)` is whether query i sees key j: no later ones once it does
    /// not see one. Costs `O(256^2 d)`, whatever `n` and `m`.
    pub fn new<T: Real>(
        (q, query_shift): (MatRef<'_, T>, &[T]),
        (k, keys, key_shift): (MatRef<'_, T>, &[usize], &[T]),
        weight: impl Fn(usize) -> f64,
        scale: f64,
        sees: impl Fn(usize, usize) -> bool,
    ) -> Result<Self> {
        let shifted = |x: MatRef<'_, T>, rows: &[usize], shift: &[T]| {
            let shift = |c: usize| shift.get(c).map_or(0.0, |shift| shift.to_f64());
            Mat::from_fn(rows.len(), x.ncols(), |i, c| x[(rows[i], c)].to_f64() - shift(c))
        };
        let rows = stratified(q.nrows(), SAMPLE, 0);
        let columns = stratified(keys.len(), SAMPLE, 1).into_iter().map(|i| keys[i]);
        let columns: Vec<usize> = columns.filter(|&j| weight(j) > 0.0).collect();
        let scores =
            faer::Scale(scale) * (shifted(k, &columns, key_shift) * shifted(q, &rows, query_shift).transpose());
        let weights: Vec<f64> = columns.iter().map(|&j| weight(j)).collect();
        let (mut s, mut e, mut squares) = (Vec::<f64>::new(), Vec::<f64>::new(), Vec::<f64>::new());
        for (i, &row) in rows.iter().enumerate() {
            let start = s.len();
            let seen = columns.partition_point(|&j| sees(row, j));
            s.extend(scores.col(i).iter().take(seen));
            let largest = s[start..].iter().fold(0.0, |largest: f64, s| largest.max(s.abs()));
            if largest > LARGEST_SCORE || largest.is_nan() {
                return Err(Error::Denominator(format!(
                    "coefficients=\"fitted\": sampled scores reach {largest:.3e}, far outside what a polynomial can \
                     follow; use Exact()"
                )));
            }
            let factor = largest.exp();
            e.extend_from_slice(&s[start..]);
            vectorised(
                #[inline(always)]
                || e[start..].iter_mut().for_each(|e| *e = (*e - largest).exp_nonpositive() * factor),
            );
            let sum: f64 = e[start..].iter().zip(&weights).map(|(e, w)| e * w).sum();
            let divisor = if sum > 0.0 { sum } else { 1.0 };
            squares.extend(weights[..seen].iter().map(|w| (w / divisor) * (w / divisor)));
        }
        let largest = s.iter().fold(0.0, |largest: f64, s| largest.max(s.abs()));
        Ok(Self { scores: s, exponentials: e, squares, largest })
    }

    /// How far weights by a polynomial are from those by `exp`, relative to them: the root of the mean square.
    pub fn error(&self, a: &[f64]) -> f64 {
        let (mut error, mut size) = (0.0, 0.0);
        for ((s, e), square) in self.scores.iter().zip(&self.exponentials).zip(&self.squares) {
            let p = a.iter().rev().fold(0.0, |p, a| p * s + a);
            error += square * (p - e) * (p - e);
            size += square * e * e;
        }
        (error / size).sqrt()
    }

    /// The fitted `a_0 .. a_degree`.
    pub fn fit(&self, degree: usize) -> Result<Vec<f64>> {
        if degree > LARGEST_DEGREE {
            return Err(Error::Argument(format!(
                "degree = {degree} with coefficients=\"fitted\"; expected a degree of at most {LARGEST_DEGREE}"
            )));
        }
        let s = &self.scores;
        let mut a = taylor(degree);
        if self.largest.powi(degree as i32 + 1) < f64::EPSILON {
            return Ok(a); // Taylor's polynomial is exact to the last bit here.
        }
        // Normal equations for the differences from Taylor's coefficients, in the variable t = s / (root mean square of
        // s), every unknown scaled so that the diagonal is 1. Their matrix holds the moments sum (w / D)^2 t^(i + j).
        let count = degree + 1;
        let rms = (s.iter().map(|s| s * s).sum::<f64>() / s.len() as f64).sqrt();
        let mut residuals = self.exponentials.clone();
        vectorised(
            #[inline(always)]
            || {
                for (e, s) in residuals.iter_mut().zip(s) {
                    *e -= a.iter().rev().fold(0.0, |p, a| p * s + a);
                }
            },
        );
        let mut powers = self.squares.clone();
        let (mut moments, mut wanted) = (vec![0.0; 2 * count - 1], Mat::<f64>::zeros(count, 1));
        for (k, moment) in moments.iter_mut().enumerate() {
            let product = vectorised(
                #[inline(always)]
                || {
                    *moment = sum(&powers, |i| powers[i]);
                    let product = sum(&powers, |i| powers[i] * residuals[i]);
                    powers.iter_mut().zip(s).for_each(|(power, s)| *power *= s / rms);
                    product
                },
            );
            if k < count {
                wanted[(k, 0)] = product;
            }
        }
        let mut gram = Mat::from_fn(count, count, |i, j| moments[i + j]);
        let size: Vec<f64> = (0..count).map(|i| gram[(i, i)].sqrt()).collect();
        for i in 0..count {
            wanted[(i, 0)] /= size[i];
            for j in 0..=i {
                gram[(i, j)] /= size[i] * size[j];
            }
            gram[(i, i)] += RIDGE;
        }
        let Ok(factor) = gram.llt(faer::Side::Lower) else {
            return Err(Error::Denominator(format!(
                "coefficients=\"fitted\": the sampled scores do not determine a polynomial of degree {degree}; use a \
                 lower degree or coefficients=\"taylor\""
            )));
        };
        let delta = factor.solve(wanted);
        for (j, a) in a.iter_mut().enumerate() {
            *a += delta[(j, 0)] / (size[j] * rms.powi(j as i32));
        }
        Ok(a)
    }
}

/// `sum_i term(i)` over the indices of `x`, in several partial sums that vectorise.
#[inline(always)]
fn sum(x: &[f64], term: impl Fn(usize) -> f64) -> f64 {
    const SUMS: usize = 16;
    let mut sums = [0.0; SUMS];
    let whole = x.len() / SUMS * SUMS;
    for first in (0..whole).step_by(SUMS) {
        for (l, sum) in sums.iter_mut().enumerate() {
            *sum += term(first + l);
        }
    }
    sums.iter().sum::<f64>() + (whole..x.len()).map(term).sum::<f64>()
}

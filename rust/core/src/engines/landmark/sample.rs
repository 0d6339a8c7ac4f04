//! Landmarks and their matrices, drawn from a sample of a head's tokens: see the top of [`landmark`](super).

use faer::{Mat, MatRef};

use crate::error::{Error, Result};
use crate::linear::features::Side;
use crate::linear::shifts::{PREFIX, live_keys, sums_and_square};
use crate::memory::{matrix, multiplied};
use crate::numerics::draws::stratified;
use crate::numerics::real::{Real, vectorised};
use crate::problem::heads::Head;
use crate::spec::LandmarkConstants;

/// Queries, and keys, that landmarks are drawn from.
pub(super) const POOL: usize = 512;
/// Queries, and keys, that `M` is fitted to, at the least and at the most; between these so many for each landmark.
const FIT: [usize; 2] = [512, 2048];
const FIT_A_LANDMARK: usize = 4;
/// Queries, and keys, that matrices of up to `rank` landmarks are fitted to.
pub(crate) fn fit_size(rank: usize) -> usize {
    (FIT_A_LANDMARK * rank).clamp(FIT[0], FIT[1])
}

/// Landmarks that were tried, and how they did on a sample.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub constants: LandmarkConstants,
    /// The relative error of outputs.
    pub out: f64,
    /// The larger of the relative errors of dq and dk for a random dout, where that was asked for.
    pub gradients: Option<f64>,
}

impl Candidate {
    /// The largest error.
    pub fn worst(&self) -> f64 {
        self.gradients.map_or(self.out, |gradients| gradients.max(self.out))
    }
}

/// A head's sampled tokens, shifted and balanced.
pub(crate) struct Sample<'a, T> {
    pub head: &'a Head<'a, T>,
    pub scale: f64,
    pub seed: u64,
    /// `α` and `β`, `(d,)` each.
    pub shifts: [Vec<f64>; 2],
    /// `t`.
    pub balance: f64,
    /// The first so many queries may be drawn.
    pub(super) queries: usize,
    /// The keys that may be drawn: those whose bias leaves them a weight.
    pub(super) keys: Vec<usize>,
    /// Queries, and keys, that matrices are fitted to.
    pub(super) fit_size: usize,
}

impl<'a, T: Real> Sample<'a, T> {
    /// A sample for up to `rank` landmarks, of the first [`PREFIX`] tokens alone where `prefix`. An error where there is no
    /// key to attend to, or where sizes overflow.
    pub fn new(head: &'a Head<'a, T>, prefix: bool, rank: usize, seed: u64) -> Result<Self> {
        let limit = |tokens: usize| if prefix { tokens.min(PREFIX) } else { tokens };
        let (queries, keys) = (limit(head.n()), live_keys(head, limit(head.m()))?);
        if queries == 0 || keys.is_empty() {
            return Err(Error::Denominator(format!("head {} has no key to attend to", head.index)));
        }
        // Rounded, as the pass will have them.
        let mean = |sums: Vec<f64>, count: usize| sums.iter().map(|sum| T::of(sum / count as f64).to_f64()).collect();
        let shifts: [Vec<f64>; 2] = [
            mean(sums_and_square(head.q, 0..queries).0, queries),
            mean(sums_and_square(head.k, keys.iter().copied()).0, keys.len()),
        ];
        let size = |x: MatRef<'_, T>, rows: Vec<usize>, shift: &[f64]| {
            let square = |&i: &usize| x.row(i).iter().zip(shift).map(|(x, s)| (x.to_f64() - s).powi(2)).sum::<f64>();
            (rows.iter().map(square).sum::<f64>() / rows.len() as f64).sqrt()
        };
        let drawn = |count: usize| stratified(count, POOL, seed);
        let size_q = size(head.q, drawn(queries), &shifts[0]);
        let size_k = size(head.k, drawn(keys.len()).into_iter().map(|i| keys[i]).collect(), &shifts[1]);
        let balance = if size_q > 0.0 && size_k > 0.0 { (size_q / size_k).sqrt() } else { 1.0 };
        if !balance.is_finite() || balance == 0.0 {
            return Err(Error::NonFinite(format!("queries or keys of head {} overflow", head.index)));
        }
        Ok(Self { head, scale: head.scores.scale, seed, shifts, balance, queries, keys, fit_size: fit_size(rank) })
    }

    /// The error of a sample that no landmarks resolve.
    pub fn no_landmarks(&self) -> Error {
        Error::Denominator(format!(
            "head {}: no landmarks resolve a sample of its scores; use another engine",
            self.head.index
        ))
    }

    /// `count` sampled tokens of one side, or all: which they are, and the points `q̂` or `k̂`, `(count, d)`. Every `salt` has
    /// a sample of its own.
    pub fn points(&self, side: Side, count: usize, salt: u64) -> Result<(Vec<usize>, Mat<f64>)> {
        let (x, all, shift) = match side {
            Side::Queries => (self.head.q, self.queries, &self.shifts[0]),
            Side::Keys => (self.head.k, self.keys.len(), &self.shifts[1]),
        };
        let factor = match side {
            Side::Queries => self.scale.signum() / self.balance,
            Side::Keys => self.balance,
        };
        let mut rows = stratified(all, count, self.seed.wrapping_add(salt));
        if side == Side::Keys {
            rows.iter_mut().for_each(|i| *i = self.keys[*i]);
        }
        let entry = |i: usize, c: usize| factor * (x[(rows[i], c)].to_f64() - shift[c]);
        let points = matrix(rows.len(), x.ncols(), "sampled tokens", entry)?;
        Ok((rows, points))
    }

    /// `ln w_j = b_j + c α.k'_j + |c| |k̂_j|^2 / 2` of the sampled keys `rows`, less their largest bias.
    pub fn log_weights(&self, rows: &[usize], points: &Mat<f64>) -> Vec<f64> {
        let alpha = &self.shifts[0];
        let bias = |j: usize| self.head.key_bias.map_or(0.0, |b| b[j].to_f64());
        let largest = rows.iter().map(|&j| bias(j)).fold(f64::NEG_INFINITY, f64::max);
        (rows.iter().enumerate())
            .map(|(i, &j)| {
                let relative_bias = bias(j) - largest;
                let along: f64 = (0..alpha.len()).map(|c| alpha[c] * points[(i, c)]).sum();
                relative_bias
                    + self.scale * along / self.balance
                    + self.scale.abs() / 2.0 * square(points.row(i).iter())
            })
            .collect()
    }

    /// `g(x_i, y_j) = e^{-|c| |x_i - y_j|^2 / 2}`, `(rows of x, rows of y)`.
    pub fn kernel(&self, x: &Mat<f64>, y: &Mat<f64>) -> Result<Mat<f64>> {
        let mut kernel = multiplied(x.as_ref(), y.transpose(), "a kernel matrix")?;
        let squares = |x: &Mat<f64>| (0..x.nrows()).map(|i| square(x.row(i).iter())).collect::<Vec<_>>();
        let (xx, yy) = (squares(x), squares(y));
        for (column, y) in kernel.col_iter_mut().zip(yy) {
            let column = column.try_as_col_major_mut().expect("a matrix is stored by columns").as_slice_mut();
            self.gaussian(column, &xx, y);
        }
        Ok(kernel)
    }

    /// Turns `x_i.y` into `g(x_i, y)`, given `|x_i|^2` and `|y|^2`.
    pub(super) fn gaussian(&self, products: &mut [f64], xx: &[f64], yy: f64) {
        let c = self.scale.abs();
        vectorised(
            #[inline(always)]
            || {
                for (x, square) in products.iter_mut().zip(xx) {
                    *x = (c * (*x - (square + yy) / 2.0)).exp_nonpositive();
                }
            },
        );
    }
}

pub(super) fn square<'a>(x: impl Iterator<Item = &'a f64>) -> f64 {
    x.map(|x| x * x).sum()
}

/// Multiplies column j of a kernel by `w_j`, and then row i by `1/D_i`, so that it sums to 1. Returns all `1/D_i` and `w_j`.
pub(super) fn normalise(kernel: &mut Mat<f64>, log_weights: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let level = log_weights.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    let weights: Vec<f64> = log_weights.iter().map(|w| (w - level).exp()).collect();
    // Column by column, as a matrix is stored.
    let mut rows = vec![0.0; kernel.nrows()];
    for (column, w) in kernel.col_iter_mut().zip(&weights) {
        for (x, sum) in column.iter_mut().zip(&mut rows) {
            *x *= w;
            *sum += *x;
        }
    }
    // A query that no sampled key reaches has no say.
    rows.iter_mut().for_each(|sum| *sum = if *sum > f64::MIN_POSITIVE { 1.0 / *sum } else { 0.0 });
    for column in kernel.col_iter_mut() {
        column.iter_mut().zip(&rows).for_each(|(x, factor)| *x *= factor);
    }
    (rows, weights)
}

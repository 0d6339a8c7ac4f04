//! Landmarks and their matrices, drawn from a sample of a head's tokens: see the top of [`landmark`](super).

use faer::linalg::matmul::matmul;
use faer::prelude::Solve;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side as Half};
use rayon::prelude::*;

use super::judge::Judge;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::linear::features::Side;
use crate::linear::shifts::{PREFIX, live_keys, sums_and_square};
use crate::memory::{matrix, multiplied, zeroed};
use crate::numerics::draws::{stratified, uniform};
use crate::numerics::real::{Real, vectorised};
use crate::problem::heads::Head;
use crate::spec::LandmarkConstants;

/// Queries, and keys, that landmarks are drawn from.
const POOL: usize = 512;
/// Queries, and keys, that `M` is fitted to, at the least and at the most; between these so many for each landmark.
const FIT: [usize; 2] = [512, 2048];
const FIT_A_LANDMARK: usize = 4;
/// Landmarks resolve a point where they leave less than this of its kernel value, which is 1.
const RESOLVED: f64 = 1e-14;
/// Ridges that are tried in inverses, relative to the mean of the diagonal.
const RIDGES: [f64; 2] = [1e-8, 1e-13];
/// Queries, and keys, that matrices of up to `rank` landmarks are fitted to.
pub(crate) fn fit_size(rank: usize) -> usize {
    (FIT_A_LANDMARK * rank).clamp(FIT[0], FIT[1])
}

/// What the largest number of landmarks must not exceed: where it does, smaller numbers are not tried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hopes {
    /// The root of the part of the points' weight that the landmarks leave unresolved.
    pub unresolved: f64,
    /// Their error on the sample.
    pub error: f64,
}

impl Hopes {
    /// Everything is tried.
    pub const ALL: Self = Self { unresolved: f64::INFINITY, error: f64::INFINITY };
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
    queries: usize,
    /// The keys that may be drawn: those whose bias leaves them a weight.
    keys: Vec<usize>,
    /// Queries, and keys, that matrices are fitted to.
    fit_size: usize,
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
    fn gaussian(&self, products: &mut [f64], xx: &[f64], yy: f64) {
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

    /// For each of the `ranks`, which increase, the landmarks that err least on a sample of their own. There are fewer
    /// landmarks where fewer resolve the sample, and candidates of the largest ranks alone, or none, where these exceed the
    /// `hopes`. Time `O(s^2 (d + r) + s r^2 + r^3)` for the largest rank `r` and [`fit_size`] `s`.
    pub fn candidates(&self, ctx: &Context, ranks: &[usize], gradients: bool, hopes: Hopes) -> Result<Vec<Candidate>> {
        let largest = ranks.iter().copied().max().unwrap_or(0);
        let (_, pool_q) = self.points(Side::Queries, POOL.max(2 * largest), 1)?;
        let (pool_rows, pool_k) = self.points(Side::Keys, POOL.max(2 * largest), 2)?;
        if pool_k.nrows() == 0 || pool_q.nrows() == 0 {
            return Err(self.no_landmarks());
        }
        let shares = self.shares(&pool_q, &pool_k, &self.log_weights(&pool_rows, &pool_k))?;
        let pool = matrix(pool_q.nrows() + pool_k.nrows(), pool_q.ncols(), "sampled tokens", |i, c| {
            if i < pool_q.nrows() { pool_q[(i, c)] } else { pool_k[(i - pool_q.nrows(), c)] }
        })?;
        let drawn = [vec![1.0; pool.nrows()], shares]
            .par_iter()
            .map(|weights| {
                ctx.check()?;
                let (pivots, left) = self.pivots(&pool, weights, largest)?;
                let points = || matrix(pivots.len(), pool.ncols(), "landmarks", |i, c| pool[(pivots[i], c)]);
                (left <= hopes.unresolved && !pivots.is_empty()).then(points).transpose()
            })
            .collect::<Result<Vec<_>>>()?;
        let drawn: Vec<Mat<f64>> = drawn.into_iter().flatten().collect();
        if drawn.is_empty() {
            return Ok(Vec::new());
        }
        let (fit, judge) = (Fit::new(self)?, Judge::new(self, gradients)?);
        let tried = drawn
            .par_iter()
            .map(|landmarks| {
                ctx.check()?;
                self.tried(&fit, &judge, landmarks, ranks, hopes.error)
            })
            .collect::<Result<Vec<_>>>()?;
        let best = (0..ranks.len()).filter_map(|i| {
            let candidates = tried.iter().filter_map(|tried| tried[i].as_ref());
            candidates.reduce(|a, b| if b.worst() < a.worst() { b } else { a }).cloned()
        });
        Ok(best.collect())
    }

    /// For each rank the best candidate among the first `rank` of these landmarks. The largest rank is tried first: where it
    /// errs more than `hopeless`, smaller ones are not tried.
    fn tried(
        &self,
        fit: &Fit,
        judge: &Judge<'_, T>,
        landmarks: &Mat<f64>,
        ranks: &[usize],
        hopeless: f64,
    ) -> Result<Vec<Option<Candidate>>> {
        // Least squares: with Φ_q the features of queries times 1/D_i, Φ_k those of keys times w_j, and the target G,
        // M = (Φ_q^T Φ_q)^-1 (Φ_q^T G Φ_k) (Φ_k^T Φ_k)^-1.
        let scaled = |x: &Mat<f64>, factors: &[f64]| {
            let mut features = self.kernel(x, landmarks)?;
            for column in features.col_iter_mut() {
                column.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
            }
            Ok(features)
        };
        let (phi_q, phi_k) = (scaled(&fit.queries, &fit.row_weights)?, scaled(&fit.keys, &fit.key_weights)?);
        let times = |a, b| multiplied(a, b, "products of landmarks' features");
        let gram = [times(phi_q.transpose(), phi_q.as_ref())?, times(phi_k.transpose(), phi_k.as_ref())?];
        let cross = times(phi_q.transpose(), times(fit.target.as_ref(), phi_k.as_ref())?.as_ref())?;
        let kernel = self.kernel(landmarks, landmarks)?;
        let mut best: Vec<Option<Candidate>> = ranks.iter().map(|_| None).collect();
        for (&rank, best) in ranks.iter().zip(&mut best).rev() {
            let r = rank.min(landmarks.nrows());
            let of_first = |x: &Mat<f64>| x.submatrix(0, 0, r, r).to_owned();
            let inverses = RIDGES.iter().filter_map(|&ridge| inverse(of_first(&kernel), ridge));
            let fitted = RIDGES.iter().filter_map(|&ridge| {
                let [q, k] = [inverse(of_first(&gram[0]), ridge), inverse(of_first(&gram[1]), ridge)];
                Some(q? * of_first(&cross) * k?)
            });
            judge.best(landmarks.subrows(0, r), fitted.chain(inverses).collect(), best)?;
            if best.as_ref().is_none_or(|best| best.worst() > hopeless) {
                break;
            }
        }
        Ok(best)
    }

    /// For each point, queries first, the square of the largest share that it may have in a row of attention: `1/D_i^2` of a
    /// query, `w_j^2` of a key. Those of either side are scaled to a sum of 1.
    fn shares(&self, queries: &Mat<f64>, keys: &Mat<f64>, log_weights: &[f64]) -> Result<Vec<f64>> {
        let mut kernel = self.kernel(queries, keys)?;
        let (rows, keys) = normalise(&mut kernel, log_weights);
        let part = |x: &[f64]| {
            let sum: f64 = x.iter().map(|x| x * x).sum();
            x.iter().map(|x| x * x / sum).collect::<Vec<_>>()
        };
        Ok([part(&rows), part(&keys)].concat())
    }

    /// Up to `rank` of the points, chosen by randomly pivoted Cholesky; and the root of the part of all weights that they
    /// leave unresolved. Time `O(n rank (d + rank))`.
    fn pivots(&self, x: &Mat<f64>, weights: &[f64], rank: usize) -> Result<(Vec<usize>, f64)> {
        let n = x.nrows();
        let squares: Vec<f64> = (0..n).map(|i| square(x.row(i).iter())).collect();
        let mut rest = vec![1.0; n];
        let (mut pivots, mut factor) = (Vec::new(), Vec::<Vec<f64>>::new());
        while pivots.len() < rank {
            let total: f64 = rest.iter().zip(weights).map(|(r, w)| r * w).sum();
            if !(rest.iter().any(|&r| r > RESOLVED) && total > 0.0) {
                break;
            }
            let mut left = uniform(self.seed, pivots.len() as u64) * total;
            let drawn = rest.iter().zip(weights).position(|(r, w)| {
                left -= r * w;
                left < 0.0
            });
            let pivot = drawn.unwrap_or(n - 1);
            if rest[pivot] <= RESOLVED {
                // A rounding of the draw, or nothing left that has a weight.
                if rest.iter().zip(weights).all(|(&r, &w)| r <= RESOLVED || w == 0.0) {
                    break;
                }
                rest[pivot] = 0.0;
                continue;
            }
            let p = x.row(pivot);
            let mut column = zeroed(n, "pivoted columns of a kernel")?;
            let product = MatMut::from_column_major_slice_mut(&mut column, n, 1);
            matmul(product, Accum::Replace, x, p.transpose().as_mat(), 1.0, Par::Seq);
            self.gaussian(&mut column, &squares, squares[pivot]);
            for earlier in &factor {
                let at_pivot = earlier[pivot];
                column.iter_mut().zip(earlier).for_each(|(x, earlier)| *x -= at_pivot * earlier);
            }
            let inverse = 1.0 / column[pivot].max(RESOLVED).sqrt();
            for (column, rest) in column.iter_mut().zip(&mut rest) {
                *column *= inverse;
                *rest = (*rest - *column * *column).max(0.0);
            }
            rest[pivot] = 0.0;
            factor.push(column);
            pivots.push(pivot);
        }
        let left: f64 = rest.iter().zip(weights).map(|(rest, w)| rest * w).sum();
        Ok((pivots, (left / weights.iter().sum::<f64>()).sqrt()))
    }
}

/// The sample that matrices are fitted to.
struct Fit {
    /// Points, `(s, d)`.
    queries: Mat<f64>,
    keys: Mat<f64>,
    /// `w_j g_ij / D_i`, `(s, s)`.
    target: Mat<f64>,
    /// `1 / D_i`.
    row_weights: Vec<f64>,
    /// `w_j`.
    key_weights: Vec<f64>,
}

impl Fit {
    fn new<T: Real>(sample: &Sample<'_, T>) -> Result<Self> {
        let (_, queries) = sample.points(Side::Queries, sample.fit_size, 3)?;
        let (rows, keys) = sample.points(Side::Keys, sample.fit_size, 4)?;
        if rows.is_empty() {
            return Err(sample.no_landmarks());
        }
        let mut target = sample.kernel(&queries, &keys)?;
        let (row_weights, key_weights) = normalise(&mut target, &sample.log_weights(&rows, &keys));
        Ok(Self { queries, keys, target, row_weights, key_weights })
    }
}

fn square<'a>(x: impl Iterator<Item = &'a f64>) -> f64 {
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

/// The inverse of a symmetric positive matrix whose diagonal is raised by `ridge` times its mean; `None` where rounding
/// leaves none.
fn inverse(mut x: Mat<f64>, ridge: f64) -> Option<Mat<f64>> {
    let r = x.nrows();
    let raise = ridge * (0..r).map(|i| x[(i, i)]).sum::<f64>() / r as f64;
    (0..r).for_each(|i| x[(i, i)] += raise);
    let factor = x.llt(Half::Lower).ok()?;
    Some(factor.solve(Mat::<f64>::identity(r, r)))
}

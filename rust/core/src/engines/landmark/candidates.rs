//! Landmarks and their matrices that are tried: drawn by randomly pivoted Cholesky, fitted, and judged.

use faer::linalg::matmul::matmul;
use faer::prelude::Solve;
use faer::{Accum, Mat, MatMut, Par, Side as Half};
use rayon::prelude::*;

use super::judge::Judge;
use super::sample::{Candidate, POOL, Sample, normalise, square};
use crate::context::Context;
use crate::error::Result;
use crate::linear::features::Side;
use crate::memory::{matrix, multiplied, zeroed};
use crate::numerics::draws::uniform;
use crate::numerics::real::Real;

/// Landmarks resolve a point where they leave less than this of its kernel value, which is 1.
const RESOLVED: f64 = 1e-14;
/// Ridges that are tried in inverses, relative to the mean of the diagonal.
const RIDGES: [f64; 2] = [1e-8, 1e-13];

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

impl<T: Real> Sample<'_, T> {
    /// For each of the `ranks`, which increase, the landmarks that err least on a sample of their own. There are fewer
    /// landmarks where fewer resolve the sample, and candidates of the largest ranks alone, or none, where these exceed the
    /// `hopes`. Time `O(s^2 (d + r) + s r^2 + r^3)` for the largest rank `r` and [`fit_size`](super::fit_size) `s`.
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

/// The inverse of a symmetric positive matrix whose diagonal is raised by `ridge` times its mean; `None` where rounding
/// leaves none.
fn inverse(mut x: Mat<f64>, ridge: f64) -> Option<Mat<f64>> {
    let r = x.nrows();
    let raise = ridge * (0..r).map(|i| x[(i, i)]).sum::<f64>() / r as f64;
    (0..r).for_each(|i| x[(i, i)] += raise);
    let factor = x.llt(Half::Lower).ok()?;
    Some(factor.solve(Mat::<f64>::identity(r, r)))
}

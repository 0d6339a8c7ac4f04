//! What is known of every row for nothing or nearly: guides, one number a row, that say where errors may sit.
//!
//! With `C_y` the covariance of the other side's rows, weighted by `e^b` where they are keys:
//!
//! ```text
//! spread_i   = c^2 x_i^T C_y x_i                   the variance of row i's scores over the other side
//! leverage_i = (x_i - mean)^T C_x^-1 (x_i - mean)  how unlike the others of its own side the row is
//! heavy_i    = sum_j (f_ij e_ij |v_j|)^2           over a few heavy keys j: those that come first by weight times value,
//!                                                  by spread or by leverage. For keys over heavy queries, with |dout_i|
//! ```
//!
//! A polynomial of degree 2 leaves out powers of scores beyond that, so its squared error grows as the third power of the
//! spread; landmarks leave out what is unlike the rest. In `heavy`, `e_ij^2 = min(1, u_ij^6 / 36)` is that of a pair whose
//! score is `u_ij` above the row's mean, and `f_ij = min(1, e^(s_ij) / D_i)` with `D_i` as if scores were normal. Sizes of
//! results, of values and of upstream gradients tell what an error would weigh. `O(n d^2)` time.

use faer::linalg::solvers::Llt;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{Mat, MatRef, Par, Side};
use rayon::prelude::*;

use crate::attention::Head;
use crate::measure::{first_rows, gather};
use crate::real::Real;
use crate::tile::{add_product, product, view, view_mut};

/// The power of spread and leverage that rows are drawn by.
const POWER: i32 = 3;
/// Directions in which rows differ by less than the root of this, relative to the others, tell nothing.
const NEGLIGIBLE: f64 = 1e-9;
/// Rows of one task.
const ROWS: usize = 512;

/// Mean and covariance of weighted rows.
struct Moments {
    mean: Vec<f64>,
    covariance: Mat<f64>,
}

/// The weight of every row, of which 0 leaves a row out: `e^b` relative to the largest. `None` are equal weights.
type Weights<'a> = Option<&'a [f64]>;

fn rows_of<T: Real>(x: MatRef<'_, T>, first: usize, mean: &[f64], weights: Weights<'_>) -> Vec<f64> {
    let d = x.ncols();
    let count = ROWS.min(x.nrows() - first);
    let mut rows = vec![0.0; count * d];
    for (t, row) in rows.chunks_exact_mut(d).enumerate() {
        if weights.is_some_and(|w| w[first + t] == 0.0) {
            continue;
        }
        for (c, row) in row.iter_mut().enumerate() {
            *row = x[(first + t, c)].to_f64() - mean.get(c).copied().unwrap_or(0.0);
        }
    }
    rows
}

impl Moments {
    fn of<T: Real>(x: MatRef<'_, T>, weights: Weights<'_>) -> Self {
        let (n, d) = x.shape();
        let weight = |i: usize| weights.map_or(1.0, |w| w[i]);
        let total = (0..n).map(weight).sum::<f64>().max(f64::MIN_POSITIVE);
        let tasks = || (0..n.div_ceil(ROWS)).into_par_iter().map(|task| task * ROWS);
        let sums: Vec<Vec<f64>> = tasks()
            .map(|first| {
                let mut sums = vec![0.0; d];
                for (t, row) in rows_of(x, first, &[], weights).chunks_exact(d).enumerate() {
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight(first + t) * x);
                }
                sums
            })
            .collect();
        let mean: Vec<f64> = (0..d).map(|c| sums.iter().map(|part| part[c]).sum::<f64>() / total).collect();
        let parts: Vec<Vec<f64>> = tasks()
            .map(|first| {
                let rows = rows_of(x, first, &mean, weights);
                let mut weighted = rows.clone();
                for (t, row) in weighted.chunks_exact_mut(d).enumerate() {
                    row.iter_mut().for_each(|x| *x *= weight(first + t) / total);
                }
                let count = rows.len() / d;
                let mut part = vec![0.0; d * d];
                let (rows, weighted) = (view(&rows, count, d), view(&weighted, count, d));
                add_product(view_mut(&mut part, d, d), rows.transpose(), weighted, 1.0);
                part
            })
            .collect();
        let covariance = Mat::from_fn(d, d, |a, b| parts.iter().map(|part| part[a * d + b]).sum());
        Self { mean, covariance }
    }
}

/// `|(x_i - mean) root|^2` of every row.
fn lengths<T: Real>(x: MatRef<'_, T>, mean: &[f64], root: MatRef<'_, f64>, weights: Weights<'_>) -> Vec<f64> {
    let d = x.ncols();
    let flat: Vec<f64> = root.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<_>>()).collect();
    let of_task = |task: usize| {
        let rows = rows_of(x, task * ROWS, mean, weights);
        let count = rows.len() / d;
        let mut turned = vec![0.0; count * d];
        product(view_mut(&mut turned, count, d), view(&rows, count, d), view(&flat, d, d), 1.0);
        turned.chunks_exact(d).map(|row| row.iter().map(|x| x * x).sum::<f64>()).collect::<Vec<_>>()
    };
    (0..x.nrows().div_ceil(ROWS)).into_par_iter().flat_map_iter(of_task).collect()
}

/// The lower triangular root of a covariance, which may lack directions.
fn root(covariance: &Mat<f64>) -> Option<Mat<f64>> {
    let d = covariance.nrows();
    let trace: f64 = (0..d).map(|c| covariance[(c, c)]).sum();
    if !(trace.is_finite() && trace > 0.0) {
        return None;
    }
    let mut raised = covariance.clone();
    (0..d).for_each(|c| raised[(c, c)] += NEGLIGIBLE * trace);
    Llt::new(raised.as_ref(), Side::Lower).ok().map(|llt| llt.L().to_owned())
}

/// Rows of one side of a head.
struct RowsOf {
    mean: Vec<f64>,
    spread: Vec<f64>,
    leverage: Vec<f64>,
}

impl RowsOf {
    fn new<T: Real>(x: MatRef<'_, T>, weights: Weights<'_>, own: Moments, other: &Moments, scale: f64) -> Self {
        let (n, d) = x.shape();
        let (mut spread, mut leverage) = (vec![0.0; n], vec![0.0; n]);
        if let Some(root) = root(&other.covariance) {
            spread = lengths(x, &[], root.as_ref(), weights);
            spread.iter_mut().for_each(|x| *x *= scale * scale);
        }
        if let Some(root) = root(&own.covariance) {
            let mut inverse = Mat::<f64>::identity(d, d);
            solve_lower_triangular_in_place(root.as_ref(), inverse.as_mut(), Par::Seq);
            leverage = lengths(x, &own.mean, inverse.transpose(), weights);
        }
        Self { mean: own.mean, spread, leverage }
    }
}

/// What is known of a head's queries and keys.
pub(crate) struct Known {
    queries: RowsOf,
    keys: RowsOf,
    /// `e^b` relative to the largest, and the logarithm of their sum.
    weights: Option<Vec<f64>>,
    log_weights: f64,
    /// `|w_j v_j|^2`.
    values: Vec<f64>,
}

/// Heavy rows of one kind.
const HEAVY: usize = 16;
/// No row's denominator is taken to be more than so many times (in logarithms) Jensen's lower bound.
const ABOVE_JENSEN: f64 = 2.0;

impl Known {
    pub fn new<T: Real>(head: &Head<'_, T>, scale: f64) -> Self {
        let weights = key_weights(head);
        let (of_q, of_k) = (Moments::of(head.q, None), Moments::of(head.k, weights.as_deref()));
        let of_queries = Moments { mean: of_q.mean.clone(), covariance: of_q.covariance.clone() };
        let queries = RowsOf::new(head.q, None, of_q, &of_k, scale);
        let keys = RowsOf::new(head.k, weights.as_deref(), of_k, &of_queries, scale);
        let mut values = squares(head.v);
        if let Some(weights) = &weights {
            let weighted = |(v, w): (&mut f64, &f64)| *v = if *w > 0.0 { w * w * *v } else { 0.0 };
            values.iter_mut().zip(weights).for_each(weighted);
        }
        let total: f64 = weights.as_ref().map_or(head.k.nrows() as f64, |w| w.iter().sum());
        Self { queries, keys, weights, log_weights: total.ln(), values }
    }

    /// What queries are drawn by, with the squared sizes of their upstream gradients where they are there.
    pub fn of_queries<T: Real>(&self, head: &Head<'_, T>, options: (bool, f64), dout: Option<&[f64]>) -> Vec<Vec<f64>> {
        let side = &self.keys;
        let keys = union([&self.values, &side.spread, &side.leverage].map(|guide| first_rows(guide, HEAVY)));
        let all: Vec<usize> = (0..head.q.nrows()).collect();
        let of_task = |rows: &[usize]| {
            let mut heavy = vec![0.0; rows.len()];
            self.pairs(head, options, rows, &keys, |i, j, f2| heavy[i] += f2 * square_of(head.v, keys[j]));
            heavy
        };
        let heavy: Vec<f64> = all.par_chunks(ROWS).flat_map_iter(of_task).collect();
        let spread = powers(&self.queries.spread);
        let mut guides = vec![vec![1.0; head.q.nrows()]];
        if let Some(dout) = dout {
            guides.extend([dout.to_vec(), times(&spread, dout), times(&heavy, dout)]);
        }
        guides.extend([spread, powers(&self.queries.leverage), heavy]);
        guides
    }

    /// What keys are drawn by; those that a bias removes are never drawn.
    pub fn of_keys<T: Real>(&self, head: &Head<'_, T>, options: (bool, f64), dout: &[f64]) -> Vec<Vec<f64>> {
        let side = &self.queries;
        let queries = union([dout, &side.spread, &side.leverage].map(|guide| first_rows(guide, HEAVY)));
        let all: Vec<usize> = (0..head.k.nrows()).collect();
        let of_task = |rows: &[usize]| {
            let mut heavy = vec![0.0; rows.len()];
            self.pairs(head, options, &queries, rows, |i, j, f2| heavy[j] += f2 * dout[queries[i]]);
            heavy
        };
        let heavy: Vec<f64> = all.par_chunks(ROWS).flat_map_iter(of_task).collect();
        let live = |j: usize| f64::from(self.weights.as_ref().is_none_or(|w| w[j] > 0.0));
        let (spread, values) = (powers(&self.keys.spread), &self.values);
        vec![
            (0..head.k.nrows()).map(live).collect(),
            powers(&self.keys.leverage),
            times(&spread, values),
            times(&heavy, values),
            values.clone(),
            spread,
            heavy,
        ]
    }

    /// Calls `add(i, j, (f_ij e_ij)^2)` for some queries and keys, by their places in those lists.
    fn pairs<T: Real>(
        &self,
        head: &Head<'_, T>,
        (causal, scale): (bool, f64),
        queries: &[usize],
        keys: &[usize],
        mut add: impl FnMut(usize, usize, f64),
    ) {
        let d = head.q.ncols();
        let (q, k) = (gather(head.q, queries), gather(head.k, keys));
        let mut scores = vec![0.0; queries.len() * keys.len()];
        product(view_mut(&mut scores, queries.len(), keys.len()), q.as_ref(), k.transpose(), scale);
        for (i, scores) in scores.chunks_exact(keys.len().max(1)).enumerate() {
            let mean: f64 = scale * (0..d).map(|c| q[(i, c)] * self.keys.mean[c]).sum::<f64>();
            let above = (0.5 * self.queries.spread[queries[i]]).min(ABOVE_JENSEN);
            for (j, &s) in scores.iter().enumerate() {
                let weight = self.weights.as_ref().map_or(1.0, |w| w[keys[j]]);
                if weight == 0.0 || (causal && keys[j] > queries[i]) {
                    continue;
                }
                let f = (weight.ln() + s - mean - self.log_weights - above).exp().min(1.0);
                let left_out = ((s - mean).powi(2).powi(POWER) / 36.0).min(1.0);
                add(i, j, f * f * left_out);
            }
        }
    }
}

/// Numbers that stand in any of some lists, in order.
fn union<const N: usize>(lists: [Vec<usize>; N]) -> Vec<usize> {
    let mut all = lists.concat();
    all.sort_unstable();
    all.dedup();
    all
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    let largest = |x: &[f64]| x.iter().copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let (of_a, of_b) = (largest(a), largest(b));
    a.iter().zip(b).map(|(a, b)| (a / of_a) * (b / of_b)).collect()
}

/// Relative to the largest, so that nothing overflows, to the power that errors grow with.
fn powers(guide: &[f64]) -> Vec<f64> {
    let largest = guide.iter().copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    guide.iter().map(|x| (x / largest).powi(POWER)).collect()
}

/// `e^b`, relative to the largest.
fn key_weights<T: Real>(head: &Head<'_, T>) -> Option<Vec<f64>> {
    let bias = head.key_bias?;
    let largest = bias.iter().map(|b| b.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    Some(bias.iter().map(|b| if largest == f64::NEG_INFINITY { 1.0 } else { (b.to_f64() - largest).exp() }).collect())
}

/// `|x_i|^2`.
pub(crate) fn squares<T: Real>(x: MatRef<'_, T>) -> Vec<f64> {
    (0..x.nrows()).into_par_iter().map(|i| square_of(x, i)).collect()
}

fn square_of<T: Real>(x: MatRef<'_, T>, i: usize) -> f64 {
    x.row(i).iter().map(|x| x.to_f64().powi(2)).sum()
}

/// The same for contiguous rows.
pub(crate) fn squares_of<T: Real>(x: &[T], width: usize) -> Vec<f64> {
    x.par_chunks(width.max(1)).map(|row| row.iter().map(|x| x.to_f64().powi(2)).sum()).collect()
}

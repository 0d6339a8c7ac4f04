//! Guides: numbers for every row, a query or a key, that cost next to nothing and say where errors may sit.
//!
//! Let `x_i` be the rows of one side, queries or keys, with the mean `mean` and the covariance `C_x`, and `C_y` the
//! covariance of the other side. Moments of keys are weighted by `e^b`. Then
//!
//! ```text
//! spread_i   = c^2 x_i^T C_y x_i                    the variance of the row's scores over the other side
//! leverage_i = (x_i - mean)^T C_x^-1 (x_i - mean)   how unlike the rest of its side the row is
//! heavy_i    = sum_j (f_ij e_ij |v_j|)^2            of a query, over a few heavy keys: the first by weight times value, by
//!                                                   spread or by leverage
//! heavy_j    = sum_i (f_ij e_ij |dout_i|)^2         of a key, over a few heavy queries
//! ```
//!
//! A polynomial of degree 2 leaves out the higher powers of scores, so its squared error grows as the third power of the
//! spread. Landmarks leave out what is unlike the rest. In `heavy`, `e_ij^2 = min(1, u_ij^6 / 36)` is the squared relative
//! error of a pair whose score is `u_ij` above the row's mean, and `f_ij = min(1, e^(s_ij) / D_i)`, with `D_i` as if scores
//! were normal. The sizes of results, of values and of upstream gradients say what an error would weigh. `O(n d^2)` time.

use faer::linalg::solvers::Llt;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{Mat, MatRef, Par, Side};
use rayon::prelude::*;

use super::draw::first_rows;
use super::exact_rows::gather;
use crate::error::Result;
use crate::memory::{collected, collected_in_parallel, copied, filled, matrix, room, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{add_product, product, view, view_mut};
use crate::problem::heads::Head;

/// The power of spread and leverage that rows are drawn by: that of the squared error.
const POWER: i32 = 3;
/// Directions in which rows differ by less than the root of this, relative to the others, tell nothing.
const NEGLIGIBLE: f64 = 1e-9;
/// Rows of one task.
const ROWS: usize = 512;

/// What errors call numbers for every row, and for every two columns.
const GUIDES: &str = "guides that rows are drawn by";
const COVARIANCE: &str = "a covariance";

/// Mean and covariance of weighted rows.
#[derive(Clone)]
struct Moments {
    /// `(d,)`.
    mean: Vec<f64>,
    /// `(d, d)`.
    covariance: Mat<f64>,
}

/// The weight of every row, `e^b` relative to the largest; a weight of 0 leaves a row out. `None`: all weights are 1.
type Weights<'a> = Option<&'a [f64]>;

/// Up to [`ROWS`] rows of `x` from `first` on, less `mean`, which may be empty, in float64: `(rows, d)`. Those without a weight
/// are 0, whatever they hold.
fn widened_rows<T: Real>(x: MatRef<'_, T>, first: usize, mean: &[f64], weights: Weights<'_>) -> Result<Vec<f64>> {
    let d = x.ncols();
    let count = ROWS.min(x.nrows() - first);
    let mut rows = zeroed::<f64>(count * d, "some rows in float64")?;
    for (t, row) in rows.chunks_exact_mut(d).enumerate() {
        if weights.is_some_and(|w| w[first + t] == 0.0) {
            continue;
        }
        for (c, row) in row.iter_mut().enumerate() {
            *row = x[(first + t, c)].to_f64() - mean.get(c).copied().unwrap_or(0.0);
        }
    }
    Ok(rows)
}

impl Moments {
    /// The moments of the rows of `x`, summed in tasks whose results are added in order.
    fn new<T: Real>(x: MatRef<'_, T>, weights: Weights<'_>) -> Result<Self> {
        let (n, d) = x.shape();
        let weight = |i: usize| weights.map_or(1.0, |w| w[i]);
        let total = (0..n).map(weight).sum::<f64>().max(f64::MIN_POSITIVE);
        let tasks = || (0..n.div_ceil(ROWS)).into_par_iter().map(|task| task * ROWS);
        let sums: Vec<Vec<f64>> = tasks()
            .map(|first| {
                let mut sums = zeroed::<f64>(d, "sums of rows")?;
                for (t, row) in widened_rows(x, first, &[], weights)?.chunks_exact(d).enumerate() {
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight(first + t) * x);
                }
                Ok(sums)
            })
            .collect::<Result<_>>()?;
        let mean: Vec<f64> = (0..d).map(|c| sums.iter().map(|part| part[c]).sum::<f64>() / total).collect();
        let parts: Vec<Vec<f64>> = tasks()
            .map(|first| {
                let rows = widened_rows(x, first, &mean, weights)?;
                let mut weighted = copied(&rows, "some rows in float64")?;
                for (t, row) in weighted.chunks_exact_mut(d).enumerate() {
                    row.iter_mut().for_each(|x| *x *= weight(first + t) / total);
                }
                let count = rows.len() / d;
                let mut part = zeroed(d * d, "covariances of some rows")?;
                let (rows, weighted) = (view(&rows, count, d), view(&weighted, count, d));
                add_product(view_mut(&mut part, d, d), rows.transpose(), weighted, 1.0);
                Ok(part)
            })
            .collect::<Result<_>>()?;
        let covariance = matrix(d, d, COVARIANCE, |a, b| parts.iter().map(|part| part[a * d + b]).sum())?;
        Ok(Self { mean, covariance })
    }
}

/// `|(x_i - mean) root|^2` of every row, `(n,)`; `mean` may be empty.
fn squared_lengths<T: Real>(
    x: MatRef<'_, T>,
    mean: &[f64],
    root: MatRef<'_, f64>,
    weights: Weights<'_>,
) -> Result<Vec<f64>> {
    let d = x.ncols();
    let mut flat = room(d * d, COVARIANCE)?;
    root.row_iter().for_each(|row| flat.extend(row.iter().copied()));
    let mut squares = zeroed::<f64>(x.nrows(), GUIDES)?;
    squares.par_chunks_mut(ROWS).enumerate().try_for_each(|(task, squares)| {
        let rows = widened_rows(x, task * ROWS, mean, weights)?;
        let count = rows.len() / d;
        let mut turned = zeroed(count * d, "some rows in float64")?;
        product(view_mut(&mut turned, count, d), view(&rows, count, d), view(&flat, d, d), 1.0);
        for (square, row) in squares.iter_mut().zip(turned.chunks_exact(d)) {
            *square = row.iter().map(|x| x * x).sum::<f64>();
        }
        Ok(())
    })?;
    Ok(squares)
}

/// A lower triangular `L` with `L L^T` the covariance, raised a little as it may lack directions; `None` where it is 0 or not
/// finite.
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

/// What is known of the queries, or of the keys, of a head.
struct OneSide {
    /// `(d,)`.
    mean: Vec<f64>,
    /// A number for every row: see the top of this file.
    spread: Vec<f64>,
    leverage: Vec<f64>,
}

impl OneSide {
    /// From the rows of the side, its moments, and those of the other side.
    fn new<T: Real>(
        x: MatRef<'_, T>,
        weights: Weights<'_>,
        moments: Moments,
        other: &Moments,
        scale: f64,
    ) -> Result<Self> {
        let (n, d) = x.shape();
        let (mut spread, mut leverage) = (zeroed(n, GUIDES)?, zeroed(n, GUIDES)?);
        if let Some(root) = root(&other.covariance) {
            spread = squared_lengths(x, &[], root.as_ref(), weights)?;
            spread.iter_mut().for_each(|x| *x *= scale * scale);
        }
        if let Some(root) = root(&moments.covariance) {
            let mut inverse = Mat::<f64>::identity(d, d);
            solve_lower_triangular_in_place(root.as_ref(), inverse.as_mut(), Par::Seq);
            leverage = squared_lengths(x, &moments.mean, inverse.transpose(), weights)?;
        }
        Ok(Self { mean: moments.mean, spread, leverage })
    }
}

/// What is known of a head's queries and keys.
pub(crate) struct Known {
    queries: OneSide,
    keys: OneSide,
    /// The weights of keys, `e^b` relative to the largest.
    weights: Option<Vec<f64>>,
    /// The logarithm of their sum.
    log_weight_sum: f64,
    /// `|w_j v_j|^2` of every key.
    values: Vec<f64>,
}

/// Rows that count as heavy by one of the three guides.
const HEAVY: usize = 16;
/// No row's denominator is taken to be more than so many times (in logarithms) Jensen's lower bound.
const ABOVE_JENSEN: f64 = 2.0;

impl Known {
    /// Time `O((n + m) d^2 + d^3)`.
    pub fn new<T: Real>(head: &Head<'_, T>) -> Result<Self> {
        let (scale, weights) = (head.scores.scale, key_weights(head)?);
        let (moments_q, moments_k) = (Moments::new(head.q, None)?, Moments::new(head.k, weights.as_deref())?);
        let queries = OneSide::new(head.q, None, moments_q.clone(), &moments_k, scale)?;
        let keys = OneSide::new(head.k, weights.as_deref(), moments_k, &moments_q, scale)?;
        let mut values = squares(head.v)?;
        if let Some(weights) = &weights {
            let weighted = |(v, w): (&mut f64, &f64)| *v = if *w > 0.0 { w * w * *v } else { 0.0 };
            values.iter_mut().zip(weights).for_each(weighted);
        }
        let total: f64 = weights.as_ref().map_or(head.k.nrows() as f64, |w| w.iter().sum());
        Ok(Self { queries, keys, weights, log_weight_sum: total.ln(), values })
    }

    /// What queries are drawn by: guides with a number for each. `dout`: the squared sizes of their upstream gradients, where
    /// there are any.
    pub fn query_guides<T: Real>(&self, head: &Head<'_, T>, dout: Option<&[f64]>) -> Result<Vec<Vec<f64>>> {
        let keys = first_of_any([&self.values, &self.keys.spread, &self.keys.leverage])?;
        let sizes = collected(keys.iter().map(|&j| square_of(head.v, j)), GUIDES)?;
        let heavy = heavy(head.q.nrows(), |rows, heavy| {
            self.pairs(head, rows, &keys, |i, j, square| heavy[i] += square * sizes[j])
        })?;
        let spread = powers(&self.queries.spread)?;
        let mut guides = vec![filled(head.q.nrows(), 1.0, GUIDES)?];
        if let Some(dout) = dout {
            guides.extend([copied(dout, GUIDES)?, times(&spread, dout)?, times(&heavy, dout)?]);
        }
        guides.extend([spread, powers(&self.queries.leverage)?, heavy]);
        Ok(guides)
    }

    /// What keys are drawn by: guides with a number for each, 0 where a bias removes the key. `dout` as for queries.
    pub fn key_guides<T: Real>(&self, head: &Head<'_, T>, dout: &[f64]) -> Result<Vec<Vec<f64>>> {
        let queries = first_of_any([dout, &self.queries.spread, &self.queries.leverage])?;
        let heavy = heavy(head.k.nrows(), |rows, heavy| {
            self.pairs(head, &queries, rows, |i, j, square| heavy[j] += square * dout[queries[i]])
        })?;
        let live = |j: usize| f64::from(self.weights.as_ref().is_none_or(|w| w[j] > 0.0));
        let (spread, values) = (powers(&self.keys.spread)?, &self.values);
        Ok(vec![
            collected((0..head.k.nrows()).map(live), GUIDES)?,
            powers(&self.keys.leverage)?,
            times(&spread, values)?,
            times(&heavy, values)?,
            copied(values, GUIDES)?,
            spread,
            heavy,
        ])
    }

    /// Calls `add(i, j, (f_ij e_ij)^2)` for the pairs of these queries and keys that see each other; `i` and `j` are places in
    /// the two lists.
    fn pairs<T: Real>(
        &self,
        head: &Head<'_, T>,
        queries: &[usize],
        keys: &[usize],
        mut add: impl FnMut(usize, usize, f64),
    ) -> Result<()> {
        let (d, m, scale, mask) = (head.d(), head.m(), head.scores.scale, head.mask);
        let (q, k) = (gather(head.q, queries)?, gather(head.k, keys)?);
        let mut scores = zeroed(queries.len() * keys.len(), "scores of heavy rows")?;
        product(view_mut(&mut scores, queries.len(), keys.len()), q.as_ref(), k.transpose(), scale);
        let log_weight = |&j: &usize| self.weights.as_ref().map_or(0.0, |w| w[j].ln());
        let log_weights = collected(keys.iter().map(log_weight), GUIDES)?;
        for (i, scores) in scores.chunks_exact(keys.len().max(1)).enumerate() {
            let mean: f64 = scale * (0..d).map(|c| q[(i, c)] * self.keys.mean[c]).sum::<f64>();
            let above = (0.5 * self.queries.spread[queries[i]]).min(ABOVE_JENSEN);
            for (j, (&s, &log_weight)) in scores.iter().zip(&log_weights).enumerate() {
                if log_weight == f64::NEG_INFINITY || !mask.sees(queries[i], keys[j], m) {
                    continue;
                }
                let f = (log_weight + s - mean - self.log_weight_sum - above).exp().min(1.0);
                let left_out = ((s - mean).powi(2).powi(POWER) / 36.0).min(1.0);
                add(i, j, f * f * left_out);
            }
        }
        Ok(())
    }
}

/// A number for each of `count` rows: `add` adds to those of some consecutive rows at a time.
fn heavy(count: usize, add: impl Fn(&[usize], &mut [f64]) -> Result<()> + Sync) -> Result<Vec<f64>> {
    let mut heavy = zeroed::<f64>(count, GUIDES)?;
    heavy.par_chunks_mut(ROWS).enumerate().try_for_each(|(task, heavy)| {
        let first = task * ROWS;
        let rows: Vec<usize> = (first..first + heavy.len()).collect();
        add(&rows, heavy)
    })?;
    Ok(heavy)
}

/// The rows that are among the [`HEAVY`] largest of any of the guides, in order.
fn first_of_any(guides: [&[f64]; 3]) -> Result<Vec<usize>> {
    let mut rows = Vec::new();
    for guide in guides {
        rows.extend(first_rows(guide, HEAVY)?);
    }
    rows.sort_unstable();
    rows.dedup();
    Ok(rows)
}

/// The largest number of a guide, by which others are divided so that nothing overflows.
fn largest(guide: &[f64]) -> f64 {
    guide.iter().copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE)
}

/// The product of two guides, each relative to its largest number.
fn times(a: &[f64], b: &[f64]) -> Result<Vec<f64>> {
    let (largest_a, largest_b) = (largest(a), largest(b));
    collected(a.iter().zip(b).map(|(a, b)| (a / largest_a) * (b / largest_b)), GUIDES)
}

/// A guide relative to its largest number, to the power that squared errors grow with.
fn powers(guide: &[f64]) -> Result<Vec<f64>> {
    let largest = largest(guide);
    collected(guide.iter().map(|x| (x / largest).powi(POWER)), GUIDES)
}

/// `e^b` of every key, relative to the largest; `None` where there are no biases.
fn key_weights<T: Real>(head: &Head<'_, T>) -> Result<Option<Vec<f64>>> {
    let Some(bias) = head.key_bias else { return Ok(None) };
    let largest = bias.iter().map(|b| b.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    let weight = |b: &T| if largest == f64::NEG_INFINITY { 1.0 } else { (b.to_f64() - largest).exp() };
    collected(bias.iter().map(weight), "weights of keys").map(Some)
}

/// `|x_i|^2` of every row.
pub(crate) fn squares<T: Real>(x: MatRef<'_, T>) -> Result<Vec<f64>> {
    collected_in_parallel((0..x.nrows()).into_par_iter().map(|i| square_of(x, i)), "squares of rows")
}

fn square_of<T: Real>(x: MatRef<'_, T>, i: usize) -> f64 {
    x.row(i).iter().map(|x| x.to_f64().powi(2)).sum()
}

/// The same for contiguous rows of `width` numbers.
pub(crate) fn squares_of<T: Real>(x: &[T], width: usize) -> Result<Vec<f64>> {
    let squares = x.par_chunks(width.max(1)).map(|row| row.iter().map(|x| x.to_f64().powi(2)).sum());
    collected_in_parallel(squares, "squares of rows")
}

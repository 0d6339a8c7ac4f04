//! What is known of every row for nothing or nearly: guides, one number a row, that say where errors may sit.
//!
//! With `C_y` the covariance of the other side's rows, weighted by `e^b` where they are keys:
//!
//! ```text
//! spread_i   = c^2 x_i^T C_y x_i                   the variance of row i's scores over the other side
//! leverage_i = (x_i - mean)^T C_x^-1 (x_i - mean)  how unlike the others of its own side the row is
//! ```
//!
//! A polynomial of degree g leaves out powers of scores beyond g, so its squared error grows as the power g + 1 of the
//! spread: the power 3 is taken. Landmarks leave out what is unlike the rest. Sizes of results, of values and of upstream
//! gradients tell what an error would weigh. `O(n d^2)` time.

use faer::linalg::solvers::Llt;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{Mat, MatRef, Par, Side};
use rayon::prelude::*;

use crate::attention::Head;
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

/// Spread and leverage (zeros where there is none) of the rows `x` against those of the other side, each to the power that errors grow with.
pub(crate) fn of_scores<T: Real>(
    x: MatRef<'_, T>,
    x_weights: Weights<'_>,
    y: MatRef<'_, T>,
    y_weights: Weights<'_>,
) -> [Vec<f64>; 2] {
    let mut guides = [vec![0.0; x.nrows()], vec![0.0; x.nrows()]];
    if x.nrows() == 0 || x.ncols() == 0 {
        return guides;
    }
    let (own, other) = (Moments::of(x, x_weights), Moments::of(y, y_weights));
    if let Some(root) = root(&other.covariance) {
        guides[0] = powers(lengths(x, &[], root.as_ref(), x_weights));
    }
    if let Some(root) = root(&own.covariance) {
        let d = x.ncols();
        let mut inverse = Mat::<f64>::identity(d, d);
        solve_lower_triangular_in_place(root.as_ref(), inverse.as_mut(), Par::Seq);
        guides[1] = powers(lengths(x, &own.mean, inverse.transpose(), x_weights));
    }
    guides
}

/// Relative to the largest, so that nothing overflows, to the power that errors grow with.
fn powers(mut guide: Vec<f64>) -> Vec<f64> {
    let largest = guide.iter().copied().fold(0.0, f64::max);
    if largest > 0.0 {
        guide.iter_mut().for_each(|x| *x = (*x / largest).powi(POWER));
    }
    guide
}

/// What queries are drawn by before anything is known of results.
pub(crate) fn of_queries<T: Real>(head: &Head<'_, T>) -> Vec<Vec<f64>> {
    let weights = key_weights(head);
    let mut guides = vec![vec![1.0; head.q.nrows()]];
    guides.extend(of_scores(head.q, None, head.k, weights.as_deref()));
    guides
}

/// The same of keys; those that a bias removes are never drawn.
pub(crate) fn of_keys<T: Real>(head: &Head<'_, T>) -> Vec<Vec<f64>> {
    let weights = key_weights(head);
    let weight = |j: usize| weights.as_ref().map_or(1.0, |w| w[j]);
    let mut guides = vec![(0..head.k.nrows()).map(|j| f64::from(weight(j) > 0.0)).collect()];
    guides.extend(of_scores(head.k, weights.as_deref(), head.q, None));
    let values = squares(head.v).into_iter().enumerate();
    guides.push(values.map(|(j, square)| if weight(j) > 0.0 { weight(j).powi(2) * square } else { 0.0 }).collect());
    guides
}

/// `e^b`, relative to the largest.
fn key_weights<T: Real>(head: &Head<'_, T>) -> Option<Vec<f64>> {
    let bias = head.key_bias?;
    let largest = bias.iter().map(|b| b.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    Some(bias.iter().map(|b| if largest == f64::NEG_INFINITY { 1.0 } else { (b.to_f64() - largest).exp() }).collect())
}

/// `|x_i|^2`.
pub(crate) fn squares<T: Real>(x: MatRef<'_, T>) -> Vec<f64> {
    let square = |i: usize| x.row(i).iter().map(|x| x.to_f64().powi(2)).sum();
    (0..x.nrows()).into_par_iter().map(square).collect()
}

/// The same for contiguous rows.
pub(crate) fn squares_of<T: Real>(x: &[T], width: usize) -> Vec<f64> {
    x.par_chunks(width.max(1)).map(|row| row.iter().map(|x| x.to_f64().powi(2)).sum()).collect()
}

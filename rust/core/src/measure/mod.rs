//! Measured errors: rows drawn at random, computed exactly in float64, and compared with given ones.
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

pub(crate) mod guides;

use std::ops::Range;

use faer::{Mat, MatRef};
use rayon::prelude::*;

use self::guides::Known;
use crate::attention::{Head, Heads, Sizes, check_finite, expect_views};
use crate::context::Context;
use crate::engines::exact::{Softmax, TILE, add_bias};
use crate::error::{Error, Result};
use crate::memory::{collected, copied, filled, matrix, room, zeroed};
use crate::numerics::draws::uniform;
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{add_product, product, view, view_mut};

/// An estimate of a relative Frobenius error, with its 95% confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
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
/// Tokens that one task goes through.
const RANGE: usize = 32 * TILE;

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
const DRAWN: &str = "drawn rows";

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
        let error: f64 = weighted().map(|(s, w)| w * ((s.error + s.more) / unit)).sum();
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
        // What is expected is exceeded by more the fewer rows it is a sum over: by chi-square with so many degrees of
        // freedom; and it may lie along the error.
        let more = |power: i32| weighted().map(|(s, w)| (w * (s.more / unit)).powi(power)).sum::<f64>();
        let along: f64 = weighted().map(|(s, w)| w * w * (s.error / unit) * (s.more / unit)).sum();
        let beyond = 2.0 * NORMAL_95 * (more(2).sqrt() + along.sqrt()) / size;
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

    /// The same, with more squared error expected in some of the rows, of unknown direction.
    pub fn compare_with<T: Real>(
        &self,
        exact: &Mat<f64>,
        given: &[T],
        width: usize,
        more: impl Fn(usize) -> f64,
    ) -> Result<ErrorEstimate> {
        let all = given.par_chunks(RANGE).map(|x| x.iter().map(|x| x.to_f64().powi(2)).sum::<f64>());
        let all: Vec<f64> = all.collect();
        let mut squares = squares(exact, |i, c| given[self.rows[i] * width + c].to_f64())?;
        squares.iter_mut().enumerate().for_each(|(i, squares)| squares.more = more(i));
        Ok(self.estimate(&squares, Some(all.iter().sum())))
    }

    /// The same for rows that are both in the order of [`rows`](Self::rows), where the others are not known.
    pub fn compare_drawn(&self, exact: &Mat<f64>, got: &Mat<f64>) -> Result<ErrorEstimate> {
        Ok(self.estimate(&squares(exact, |i, c| got[(i, c)])?, None))
    }
}

/// The numbers of the `count` largest of a guide.
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
    /// What is expected to be missing in `error`: the mean square of a change whose direction is not known.
    pub more: f64,
}

fn squares(exact: &Mat<f64>, given: impl Fn(usize, usize) -> f64) -> Result<Vec<Squares>> {
    let sum = |of: &dyn Fn(usize) -> f64| (0..exact.ncols()).map(of).sum();
    let rows = (0..exact.nrows()).map(|i| Squares {
        error: sum(&|c| (exact[(i, c)] - given(i, c)).powi(2)),
        exact: sum(&|c| exact[(i, c)] * exact[(i, c)]),
        given: sum(&|c| given(i, c) * given(i, c)),
        more: 0.0,
    });
    collected(rows, DRAWN)
}

/// Exact attention of some queries of a head, row after row.
pub(crate) struct ExactRows {
    /// `(rows, dv)`.
    pub out: Mat<f64>,
    /// `(rows, d)`, where a gradient was given.
    pub dq: Option<Mat<f64>>,
    /// The logarithms of the denominators.
    pub log_sums: Vec<f64>,
}

/// Rows `rows` of `x`, in float64.
pub(crate) fn gather<T: Real>(x: MatRef<'_, T>, rows: &[usize]) -> Result<Mat<f64>> {
    matrix(rows.len(), x.ncols(), "drawn rows in float64", |i, c| x[(rows[i], c)].to_f64())
}

/// Rows `rows` of `x`, in float64, row-major, after one another.
pub(crate) fn widened<T: Real>(x: MatRef<'_, T>, rows: Range<usize>) -> Vec<f64> {
    x.subrows(rows.start, rows.len()).row_iter().flat_map(|row| row.iter().map(|x| x.to_f64())).collect()
}

/// The same of rows that belong to keys, `(keys, width)`: those of removed keys are 0, whatever they hold.
pub(crate) fn widened_keys<T: Real>(head: &Head<'_, T>, x: MatRef<'_, T>, keys: Range<usize>) -> Vec<f64> {
    let mut rows = widened(x, keys.clone());
    for (row, j) in rows.chunks_exact_mut(x.ncols()).zip(keys) {
        if head.removed(j) {
            row.fill(0.0);
        }
    }
    rows
}

/// Computes rows exactly, in parallel over keys; `dout` has a row for each.
pub(crate) fn exact_rows<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    (causal, scale): (bool, f64),
    rows: &[usize],
    dout: Option<&Mat<f64>>,
) -> Result<ExactRows> {
    let (m, d, dv) = (head.k.nrows(), head.k.ncols(), head.v.ncols());
    let zeros = |columns| matrix(rows.len(), columns, "exact rows", |_, _| 0.0);
    let dq = dout.map(|_| zeros(d)).transpose()?;
    let mut all = ExactRows { out: zeros(dv)?, dq, log_sums: room(rows.len(), "exact rows")? };
    for (first, rows) in rows.chunks(TILE).enumerate().map(|(i, rows)| (i * TILE, rows)) {
        let count = rows.len();
        let (q, dout) = (gather(head.q, rows)?, dout.map(|dout| dout.subrows(first, count)));
        // Weighted sums of [v, k], and of (dout.v) k.
        let width = dv + if dout.is_some() { 2 * d } else { 0 };
        let end = if causal { rows[count - 1] + 1 } else { m };
        let parts = (0..end.div_ceil(RANGE))
            .into_par_iter()
            .map(|range| {
                let mut softmax = Softmax::new(width)?;
                softmax.start(count);
                let mut upstream = zeroed(TILE * count, "a tile of exact rows")?;
                for j0 in (range * RANGE..end.min((range + 1) * RANGE)).step_by(TILE) {
                    ctx.check()?;
                    let bk = TILE.min(end - j0);
                    let (k, v) = (widened_keys(head, head.k, j0..j0 + bk), widened_keys(head, head.v, j0..j0 + bk));
                    let (k, v) = (view(&k, bk, d), view(&v, bk, dv));
                    let s = &mut softmax.scores;
                    product(view_mut(s, bk, count), k, q.transpose(), scale);
                    if let Some(bias) = head.key_bias {
                        add_bias(bias.subrows(j0, bk).iter().map(|b| b.to_f64()), count, s);
                    }
                    if causal {
                        for (i, &row) in rows.iter().enumerate() {
                            for j in (row + 1).saturating_sub(j0)..bk {
                                s[j * count + i] = f64::NEG_INFINITY;
                            }
                        }
                    }
                    match dout {
                        None => softmax.add(bk, v),
                        Some(dout) => {
                            product(view_mut(&mut upstream, bk, count), v, dout.transpose(), 1.0);
                            softmax.add_with(bk, &[(v, None), (k, None), (k, Some(&upstream))]);
                        }
                    }
                }
                Ok(softmax)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut parts = parts.into_iter();
        let Some(mut softmax) = parts.next() else { continue };
        parts.for_each(|part| softmax.merge(&part));
        let mut sums = zeroed(count * width, "a tile of exact rows")?;
        let (mut max, mut scales) = (vec![0.0; count], vec![0.0; count]);
        softmax.finish(head.index, |i| rows[i], &mut sums, &mut max, &mut scales)?;
        all.log_sums.extend(max.iter().zip(&scales).map(|(max, scale)| max - scale.ln()));
        for (i, sums) in sums.chunks_exact(width).enumerate() {
            for c in 0..dv {
                all.out[(first + i, c)] = sums[c];
            }
            if let (Some(dout), Some(dq)) = (dout, &mut all.dq) {
                let delta: f64 = (0..dv).map(|c| dout[(i, c)] * sums[c]).sum();
                for c in 0..d {
                    dq[(first + i, c)] = scale * (sums[dv + d + c] - delta * sums[dv + c]);
                }
            }
        }
    }
    Ok(all)
}

/// What the weights `f_ij` of an engine are, where they are known pair by pair.
pub(crate) trait Weights: Sync {
    /// Turns the scores `scale q_i.k_j` of query `i` and the `keys` into the factors of `dout_i.v_j - delta_i` in their
    /// gradients, and `f`, the exact weights of these pairs (0 where masked), into the engine's.
    fn weigh(&self, i: usize, keys: &[usize], scores: &mut [f64], f: &mut [f64]);
}

/// What errors call them.
const KEY_GRADIENTS: &str = "gradients of drawn keys";

/// Gradients of some keys of a head, row after row.
#[derive(Debug, Clone)]
pub(crate) struct KeyGradients {
    /// `(keys, d)`.
    pub dk: Mat<f64>,
    /// `(keys, dv)`.
    pub dv: Mat<f64>,
    /// `(keys, 1)`.
    pub db: Mat<f64>,
}

impl KeyGradients {
    /// Adds those that other queries give.
    pub fn add(&mut self, other: &Self) {
        self.dk += &other.dk;
        self.dv += &other.dv;
        self.db += &other.db;
    }
}

/// What the queries give keys: `log_sums[i]` is `ln D_i`, and `delta[i]` is `dout_i.out_i`.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a, T> {
    pub dout: MatRef<'a, T>,
    pub delta: &'a [T],
    pub log_sums: &'a [f64],
}

/// Gradients of keys from all queries, exact but for the row sums, in parallel over queries; and with an engine's weights
/// in place of the exact ones, where they are given.
pub(crate) fn key_gradients<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    (causal, scale): (bool, f64),
    keys: &[usize],
    up: Queries<'_, T>,
    weights: Option<&dyn Weights>,
) -> Result<(KeyGradients, Option<KeyGradients>)> {
    let (n, d, dv, count) = (head.q.nrows(), head.q.ncols(), head.v.ncols(), keys.len());
    let (mut k, mut v) = (gather(head.k, keys)?, gather(head.v, keys)?);
    for (t, _) in keys.iter().enumerate().filter(|&(_, &j)| head.removed(j)) {
        k.row_mut(t).fill(0.0);
        v.row_mut(t).fill(0.0);
    }
    let bias: Vec<f64> = keys.iter().map(|&j| head.key_bias.map_or(0.0, |b| b[j].to_f64())).collect();
    let width = d + dv + 1;
    let kinds = 1 + usize::from(weights.is_some());
    let start = if causal { keys.first().copied().unwrap_or(0) / RANGE } else { 0 };
    let parts = (start..n.div_ceil(RANGE))
        .into_par_iter()
        .map(|range| {
            let mut sums = zeroed(kinds * width * count, KEY_GRADIENTS)?;
            let tile = || zeroed(TILE * count, "a tile of drawn keys");
            let mut tiles = [tile()?, tile()?, tile()?, tile()?];
            for i0 in (range * RANGE..n.min((range + 1) * RANGE)).step_by(TILE) {
                ctx.check()?;
                let bq = TILE.min(n - i0);
                let (q, dout) = (widened(head.q, i0..i0 + bq), widened(up.dout, i0..i0 + bq));
                let (q, dout) = (view(&q, bq, d), view(&dout, bq, dv));
                let [s, e, f, ds] = &mut tiles;
                product(view_mut(s, bq, count), q, k.transpose(), scale);
                product(view_mut(e, bq, count), dout, v.transpose(), 1.0);
                for i in 0..bq {
                    let row = i * count..(i + 1) * count;
                    let (log_sum, delta) = (up.log_sums[i0 + i], up.delta[i0 + i].to_f64());
                    let seen = if causal { keys.partition_point(|&j| j <= i0 + i) } else { count };
                    let (s, e, f) = (&s[row.clone()], &mut e[row.clone()], &mut f[row]);
                    vectorised(
                        #[inline(always)]
                        || {
                            for j in 0..count {
                                let x = (s[j] + bias[j] - log_sum).exp_nonpositive();
                                f[j] = if j < seen { x } else { 0.0 };
                                e[j] -= delta;
                            }
                        },
                    );
                }
                let (e, mut slope) = (&e[..bq * count], &mut copied(f, "a tile of drawn keys")?[..bq * count]);
                for (kind, sums) in sums.chunks_exact_mut(width * count).enumerate() {
                    if let (1, Some(weights)) = (kind, weights) {
                        let rows = s.chunks_exact_mut(count).zip(f.chunks_exact_mut(count));
                        for (i, (s, f)) in rows.enumerate().take(bq) {
                            weights.weigh(i0 + i, keys, s, f);
                        }
                        slope = &mut s[..bq * count];
                    }
                    for ((ds, slope), e) in ds.iter_mut().zip(&*slope).zip(e) {
                        *ds = slope.times(*e);
                    }
                    let (of_dk, rest) = sums.split_at_mut(d * count);
                    let (of_dv, of_db) = rest.split_at_mut(dv * count);
                    add_product(view_mut(of_dk, d, count), q.transpose(), view(ds, bq, count), scale);
                    add_product(view_mut(of_dv, dv, count), dout.transpose(), view(f, bq, count), 1.0);
                    for (f, e) in f.chunks_exact(count).zip(e.chunks_exact(count)) {
                        of_db.iter_mut().zip(f.iter().zip(e)).for_each(|(db, (f, e))| *db += f.times(*e));
                    }
                }
            }
            Ok(sums)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut sums = zeroed(kinds * width * count, KEY_GRADIENTS)?;
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
    }
    let kind = |sums: &[f64]| -> Result<KeyGradients> {
        let part =
            |first: usize, columns: usize| matrix(count, columns, KEY_GRADIENTS, |j, c| sums[(first + c) * count + j]);
        Ok(KeyGradients { dk: part(0, d)?, dv: part(d, dv)?, db: part(d + dv, 1)? })
    };
    let (exact, own) = sums.split_at(width * count);
    Ok((kind(exact)?, weights.map(|_| kind(own)).transpose()?))
}

/// Pairs of drawn queries and keys, row-major `(queries, keys)`, and what is known of the queries.
#[derive(Debug, Clone, Copy)]
pub struct Pairs<'a> {
    /// `s_ij`, with its bias; minus infinity where the query does not see the key.
    pub scores: &'a [f64],
    /// `dout_i.v_j`.
    pub upstream: &'a [f64],
    /// What each query stands for.
    pub weights: &'a [f64],
    /// `ln D_i` and `dout_i.out_i`, exact.
    pub exact: [&'a [f64]; 2],
    /// The same of the engine.
    pub own: [&'a [f64]; 2],
    /// `|c q_i|^2` and `|dout_i|^2`.
    pub squares: [&'a [f64]; 2],
}

/// What row sums of the engine, in place of exact ones, are expected to add to the squared errors of `[dk, dv, db]` of
/// each key, from queries that were not drawn: a row's part in a key's gradient changes by
///
/// ```text
/// t_ij = f_ij (dout_i.v_j - delta_i) - (the same with the engine's sums),   or   f_ij - (the same)  for dv
/// ```
///
/// and as parts of different queries have no common direction, their squares add up: `sum_i (w_i - 1) t_ij^2 |c q_i|^2`.
///
/// Added to `all`, which has an entry a key.
pub fn unseen_row_sums(pairs: &Pairs<'_>, all: &mut [[f64; 3]]) {
    let keys = all.len();
    for i in 0..pairs.weights.len() {
        let unseen = pairs.weights[i] - 1.0;
        let row = i * keys..(i + 1) * keys;
        let seen = |((_, s), _): &((&mut [f64; 3], &f64), &f64)| **s > f64::NEG_INFINITY; // what others hold may be anything
        for ((all, &s), &e) in all.iter_mut().zip(&pairs.scores[row.clone()]).zip(&pairs.upstream[row]).filter(seen) {
            let (f, own) = ((s - pairs.exact[0][i]).exp(), (s - pairs.own[0][i]).exp());
            let t = f * (e - pairs.exact[1][i]) - own * (e - pairs.own[1][i]);
            all[0] += unseen * t * t * pairs.squares[0][i];
            all[1] += unseen * (f - own).powi(2) * pairs.squares[1][i];
            all[2] += unseen * t * t;
        }
    }
}

/// Estimates `‖out - exact‖_F / ‖exact‖_F` over all heads together, from `samples` rows drawn at random (see the top of
/// this file), each computed exactly, in float64.
///
/// The standard error of the ratio's square is that of `sum e_i - R x_i` over `sum x_i`, less the finite-population
/// factor, and the interval is taken on its logarithm. All rows sampled: the interval is a point. Time `O(samples m (d +
/// dv))`.
pub fn measure_error<T: Real>(
    ctx: &Context,
    heads: &Heads<'_, T>,
    causal: bool,
    scale: f64,
    out: &[MatRef<'_, T>],
    samples: usize,
    seed: u64,
) -> Result<ErrorEstimate> {
    let Sizes { h, n, m, dv, .. } = heads.sizes()?;
    expect_views("out", out, h, n, dv)?;
    if causal && n != m {
        return Err(Error::Shape(format!("causal=True with n = {n} queries and m = {m} keys; expected n == m")));
    }
    if samples == 0 {
        return Err(Error::Argument("samples is 0; expected at least 1".into()));
    }
    if h * n == 0 {
        return Ok(ErrorEstimate { relative: 0.0, low: 0.0, high: 0.0, rows: 0 });
    }
    heads.check_finite()?;
    check_finite("out", out)?;
    let draw = Draw::new(h * n, samples, seed, &of_all_heads(heads, (causal, scale), out)?)?;
    let of_heads: Vec<&[usize]> = draw.rows.chunk_by(|a, b| a / n == b / n).collect();
    let exact = of_heads
        .into_par_iter()
        .map(|rows| {
            let own = collected(rows.iter().map(|i| i % n), DRAWN)?;
            exact_rows(ctx, &heads.head(rows[0] / n), (causal, scale), &own, None)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut rows = room(draw.rows.len(), DRAWN)?;
    rows.extend(exact.iter().flat_map(|part| part.out.row_iter()));
    let exact = matrix(rows.len(), dv, "exact rows", |i, c| rows[i][c])?;
    let given = |i: usize, c: usize| out[draw.rows[i] / n][(draw.rows[i] % n, c)].to_f64();
    let mut all = 0.0;
    for out in out {
        all += guides::squares(*out)?.iter().sum::<f64>();
    }
    Ok(draw.estimate(&squares(&exact, given)?, Some(all)))
}

/// What rows of all heads together are drawn by.
fn of_all_heads<T: Real>(heads: &Heads<'_, T>, options: (bool, f64), out: &[MatRef<'_, T>]) -> Result<Vec<Vec<f64>>> {
    let of_head = |i: usize| {
        let head = heads.head(i);
        let mut guides = Known::new(&head, options.1)?.of_queries(&head, options, None)?;
        guides.push(guides::squares(out[i])?);
        Ok(guides)
    };
    let mut all = Vec::new();
    for i in 0..out.len() {
        let own: Vec<Vec<f64>> = of_head(i)?;
        if i == 0 {
            for guide in &own {
                all.push(room(out.len() * guide.len(), "guides that rows are drawn by")?);
            }
        }
        all.iter_mut().zip(own).for_each(|(all, own)| all.extend(own));
    }
    Ok(all)
}

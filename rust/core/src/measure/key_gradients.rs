//! Gradients of some keys, from all queries.

use faer::{Mat, MatRef};
use rayon::prelude::*;

use super::TOKENS_A_TASK;
use super::exact_rows::{gather, widened};
use crate::context::Context;
use crate::error::Result;
use crate::memory::{copied, matrix, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{TILE, add_product, product, view, view_mut};
use crate::problem::heads::Head;

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
    /// `(keys, d_v)`.
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
    keys: &[usize],
    up: Queries<'_, T>,
    weights: Option<&dyn Weights>,
) -> Result<(KeyGradients, Option<KeyGradients>)> {
    let (n, m, d, d_v, count) = (head.n(), head.m(), head.d(), head.d_v(), keys.len());
    let (scale, mask, plain) = (head.scores.scale, head.mask, head.pairs.is_none() && head.scores.softcap.is_none());
    let (mut k, mut v) = (gather(head.k, keys)?, gather(head.v, keys)?);
    for (t, _) in keys.iter().enumerate().filter(|&(_, &j)| head.removed(j)) {
        k.row_mut(t).fill(0.0);
        v.row_mut(t).fill(0.0);
    }
    let bias: Vec<f64> = keys.iter().map(|&j| head.bias(j)).collect();
    let width = d + d_v + 1;
    let kinds = 1 + usize::from(weights.is_some());
    // Ranges of queries that come before any that sees a key.
    let sees_none =
        |range: &usize| keys.first().is_some_and(|&key| mask.seen((range + 1) * TOKENS_A_TASK - 1, m).end <= key);
    let start = (0..n / TOKENS_A_TASK).take_while(sees_none).count();
    let parts = (start..n.div_ceil(TOKENS_A_TASK))
        .into_par_iter()
        .map(|range| {
            let mut sums = zeroed(kinds * width * count, KEY_GRADIENTS)?;
            let tile = || zeroed(TILE * count, "a tile of drawn keys");
            let mut tiles = [tile()?, tile()?, tile()?, tile()?];
            let mut slopes = if head.scores.softcap.is_some() { tile()? } else { Vec::new() };
            for i0 in (range * TOKENS_A_TASK..n.min((range + 1) * TOKENS_A_TASK)).step_by(TILE) {
                ctx.check()?;
                let bq = TILE.min(n - i0);
                let (q, dout) = (widened(head.q, i0..i0 + bq), widened(up.dout, i0..i0 + bq));
                let (q, dout) = (view(&q, bq, d), view(&dout, bq, d_v));
                let [s, e, f, ds] = &mut tiles;
                product(view_mut(s, bq, count), q, k.transpose(), scale);
                product(view_mut(e, bq, count), dout, v.transpose(), 1.0);
                for i in 0..bq {
                    let row = i * count..(i + 1) * count;
                    let (log_sum, delta) = (up.log_sums[i0 + i], up.delta[i0 + i].to_f64());
                    let seen = mask.seen(i0 + i, m);
                    let [first, end] = [seen.start, seen.end].map(|key| keys.partition_point(|&j| j < key));
                    let (s, e, f) = (&s[row.clone()], &mut e[row.clone()], &mut f[row.clone()]);
                    if !plain || log_sum == f64::NEG_INFINITY {
                        for j in 0..count {
                            let score = head.score(i0 + i, keys[j], s[j]);
                            let counts = score > f64::NEG_INFINITY && log_sum > f64::NEG_INFINITY;
                            f[j] = if counts { (score - log_sum).exp() } else { 0.0 };
                            e[j] -= delta;
                        }
                        slopes
                            .get_mut(row)
                            .into_iter()
                            .flatten()
                            .zip(s)
                            .for_each(|(to, s)| *to = head.scores.cap_slope(*s));
                        continue;
                    }
                    vectorised(
                        #[inline(always)]
                        || {
                            for j in 0..count {
                                let x = (s[j] + bias[j] - log_sum).exp_nonpositive();
                                f[j] = if first <= j && j < end { x } else { 0.0 };
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
                    ds.iter_mut().zip(&slopes).for_each(|(ds, slope)| *ds *= slope);
                    let (of_dk, rest) = sums.split_at_mut(d * count);
                    let (of_dv, of_db) = rest.split_at_mut(d_v * count);
                    add_product(view_mut(of_dk, d, count), q.transpose(), view(ds, bq, count), scale);
                    add_product(view_mut(of_dv, d_v, count), dout.transpose(), view(f, bq, count), 1.0);
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
        Ok(KeyGradients { dk: part(0, d)?, dv: part(d, d_v)?, db: part(d + d_v, 1)? })
    };
    let (exact, of_engine) = sums.split_at(width * count);
    Ok((kind(exact)?, weights.map(|_| kind(of_engine)).transpose()?))
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
    pub engine: [&'a [f64]; 2],
    /// `|c q_i|^2` and `|dout_i|^2`.
    pub squares: [&'a [f64]; 2],
}

/// Adds to `all`, which has an entry for each key, what the engine's row sums in place of exact ones are expected to add to
/// the squared errors of `[dk, dv, db]`, from queries that were not drawn.
///
/// With the engine's sums the part of query `i` in the gradient of key `j` changes by
///
/// ```text
/// t_ij = f_ij (dout_i.v_j - delta_i) - (the same with the engine's sums)       for dk and db
/// t_ij = f_ij - (the same with the engine's sums)                              for dv
/// ```
///
/// times `c q_i`, 1 or `dout_i`. The parts of different queries have no common direction, so their squares add up: for dk to
/// `sum_i (w_i - 1) t_ij^2 |c q_i|^2`, where the drawn query `i` stands for `w_i - 1` others.
pub fn unseen_row_sums(pairs: &Pairs<'_>, all: &mut [[f64; 3]]) {
    let keys = all.len();
    for i in 0..pairs.weights.len() {
        let unseen = pairs.weights[i] - 1.0;
        let row = i * keys..(i + 1) * keys;
        let seen = |((_, s), _): &((&mut [f64; 3], &f64), &f64)| **s > f64::NEG_INFINITY; // what others hold may be anything
        for ((all, &s), &e) in all.iter_mut().zip(&pairs.scores[row.clone()]).zip(&pairs.upstream[row]).filter(seen) {
            let (f, f_engine) = ((s - pairs.exact[0][i]).exp(), (s - pairs.engine[0][i]).exp());
            let t = f * (e - pairs.exact[1][i]) - f_engine * (e - pairs.engine[1][i]);
            all[0] += unseen * t * t * pairs.squares[0][i];
            all[1] += unseen * (f - f_engine).powi(2) * pairs.squares[1][i];
            all[2] += unseen * t * t;
        }
    }
}

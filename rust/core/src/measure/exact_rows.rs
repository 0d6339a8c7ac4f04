//! Rows of attention that are computed exactly, in float64.

use std::ops::Range;

use faer::{Mat, MatRef};
use rayon::prelude::*;

use super::TOKENS_A_TASK;
use crate::context::Context;
use crate::engines::exact::Softmax;
use crate::error::Result;
use crate::memory::{matrix, room, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{TILE, product, view, view_mut};
use crate::problem::grads::RowFactors;
use crate::problem::heads::Head;
use crate::problem::scores::{add_bias, join_sink};
use crate::problem::state::State;

/// Exact attention of some queries of a head, row after row.
pub(crate) struct ExactRows {
    /// `(rows, d_v)`.
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
    rows: &[usize],
    dout: Option<&Mat<f64>>,
) -> Result<ExactRows> {
    let (m, d, d_v, scale) = (head.m(), head.d(), head.d_v(), head.scores.scale);
    let zeros = |columns| matrix(rows.len(), columns, "exact rows", |_, _| 0.0);
    let dq = dout.map(|_| zeros(d)).transpose()?;
    let mut all = ExactRows { out: zeros(d_v)?, dq, log_sums: room(rows.len(), "exact rows")? };
    for (first, rows) in rows.chunks(TILE).enumerate().map(|(i, rows)| (i * TILE, rows)) {
        let count = rows.len();
        let (q, dout) = (gather(head.q, rows)?, dout.map(|dout| dout.subrows(first, count)));
        // Weighted sums of [v, k], and of (dout.v) k.
        let width = d_v + if dout.is_some() { 2 * d } else { 0 };
        let seen = head.mask.seen_by(rows[0]..rows[count - 1] + 1, m);
        let (start, end) = (seen.start / TOKENS_A_TASK, seen.end);
        let parts = (start..end.div_ceil(TOKENS_A_TASK))
            .into_par_iter()
            .map(|range| {
                let mut softmax = Softmax::new(width)?;
                softmax.start(count);
                let mut upstream = zeroed(TILE * count, "a tile of exact rows")?;
                for j0 in (range * TOKENS_A_TASK..end.min((range + 1) * TOKENS_A_TASK)).step_by(TILE) {
                    ctx.check()?;
                    let bk = TILE.min(end - j0);
                    let (k, v) = (widened_keys(head, head.k, j0..j0 + bk), widened_keys(head, head.v, j0..j0 + bk));
                    let (k, v) = (view(&k, bk, d), view(&v, bk, d_v));
                    let s = &mut softmax.scores;
                    product(view_mut(s, bk, count), k, q.transpose(), scale);
                    let slopes: Option<Vec<f64>> = head
                        .scores
                        .softcap
                        .map(|_| s[..bk * count].iter().map(|&s| head.scores.cap_slope(s)).collect());
                    if head.is_plain() {
                        if let Some(bias) = head.key_bias {
                            add_bias(bias.subrows(j0, bk).iter().map(|b| b.to_f64()), count, s);
                        }
                    } else {
                        for (j, s) in s.chunks_exact_mut(count).enumerate().take(bk) {
                            s.iter_mut().zip(rows).for_each(|(s, &row)| *s = head.score(row, j0 + j, *s));
                        }
                    }
                    match dout {
                        None => softmax.add(bk, v),
                        Some(dout) => {
                            product(view_mut(&mut upstream, bk, count), v, dout.transpose(), 1.0);
                            // Factors stay with the weights, so that the last one has that of the cap too.
                            softmax.add_with(bk, &[(v, None), (k, slopes.as_deref()), (k, Some(&upstream))]);
                        }
                    }
                }
                Ok(softmax)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut parts = parts.into_iter();
        let mut softmax = match parts.next() {
            Some(softmax) => softmax,
            None => {
                // Rows that see no key.
                let mut softmax = Softmax::new(width)?;
                softmax.start(count);
                softmax
            }
        };
        parts.try_for_each(|part| softmax.merge(&part))?;
        let mut sums = zeroed(count * width, "a tile of exact rows")?;
        let (mut max, mut scales) = (vec![0.0; count], vec![0.0; count]);
        softmax.finish(head.index, |i| rows[i], |row| head.may_be_empty(row), &mut sums, &mut max, &mut scales)?;
        let mut log_sums: Vec<f64> = RowFactors { max: &max, scale: &scales }.log_sums().collect();
        if let Some(sink) = head.sink {
            for (log_sum, sums) in log_sums.iter_mut().zip(sums.chunks_exact_mut(width)) {
                let share = join_sink(log_sum, sink);
                sums.iter_mut().for_each(|sum| *sum *= share);
            }
        }
        all.log_sums.extend(log_sums);
        for (i, sums) in sums.chunks_exact(width).enumerate() {
            for c in 0..d_v {
                all.out[(first + i, c)] = sums[c];
            }
            if let (Some(dout), Some(dq)) = (dout, &mut all.dq) {
                let delta: f64 = (0..d_v).map(|c| dout[(i, c)] * sums[c]).sum();
                for c in 0..d {
                    dq[(first + i, c)] = scale * (sums[d_v + d + c] - delta * sums[d_v + c]);
                }
            }
        }
    }
    Ok(all)
}

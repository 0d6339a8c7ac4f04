//! A head's pass without a mask: one state of all keys, which every query is applied to; backward also one state of all
//! queries, which every key is applied to. The equations are those of [`pass`](super::pass).

use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::features::{Purpose, Side, TokenRows, Weightings};
use super::floor::floors;
use super::pass::Pass;
use super::shifts::live_keys;
use super::state::{Growing, LARGEST_STATE, LinearState, Weighting};
use crate::error::Result;
use crate::memory::{collected, made, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{store_transposed, tiles, view};
use crate::problem::grads::{HeadGrads, Upstream};
use crate::problem::state::State;

/// Tiles that share one set of buffers at least: new buffers cost as much as a tile.
const TILES_A_SCRATCH: usize = 8;
/// Numbers in all partial states of a head together, where eight of them take no more than 1 GiB.
const PARTIAL_STATES: usize = 1 << 23;

/// Writes `out` and the row factors, and returns the state of all keys.
///
/// Time `O((n + m) r (d_v + 1))` and what `r` features of `n + m` tokens cost.
pub(crate) fn forward<T: Real>(
    pass: &Pass<'_, T>,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<LinearState> {
    let (e, d_v, m) = (pass.tokens.e(), pass.tokens.head.d_v(), pass.tokens.head.m());
    let purpose = Purpose::Weights;
    let of_keys = key_state(pass, purpose)?;
    let state = pass.features.weighting()?.weigh(&of_keys.sum, of_keys.r)?;
    let state = view(&state, e, of_keys.r); // (e, r)
    let len = pass.tile_len(purpose);
    let floors = floors(pass, 1, |_| 0..m)?;
    row_max.fill(T::ZERO);
    (out.par_chunks_mut(len * d_v), row_scale.par_chunks_mut(len))
        .into_par_iter()
        .enumerate()
        .with_min_len(TILES_A_SCRATCH)
        .try_for_each_init(
            || pass.tile(purpose, false),
            |tile, (i, (out, scale))| {
                let tile = made(tile)?;
                pass.ctx.check()?;
                let (start, len) = (i * len, scale.len());
                pass.tokens.load_queries(start, len, &mut tile.x);
                pass.features.apply(Side::Queries, purpose, state, tile, len);
                for (t, scale) in scale.iter_mut().enumerate() {
                    let denominator = tile.out[d_v * len + t];
                    *scale = pass.inverse(denominator, start + t)?;
                    if let Some(floors) = &floors {
                        floors[0].check(pass, of_keys.level, denominator, start + t)?;
                    }
                }
                store_transposed(&tile.out, len, d_v, out, |t| scale[t]);
                Ok(())
            },
        )?;
    Ok(of_keys)
}

/// Adds the gradients, from the state of all keys where the forward pass has left it.
pub(crate) fn backward<T: Real>(
    pass: &Pass<'_, T>,
    of_keys: Option<&LinearState>,
    up: Upstream<'_, T>,
    grads: HeadGrads<'_, T>,
) -> Result<()> {
    let HeadGrads { dq, dk, dv, dkey_bias } = grads;
    query_gradients(pass, of_keys, &up, dq)?;
    key_gradients(pass, &up, HeadGrads { dq: &mut [], dk, dv, dkey_bias })
}

/// Writes `dq_i = (1/D_i) J_φ(q_i)^T W S^T [dout_i; -delta_i]`.
fn query_gradients<T: Real>(
    pass: &Pass<'_, T>,
    of_keys: Option<&LinearState>,
    up: &Upstream<'_, T>,
    dq: &mut [T],
) -> Result<()> {
    let (purpose, d, e) = (Purpose::Gradient, pass.tokens.head.d(), pass.tokens.e());
    let (len, r) = (pass.tile_len(purpose), pass.features.rank(purpose));
    let weighting = pass.features.backward_weightings(Side::Keys)?.gradient;
    let state = match of_keys.filter(|state| state.r == r && state.sum.len() == e * r) {
        Some(state) => weighting.weigh(&state.sum, r),
        None => weighting.weigh(&key_state(pass, purpose)?.sum, r),
    }?;
    let state = view(&state, e, r); // (e, r)
    dq.par_chunks_mut(len * d).enumerate().with_min_len(TILES_A_SCRATCH).try_for_each_init(
        || pass.tile(purpose, true),
        |tile, (i, dq)| {
            let tile = made(tile)?;
            pass.ctx.check()?;
            let (start, len) = (i * len, dq.len() / d);
            pass.tokens.load_queries(start, len, &mut tile.x);
            pass.tokens.load_upstream(up, start, len, &mut tile.values);
            pass.features.pull_back(Side::Queries, purpose, state, tile, len);
            store_transposed(&tile.dx, len, d, dq, |t| up.rows.scale[start + t]);
            Ok(())
        },
    )
}

/// Adds dk, dv and db, by way of the state of all queries.
fn key_gradients<T: Real>(pass: &Pass<'_, T>, up: &Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
    let HeadGrads { dk, dv, dkey_bias, .. } = grads;
    let (purpose, d, e) = (Purpose::Gradient, pass.tokens.head.d(), pass.tokens.e());
    let (n, m, d_v) = (pass.tokens.head.n(), pass.tokens.head.m(), pass.tokens.head.d_v());
    let (len, r) = (pass.tile_len(purpose), pass.features.rank(purpose));
    let level = pass.tokens.level(0..m);
    let of_queries = whole_state(pass, n, purpose, 0.0, |state, queries, rows| {
        pass.add_queries(state, up, queries, |i| up.rows.scale[i], rows)
    })?;
    let Weightings { gradient, weights } = pass.features.backward_weightings(Side::Queries)?;
    let state = gradient.weigh(&of_queries.sum, r)?;
    let for_gradient = view(&state, e, r);
    let second = weights.map(|weights| Weighting::Diagonal(weights).weigh(&of_queries.sum, r)).transpose()?;
    drop(of_queries);
    let for_values: MatRef<'_, T> = second.as_ref().map_or(for_gradient, |second| view(second, e, second.len() / e));
    let mut db = optional_chunks(dkey_bias, len, m.div_ceil(len))?;
    (dk.par_chunks_mut(len * d), dv.par_chunks_mut(len * d_v), db.par_iter_mut())
        .into_par_iter()
        .enumerate()
        .with_min_len(TILES_A_SCRATCH)
        .try_for_each_init(
            || pass.tile(purpose, true),
            |tile, (j, (dk, dv, db))| {
                let grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias: db.as_deref_mut() };
                pass.add_key_gradients(j * len, level, for_gradient, for_values, made(tile)?, grads)
            },
        )
}

/// Adds the gradients of a pass whose shifts are the means of its own tokens, and which are differentiated through those
/// too: see [`shifts`](super::shifts).
pub(crate) fn backward_through_means<T: Real>(
    pass: &Pass<'_, T>,
    of_keys: Option<&LinearState>,
    up: Upstream<'_, T>,
    grads: HeadGrads<'_, T>,
) -> Result<()> {
    let head = pass.tokens.head;
    let (n, m, d, d_v, scale) = (head.n(), head.m(), head.d(), head.d_v(), head.scores.scale);
    let beta = &pass.tokens.shifts.key;
    let zeros = |len: usize| zeroed(len, "gradients of shifted keys");
    let (mut dk, mut dv, mut db) = (zeros(m * d)?, zeros(m * d_v)?, zeros(m)?);
    let shifted = HeadGrads { dq: &mut *grads.dq, dk: &mut dk, dv: &mut dv, dkey_bias: Some(&mut db) };
    backward(pass, of_keys, up, shifted)?;
    let live = live_keys(head, m)?;
    let mut dalpha = column_sums(grads.dq, d, 0..n);
    let mut dbeta = column_sums(&dk, d, live.iter().copied());
    for (c, (dalpha, dbeta)) in dalpha.iter_mut().zip(&mut dbeta).enumerate() {
        let of_key = |&j: &usize| db[j].to_f64() * (head.k[(j, c)].to_f64() - beta[c].to_f64());
        let through_bias: f64 = live.iter().map(of_key).sum();
        // dα / n and dβ / m': what each query, and each key, gets.
        *dalpha = (scale * through_bias - *dalpha) / n as f64;
        *dbeta = -*dbeta / live.len() as f64;
    }
    add_to_rows(grads.dq, &dalpha, 0..n);
    add_to_rows(&mut dk, &dbeta, live.into_iter());
    let add = |total: &mut [T], part: &[T]| total.iter_mut().zip(part).for_each(|(total, &x)| *total += x);
    add(grads.dk, &dk);
    add(grads.dv, &dv);
    if let Some(total) = grads.dkey_bias {
        add(total, &db);
    }
    Ok(())
}

/// The state of all keys, relative to their level.
fn key_state<T: Real>(pass: &Pass<'_, T>, purpose: Purpose) -> Result<LinearState> {
    let m = pass.tokens.head.m();
    let level = pass.tokens.level(0..m);
    whole_state(pass, m, purpose, level, |state, keys, rows| pass.add_keys(purpose, state, keys, level, rows))
}

/// The state of all tokens: those of fixed ranges, merged in order. `add_tile` adds a tile, `(start, len)`, to a state.
fn whole_state<T: Real>(
    pass: &Pass<'_, T>,
    tokens: usize,
    purpose: Purpose,
    level: f64,
    add_tile: impl Fn((&mut [T], Accum), (usize, usize), &mut TokenRows<T>) -> Result<()> + Sync,
) -> Result<LinearState> {
    let (e, r, tile) = (pass.tokens.e(), pass.features.rank(purpose), pass.tile_len(purpose));
    let part = tokens_a_part(tokens, tile, e * r);
    let parts: Vec<LinearState> = (0..tokens.div_ceil(part))
        .into_par_iter()
        .map_init(
            || pass.token_rows(purpose),
            |rows, p| {
                let rows = made(rows)?;
                let mut state = Growing::new(level, e, r)?;
                for (start, len) in tiles(p * part..tokens.min((p + 1) * part), tile) {
                    add_tile(state.tile(len), (start, len), rows)?;
                }
                Ok(state.finish())
            },
        )
        .collect::<Result<_>>()?;
    let mut parts = parts.into_iter();
    let mut whole = parts.next().map_or_else(|| LinearState::new(level, e, r), Ok)?;
    parts.try_for_each(|part| whole.merge(&part))?;
    Ok(whole)
}

/// Tokens of one part of a state that is summed in parallel, a multiple of `step`. There are up to 32 parts, fewer where
/// states of so many `numbers` would take too much memory together.
fn tokens_a_part(tokens: usize, step: usize, numbers: usize) -> usize {
    let parts = (PARTIAL_STATES / numbers).clamp(8, 32).min((LARGEST_STATE / numbers).max(1));
    let parts = 1 << parts.ilog2();
    tokens.div_ceil(parts).next_multiple_of(step).max(step)
}

/// `x` in chunks of `len`, or `count` times `None`.
fn optional_chunks<T>(x: Option<&mut [T]>, len: usize, count: usize) -> Result<Vec<Option<&mut [T]>>> {
    match x {
        Some(x) => collected(x.chunks_mut(len).map(Some), "tiles of a gradient"),
        None => collected((0..count).map(|_| None), "tiles of a gradient"),
    }
}

/// The sum of some of the rows of `x`, `(.., width)`.
fn column_sums<T: Real>(x: &[T], width: usize, rows: impl Iterator<Item = usize>) -> Vec<f64> {
    let mut sums = vec![0.0; width];
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(&x[row * width..]) {
            *sum += x.to_f64();
        }
    }
    sums
}

/// Adds `addend` to some of the rows of `x`.
fn add_to_rows<T: Real>(x: &mut [T], addend: &[f64], rows: impl Iterator<Item = usize>) {
    for row in rows {
        for (x, &addend) in x[row * addend.len()..].iter_mut().zip(addend) {
            *x += T::of(addend);
        }
    }
}

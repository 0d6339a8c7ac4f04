//! A head's pass over its tokens, for any [feature maps](super::features) `φ` of queries and `χ` of keys with `A_ij ≈
//! φ(q_i)^T W χ(k_j)`.
//!
//! With key weights `w_j = e^{b_j - level}` (a common factor of numerators and denominators; the level is the largest
//! bias):
//!
//! ```text
//! S = sum_j [w_j v_j, w_j]^T χ(k_j)^T       (d_v + 1, r)
//! [N_i, D_i] = S W^T φ(q_i)        out_i = N_i / D_i
//! ```
//!
//! Backward. Let `f_ij` be the low-rank weights over `D_i`, `delta_i = dout_i.out_i` and `e_ij = dout_i.v_j - delta_i`.
//! The gradient of the scores is `f_ij e_ij`, or what the engine puts in its place, so that with the state `R = sum_i
//! [dout_i, -delta_i]^T φ(q_i)^T / D_i`
//!
//! ```text
//! dq_i = (1/D_i) J_φ(q_i)^T W S^T [dout_i; -delta_i]
//! dk_j = w_j J_χ(k_j)^T W^T R^T [v_j; 1]     [dv_j, h_j] = w_j R W χ(k_j)       db_j = dv_j.v_j + h_j
//! ```
//!
//! The gradient may go through features and weights of its own (the *potential*: see `engines/polynomial.rs`). Queries and
//! keys are shifted: see [`shifts`](super::shifts).

use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::features::{FeatureMap, Purpose, Side, Tile, TokenRows, Weightings};
use super::floor::{Floor, floors};
use super::near::Nearby;
use super::shifts::{Relative, Shifted, Shifts, biases, live_keys};
use super::state::{Growing, LARGEST_STATE, LinearState, Weighting};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::memory::{collected, collected_in_parallel, made, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{store_transposed, tiles, view, view_mut};
use crate::problem::grads::{HeadGrads, RowFactors, Upstream};
use crate::problem::heads::Head;
use crate::problem::scores::NO_KEY_REMEDY;
use crate::problem::state::State;

/// Numbers in a tile of features that stay in a core's second-level cache.
const TILE_NUMBERS: usize = 1 << 17;
/// Tiles that share one set of buffers at least: new buffers cost as much as a tile.
const TILES_A_SCRATCH: usize = 8;
/// Numbers in all partial states of a head together, where eight of them take no more than 1 GiB.
const PARTIAL_STATES: usize = 1 << 23;

/// The far keys of a query: their weights are its features' times `scale`, relative to `e^level`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FarLevel {
    pub level: f64,
    pub scale: f64,
}

/// One head's pass, with everything that its tiles share.
pub(crate) struct Pass<'a, T> {
    pub ctx: &'a Context,
    pub tokens: Shifted<'a, T>,
    pub features: &'a dyn FeatureMap<T>,
    /// Under a causal mask.
    pub near: Nearby<'a>,
}

impl<'a, T: Real> Pass<'a, T> {
    pub fn new(
        ctx: &'a Context,
        head: &'a Head<'a, T>,
        features: &'a dyn FeatureMap<T>,
        shifts: &'a Shifts<T>,
        near: Nearby<'a>,
    ) -> Result<Self> {
        Ok(Self { ctx, tokens: Shifted::new(head, shifts, features.half(Side::Keys))?, features, near })
    }

    /// What the low-rank weights of a query leave out, as a logarithm: they are those of `c q'.k' + b'` times `e` to
    /// minus this.
    pub fn row_level(&self, i: usize) -> f64 {
        match self.features.half(Side::Queries) {
            0.0 => 0.0,
            half => half * self.tokens.shifts.query(self.tokens.head, i).map(|q| q * q).sum::<f64>(),
        }
    }

    /// What turns weights relative to `level` into entries of `f`, for each query.
    pub fn far_factor(&self, up: &Upstream<'_, T>, level: f64) -> impl Fn(usize) -> T {
        let (rows, floor) = (up.rows, self.features.has_floor());
        move |i| {
            if floor {
                T::of(rows.scale[i].to_f64() * (level + self.row_level(i) - rows.max[i].to_f64()).exp())
            } else {
                rows.scale[i] * T::of(level - rows.max[i].to_f64()).exp_nonpositive()
            }
        }
    }

    /// The far keys' part of each of the queries from `start` on, from their sums of low-rank weights relative to
    /// `level`.
    pub fn far_levels(
        &self,
        level: f64,
        floor: Option<&Floor>,
        start: usize,
        denominators: &[T],
        far: &mut Vec<FarLevel>,
    ) -> Result<()> {
        far.clear();
        for (t, &denominator) in denominators.iter().enumerate() {
            far.push(match floor {
                None => FarLevel { level, scale: 1.0 },
                Some(floor) => FarLevel {
                    level: floor.check(self, level, denominator, start + t)?,
                    scale: 1.0 / denominator.to_f64(),
                },
            });
        }
        Ok(())
    }

    /// Tokens a tile.
    pub fn tile_len(&self, purpose: Purpose) -> usize {
        let fit = TILE_NUMBERS / self.features.formed_at_once(purpose);
        // An odd multiple of 16: strides of tiles are no powers of two, whose rows would all share a few places in the
        // cache.
        (fit / 32 * 32).clamp(64, 128) - 16
    }

    /// Buffers for tiles, for a pullback too where that is asked for.
    pub fn tile(&self, purpose: Purpose, pullback: bool) -> Result<Tile<T>> {
        let widths = (self.tokens.head.d(), self.tokens.e());
        Tile::new(self.features, purpose, widths, self.tile_len(purpose), pullback)
    }

    /// Buffers for tiles of tokens that are added to states.
    pub fn token_rows(&self, purpose: Purpose) -> Result<TokenRows<T>> {
        TokenRows::new(self.features, purpose, self.tokens.head.d(), self.tokens.e(), self.tile_len(purpose))
    }

    /// Adds `[w_j v_j, w_j]^T χ(k_j)^T` of some keys, no more than a tile, to a state `(e, r)`, or replaces it. The weights
    /// are relative to `level`.
    pub fn add_keys(
        &self,
        purpose: Purpose,
        (state, accum): (&mut [T], Accum),
        (start, len): (usize, usize),
        level: f64,
        rows: &mut TokenRows<T>,
    ) -> Result<()> {
        self.ctx.check()?;
        self.tokens.load_key_rows(start, len, level, rows);
        let state = view_mut(state, self.tokens.e(), self.features.rank(purpose));
        self.features.add_outer(Side::Keys, purpose, rows, len, state, accum);
        Ok(())
    }

    /// Adds `[dout_i, -delta_i]^T φ(q_i)^T factor(i)` of some queries, as [`add_keys`](Self::add_keys) for gradients.
    pub fn add_queries(
        &self,
        (state, accum): (&mut [T], Accum),
        up: &Upstream<'_, T>,
        (start, len): (usize, usize),
        factor: impl Fn(usize) -> T,
        rows: &mut TokenRows<T>,
    ) -> Result<()> {
        self.ctx.check()?;
        self.tokens.load_query_rows(up, start, len, factor, rows);
        let state = view_mut(state, self.tokens.e(), self.features.rank(Purpose::Gradient));
        self.features.add_outer(Side::Queries, Purpose::Gradient, rows, len, state, accum);
        Ok(())
    }

    /// The state of all tokens: those of fixed ranges, merged in order.
    fn whole_state(
        &self,
        tokens: usize,
        purpose: Purpose,
        level: f64,
        add_tile: impl Fn((&mut [T], Accum), (usize, usize), &mut TokenRows<T>) -> Result<()> + Sync,
    ) -> Result<LinearState> {
        let (e, r, tile) = (self.tokens.e(), self.features.rank(purpose), self.tile_len(purpose));
        let part = self.partition(tokens, tile, e * r);
        let parts: Vec<LinearState> = (0..tokens.div_ceil(part))
            .into_par_iter()
            .map_init(
                || self.token_rows(purpose),
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

    /// Tokens of one unit of parallel work, a multiple of `step`: as many units as memory for their states, of so many
    /// numbers each, allows, up to 32.
    fn partition(&self, tokens: usize, step: usize, state: usize) -> usize {
        let units = (PARTIAL_STATES / state).clamp(8, 32).min((LARGEST_STATE / state).max(1));
        let units = 1 << units.ilog2();
        tokens.div_ceil(units).next_multiple_of(step).max(step)
    }

    fn key_state(&self, purpose: Purpose) -> Result<LinearState> {
        let m = self.tokens.head.m();
        let level = self.tokens.level(0..m);
        self.whole_state(m, purpose, level, |state, keys, rows| self.add_keys(purpose, state, keys, level, rows))
    }

    /// Writes `out` and the row factors, and returns the state of all keys.
    pub fn forward(&self, out: &mut [T], row_max: &mut [T], row_scale: &mut [T]) -> Result<LinearState> {
        let (e, d_v, m) = (self.tokens.e(), self.tokens.head.d_v(), self.tokens.head.m());
        let purpose = Purpose::Weights;
        let of_keys = self.key_state(purpose)?;
        let state = self.features.weighting()?.weigh(&of_keys.sum, of_keys.r)?;
        let state = view(&state, e, of_keys.r);
        let len = self.tile_len(purpose);
        let floors = floors(self, 1, |_| 0..m)?;
        row_max.fill(T::ZERO);
        (out.par_chunks_mut(len * d_v), row_scale.par_chunks_mut(len))
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || self.tile(purpose, false),
                |tile, (i, (out, scale))| {
                    let tile = made(tile)?;
                    self.ctx.check()?;
                    let (start, len) = (i * len, scale.len());
                    self.tokens.load_queries(start, len, &mut tile.x);
                    self.features.apply(Side::Queries, purpose, state, tile, len);
                    for (t, scale) in scale.iter_mut().enumerate() {
                        let denominator = tile.out[d_v * len + t];
                        *scale = self.inverse(denominator, start + t)?;
                        if let Some(floors) = &floors {
                            floors[0].check(self, of_keys.level, denominator, start + t)?;
                        }
                    }
                    store_transposed(&tile.out, len, d_v, out, |t| scale[t]);
                    Ok(())
                },
            )?;
        Ok(of_keys)
    }

    /// `1/D_i`, or what to do about a denominator that has none.
    pub fn inverse(&self, denominator: T, row: usize) -> Result<T> {
        if denominator > T::ZERO && denominator.finite() && (T::ONE / denominator).finite() {
            return Ok(T::ONE / denominator);
        }
        let head = self.tokens.head;
        if denominator == T::ZERO && head.key_bias.is_some() {
            return Err(Error::Denominator(format!(
                "row {row} of head {} has no key to attend to: key_bias is -inf, or far below its maximum, for every \
                 key that it may see; {NO_KEY_REMEDY}",
                head.index
            )));
        }
        let remedy = self.features.remedy();
        Err(Error::Denominator(if denominator.finite() && denominator <= T::ZERO {
            format!(
                "row {row} of head {} has the denominator {:.3e}, which is not positive: {remedy}",
                head.index,
                denominator.to_f64()
            )
        } else {
            format!("row {row} of head {} has a denominator that overflows or underflows: {remedy}", head.index)
        }))
    }

    /// Adds the gradients, from the state of all keys where the forward pass has left it.
    pub fn backward(&self, of_keys: Option<&LinearState>, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
        let HeadGrads { dq, dk, dv, dkey_bias } = grads;
        let (purpose, d, e) = (Purpose::Gradient, self.tokens.head.d(), self.tokens.e());
        let (n, m, d_v) = (self.tokens.head.n(), self.tokens.head.m(), self.tokens.head.d_v());
        let (len, r) = (self.tile_len(purpose), self.features.rank(purpose));
        let level = self.tokens.level(0..m);

        let weighting = self.features.backward_weightings(Side::Keys)?.gradient;
        let state = match of_keys.filter(|state| state.r == r && state.sum.len() == e * r) {
            Some(state) => weighting.weigh(&state.sum, r),
            None => weighting.weigh(&self.key_state(purpose)?.sum, r),
        }?;
        let keys = view(&state, e, r);
        dq.par_chunks_mut(len * d).enumerate().with_min_len(TILES_A_SCRATCH).try_for_each_init(
            || self.tile(purpose, true),
            |tile, (i, dq)| {
                let tile = made(tile)?;
                self.ctx.check()?;
                let (start, len) = (i * len, dq.len() / d);
                self.tokens.load_queries(start, len, &mut tile.x);
                self.tokens.load_upstream(&up, start, len, &mut tile.values);
                self.features.pull_back(Side::Queries, purpose, keys, tile, len);
                store_transposed(&tile.dx, len, d, dq, |t| up.rows.scale[start + t]);
                Ok(())
            },
        )?;
        drop(state);

        let of_queries = self.whole_state(n, purpose, 0.0, |state, queries, rows| {
            self.add_queries(state, &up, queries, |i| up.rows.scale[i], rows)
        })?;
        let Weightings { gradient, weights } = self.features.backward_weightings(Side::Queries)?;
        let state = gradient.weigh(&of_queries.sum, r)?;
        let for_gradient = view(&state, e, r);
        let second = weights.map(|weights| Weighting::Diagonal(weights).weigh(&of_queries.sum, r)).transpose()?;
        drop(of_queries);
        let for_values = second.as_ref().map_or(for_gradient, |second| view(second, e, second.len() / e));
        let mut db = optional_chunks(dkey_bias, len, m.div_ceil(len))?;
        (dk.par_chunks_mut(len * d), dv.par_chunks_mut(len * d_v), db.par_iter_mut())
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || self.tile(purpose, true),
                |tile, (j, (dk, dv, db))| {
                    let grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias: db.as_deref_mut() };
                    self.key_gradients(j * len, level, for_gradient, for_values, made(tile)?, grads)
                },
            )
    }

    /// Adds dk, dv and db of the keys from `start` on, no more than a tile, from the query state weighted for the gradient
    /// and for the values. `level` is what the keys' weights are relative to, in the state too.
    pub fn key_gradients(
        &self,
        start: usize,
        level: f64,
        for_gradient: MatRef<'_, T>,
        for_values: MatRef<'_, T>,
        tile: &mut Tile<T>,
        mut grads: HeadGrads<'_, T>,
    ) -> Result<()> {
        self.ctx.check()?;
        let (d, d_v, scale) = (self.tokens.head.d(), self.tokens.head.d_v(), T::of(self.tokens.head.scores.scale));
        let len = grads.dk.len() / d;
        self.tokens.load_keys(start, len, &mut tile.x);
        self.tokens.load_values(start, len, &mut tile.values);
        self.features.pull_back(Side::Keys, Purpose::Gradient, for_gradient, tile, len);
        self.features.apply(Side::Keys, Purpose::Weights, for_values, tile, len);
        let Tile { values, out, dx, .. } = tile;
        let alpha = &self.tokens.shifts.query;
        for t in 0..len {
            let w = self.tokens.weight(start + t, level);
            for c in 0..d_v {
                grads.dv[t * d_v + c] += w * out[c * len + t];
            }
            for c in 0..d {
                grads.dk[t * d + c] += w * dx[c * len + t];
            }
            if grads.dkey_bias.is_some() || !alpha.is_empty() {
                let db = w * (0..=d_v).map(|c| out[c * len + t] * values[c * len + t]).sum::<T>();
                for (dk, &alpha) in grads.dk[t * d..(t + 1) * d].iter_mut().zip(alpha) {
                    *dk += scale * db * alpha;
                }
                if let Some(grad) = &mut grads.dkey_bias {
                    grad[t] += db;
                }
            }
        }
        Ok(())
    }

    /// The gradients of a pass that is differentiated through the means too: see [`shifts`](super::shifts).
    pub fn backward_through_means(
        &self,
        of_keys: Option<&LinearState>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
    ) -> Result<()> {
        let head = self.tokens.head;
        let (n, m, d, d_v) = (head.n(), head.m(), head.d(), head.d_v());
        let beta = &self.tokens.shifts.key;
        let zeros = |len: usize| zeroed(len, "gradients of shifted keys");
        let (mut dk, mut dv, mut db) = (zeros(m * d)?, zeros(m * d_v)?, zeros(m)?);
        let shifted = HeadGrads { dq: &mut *grads.dq, dk: &mut dk, dv: &mut dv, dkey_bias: Some(&mut db) };
        self.backward(of_keys, up, shifted)?;
        let live = live_keys(head, m)?;
        let mut dalpha = column_sums(grads.dq, d, 0..n);
        let mut dbeta = column_sums(&dk, d, live.iter().copied());
        for (col, (dalpha, dbeta)) in dalpha.iter_mut().zip(&mut dbeta).enumerate() {
            let of_key = |&j: &usize| db[j].to_f64() * (head.k[(j, col)].to_f64() - beta[col].to_f64());
            let through_bias: f64 = live.iter().map(of_key).sum();
            *dalpha = (head.scores.scale * through_bias - *dalpha) / n as f64;
            *dbeta = -*dbeta / live.len() as f64;
        }
        add_to_rows(grads.dq, &dalpha, 0..n);
        add_to_rows(&mut dk, &dbeta, live.into_iter());
        let into = |total: &mut [T], part: &[T]| total.iter_mut().zip(part).for_each(|(total, &x)| *total += x);
        into(grads.dk, &dk);
        into(grads.dv, &dv);
        if let Some(total) = grads.dkey_bias {
            into(total, &db);
        }
        Ok(())
    }
}

/// `ln sum_j A_ij` of every query in the original scores, from the row factors that a pass with these shifts and features
/// left.
pub(crate) fn log_row_sums<T: Real>(
    head: &Head<'_, T>,
    shifts: &Shifts<T>,
    features: Option<&dyn FeatureMap<T>>,
    rows: RowFactors<'_, T>,
) -> Result<Vec<f64>> {
    let half = |side: Side| features.map_or(0.0, |features| features.half(side));
    let (full, query_half) = (head.scores.mask.is_none(), half(Side::Queries));
    // Without a mask the forward pass leaves the level of the keys, and of a query's landmarks, out.
    let level = match biases(head, Relative::under(&head.scores.mask), shifts, half(Side::Keys))? {
        Some(biases) if full => biases.base + biases.of_keys.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        _ => 0.0,
    };
    let by = |shift: &[T], c: usize| shift.get(c).map_or(0.0, |b| b.to_f64());
    let sum = |i: usize| {
        let mut sum = rows.max[i].to_f64() - rows.scale[i].to_f64().ln() + level;
        for (c, q) in head.q.row(i).iter().enumerate() {
            let q = q.to_f64();
            sum += head.scores.scale * q * by(&shifts.key, c);
            if full {
                sum += query_half * (q - by(&shifts.query, c)).powi(2);
            }
        }
        sum
    };
    collected_in_parallel((0..rows.max.len()).into_par_iter().map(sum), "logarithms of row sums")
}

/// `x` in chunks of `len`, or as many `None`.
fn optional_chunks<T>(x: Option<&mut [T]>, len: usize, count: usize) -> Result<Vec<Option<&mut [T]>>> {
    match x {
        Some(x) => collected(x.chunks_mut(len).map(Some), "tiles of a gradient"),
        None => collected((0..count).map(|_| None), "tiles of a gradient"),
    }
}

/// The sum of some rows.
fn column_sums<T: Real>(x: &[T], width: usize, rows: impl Iterator<Item = usize>) -> Vec<f64> {
    let mut sums = vec![0.0; width];
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(&x[row * width..]) {
            *sum += x.to_f64();
        }
    }
    sums
}

/// Adds the same to some rows.
fn add_to_rows<T: Real>(x: &mut [T], by: &[f64], rows: impl Iterator<Item = usize>) {
    for row in rows {
        for (x, &by) in x[row * by.len()..].iter_mut().zip(by) {
            *x += T::of(by);
        }
    }
}

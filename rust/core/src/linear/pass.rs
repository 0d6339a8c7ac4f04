//! What the low-rank engines share: a head's pass over its tokens, for any feature maps `φ` of queries and `χ` of keys
//! with `A_ij ≈ φ(q_i)^T W χ(k_j)`, and the shifts of queries and keys.
//!
//! With key weights `w_j = e^{b_j - level}` (a common factor of numerators and denominators; the level is the largest
//! bias):
//!
//! ```text
//! S = sum_j [w_j v_j, w_j]^T χ(k_j)^T       (dv + 1, r)
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
//! The gradient may go through features and weights of its own (the *potential*: see `polynomial.rs`).
//!
//! Shifts. With `q' = q - α`, `k' = k - β` and the bias `b'_j = b_j + c α.k'_j`, `c q'.k' + b'` differs from `c q.k +
//! b` by a constant of the row, which exact attention does not see. Back from the primed gradients: `dk_j = dk'_j + c
//! db_j α`, which for constant shifts, and for the closed form, is all. Where `α` and `β` are the means of the call, `β`
//! that of the `m'` keys that no bias removes, the consistent gradient also goes through them:
//!
//! ```text
//! dα = -sum_i dq'_i + c sum_j db_j k'_j      dq_i = dq'_i + dα / n
//! dβ = -sum_j (dk'_j + c db_j α)             dk_j = dk'_j + c db_j α + dβ / m'
//! ```
//!
//! the last for those `m'` keys alone: a removed key gives nothing and gets nothing.
//!
//! Sums over tokens are added up in float64: see `state.rs`.

use std::ops::Range;

use faer::{Accum, MatRef};
use rayon::prelude::*;

use crate::attention::{Constants, Head, HeadGrads, Upstream};
use crate::context::Context;
use crate::engines::exact::NO_KEY_REMEDY;
use crate::engines::landmark::Landmarks;
use crate::engines::polynomial;
use crate::error::{Error, Result};
use crate::linear::monomials::{Monomials, PIECE};
use crate::linear::state::{STATE, State, Tokens, Weighting};
use crate::memory::{collected, collected_in_parallel, made, room, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{load_rows, load_transposed, multiply, product, store_transposed, view, view_mut, widen};
use crate::spec::Diagonal;

/// What is subtracted from queries and keys: `α` and `β`, each empty for none.
#[derive(Debug, Clone)]
pub(crate) struct Shifts<T> {
    pub query: Vec<T>,
    pub key: Vec<T>,
}

/// Numbers in a tile of features that stay in a core's second-level cache.
const TILE_NUMBERS: usize = 1 << 17;
/// Tiles that share one set of buffers at least: new buffers cost as much as a tile.
const TILES_A_SCRATCH: usize = 8;
/// Tokens at the start of a causal sequence that constants are taken from.
pub(crate) const PREFIX: usize = 1024;
/// Numbers in one state at the most (1 GiB): beyond this neither memory nor time is reasonable.
pub(crate) const LARGEST_STATE: usize = 1 << 27;
/// Numbers in all partial states of a head together, where eight of them take no more than 1 GiB.
const PARTIAL_STATES: usize = 1 << 23;

const LANDMARK_REMEDY: &str =
    "its weights are not resolved by these landmarks; use a higher rank, tol= in place of an engine, or Exact()";

/// Queries or keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Queries,
    Keys,
}

/// The feature maps of a head.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Features<'a, T> {
    /// The same for queries and keys, up to some degree.
    Monomials(&'a Monomials),
    /// One for queries and one for keys; they have no degree.
    Landmarks(&'a Landmarks<T>),
}

impl<T: Real> Features<'_, T> {
    /// How many there are, up to `degree`.
    pub fn rank(&self, degree: usize) -> usize {
        match self {
            Self::Monomials(tree) => tree.rank(degree),
            Self::Landmarks(landmarks) => landmarks.rank(),
        }
    }
}

/// How a head is computed, apart from its data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// Of the features that the weights are made of, and of those that the gradient goes through.
    pub degree: usize,
    pub potential_degree: usize,
    /// Whether the gradient is the derivative of the forward pass.
    pub consistent: bool,
    pub diagonal: Diagonal,
    pub window: usize,
    /// Whether constants of the head were taken from its first [`PREFIX`] tokens.
    pub from_prefix: bool,
}

/// The matrices `W` that turn a state into one that features are applied to.
pub(crate) struct Weightings<'a> {
    /// For the gradient.
    pub potential: Weighting<'a>,
    /// For the weights themselves, where they are not the first of those.
    pub own: Option<Vec<f64>>,
}

/// The far keys of a query: their weights are its features' times `scale`, relative to `e^level`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Far {
    pub level: f64,
    pub scale: f64,
}

/// Jensen's lower bound of a row's denominator over some keys: `sum_j e^{s_ij} >= e^{weight + c q'_i.mean}`.
#[derive(Debug, Clone)]
pub(crate) struct Floor {
    /// `ln sum_j e^{b_j}`.
    weight: f64,
    /// The mean of the shifted keys under these weights, times `c`.
    mean: Vec<f64>,
}

/// A denominator below this much of its lower bound is wrong.
const LEAST_OF_FLOOR: f64 = 0.5;

/// One head's pass, with everything that its tiles share.
pub(crate) struct Pass<'a, T> {
    pub ctx: &'a Context,
    pub head: &'a Head<'a, T>,
    pub settings: Settings,
    pub scale: f64,
    pub features: Features<'a, T>,
    /// `a_0 .. a_g`, for monomials.
    pub coefficients: &'a [f64],
    pub shifts: &'a Shifts<T>,
    /// `b'_j`, where there is a bias or a query shift, and what landmarks add; else all are 0.
    pub biases: Option<Biases>,
}

impl<'a, T: Real> Pass<'a, T> {
    pub fn new(
        ctx: &'a Context,
        head: &'a Head<'a, T>,
        settings: Settings,
        (causal, scale): (bool, f64),
        features: Features<'a, T>,
        coefficients: &'a [f64],
        shifts: &'a Shifts<T>,
    ) -> Result<Self> {
        let norms = match features {
            Features::Monomials(_) => 0.0,
            Features::Landmarks(landmarks) => landmarks.key.half,
        };
        let biases = biases(head, (causal, scale), shifts, norms)?;
        Ok(Self { ctx, head, settings, scale, features, coefficients, shifts, biases })
    }

    /// `b'_j`.
    pub fn bias(&self, j: usize) -> f64 {
        self.biases.as_ref().map_or(0.0, |b| b.of_keys[j])
    }

    /// The largest `b'_j` of some keys, `-inf` where there are none.
    pub fn level(&self, keys: Range<usize>) -> f64 {
        keys.map(|j| self.bias(j)).fold(f64::NEG_INFINITY, f64::max)
    }

    /// `w_j = e^{b'_j - level}`, for a level that is not below `b'_j`.
    pub fn weight(&self, j: usize, level: f64) -> T {
        match &self.biases {
            None if level == 0.0 => T::ONE,
            _ if self.bias(j) == f64::NEG_INFINITY => T::ZERO,
            _ => T::of(self.bias(j) - level).exp_nonpositive(),
        }
    }

    /// Width of the extended values `[v, 1]`.
    pub fn e(&self) -> usize {
        self.head.v.ncols() + 1
    }

    /// What a state of keys is multiplied by where the weights are wanted.
    pub fn forward_weighting(&self) -> Result<Weighting<'a>> {
        Ok(match self.features {
            Features::Monomials(tree) => Weighting::Diagonal(tree.weights(self.coefficients, self.scale)?),
            Features::Landmarks(landmarks) => Weighting::Matrix(landmarks.matrix.transpose()),
        })
    }

    /// What a state of keys, or of queries, is multiplied by in the backward pass.
    pub fn backward_weightings(&self, state_of: Side) -> Result<Weightings<'a>> {
        Ok(match (self.features, state_of) {
            (Features::Monomials(tree), _) => {
                let a = self.coefficients;
                let potential = polynomial::potential(a, self.settings.consistent);
                let own = potential[..a.len()] != *a;
                Weightings {
                    potential: Weighting::Diagonal(tree.weights(&potential, self.scale)?),
                    own: own.then(|| tree.weights(a, self.scale)).transpose()?,
                }
            }
            (Features::Landmarks(landmarks), Side::Keys) => {
                Weightings { potential: Weighting::Matrix(landmarks.matrix.transpose()), own: None }
            }
            (Features::Landmarks(landmarks), Side::Queries) => {
                Weightings { potential: Weighting::Matrix(landmarks.matrix.as_ref()), own: None }
            }
        })
    }

    /// Shifted query i.
    fn query(&self, i: usize) -> impl Iterator<Item = f64> {
        let alpha = &self.shifts.query;
        self.head.q.row(i).iter().enumerate().map(|(c, q)| q.to_f64() - alpha.get(c).map_or(0.0, |a| a.to_f64()))
    }

    /// What the low-rank weights of a query leave out, as a logarithm: they are those of `c q'.k' + b'` times `e` to
    /// minus this.
    fn row_level(&self, i: usize) -> f64 {
        match self.features {
            Features::Monomials(_) => 0.0,
            Features::Landmarks(landmarks) => landmarks.query.half * self.query(i).map(|q| q * q).sum::<f64>(),
        }
    }

    /// What `c q_i.k_j + b_j` has more than `c q'_i.k'_j + b'_j`.
    pub fn row_constant(&self, i: usize) -> f64 {
        let q = self.head.q.row(i);
        self.scale * q.iter().zip(&self.shifts.key).map(|(q, beta)| q.to_f64() * beta.to_f64()).sum::<f64>()
    }

    /// What turns weights relative to `level` into entries of `f`, for each query.
    pub fn far_factor(&self, up: &Upstream<'_, T>, level: f64) -> impl Fn(usize) -> T {
        let (rows, landmarks) = (up.rows, matches!(self.features, Features::Landmarks(_)));
        move |i| {
            if landmarks {
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
        far: &mut Vec<Far>,
    ) -> Result<()> {
        far.clear();
        for (t, &denominator) in denominators.iter().enumerate() {
            far.push(match floor {
                None => Far { level, scale: 1.0 },
                Some(floor) => {
                    let log = self.check_floor(floor, level, denominator, start + t)?;
                    Far { level: log, scale: 1.0 / denominator.to_f64() }
                }
            });
        }
        Ok(())
    }

    /// The logarithm of a denominator of low-rank weights relative to `level`, if it is not below Jensen's bound.
    fn check_floor(&self, floor: &Floor, level: f64, denominator: T, row: usize) -> Result<f64> {
        self.inverse(denominator, row)?;
        let log = level + self.row_level(row) + denominator.to_f64().ln();
        let bound = floor.weight + self.query(row).zip(&floor.mean).map(|(q, k)| q * k).sum::<f64>();
        if log >= bound + LEAST_OF_FLOOR.ln() {
            return Ok(log);
        }
        Err(Error::Denominator(format!(
            "row {row} of head {} has a denominator of e^{log:.3}, below Jensen's lower bound of e^{bound:.3}: \
             {LANDMARK_REMEDY}",
            self.head.index
        )))
    }

    /// Jensen's bounds over the first `c + 1` of `count` ranges of keys, for every `c`, where an engine needs them.
    pub fn floors(&self, count: usize, keys: impl Fn(usize) -> Range<usize>) -> Result<Option<Vec<Floor>>> {
        let Features::Landmarks(landmarks) = self.features else {
            return Ok(None);
        };
        let (d, beta) = (self.head.k.ncols(), &self.shifts.key);
        let (mut level, mut weight, mut sum) = (f64::NEG_INFINITY, 0.0, vec![0.0; d]);
        let mut floors = room(count, "bounds of denominators")?;
        for c in 0..count {
            for j in keys(c).filter(|&j| self.bias(j) > f64::NEG_INFINITY) {
                let k = || {
                    self.head
                        .k
                        .row(j)
                        .iter()
                        .enumerate()
                        .map(|(c, k)| k.to_f64() - beta.get(c).map_or(0.0, |b| b.to_f64()))
                };
                let own = self.bias(j) - landmarks.key.half * k().map(|k| k * k).sum::<f64>();
                if own > level {
                    let by = (level - own).exp();
                    weight *= by;
                    sum.iter_mut().for_each(|sum| *sum *= by);
                    level = own;
                }
                let w = (own - level).exp();
                weight += w;
                sum.iter_mut().zip(k()).for_each(|(sum, k)| *sum += w * k);
            }
            floors.push(Floor {
                weight: level + weight.ln(),
                mean: collected(sum.iter().map(|sum| self.scale * sum / weight), "bounds of denominators")?,
            });
        }
        Ok(Some(floors))
    }

    /// Tokens a tile, for features up to `degree`.
    pub fn tile(&self, degree: usize) -> usize {
        let at_once = match self.features {
            Features::Monomials(tree) => tree.rank(degree - 1),
            Features::Landmarks(landmarks) => landmarks.rank(),
        };
        let fit = TILE_NUMBERS / at_once.max(PIECE);
        // An odd multiple of 16: see PIECE.
        (fit / 32 * 32).clamp(64, 128) - 16
    }

    /// Buffers for tiles with features up to `degree`, for a pullback too where that is asked for.
    pub fn scratch(&self, degree: usize, pullback: bool) -> Result<Scratch<T>> {
        Scratch::new(self, self.tile(degree), degree, pullback)
    }

    /// Buffers for tiles of tokens that are added to states of features up to `degree`.
    pub fn tokens(&self, degree: usize) -> Result<Tokens<T>> {
        Tokens::new(self.features, self.head.q.ncols(), self.e(), self.tile(degree), degree)
    }

    pub fn load_queries(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.q, start, len, &self.shifts.query, x);
    }

    /// Shifted keys; those that a bias of `-inf` removes are 0, whatever they hold.
    fn load_keys(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.k, start, len, &self.shifts.key, x);
        self.clear_removed(start, len, self.head.k.ncols(), x);
    }

    /// `[v_j; 1]` as `(e, len)`, with the values of removed keys as 0.
    fn load_values(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.v, start, len, &[], x);
        let e = self.e();
        self.clear_removed(start, len, e - 1, x);
        x[(e - 1) * len..e * len].fill(T::ONE);
    }

    /// Sets to 0 what removed keys hold in a tile `(width, len)`.
    fn clear_removed(&self, start: usize, len: usize, width: usize, x: &mut [T]) {
        if self.biases.is_some() {
            for t in (0..len).filter(|t| self.bias(start + t) == f64::NEG_INFINITY) {
                x.iter_mut().skip(t).step_by(len).take(width).for_each(|x| *x = T::ZERO);
            }
        }
    }

    /// `[dout_i; -delta_i]` as `(e, len)`.
    pub fn load_upstream(&self, up: &Upstream<'_, T>, start: usize, len: usize, x: &mut [T]) {
        load_transposed(up.dout, start, len, &[], x);
        let dv = self.e() - 1;
        for (x, &delta) in x[dv * len..].iter_mut().zip(&up.delta[start..start + len]) {
            *x = -delta;
        }
    }

    /// Adds `[w_j v_j, w_j]^T φ(k_j)^T` of a range of keys, no more than a tile, with features up to `degree`, to
    /// a state, or replaces it. The weights are relative to `level`.
    pub fn add_keys(
        &self,
        (state, accum): (&mut [T], Accum),
        (start, len): (usize, usize),
        level: f64,
        degree: usize,
        tokens: &mut Tokens<T>,
    ) -> Result<()> {
        self.ctx.check()?;
        let (d, e) = (self.head.k.ncols(), self.e());
        load_rows(self.head.k, start, len, &self.shifts.key, tokens.width, &mut tokens.x);
        load_rows(self.head.v, start, len, &[], e, &mut tokens.values);
        for (t, (x, values)) in
            tokens.x.chunks_exact_mut(tokens.width).zip(tokens.values.chunks_exact_mut(e)).enumerate().take(len)
        {
            let w = self.weight(start + t, level);
            values[e - 1] = T::ONE;
            if w != T::ONE {
                values.iter_mut().for_each(|v| *v *= w);
            }
            if self.bias(start + t) == f64::NEG_INFINITY {
                x[..d].fill(T::ZERO);
            }
        }
        tokens.add_to(state, accum, (self.features, Side::Keys), degree, len);
        Ok(())
    }

    /// Adds `[dout_i, -delta_i]^T φ(q_i)^T factor(i)` of a range of queries, as [`add_keys`](Self::add_keys).
    pub fn add_queries(
        &self,
        (state, accum): (&mut [T], Accum),
        up: &Upstream<'_, T>,
        (start, len): (usize, usize),
        factor: impl Fn(usize) -> T,
        degree: usize,
        tokens: &mut Tokens<T>,
    ) -> Result<()> {
        self.ctx.check()?;
        let e = self.e();
        load_rows(self.head.q, start, len, &self.shifts.query, tokens.width, &mut tokens.x);
        load_rows(up.dout, start, len, &[], e, &mut tokens.values);
        for (t, values) in tokens.values.chunks_exact_mut(e).enumerate().take(len) {
            values[e - 1] = -up.delta[start + t];
            let by = factor(start + t);
            values.iter_mut().for_each(|v| *v *= by);
        }
        tokens.add_to(state, accum, (self.features, Side::Queries), degree, len);
        Ok(())
    }

    /// The whole head's state: partial sums over fixed ranges, added up in order.
    fn whole_state(
        &self,
        tokens: usize,
        degree: usize,
        add_tile: impl Fn((&mut [T], Accum), (usize, usize), &mut Tokens<T>) -> Result<()> + Sync,
    ) -> Result<Vec<f64>> {
        let (e, r, tile) = (self.e(), self.features.rank(degree), self.tile(degree));
        let rows = self.partition(tokens, tile, degree);
        let partials: Vec<Vec<f64>> = (0..tokens.div_ceil(rows))
            .into_par_iter()
            .map_init(
                || self.tokens(degree),
                |buffers, p| {
                    let buffers = made(buffers)?;
                    let mut state = State::new(e, r)?;
                    for (start, len) in tiles(p * rows..tokens.min((p + 1) * rows), tile) {
                        add_tile(state.tile(len), (start, len), buffers)?;
                    }
                    Ok(state.finish())
                },
            )
            .collect::<Result<_>>()?;
        let mut partials = partials.into_iter();
        let mut sum = partials.next().map_or_else(|| zeroed(r * e, STATE), Ok)?;
        for partial in partials {
            widen(&partial, &mut sum);
        }
        Ok(sum)
    }

    /// Tokens of one unit of parallel work, a multiple of `step`: as many units as memory for their states allows, up
    /// to 32.
    fn partition(&self, tokens: usize, step: usize, degree: usize) -> usize {
        let state = self.features.rank(degree) * self.e();
        let units = (PARTIAL_STATES / state).clamp(8, 32).min((LARGEST_STATE / state).max(1));
        let units = 1 << units.ilog2();
        tokens.div_ceil(units).next_multiple_of(step).max(step)
    }

    /// Writes `out` and the row factors, and returns the state of all keys.
    pub fn forward(&self, out: &mut [T], row_max: &mut [T], row_scale: &mut [T]) -> Result<Vec<f64>> {
        let (g, e, dv, m) = (self.settings.degree, self.e(), self.e() - 1, self.head.k.nrows());
        let level = self.level(0..m);
        let sum = self.whole_state(m, g, |state, keys, tokens| self.add_keys(state, keys, level, g, tokens))?;
        let r = self.features.rank(g);
        let state = self.forward_weighting()?.weigh(&sum, r)?;
        let state = view(&state, e, r);
        let tile = self.tile(g);
        let floors = self.floors(1, |_| 0..m)?;
        row_max.fill(T::ZERO);
        (out.par_chunks_mut(tile * dv), row_scale.par_chunks_mut(tile))
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || self.scratch(g, false),
                |scratch, (i, (out, scale))| {
                    let scratch = made(scratch)?;
                    self.ctx.check()?;
                    let (start, len) = (i * tile, scale.len());
                    self.load_queries(start, len, &mut scratch.x);
                    scratch.apply((self.features, Side::Queries), g, state, len);
                    for (t, scale) in scale.iter_mut().enumerate() {
                        let denominator = scratch.out[dv * len + t];
                        *scale = self.inverse(denominator, start + t)?;
                        if let Some(floors) = &floors {
                            self.check_floor(&floors[0], level, denominator, start + t)?;
                        }
                    }
                    store_transposed(&scratch.out, len, dv, out, |t| scale[t]);
                    Ok(())
                },
            )?;
        Ok(sum)
    }

    /// `1/D_i`, or what to do about a denominator that has none.
    pub fn inverse(&self, denominator: T, row: usize) -> Result<T> {
        if denominator > T::ZERO && denominator.finite() && (T::ONE / denominator).finite() {
            return Ok(T::ONE / denominator);
        }
        let head = self.head.index;
        if denominator == T::ZERO && self.head.key_bias.is_some() {
            return Err(Error::Denominator(format!(
                "row {row} of head {head} has no key to attend to: key_bias is -inf, or far below its maximum, for every \
                 key that it may see; {NO_KEY_REMEDY}"
            )));
        }
        let remedy = match self.features {
            Features::Monomials(_) => format!(
                "its scores lie outside the region where this polynomial of degree {} resembles exp; use an even degree \
                 with coefficients=\"taylor\", a smaller scale, or Exact()",
                self.settings.degree
            ),
            Features::Landmarks(_) => LANDMARK_REMEDY.into(),
        };
        Err(Error::Denominator(if denominator.finite() && denominator <= T::ZERO {
            format!(
                "row {row} of head {head} has the denominator {:.3e}, which is not positive: {remedy}",
                denominator.to_f64()
            )
        } else {
            format!("row {row} of head {head} has a denominator that overflows or underflows: {remedy}")
        }))
    }

    /// Adds the gradients, from the state of all keys where the forward pass has left it.
    pub fn backward(&self, key_state: Option<&[f64]>, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
        let HeadGrads { dq, dk, dv: grad_v, dkey_bias } = grads;
        let (degree, d, e) = (self.settings.potential_degree, self.head.q.ncols(), self.e());
        let (n, m, dv, tile, r) =
            (self.head.q.nrows(), self.head.k.nrows(), e - 1, self.tile(degree), self.features.rank(degree));
        let level = self.level(0..m);

        let weighting = self.backward_weightings(Side::Keys)?.potential;
        let state = match key_state.filter(|sum| sum.len() == e * r) {
            Some(sum) => weighting.weigh(sum, r),
            None => weighting.weigh(
                &self
                    .whole_state(m, degree, |state, keys, tokens| self.add_keys(state, keys, level, degree, tokens))?,
                r,
            ),
        }?;
        let of_keys = view(&state, e, r);
        dq.par_chunks_mut(tile * d).enumerate().with_min_len(TILES_A_SCRATCH).try_for_each_init(
            || self.scratch(degree, true),
            |scratch, (i, dq)| {
                let scratch = made(scratch)?;
                self.ctx.check()?;
                let (start, len) = (i * tile, dq.len() / d);
                self.load_queries(start, len, &mut scratch.x);
                self.load_upstream(&up, start, len, &mut scratch.values);
                scratch.pullback((self.features, Side::Queries), degree, of_keys, len);
                store_transposed(&scratch.dx, len, d, dq, |t| up.rows.scale[start + t]);
                Ok(())
            },
        )?;
        drop(state);

        let sum = self.whole_state(n, degree, |state, queries, tokens| {
            self.add_queries(state, &up, queries, |i| up.rows.scale[i], degree, tokens)
        })?;
        let Weightings { potential, own } = self.backward_weightings(Side::Queries)?;
        let state = potential.weigh(&sum, r)?;
        let of_potential = view(&state, e, r);
        let own = own.map(|own| Weighting::Diagonal(own).weigh(&sum, r)).transpose()?;
        drop(sum);
        let of_values = own.as_ref().map_or(of_potential, |own| view(own, e, own.len() / e));
        let mut db = optional_chunks(dkey_bias, tile, m.div_ceil(tile))?;
        (dk.par_chunks_mut(tile * d), grad_v.par_chunks_mut(tile * dv), db.par_iter_mut())
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || self.scratch(degree, true),
                |scratch, (j, (dk, dv, db))| {
                    let grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias: db.as_deref_mut() };
                    self.key_gradients(j * tile, level, of_potential, of_values, made(scratch)?, grads)
                },
            )
    }

    /// Adds dk, dv and db of the keys from `start` on, no more than a tile, from the query state weighted by the
    /// potential's and by p's weights. `level` is what the keys' weights are relative to, in the state too.
    pub fn key_gradients(
        &self,
        start: usize,
        level: f64,
        potential: MatRef<'_, T>,
        of_values: MatRef<'_, T>,
        scratch: &mut Scratch<T>,
        mut grads: HeadGrads<'_, T>,
    ) -> Result<()> {
        self.ctx.check()?;
        let (d, dv) = (self.head.k.ncols(), self.e() - 1);
        let len = grads.dk.len() / d;
        self.load_keys(start, len, &mut scratch.x);
        self.load_values(start, len, &mut scratch.values);
        let features = (self.features, Side::Keys);
        scratch.pullback(features, self.settings.potential_degree, potential, len);
        scratch.apply(features, self.settings.degree, of_values, len);
        let Scratch { values, out, dx, .. } = scratch;
        let alpha = &self.shifts.query;
        for t in 0..len {
            let w = self.weight(start + t, level);
            for c in 0..dv {
                grads.dv[t * dv + c] += w * out[c * len + t];
            }
            for c in 0..d {
                grads.dk[t * d + c] += w * dx[c * len + t];
            }
            if grads.dkey_bias.is_some() || !alpha.is_empty() {
                let db = w * (0..=dv).map(|c| out[c * len + t] * values[c * len + t]).sum::<T>();
                for (dk, &alpha) in grads.dk[t * d..(t + 1) * d].iter_mut().zip(alpha) {
                    *dk += T::of(self.scale) * db * alpha;
                }
                if let Some(grad) = &mut grads.dkey_bias {
                    grad[t] += db;
                }
            }
        }
        Ok(())
    }

    /// The gradients of a pass that is differentiated through the means too: see the top of this file.
    pub fn backward_through_means(
        &self,
        key_state: Option<&[f64]>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
    ) -> Result<()> {
        let (n, m, d, dv) = (self.head.q.nrows(), self.head.k.nrows(), self.head.q.ncols(), self.e() - 1);
        let beta = &self.shifts.key;
        let zeros = |len: usize| zeroed(len, "gradients of shifted keys");
        let (mut dk, mut dv_, mut db) = (zeros(m * d)?, zeros(m * dv)?, zeros(m)?);
        let own = HeadGrads { dq: &mut *grads.dq, dk: &mut dk, dv: &mut dv_, dkey_bias: Some(&mut db) };
        self.backward(key_state, up, own)?;
        let live = live_keys(self.head, m)?;
        let mut dalpha = column_sums(grads.dq, d, 0..n);
        let mut dbeta = column_sums(&dk, d, live.iter().copied());
        for (col, (dalpha, dbeta)) in dalpha.iter_mut().zip(&mut dbeta).enumerate() {
            let of_key = |&j: &usize| db[j].to_f64() * (self.head.k[(j, col)].to_f64() - beta[col].to_f64());
            let through_bias: f64 = live.iter().map(of_key).sum();
            *dalpha = (self.scale * through_bias - *dalpha) / n as f64;
            *dbeta = -*dbeta / live.len() as f64;
        }
        add_to_rows(grads.dq, &dalpha, 0..n);
        add_to_rows(&mut dk, &dbeta, live.into_iter());
        let into = |total: &mut [T], own: &[T]| total.iter_mut().zip(own).for_each(|(t, &o)| *t += o);
        into(grads.dk, &dk);
        into(grads.dv, &dv_);
        if let Some(total) = grads.dkey_bias {
            into(total, &db);
        }
        Ok(())
    }
}

/// Buffers of one thread's tiles, tokens along the lanes, and what states are applied to and pulled back through. The
/// features of the highest degree, most of them, are formed a piece at a time and used at once.
pub(crate) struct Scratch<T> {
    /// Queries or keys, `(d, len)`.
    pub x: Vec<T>,
    /// Extended values or upstream gradients, `(e, len)`.
    pub values: Vec<T>,
    /// Gradients of x, `(d, len)`.
    pub dx: Vec<T>,
    /// A state times features, `(e, len)`.
    pub out: Vec<T>,
    /// The features up to a low degree, and a piece of the others.
    low: Vec<T>,
    piece: Vec<T>,
    /// Their gradients.
    dlow: Vec<T>,
    dpiece: Vec<T>,
}

impl<T: Real> Scratch<T> {
    /// For tiles of at most `len` tokens and features up to `degree`.
    fn new(pass: &Pass<'_, T>, len: usize, degree: usize, pullback: bool) -> Result<Self> {
        let zeros = |rows: usize| zeroed(rows * len, "a tile of features");
        let (d, e, r) = (pass.head.q.ncols(), pass.e(), pass.features.rank(degree));
        let low = match pass.features {
            Features::Monomials(tree) => tree.rank(tree.low_degree(degree)),
            Features::Landmarks(_) => r,
        };
        let piece = if low < r { PIECE } else { 0 };
        let only = |rows: usize| if pullback { zeros(rows) } else { Ok(Vec::new()) };
        Ok(Self {
            x: zeros(d)?,
            values: only(e)?,
            dx: only(d)?,
            out: zeros(e)?,
            low: zeros(low)?,
            piece: zeros(piece)?,
            dlow: only(low)?,
            dpiece: only(piece)?,
        })
    }

    /// `out = state φ(x)` with features up to `degree`, for a weighted state of at least so many columns.
    pub fn apply(
        &mut self,
        (features, side): (Features<'_, T>, Side),
        degree: usize,
        state: MatRef<'_, T>,
        len: usize,
    ) {
        let tree = match features {
            Features::Monomials(tree) => tree,
            Features::Landmarks(landmarks) => {
                landmarks.map(side).columns(&self.x, len, &mut self.low);
                let f = view(&self.low, landmarks.rank(), len);
                product(view_mut(&mut self.out, state.nrows(), len), state, f, T::ONE);
                return;
            }
        };
        for piece in tree.pieces(degree) {
            let f = if piece.start == 0 {
                tree.features(&self.x, len, tree.low_degree(degree), &mut self.low);
                &self.low
            } else {
                tree.piece(&self.x, &self.low, len, piece.clone(), &mut self.piece);
                &self.piece
            };
            let (state, f) = (state.subcols(piece.start, piece.len()), view(f, piece.len(), len));
            let out = view_mut(&mut self.out, state.nrows(), len);
            let accum = if piece.start == 0 { Accum::Replace } else { Accum::Add };
            multiply(out, accum, state, f, T::ONE);
        }
    }

    /// `dx = J_φ(x)^T state^T values`, for a weighted state `(e, r)`.
    pub fn pullback(
        &mut self,
        (features, side): (Features<'_, T>, Side),
        degree: usize,
        state: MatRef<'_, T>,
        len: usize,
    ) {
        let Self { x, values, dx, low, dlow, dpiece, .. } = self;
        let values = view(values, state.nrows(), len);
        let tree = match features {
            Features::Monomials(tree) => tree,
            Features::Landmarks(landmarks) => {
                product(view_mut(dlow, landmarks.rank(), len), state.transpose(), values, T::ONE);
                landmarks.map(side).pullback(x, len, low, dlow, dx);
                return;
            }
        };
        dx.fill(T::ZERO);
        for piece in tree.pieces(degree) {
            let df = if piece.start == 0 { &mut *dlow } else { &mut *dpiece };
            let of_piece = state.subcols(piece.start, piece.len()).transpose();
            product(view_mut(df, piece.len(), len), of_piece, values, T::ONE);
            if piece.start == 0 {
                tree.features(x, len, degree - 1, low);
            } else {
                tree.pullback_piece(x, low, len, piece, dpiece, dlow, dx);
            }
        }
        tree.pullback(x, low, len, tree.low_degree(degree), dlow, dx);
    }
}

const LOG_SUMS: &str = "logarithms of row sums";

/// `ln sum_j A_ij` of every query, from what its forward pass left.
pub(crate) fn log_sums<T: Real>(
    head: &Head<'_, T>,
    (causal, scale): (bool, f64),
    constants: &Constants<T>,
    row_max: &[T],
    row_scale: &[T],
) -> Result<Vec<f64>> {
    let own = |i: usize| row_max[i].to_f64() - row_scale[i].to_f64().ln();
    let (shifts, key_half, query_half) = match constants {
        Constants::Exact => return collected((0..row_max.len()).map(own), LOG_SUMS),
        Constants::Polynomial(constants) => (&constants.shifts, 0.0, 0.0),
        Constants::Landmark(constants) => {
            (&constants.shifts, constants.landmarks.key.half, constants.landmarks.query.half)
        }
    };
    // Without a mask the forward pass leaves the level of the keys, and of a query's landmarks, out.
    let level = match biases(head, (causal, scale), shifts, key_half)? {
        Some(biases) if !causal => biases.base + biases.of_keys.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        _ => 0.0,
    };
    let by = |shift: &[T], c: usize| shift.get(c).map_or(0.0, |b| b.to_f64());
    let sum = |i: usize| {
        let mut sum = own(i) + level;
        for (c, q) in head.q.row(i).iter().enumerate() {
            let q = q.to_f64();
            sum += scale * q * by(&shifts.key, c);
            if !causal {
                sum += query_half * (q - by(&shifts.query, c)).powi(2);
            }
        }
        sum
    };
    collected_in_parallel((0..row_max.len()).into_par_iter().map(sum), LOG_SUMS)
}

/// What keys add to all of their scores.
#[derive(Debug, Clone)]
pub(crate) struct Biases {
    /// `b'_j` less the base.
    pub of_keys: Vec<f64>,
    /// The largest bias that was given, without a mask; with one 0, as what earlier rows see must not depend on it.
    pub base: f64,
}

/// A number that is added to biases beyond this is off by more than a millionth: lost, beside a bias that stands for
/// minus infinity.
const LARGEST_BIAS: f64 = 1e-6 / f64::EPSILON;

/// `b'_j = b_j + c α.k'_j + half |k'_j|^2`, or `None` where all are 0.
pub(crate) fn biases<T: Real>(
    head: &Head<'_, T>,
    (causal, scale): (bool, f64),
    shifts: &Shifts<T>,
    half: f64,
) -> Result<Option<Biases>> {
    let (alpha, beta) = (&shifts.query, &shifts.key);
    let adds = !alpha.is_empty() || half != 0.0;
    if head.key_bias.is_none() && !adds {
        return Ok(None);
    }
    let (m, given) = (head.k.nrows(), |j: usize| head.key_bias.map_or(0.0, |b| b[j].to_f64()));
    let Some(first) = (0..m).map(given).find(|b| *b > f64::NEG_INFINITY) else {
        return Err(Error::Denominator(format!(
            "head {} has no key to attend to: key_bias is -inf for every key",
            head.index
        )));
    };
    let largest = (0..m).map(given).fold(first, f64::max);
    // The largest bias that a row sees lies between these two.
    if let Some(bias) = [first, largest].into_iter().find(|b| causal && adds && b.abs() > LARGEST_BIAS) {
        return Err(Error::Denominator(format!(
            "head {}: the largest key_bias that some row sees is {bias:e}, beside which this engine loses what keys add to \
             scores; remove keys by -inf, add a number to all of key_bias that brings it near 0, or use engine=Exact()",
            head.index
        )));
    }
    let base = if causal { 0.0 } else { largest };
    let bias = |j: usize| {
        let mut bias = given(j) - base;
        if bias == f64::NEG_INFINITY {
            return bias; // whatever the key holds
        }
        for (c, k) in head.k.row(j).iter().enumerate() {
            let k = k.to_f64() - beta.get(c).map_or(0.0, |b| b.to_f64());
            bias += scale * alpha.get(c).map_or(0.0, |a| a.to_f64()) * k + half * k * k;
        }
        bias
    };
    let of_keys = collected_in_parallel((0..m).into_par_iter().map(bias), "biases of keys")?;
    Ok(Some(Biases { of_keys, base }))
}

/// The first token and the length of each tile of a range.
pub(crate) fn tiles(tokens: Range<usize>, tile: usize) -> impl Iterator<Item = (usize, usize)> {
    tokens.clone().step_by(tile).map(move |start| (start, tile.min(tokens.end - start)))
}

/// `x` in chunks of `len`, or as many `None`.
fn optional_chunks<T>(x: Option<&mut [T]>, len: usize, count: usize) -> Result<Vec<Option<&mut [T]>>> {
    match x {
        Some(x) => collected(x.chunks_mut(len).map(Some), "tiles of a gradient"),
        None => collected((0..count).map(|_| None), "tiles of a gradient"),
    }
}

/// The mean of some rows.
pub(crate) fn mean<T: Real>(x: MatRef<'_, T>, rows: impl ExactSizeIterator<Item = usize>) -> Vec<T> {
    let count = rows.len().max(1) as f64;
    sums_and_square(x, rows).0.into_iter().map(|sum| T::of(sum / count)).collect()
}

/// Those of the first `count` keys whose bias leaves them a weight beside the others: also numbers like -1e9 stand for
/// minus infinity.
pub(crate) fn live_keys<T: Real>(head: &Head<'_, T>, count: usize) -> Result<Vec<usize>> {
    const LIVE: &str = "the keys that have a weight";
    let Some(biases) = head.key_bias else { return collected(0..count, LIVE) };
    let bias = |j: usize| biases[j].to_f64();
    let largest = (0..count).map(bias).fold(f64::NEG_INFINITY, f64::max);
    let mut live = room(count, LIVE)?;
    // No key where all are -inf: their difference is NaN.
    live.extend((0..count).filter(|&j| (bias(j) - largest).exp() > 0.0));
    Ok(live)
}

/// The sum of each column, and the sum of all squares, of some rows, one after the other as they lie.
pub(crate) fn sums_and_square<T: Real>(x: MatRef<'_, T>, rows: impl Iterator<Item = usize>) -> (Vec<f64>, f64) {
    let (mut sums, mut square) = (vec![0.0; x.ncols()], 0.0);
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(x.row(row).iter()) {
            let x = x.to_f64();
            *sum += x;
            square += x * x;
        }
    }
    (sums, square)
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

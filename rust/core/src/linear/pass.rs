//! A head's pass over its tokens, for any [feature maps](super::features) `φ` of queries and `χ` of keys with `A_ij ≈
//! φ(q_i)^T W χ(k_j)`: the equations, and the steps that passes without a mask ([`full`](super::full)) and under a causal
//! one ([`scan`](super::scan)) are made of.
//!
//! Keys have the weights `w_j = e^{b_j - level}`, where the level is the largest bias: numerators and denominators share
//! the factor that it leaves out. Then
//!
//! ```text
//! S = sum_j [w_j v_j, w_j]^T χ(k_j)^T       (d_v + 1, r)
//! [N_i, D_i] = S W^T φ(q_i)        out_i = N_i / D_i
//! ```
//!
//! Backward. Let `f_ij` be the low-rank weights over `D_i`, `delta_i = dout_i.out_i` and `e_ij = dout_i.v_j - delta_i`.
//! The gradient of a score is `f_ij e_ij`, or what the engine puts in its place. So, with the state of queries `R = sum_i
//! [dout_i, -delta_i]^T φ(q_i)^T / D_i`,
//!
//! ```text
//! dq_i = (1/D_i) J_φ(q_i)^T W S^T [dout_i; -delta_i]
//! dk_j = w_j J_χ(k_j)^T W^T R^T [v_j; 1]     [dv_j, h_j] = w_j R W χ(k_j)       db_j = dv_j.v_j + h_j
//! ```
//!
//! Gradients may need more features than weights do, and another `W` (those of the *potential*: see
//! [`polynomial`](crate::engines::polynomial)). Queries and keys are shifted: see [`shifts`](super::shifts).

use faer::{Accum, MatRef};

use super::features::{FeatureMap, Purpose, Side, Tile, TokenRows};
use super::nearby::Nearby;
use super::shifts::{Shifted, Shifts};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::numerics::real::Real;
use crate::numerics::tile::view_mut;
use crate::problem::grads::{HeadGrads, Upstream};
use crate::problem::heads::Head;
use crate::problem::scores::NO_KEY_REMEDY;

/// Numbers in a tile of features that stay in a core's second-level cache.
const TILE_NUMBERS: usize = 1 << 17;

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

    /// `1/D_i`, or an error where the denominator is not positive or has no finite inverse.
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

    /// Adds the gradients of the keys from `start` on, no more than a tile:
    ///
    /// ```text
    /// dk_j = w_j J_χ(k_j)^T W^T R^T [v_j; 1]     [dv_j, h_j] = w_j R W χ(k_j)       db_j = dv_j.v_j + h_j
    /// ```
    ///
    /// and back from shifted keys `dk_j += c db_j α`. `for_gradient` and `for_values` are `R`, weighted for dk and for dv,
    /// each `(e, r)`. `level` is what the keys' weights are relative to, in the state too.
    pub fn add_key_gradients(
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
}

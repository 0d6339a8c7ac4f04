//! The polynomial engine: `exp(s)` replaced by `p(s) = sum_{j<=g} a_j s^j`, so that attention costs time linear in its
//! length.
//!
//! With the monomial features `φ` of [`Monomials`], `p(c q.k) = φ(q)^T diag(ω_p) φ(k)`. Forward, with key weights `w_j
//! = e^{b_j - level}` (a common factor of numerators and denominators; the level is the largest bias):
//!
//! ```text
//! S = sum_j [w_j v_j, w_j]^T φ(k_j)^T       (dv + 1, r)
//! [N_i, D_i] = S diag(ω_p) φ(q_i)        out_i = N_i / D_i
//! ```
//!
//! Backward. Let `f_ij = w_j p(c q_i.k_j) / D_i`, `delta_i = dout_i.out_i` and `e_ij = dout_i.v_j - delta_i`.
//!
//! *Closed form*: the exact gradient's formula, `dS_ij = f_ij e_ij` and `dq_i = sum_j dS_ij c k_j`. For a polynomial
//! `P` with `P' = p`, `c p(c q.k) k = ∇_q P(c q.k)`, and `P(c q.k) = φ⁺(q)^T diag(ω_P) φ⁺(k)` with features of degree
//! `g + 1`. So
//!
//! ```text
//! dq_i = (1/D_i) ∇_q sum_j w_j e_ij P(c q_i.k_j) = (1/D_i) J_φ⁺(q_i)^T diag(ω_P) S⁺^T [dout_i; -delta_i]
//! ```
//!
//! *Consistent*: the derivative of the forward pass. Its scores have the gradient `w_j p'(s_ij) e_ij / D_i`, and
//! `c p'(c q.k) k = ∇_q p(c q.k)`: the same formula with `p` in place of `P` and degree `g`. The `P` or `p` that is
//! differentiated is called the *potential* below.
//!
//! For keys the roles change, with the state `R = sum_i [dout_i, -delta_i]^T φ(q_i)^T / D_i`:
//!
//! ```text
//! dk_j = w_j J_φ(k_j)^T diag(ω) R^T [v_j; 1]     [dv_j, h_j] = w_j R diag(ω_p) φ(k_j)       db_j = dv_j.v_j + h_j
//! ```
//!
//! Shifts. With `q' = q - α`, `k' = k - β` and the bias `b'_j = b_j + c α.k'_j`, `c q'.k' + b'` differs from `c q.k +
//! b` by a constant of the row, which exact attention does not see. Back from the primed gradients: `dk_j = dk'_j + c
//! db_j α`, which for the closed form is all. The consistent gradient also goes through the means `α` and `β`:
//!
//! ```text
//! dα = -sum_i dq'_i + c sum_j db_j k'_j      dq_i = dq'_i + dα / n
//! dβ = -sum_j (dk'_j + c db_j α)             dk_j = dk'_j + c db_j α + dβ / m
//! ```
//!
//! Sums over tokens are products of at most `FLUSH` tokens in the arrays' own type, added up in float64.

use std::ops::Range;

use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use rayon::prelude::*;

use crate::attention::{Attention, Head, HeadGrads, Upstream};
use crate::causal;
use crate::context::Context;
use crate::engine::{self, Coefficients, Diagonal, Gradient, Shift};
use crate::error::{Error, Result};
use crate::exact::NO_KEY_REMEDY;
use crate::fit;
use crate::monomials::{self, Monomials, PIECE};
use crate::real::Real;
use crate::state::{State, add, weigh};
use crate::tile::{add_product, load_transposed, product, store_transposed, view, view_mut};

/// What a head's data decide before its pass: kept for the backward pass, which takes it as given.
#[derive(Debug, Clone)]
pub(crate) struct Constants<T> {
    /// `a_0 .. a_g`.
    pub coefficients: Vec<f64>,
    /// `α`, empty for none.
    query_shift: Vec<T>,
    /// `β`, empty for none.
    key_shift: Vec<T>,
}

/// Numbers in a tile of features that stay in a core's second-level cache.
const TILE_NUMBERS: usize = 1 << 17;
/// Tiles that share one set of buffers at least: new buffers cost as much as a tile.
const TILES_A_SCRATCH: usize = 4;
/// Tokens at the start of a causal sequence that coefficients are fitted to.
const FIT_PREFIX: usize = 1024;
/// Numbers in one state at the most (1 GiB): beyond this neither memory nor time is reasonable.
const LARGEST_STATE: usize = 1 << 27;
/// Numbers in all partial states of a head together, where eight of them take no more than 1 GiB.
const PARTIAL_STATES: usize = 1 << 23;

/// One head's pass, with everything that its tiles share.
pub(crate) struct Pass<'a, T> {
    pub ctx: &'a Context,
    pub head: &'a Head<'a, T>,
    pub engine: &'a engine::Polynomial,
    pub scale: f64,
    pub constants: Constants<T>,
    pub tree: &'a Monomials,
    /// `b'_j`, where there is a bias or a query shift; else all are 0.
    pub biases: Option<Vec<f64>>,
}

/// The monomials that every head's pass needs: up to the degree of p, and of the potential where there is a `backward`
/// pass. An error where that one is out of reach, before a forward pass that could have no backward one.
pub(crate) fn tree(engine: &engine::Polynomial, d: usize, e: usize, backward: bool) -> Result<Monomials> {
    let potential_degree = engine.degree + usize::from(engine.gradient == Gradient::ClosedForm);
    match monomials::rank(d, potential_degree) {
        Some(r) if r.saturating_mul(e) <= LARGEST_STATE => {
            Ok(Monomials::new(d, if backward { potential_degree } else { engine.degree }))
        }
        _ => Err(Error::Argument(format!(
            "degree = {} with d = {d} and dv = {} needs more monomials (up to degree {potential_degree}) than memory holds; \
             use a lower degree, gradient=\"consistent\", or Exact()",
            engine.degree,
            e - 1
        ))),
    }
}

/// Writes `out` and the row factors of one head, and returns its constants.
pub(crate) fn forward<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    engine: &engine::Polynomial,
    tree: &Monomials,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<Constants<T>> {
    let pass = Pass::new(ctx, head, attention, engine, tree, None)?;
    if attention.causal {
        causal::forward(&pass, out, row_max, row_scale)?;
    } else {
        pass.forward(out, row_max, row_scale)?;
    }
    Ok(pass.constants)
}

/// Adds one head's gradients.
pub(crate) fn backward<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    engine: &engine::Polynomial,
    tree: &Monomials,
    constants: &Constants<T>,
    up: Upstream<'_, T>,
    grads: HeadGrads<'_, T>,
) -> Result<()> {
    let pass = Pass::new(ctx, head, attention, engine, tree, Some(constants.clone()))?;
    if attention.causal {
        causal::backward(&pass, up, grads)
    } else if engine.shift == Shift::None {
        pass.backward(up, grads)
    } else {
        pass.backward_through_shift(up, grads)
    }
}

impl<'a, T: Real> Pass<'a, T> {
    fn new(
        ctx: &'a Context,
        head: &'a Head<'a, T>,
        attention: &Attention,
        engine: &'a engine::Polynomial,
        tree: &'a Monomials,
        constants: Option<Constants<T>>,
    ) -> Result<Self> {
        let none = Constants { coefficients: Vec::new(), query_shift: Vec::new(), key_shift: Vec::new() };
        let mut pass = Self { ctx, head, engine, scale: attention.scale, constants: none, tree, biases: None };
        let fit_it = constants.is_none();
        match constants {
            Some(constants) if constants.coefficients.len() != engine.degree + 1 => {
                return Err(Error::Argument("saved comes from a forward pass of another degree".into()));
            }
            Some(constants) => pass.constants = constants,
            None if engine.shift == Shift::Mean => {
                pass.constants.query_shift = mean(head.q);
                pass.constants.key_shift = mean(head.k);
            }
            None => {}
        }
        pass.biases = pass.biases()?;
        if fit_it {
            pass.constants.coefficients = pass.coefficients(attention.causal)?;
        }
        Ok(pass)
    }

    fn coefficients(&self, causal: bool) -> Result<Vec<f64>> {
        let degree = self.engine.degree;
        match &self.engine.coefficients {
            Coefficients::Taylor => Ok(fit::taylor(degree)),
            Coefficients::Given(a) => Ok(a.clone()),
            Coefficients::Fitted => {
                // Under a causal mask the fit sees only the prefix: every query that meets the polynomial is later.
                let tokens = |x: MatRef<'a, T>| {
                    let all = x.nrows();
                    x.subrows(0, if causal { all.min(self.prefix() * self.block()) } else { all })
                };
                let level = self.level(0..tokens(self.head.k).nrows());
                let weight =
                    |j: usize| if self.bias(j) == f64::NEG_INFINITY { 0.0 } else { (self.bias(j) - level).exp() };
                fit::fit(
                    degree,
                    (tokens(self.head.q), &self.constants.query_shift),
                    (tokens(self.head.k), &self.constants.key_shift),
                    weight,
                    self.scale,
                    causal,
                )
            }
        }
    }

    /// `b'_j = b_j + c α.k'_j`, or `None` where all are 0.
    fn biases(&self) -> Result<Option<Vec<f64>>> {
        let alpha = &self.constants.query_shift;
        if self.head.key_bias.is_none() && alpha.is_empty() {
            return Ok(None);
        }
        let bias = |j: usize| {
            let own = self.head.key_bias.map_or(0.0, |b| b[j].to_f64());
            let beta = &self.constants.key_shift;
            let row = self.head.k.row(j);
            let by_shift: f64 =
                (0..alpha.len()).map(|c| alpha[c].to_f64() * (row[c].to_f64() - beta[c].to_f64())).sum();
            own + self.scale * by_shift
        };
        let biases: Vec<f64> = (0..self.head.k.nrows()).into_par_iter().map(bias).collect();
        if biases.iter().all(|b| *b == f64::NEG_INFINITY) {
            return Err(Error::Denominator(format!(
                "head {} has no key to attend to: key_bias is -inf for every key",
                self.head.index
            )));
        }
        Ok(Some(biases))
    }

    /// `b'_j`.
    pub fn bias(&self, j: usize) -> f64 {
        self.biases.as_ref().map_or(0.0, |b| b[j])
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

    /// The degree of the potential.
    pub fn potential_degree(&self) -> usize {
        self.potential().len() - 1
    }

    /// Coefficients of the polynomial whose gradient stands in dq and dk: `P` with `P' = p`, or `p` itself.
    pub fn potential(&self) -> Vec<f64> {
        let a = &self.constants.coefficients;
        match self.engine.gradient {
            Gradient::Consistent => a.clone(),
            Gradient::ClosedForm => {
                std::iter::once(0.0).chain(a.iter().enumerate().map(|(j, a)| a / (j + 1) as f64)).collect()
            }
        }
    }

    /// Tokens a tile, for features up to `degree`.
    pub fn tile(&self, degree: usize) -> usize {
        let fit = (TILE_NUMBERS / self.tree.rank(degree - 1).max(PIECE)).max(1);
        (1usize << fit.ilog2()).clamp(32, 256)
    }

    /// Buffers for tiles with features up to `degree`.
    pub fn scratch(&self, degree: usize) -> Scratch<T> {
        Scratch::new(self, self.tile(degree), degree)
    }

    /// Tokens a block of the causal scans. A function of d and the degree alone, the same forward and backward.
    pub fn block(&self) -> usize {
        if self.tree.rank(self.engine.degree) <= 1024 { 64 } else { 128 }
    }

    /// Blocks before a query's own whose scores are exact too.
    pub fn lag(&self) -> usize {
        match self.engine.diagonal {
            Diagonal::Exact => self.engine.window.div_ceil(self.block()),
            Diagonal::Polynomial => 0,
        }
    }

    /// Blocks at the start of a causal sequence whose queries meet all their keys exactly, so that coefficients may be
    /// fitted to them without any query's answer depending on a later token.
    pub fn prefix(&self) -> usize {
        if self.engine.coefficients == Coefficients::Fitted {
            (FIT_PREFIX / self.block()).max(self.lag() + 1)
        } else {
            0
        }
    }

    pub fn load_queries(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.q, start, len, &self.constants.query_shift, x);
    }

    /// Shifted keys; those that a bias of `-inf` removes are 0, whatever they hold.
    pub fn load_keys(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.k, start, len, &self.constants.key_shift, x);
        if self.biases.is_some() {
            for t in (0..len).filter(|t| self.bias(start + t) == f64::NEG_INFINITY) {
                x.iter_mut().skip(t).step_by(len).take(self.head.k.ncols()).for_each(|x| *x = T::ZERO);
            }
        }
    }

    /// `[v_j; 1]` as `(e, len)`, times `w_j` where there is a level that the weights are relative to.
    pub fn load_values(&self, start: usize, len: usize, level: Option<f64>, x: &mut [T]) {
        load_transposed(self.head.v, start, len, &[], x);
        let e = self.e();
        x[(e - 1) * len..e * len].fill(T::ONE);
        if let (Some(level), Some(_)) = (level, &self.biases) {
            for t in 0..len {
                let w = self.weight(start + t, level);
                for c in 0..e {
                    x[c * len + t] *= w;
                }
            }
        }
    }

    /// `[dout_i; -delta_i] factor(i)` as `(e, len)`.
    pub fn load_upstream(
        &self,
        up: &Upstream<'_, T>,
        start: usize,
        len: usize,
        factor: impl Fn(usize) -> T,
        x: &mut [T],
    ) {
        let dv = self.e() - 1;
        load_transposed(up.dout, start, len, &[], x);
        for t in 0..len {
            x[dv * len + t] = -up.delta[start + t];
            let by = factor(start + t);
            for c in 0..=dv {
                x[c * len + t] *= by;
            }
        }
    }

    /// `sum_j [w_j v_j, w_j]^T φ(k_j)^T` over a range of keys, in float64, with features up to `degree` and the weights
    /// relative to `level`.
    pub fn key_state(
        &self,
        keys: Range<usize>,
        level: f64,
        degree: usize,
        scratch: &mut Scratch<T>,
    ) -> Result<Vec<f64>> {
        let mut state = State::new(self.e(), self.tree.rank(degree));
        self.add_keys(&mut state, keys, level, degree, scratch)?;
        Ok(state.finish())
    }

    /// `sum_i [dout_i, -delta_i]^T φ(q_i)^T factor(i)` over a range of queries, in float64.
    pub fn query_state(
        &self,
        up: &Upstream<'_, T>,
        queries: Range<usize>,
        degree: usize,
        factor: impl Fn(usize) -> T + Copy,
        scratch: &mut Scratch<T>,
    ) -> Result<Vec<f64>> {
        let mut state = State::new(self.e(), self.tree.rank(degree));
        self.add_queries(&mut state, up, queries, factor, degree, scratch)?;
        Ok(state.finish())
    }

    /// Adds keys to a state.
    pub fn add_keys(
        &self,
        state: &mut State<T>,
        keys: Range<usize>,
        level: f64,
        degree: usize,
        scratch: &mut Scratch<T>,
    ) -> Result<()> {
        for (start, len) in tiles(keys, self.tile(degree)) {
            self.ctx.check()?;
            self.load_keys(start, len, &mut scratch.x);
            self.load_values(start, len, Some(level), &mut scratch.values);
            scratch.add_to(state, self.tree, degree, len);
        }
        Ok(())
    }

    /// Adds queries, with what is pulled back through them, to a state.
    pub fn add_queries(
        &self,
        state: &mut State<T>,
        up: &Upstream<'_, T>,
        queries: Range<usize>,
        factor: impl Fn(usize) -> T + Copy,
        degree: usize,
        scratch: &mut Scratch<T>,
    ) -> Result<()> {
        for (start, len) in tiles(queries, self.tile(degree)) {
            self.ctx.check()?;
            self.load_queries(start, len, &mut scratch.x);
            self.load_upstream(up, start, len, factor, &mut scratch.values);
            scratch.add_to(state, self.tree, degree, len);
        }
        Ok(())
    }

    /// The whole head's state: partial sums over fixed ranges, added up in order.
    fn whole_state(
        &self,
        tokens: usize,
        degree: usize,
        partial: impl Fn(Range<usize>, &mut Scratch<T>) -> Result<Vec<f64>> + Sync,
    ) -> Result<Vec<f64>> {
        let rows = self.partition(tokens, self.tile(degree), degree);
        let partials: Vec<_> = (0..tokens.div_ceil(rows))
            .into_par_iter()
            .map_init(|| self.scratch(degree), |scratch, p| partial(p * rows..tokens.min((p + 1) * rows), scratch))
            .collect::<Result<_>>()?;
        let mut partials = partials.into_iter();
        let mut sum = partials.next().unwrap_or_else(|| vec![0.0; self.tree.rank(degree) * self.e()]);
        for partial in partials {
            add(&mut sum, &partial);
        }
        Ok(sum)
    }

    /// Tokens of one unit of parallel work, a multiple of `step`: as many units as memory for their states allows, up
    /// to 32.
    pub fn partition(&self, tokens: usize, step: usize, degree: usize) -> usize {
        let state = self.tree.rank(degree) * self.e();
        let units = (PARTIAL_STATES / state).clamp(8, 32).min((LARGEST_STATE / state).max(1));
        let units = 1 << units.ilog2();
        tokens.div_ceil(units).next_multiple_of(step).max(step)
    }

    fn forward(&self, out: &mut [T], row_max: &mut [T], row_scale: &mut [T]) -> Result<()> {
        let (g, e, dv) = (self.engine.degree, self.e(), self.e() - 1);
        let level = self.level(0..self.head.k.nrows());
        let state =
            self.whole_state(self.head.k.nrows(), g, |keys, scratch| self.key_state(keys, level, g, scratch))?;
        let weights = self.tree.weights(&self.constants.coefficients, self.scale);
        let state = weigh(&state, weights.len(), &weights);
        let tile = self.tile(g);
        row_max.fill(T::ZERO);
        (out.par_chunks_mut(tile * dv), row_scale.par_chunks_mut(tile))
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || (self.scratch(g), vec![T::ZERO; e * tile]),
                |(scratch, values), (i, (out, scale))| {
                    self.ctx.check()?;
                    let (start, len) = (i * tile, scale.len());
                    self.load_queries(start, len, &mut scratch.x);
                    scratch.apply(self.tree, g, &state, len, view_mut(values, e, len));
                    for (t, scale) in scale.iter_mut().enumerate() {
                        *scale = self.inverse(values[dv * len + t], start + t)?;
                    }
                    store_transposed(values, len, dv, out, |t| scale[t]);
                    Ok(())
                },
            )
    }

    /// `1/D_i`, or what to do about a denominator that has none.
    pub fn inverse(&self, denominator: T, row: usize) -> Result<T> {
        if denominator > T::ZERO && denominator.finite() && (T::ONE / denominator).finite() {
            return Ok(T::ONE / denominator);
        }
        let head = self.head.index;
        if denominator == T::ZERO && self.biases.is_some() {
            return Err(Error::Denominator(format!(
                "row {row} of head {head} has no key to attend to: key_bias is -inf, or far below its maximum, for every \
                 key that it may see; {NO_KEY_REMEDY}"
            )));
        }
        Err(Error::Denominator(if denominator.finite() && denominator <= T::ZERO {
            format!(
                "row {row} of head {head} has the denominator {:.3e}, which is not positive: its scores lie outside the \
                 region where this polynomial of degree {} resembles exp; use an even degree with \
                 coefficients=\"taylor\", a smaller scale, or Exact()",
                denominator.to_f64(),
                self.engine.degree
            )
        } else {
            format!(
                "row {row} of head {head} has a denominator that overflows or underflows: its scores are too large for a \
                 polynomial of degree {}; use Exact()",
                self.engine.degree
            )
        }))
    }

    fn backward(&self, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
        let HeadGrads { dq, dk, dv: grad_v, dkey_bias } = grads;
        let (degree, d, dv) = (self.potential_degree(), self.head.q.ncols(), self.e() - 1);
        let (n, m, tile) = (self.head.q.nrows(), self.head.k.nrows(), self.tile(degree));
        let potential = self.tree.weights(&self.potential(), self.scale);
        let level = self.level(0..m);

        let state = self.whole_state(m, degree, |keys, scratch| self.key_state(keys, level, degree, scratch))?;
        let state = weigh(&state, potential.len(), &potential);
        dq.par_chunks_mut(tile * d).enumerate().with_min_len(TILES_A_SCRATCH).try_for_each_init(
            || self.scratch(degree),
            |scratch, (i, dq)| {
                self.ctx.check()?;
                let (start, len) = (i * tile, dq.len() / d);
                self.load_queries(start, len, &mut scratch.x);
                self.load_upstream(&up, start, len, |i| up.rows.scale[i], &mut scratch.values);
                scratch.pullback(self.tree, degree, &state, len);
                store_transposed(&scratch.dx, len, d, dq, |_| T::ONE);
                Ok(())
            },
        )?;
        drop(state);

        let state = self.whole_state(n, degree, |queries, scratch| {
            self.query_state(&up, queries, degree, |i| up.rows.scale[i], scratch)
        })?;
        let weighted = weigh(&state, potential.len(), &potential);
        let of_values = weigh(&state, potential.len(), &self.tree.weights(&self.constants.coefficients, self.scale));
        drop(state);
        let mut db = optional_chunks(dkey_bias, tile, m.div_ceil(tile));
        (dk.par_chunks_mut(tile * d), grad_v.par_chunks_mut(tile * dv), db.par_iter_mut())
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || self.scratch(degree),
                |scratch, (j, (dk, dv, db))| {
                    let grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias: db.as_deref_mut() };
                    self.key_gradients(j * tile, level, &weighted, &of_values, scratch, grads)
                },
            )
    }

    /// Adds dk, dv and db of the keys from `start` on, no more than a tile, from the query state weighted by the
    /// potential's and by p's weights. `level` is what the keys' weights are relative to, in the state too.
    pub fn key_gradients(
        &self,
        start: usize,
        level: f64,
        potential: &[T],
        of_values: &[T],
        scratch: &mut Scratch<T>,
        mut grads: HeadGrads<'_, T>,
    ) -> Result<()> {
        self.ctx.check()?;
        let (e, d, dv) = (self.e(), self.head.k.ncols(), self.e() - 1);
        let len = grads.dk.len() / d;
        self.load_keys(start, len, &mut scratch.x);
        self.load_values(start, len, None, &mut scratch.values);
        scratch.pullback(self.tree, self.potential_degree(), potential, len);
        let mut out = std::mem::take(&mut scratch.out);
        scratch.apply(self.tree, self.engine.degree, of_values, len, view_mut(&mut out, e, len));
        scratch.out = out;
        let Scratch { values, out, dx, .. } = scratch;
        for t in 0..len {
            let w = self.weight(start + t, level);
            let mut db = out[dv * len + t];
            for c in 0..dv {
                let g = out[c * len + t];
                grads.dv[t * dv + c] += w * g;
                db += g * values[c * len + t];
            }
            for c in 0..d {
                grads.dk[t * d + c] += w * dx[c * len + t];
            }
            if let Some(grad) = &mut grads.dkey_bias {
                grad[t] += w * db;
            }
        }
        Ok(())
    }

    /// The gradients behind the shifts: see the top of this file.
    fn backward_through_shift(&self, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
        let (n, m, d, dv) = (self.head.q.nrows(), self.head.k.nrows(), self.head.q.ncols(), self.e() - 1);
        let Constants { query_shift: alpha, key_shift: beta, .. } = &self.constants;
        let (mut dk, mut dv_, mut db) = (vec![T::ZERO; m * d], vec![T::ZERO; m * dv], vec![T::ZERO; m]);
        self.backward(up, HeadGrads { dq: &mut *grads.dq, dk: &mut dk, dv: &mut dv_, dkey_bias: Some(&mut db) })?;
        let c = T::of(self.scale);
        for (dk, &db) in dk.chunks_mut(d).zip(&db) {
            for (dk, &alpha) in dk.iter_mut().zip(alpha) {
                *dk += c * db * alpha;
            }
        }
        if self.engine.gradient == Gradient::Consistent {
            let mut dalpha = column_sums(grads.dq, d);
            let mut dbeta = column_sums(&dk, d);
            for (col, (dalpha, dbeta)) in dalpha.iter_mut().zip(&mut dbeta).enumerate() {
                let through_bias: f64 =
                    (0..m).map(|j| db[j].to_f64() * (self.head.k[(j, col)].to_f64() - beta[col].to_f64())).sum();
                *dalpha = (self.scale * through_bias - *dalpha) / n as f64;
                *dbeta = -*dbeta / m as f64;
            }
            add_to_rows(grads.dq, &dalpha);
            add_to_rows(&mut dk, &dbeta);
        }
        let into = |total: &mut [T], own: &[T]| total.iter_mut().zip(own).for_each(|(t, &o)| *t += o);
        into(grads.dk, &dk);
        into(grads.dv, &dv_);
        if let Some(total) = grads.dkey_bias {
            into(total, &db);
        }
        Ok(())
    }
}

/// Buffers of one thread's tiles, and what is done with the features of a tile. Those of the highest degree, most of
/// them, are formed a piece at a time and used at once.
pub(crate) struct Scratch<T> {
    /// Queries or keys, `(d, len)`.
    pub x: Vec<T>,
    /// Extended values or upstream gradients, `(e, len)`.
    pub values: Vec<T>,
    /// Gradients of x, `(d, len)`.
    pub dx: Vec<T>,
    /// A second `(e, len)`.
    out: Vec<T>,
    /// The features below the highest degree, and a piece of the others.
    low: Vec<T>,
    piece: Vec<T>,
    /// Their gradients.
    dlow: Vec<T>,
    dpiece: Vec<T>,
}

impl<T: Real> Scratch<T> {
    /// For tiles of at most `len` tokens and features up to `degree`.
    fn new(pass: &Pass<'_, T>, len: usize, degree: usize) -> Self {
        let zeros = |rows: usize| vec![T::ZERO; rows * len];
        let (d, e, low) = (pass.head.q.ncols(), pass.e(), pass.tree.rank(degree - 1));
        Self {
            x: zeros(d),
            values: zeros(e),
            dx: zeros(d),
            out: zeros(e),
            low: zeros(low),
            piece: zeros(PIECE),
            dlow: zeros(low),
            dpiece: zeros(PIECE),
        }
    }

    /// Calls `body` with every piece of the features of `x` up to `degree`.
    fn for_each_piece(
        &mut self,
        tree: &Monomials,
        degree: usize,
        len: usize,
        mut body: impl FnMut(Range<usize>, &[T]),
    ) {
        for piece in tree.pieces(degree) {
            if piece.start == 0 {
                tree.features(&self.x, len, piece.end, &mut self.low);
                body(piece, &self.low);
            } else {
                tree.piece(&self.x, &self.low, len, piece.clone(), &mut self.piece);
                body(piece, &self.piece);
            }
        }
    }

    /// Adds `values φ(x)^T` to a state.
    fn add_to(&mut self, state: &mut State<T>, tree: &Monomials, degree: usize, len: usize) {
        state.start_tile(len);
        let values = std::mem::take(&mut self.values);
        self.for_each_piece(tree, degree, len, |piece, f| state.add(&values, piece, f, len));
        self.values = values;
    }

    /// `out = state φ(x)`, for a weighted state `(e, r)`.
    pub fn apply(&mut self, tree: &Monomials, degree: usize, state: &[T], len: usize, mut out: MatMut<'_, T>) {
        let state = view(state, out.nrows(), tree.rank(degree));
        self.for_each_piece(tree, degree, len, |piece, f| {
            let (state, f) = (state.subcols(piece.start, piece.len()), view(f, piece.len(), len));
            if piece.start == 0 {
                product(out.rb_mut(), state, f, T::ONE);
            } else {
                add_product(out.rb_mut(), state, f, T::ONE);
            }
        });
    }

    /// `dx = J_φ(x)^T state^T values`, for a weighted state `(e, r)`.
    pub fn pullback(&mut self, tree: &Monomials, degree: usize, state: &[T], len: usize) {
        let Self { x, values, dx, low, dlow, dpiece, .. } = self;
        let r = tree.rank(degree);
        let e = state.len() / r;
        let (state, values) = (view(state, e, r), view(values, e, len));
        dx.fill(T::ZERO);
        for piece in tree.pieces(degree) {
            let df = if piece.start == 0 { &mut *dlow } else { &mut *dpiece };
            let of_piece = state.subcols(piece.start, piece.len()).transpose();
            product(view_mut(df, piece.len(), len), of_piece, values, T::ONE);
            if piece.start == 0 {
                tree.features(x, len, piece.end, low);
            } else {
                tree.pullback_piece(x, low, len, piece, dpiece, dlow, dx);
            }
        }
        tree.pullback(x, low, len, tree.rank(degree - 1), dlow, dx);
    }
}

/// The first token and the length of each tile of a range.
pub(crate) fn tiles(tokens: Range<usize>, tile: usize) -> impl Iterator<Item = (usize, usize)> {
    tokens.clone().step_by(tile).map(move |start| (start, tile.min(tokens.end - start)))
}

/// `x` in chunks of `len`, or as many `None`.
pub(crate) fn optional_chunks<T>(x: Option<&mut [T]>, len: usize, count: usize) -> Vec<Option<&mut [T]>> {
    match x {
        Some(x) => x.chunks_mut(len).map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}

/// The mean row.
fn mean<T: Real>(x: MatRef<'_, T>) -> Vec<T> {
    x.col_iter().map(|c| T::of(c.iter().map(|x| x.to_f64()).sum::<f64>() / x.nrows() as f64)).collect()
}

fn column_sums<T: Real>(x: &[T], width: usize) -> Vec<f64> {
    let mut sums = vec![0.0; width];
    for row in x.chunks_exact(width) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += x.to_f64();
        }
    }
    sums
}

fn add_to_rows<T: Real>(x: &mut [T], by: &[f64]) {
    for row in x.chunks_exact_mut(by.len()) {
        for (x, &by) in row.iter_mut().zip(by) {
            *x += T::of(by);
        }
    }
}

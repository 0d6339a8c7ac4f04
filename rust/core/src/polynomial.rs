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
//! Sums over tokens are added up in float64: see `state.rs`.

use std::ops::Range;

use faer::{Accum, MatRef};
use rayon::prelude::*;

use crate::attention::{Attention, Head, HeadGrads, Upstream};
use crate::causal;
use crate::context::Context;
use crate::engine::{self, Coefficients, Gradient, Shift};
use crate::error::{Error, Result};
use crate::exact::NO_KEY_REMEDY;
use crate::fit;
use crate::monomials::{self, Monomials, PIECE};
use crate::real::Real;
use crate::state::{State, Tokens, weigh};
use crate::tile::{load_rows, load_transposed, multiply, product, store_transposed, view, view_mut, widen};

/// What a head's data decide before its pass: kept for the backward pass, which takes it as given.
#[derive(Debug, Clone)]
pub(crate) struct Constants<T> {
    /// `a_0 .. a_g`.
    pub coefficients: Vec<f64>,
    /// `α`, empty for none.
    query_shift: Vec<T>,
    /// `β`, empty for none.
    key_shift: Vec<T>,
    /// The state of all keys, not weighted, where the backward pass without a mask uses the same one and it is small.
    key_state: Option<Vec<f64>>,
}

/// Numbers in a tile of features that stay in a core's second-level cache.
const TILE_NUMBERS: usize = 1 << 17;
/// Tiles that share one set of buffers at least: new buffers cost as much as a tile.
const TILES_A_SCRATCH: usize = 8;
/// Tokens at the start of a causal sequence that coefficients are fitted to.
pub(crate) const FIT_PREFIX: usize = 1024;
/// Numbers in one state at the most (1 GiB): beyond this neither memory nor time is reasonable.
pub(crate) const LARGEST_STATE: usize = 1 << 27;
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

/// The degree of the potential: see the top of this file.
fn potential_degree(engine: &engine::Polynomial) -> usize {
    engine.degree + usize::from(engine.gradient == Gradient::ClosedForm)
}

/// The monomials that every head's pass needs: up to the degree of p, and of the potential where there is a `backward`
/// pass. An error where that one is out of reach, before a forward pass that could have no backward one.
pub(crate) fn tree(engine: &engine::Polynomial, d: usize, e: usize, backward: bool) -> Result<Monomials> {
    let potential_degree = potential_degree(engine);
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
    let mut pass = Pass::new(ctx, head, attention, engine, tree, None)?;
    if attention.causal {
        causal::forward(&pass, out, row_max, row_scale)?;
    } else {
        let state = pass.forward(out, row_max, row_scale)?;
        // Only where it is smaller than the keys and values that it stands for.
        let small = state.len() <= head.k.nrows() * (head.k.ncols() + head.v.ncols());
        pass.constants.key_state = (small && engine.gradient == Gradient::Consistent).then_some(state);
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
    let pass = Pass::new(ctx, head, attention, engine, tree, Some(constants))?;
    if attention.causal {
        causal::backward(&pass, up, grads)
    } else if engine.shift == Shift::None {
        pass.backward(constants.key_state.as_deref(), up, grads)
    } else {
        pass.backward_through_shift(constants.key_state.as_deref(), up, grads)
    }
}

impl<'a, T: Real> Pass<'a, T> {
    fn new(
        ctx: &'a Context,
        head: &'a Head<'a, T>,
        attention: &Attention,
        engine: &'a engine::Polynomial,
        tree: &'a Monomials,
        constants: Option<&Constants<T>>,
    ) -> Result<Self> {
        let none =
            Constants { coefficients: Vec::new(), query_shift: Vec::new(), key_shift: Vec::new(), key_state: None };
        let mut pass = Self { ctx, head, engine, scale: attention.scale, constants: none, tree, biases: None };
        let fit_it = constants.is_none();
        match constants {
            Some(constants) if constants.coefficients.len() != engine.degree + 1 => {
                return Err(Error::Argument("saved comes from a forward pass of another degree".into()));
            }
            Some(Constants { coefficients, query_shift, key_shift, .. }) => {
                pass.constants.coefficients.clone_from(coefficients);
                pass.constants.query_shift.clone_from(query_shift);
                pass.constants.key_shift.clone_from(key_shift);
            }
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
                    x.subrows(0, if causal { all.min(FIT_PREFIX) } else { all })
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
        potential_degree(self.engine)
    }

    /// Coefficients of the polynomial whose gradient stands in dq and dk: `P` with `P' = p`, or `p` itself.
    ///
    /// The constant of `P` is free. With that of `p`, Taylor's `P` continues `p`: then one weighted state is both.
    pub fn potential(&self) -> Vec<f64> {
        let a = &self.constants.coefficients;
        match self.engine.gradient {
            Gradient::Consistent => a.clone(),
            Gradient::ClosedForm => {
                std::iter::once(a[0]).chain(a.iter().enumerate().map(|(j, a)| a / (j + 1) as f64)).collect()
            }
        }
    }

    /// The weights of the potential's features, and those of p's where they are not the first of them.
    pub fn weights(&self) -> (Vec<f64>, Option<Vec<f64>>) {
        let (a, potential) = (&self.constants.coefficients, self.potential());
        let own = (potential[..a.len()] != a[..]).then(|| self.tree.weights(a, self.scale));
        (self.tree.weights(&potential, self.scale), own)
    }

    /// Tokens a tile, for features up to `degree`.
    pub fn tile(&self, degree: usize) -> usize {
        let fit = TILE_NUMBERS / self.tree.rank(degree - 1).max(PIECE);
        // An odd multiple of 16: see PIECE.
        (fit / 32 * 32).clamp(64, 128) - 16
    }

    /// Buffers for tiles with features up to `degree`, for a pullback too where that is asked for.
    pub fn scratch(&self, degree: usize, pullback: bool) -> Scratch<T> {
        Scratch::new(self, self.tile(degree), degree, pullback)
    }

    /// Buffers for tiles of tokens that are added to states of features up to `degree`.
    pub fn tokens(&self, degree: usize) -> Tokens<T> {
        Tokens::new(self.tree, self.head.q.ncols(), self.e(), self.tile(degree), degree)
    }

    pub fn load_queries(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.q, start, len, &self.constants.query_shift, x);
    }

    /// Shifted keys; those that a bias of `-inf` removes are 0, whatever they hold.
    fn load_keys(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.k, start, len, &self.constants.key_shift, x);
        if self.biases.is_some() {
            for t in (0..len).filter(|t| self.bias(start + t) == f64::NEG_INFINITY) {
                x.iter_mut().skip(t).step_by(len).take(self.head.k.ncols()).for_each(|x| *x = T::ZERO);
            }
        }
    }

    /// `[v_j; 1]` as `(e, len)`.
    fn load_values(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.v, start, len, &[], x);
        let e = self.e();
        x[(e - 1) * len..e * len].fill(T::ONE);
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
        load_rows(self.head.k, start, len, &self.constants.key_shift, tokens.width, &mut tokens.x);
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
        tokens.add_to(state, accum, self.tree, degree, len);
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
        load_rows(self.head.q, start, len, &self.constants.query_shift, tokens.width, &mut tokens.x);
        load_rows(up.dout, start, len, &[], e, &mut tokens.values);
        for (t, values) in tokens.values.chunks_exact_mut(e).enumerate().take(len) {
            values[e - 1] = -up.delta[start + t];
            let by = factor(start + t);
            values.iter_mut().for_each(|v| *v *= by);
        }
        tokens.add_to(state, accum, self.tree, degree, len);
        Ok(())
    }

    /// The whole head's state: partial sums over fixed ranges, added up in order.
    fn whole_state(
        &self,
        tokens: usize,
        degree: usize,
        add_tile: impl Fn((&mut [T], Accum), (usize, usize), &mut Tokens<T>) -> Result<()> + Sync,
    ) -> Result<Vec<f64>> {
        let (e, r, tile) = (self.e(), self.tree.rank(degree), self.tile(degree));
        let rows = self.partition(tokens, tile, degree);
        let partials: Vec<_> = (0..tokens.div_ceil(rows))
            .into_par_iter()
            .map_init(
                || self.tokens(degree),
                |buffers, p| {
                    let mut state = State::new(e, r);
                    for (start, len) in tiles(p * rows..tokens.min((p + 1) * rows), tile) {
                        add_tile(state.tile(len), (start, len), buffers)?;
                    }
                    Ok(state.finish())
                },
            )
            .collect::<Result<_>>()?;
        let mut partials = partials.into_iter();
        let mut sum = partials.next().unwrap_or_else(|| vec![0.0; r * e]);
        for partial in partials {
            widen(&partial, &mut sum);
        }
        Ok(sum)
    }

    /// Tokens of one unit of parallel work, a multiple of `step`: as many units as memory for their states allows, up
    /// to 32.
    fn partition(&self, tokens: usize, step: usize, degree: usize) -> usize {
        let state = self.tree.rank(degree) * self.e();
        let units = (PARTIAL_STATES / state).clamp(8, 32).min((LARGEST_STATE / state).max(1));
        let units = 1 << units.ilog2();
        tokens.div_ceil(units).next_multiple_of(step).max(step)
    }

    /// Writes `out` and the row factors, and returns the state of all keys.
    fn forward(&self, out: &mut [T], row_max: &mut [T], row_scale: &mut [T]) -> Result<Vec<f64>> {
        let (g, e, dv, m) = (self.engine.degree, self.e(), self.e() - 1, self.head.k.nrows());
        let level = self.level(0..m);
        let sum = self.whole_state(m, g, |state, keys, tokens| self.add_keys(state, keys, level, g, tokens))?;
        let r = self.tree.rank(g);
        let state = weigh(&sum, r, &self.tree.weights(&self.constants.coefficients, self.scale));
        let state = view(&state, e, r);
        let tile = self.tile(g);
        row_max.fill(T::ZERO);
        (out.par_chunks_mut(tile * dv), row_scale.par_chunks_mut(tile))
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || self.scratch(g, false),
                |scratch, (i, (out, scale))| {
                    self.ctx.check()?;
                    let (start, len) = (i * tile, scale.len());
                    self.load_queries(start, len, &mut scratch.x);
                    scratch.apply(self.tree, g, state, len);
                    for (t, scale) in scale.iter_mut().enumerate() {
                        *scale = self.inverse(scratch.out[dv * len + t], start + t)?;
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

    /// Adds the gradients, from the state of all keys where the forward pass has left it.
    fn backward(&self, key_state: Option<&[f64]>, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
        let HeadGrads { dq, dk, dv: grad_v, dkey_bias } = grads;
        let (degree, d, e) = (self.potential_degree(), self.head.q.ncols(), self.e());
        let (n, m, dv, tile, r) =
            (self.head.q.nrows(), self.head.k.nrows(), e - 1, self.tile(degree), self.tree.rank(degree));
        let (potential, own) = self.weights();
        let level = self.level(0..m);

        let state = match key_state.filter(|sum| sum.len() == e * r) {
            Some(sum) => weigh(sum, r, &potential),
            None => weigh(
                &self
                    .whole_state(m, degree, |state, keys, tokens| self.add_keys(state, keys, level, degree, tokens))?,
                r,
                &potential,
            ),
        };
        let of_keys = view(&state, e, r);
        dq.par_chunks_mut(tile * d).enumerate().with_min_len(TILES_A_SCRATCH).try_for_each_init(
            || self.scratch(degree, true),
            |scratch, (i, dq)| {
                self.ctx.check()?;
                let (start, len) = (i * tile, dq.len() / d);
                self.load_queries(start, len, &mut scratch.x);
                self.load_upstream(&up, start, len, &mut scratch.values);
                scratch.pullback(self.tree, degree, of_keys, len);
                store_transposed(&scratch.dx, len, d, dq, |t| up.rows.scale[start + t]);
                Ok(())
            },
        )?;
        drop(state);

        let sum = self.whole_state(n, degree, |state, queries, tokens| {
            self.add_queries(state, &up, queries, |i| up.rows.scale[i], degree, tokens)
        })?;
        let state = weigh(&sum, r, &potential);
        let of_potential = view(&state, e, r);
        let own = own.map(|weights| weigh(&sum, r, &weights));
        drop(sum);
        let of_values = own.as_ref().map_or(of_potential, |own| view(own, e, own.len() / e));
        let mut db = optional_chunks(dkey_bias, tile, m.div_ceil(tile));
        (dk.par_chunks_mut(tile * d), grad_v.par_chunks_mut(tile * dv), db.par_iter_mut())
            .into_par_iter()
            .enumerate()
            .with_min_len(TILES_A_SCRATCH)
            .try_for_each_init(
                || self.scratch(degree, true),
                |scratch, (j, (dk, dv, db))| {
                    let grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias: db.as_deref_mut() };
                    self.key_gradients(j * tile, level, of_potential, of_values, scratch, grads)
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
        scratch.pullback(self.tree, self.potential_degree(), potential, len);
        scratch.apply(self.tree, self.engine.degree, of_values, len);
        let Scratch { values, out, dx, .. } = scratch;
        for t in 0..len {
            let w = self.weight(start + t, level);
            for c in 0..dv {
                grads.dv[t * dv + c] += w * out[c * len + t];
            }
            for c in 0..d {
                grads.dk[t * d + c] += w * dx[c * len + t];
            }
            if let Some(grad) = &mut grads.dkey_bias {
                let db = (0..=dv).map(|c| out[c * len + t] * values[c * len + t]).sum::<T>();
                grad[t] += w * db;
            }
        }
        Ok(())
    }

    /// The gradients behind the shifts: see the top of this file.
    fn backward_through_shift(
        &self,
        key_state: Option<&[f64]>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
    ) -> Result<()> {
        let (n, m, d, dv) = (self.head.q.nrows(), self.head.k.nrows(), self.head.q.ncols(), self.e() - 1);
        let Constants { query_shift: alpha, key_shift: beta, .. } = &self.constants;
        let (mut dk, mut dv_, mut db) = (vec![T::ZERO; m * d], vec![T::ZERO; m * dv], vec![T::ZERO; m]);
        let own = HeadGrads { dq: &mut *grads.dq, dk: &mut dk, dv: &mut dv_, dkey_bias: Some(&mut db) };
        self.backward(key_state, up, own)?;
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
    fn new(pass: &Pass<'_, T>, len: usize, degree: usize, pullback: bool) -> Self {
        let zeros = |rows: usize| vec![T::ZERO; rows * len];
        let (d, e, r) = (pass.head.q.ncols(), pass.e(), pass.tree.rank(degree));
        let low = pass.tree.rank(pass.tree.low_degree(degree));
        let piece = if low < r { PIECE } else { 0 };
        let only = |rows: usize| if pullback { zeros(rows) } else { Vec::new() };
        Self {
            x: zeros(d),
            values: only(e),
            dx: only(d),
            out: zeros(e),
            low: zeros(low),
            piece: zeros(piece),
            dlow: only(low),
            dpiece: only(piece),
        }
    }

    /// `out = state φ(x)` with features up to `degree`, for a weighted state of at least so many columns.
    pub fn apply(&mut self, tree: &Monomials, degree: usize, state: MatRef<'_, T>, len: usize) {
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
    pub fn pullback(&mut self, tree: &Monomials, degree: usize, state: MatRef<'_, T>, len: usize) {
        let Self { x, values, dx, low, dlow, dpiece, .. } = self;
        let values = view(values, state.nrows(), len);
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

/// The first token and the length of each tile of a range.
pub(crate) fn tiles(tokens: Range<usize>, tile: usize) -> impl Iterator<Item = (usize, usize)> {
    tokens.clone().step_by(tile).map(move |start| (start, tile.min(tokens.end - start)))
}

/// `x` in chunks of `len`, or as many `None`.
fn optional_chunks<T>(x: Option<&mut [T]>, len: usize, count: usize) -> Vec<Option<&mut [T]>> {
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

//! The polynomial engine: `exp(s)` replaced by `p(s) = sum_{j<=g} a_j s^j`, so that attention costs time linear in its
//! length.
//!
//! With the [monomials](crate::linear::monomials) `φ`, `p(c q.k) = φ(q)^T diag(ω_p) φ(k)`; `linear` makes attention of that.
//!
//! Backward, with `f_ij = w_j p(c q_i.k_j) / D_i` and `e_ij = dout_i.v_j - delta_i`:
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
//! differentiated is called the *potential*.

mod bound;
mod fit;

use std::sync::{Arc, Mutex, PoisonError};

pub(crate) use self::bound::{largest_relative_error, longest_row};
pub(crate) use self::fit::Sample;
use self::fit::taylor;
use super::{Engine, Prepared};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::linear::full;
use crate::linear::levels;
use crate::linear::monomials::{self, Monomials};
use crate::linear::nearby::{NearKeys, NearWeights, Nearby};
use crate::linear::pass::Pass;
use crate::linear::polynomials::Polynomials;
use crate::linear::scan;
use crate::linear::shifts::{PREFIX, Relative, Shifts, biases, live_keys, mean};
use crate::linear::state::{LARGEST_STATE, LinearState};
use crate::memory::collected;
use crate::numerics::real::Real;
use crate::problem::grads::{BiasGrads, HeadGrads, RowFactors, Upstream};
use crate::problem::heads::{Head, Sizes};
use crate::spec::{self, Coefficients, Diagonal, Gradient, Shift};

/// The polynomial engine with its options, and the monomials that all heads share.
#[derive(Debug)]
pub(crate) struct Polynomial {
    options: spec::Polynomial,
    trees: Arc<Trees>,
}

/// What is known of a head before its pass.
#[derive(Debug)]
struct OfHead<T> {
    options: spec::Polynomial,
    trees: Arc<Trees>,
    form: Form<T>,
    /// The state of all keys, where the backward pass without a mask uses the same one and it is small.
    of_keys: Option<LinearState>,
}

/// A head's weights pair by pair: `e^b' p(c q'.k')` for far keys, the exact ones for near keys.
#[derive(Debug, Clone)]
pub(crate) struct Form<T> {
    /// `a_0 .. a_g`.
    pub coefficients: Vec<f64>,
    pub shifts: Shifts<T>,
    /// Under a causal mask.
    pub near: NearKeys,
    /// Whether the gradient is the derivative of the forward pass.
    pub consistent: bool,
}

/// The monomials up to the degree of `p`, for forward passes, and up to that of the potential, for backward ones: made when
/// they are first asked for.
#[derive(Debug)]
struct Trees {
    d: usize,
    degrees: [usize; 2],
    trees: [Mutex<Option<Arc<Monomials>>>; 2],
}

/// Which of [`Trees`].
#[derive(Debug, Clone, Copy)]
enum Direction {
    Forward,
    Backward,
}

impl Trees {
    fn get(&self, direction: Direction) -> Result<Arc<Monomials>> {
        // Where both degrees are the same, so are the trees.
        let which = if self.degrees[0] == self.degrees[1] { 0 } else { direction as usize };
        let mut tree = self.trees[which].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tree) = &*tree {
            return Ok(tree.clone());
        }
        let made = Arc::new(Monomials::new(self.d, self.degrees[which])?);
        *tree = Some(made.clone());
        Ok(made)
    }
}

/// The degree of the potential: see the top of this file.
pub(crate) fn potential_degree(options: &spec::Polynomial) -> usize {
    options.degree.saturating_add(usize::from(options.gradient == Gradient::ClosedForm))
}

/// Which keys are near, under a causal mask.
pub(crate) fn near_keys(options: &spec::Polynomial) -> NearKeys {
    NearKeys {
        window: if options.diagonal == Diagonal::Exact { options.window } else { 0 },
        from_prefix: options.coefficients == Coefficients::Fitted,
    }
}

impl Polynomial {
    /// An error where the potential's degree is out of reach, before a forward pass that could have no backward one.
    pub fn new(options: spec::Polynomial, sizes: &Sizes) -> Result<Self> {
        let (d, d_v, degree) = (sizes.d, sizes.d_v, potential_degree(&options));
        match monomials::rank(d, degree) {
            Some(r) if r.saturating_mul(d_v + 1) <= LARGEST_STATE => {
                let trees = Trees { d, degrees: [options.degree, degree], trees: Default::default() };
                Ok(Self { options, trees: Arc::new(trees) })
            }
            _ => Err(Error::Argument(format!(
                "degree = {} with d = {d} and dv = {d_v} needs more monomials (up to degree {degree}) than memory holds; use a \
                 lower degree, gradient=\"consistent\", or Exact()",
                options.degree,
            ))),
        }
    }
}

impl<T: Real> Engine<T> for Polynomial {
    fn prepare(&self, _: &Context, head: &Head<'_, T>) -> Result<Box<dyn Prepared<T>>> {
        let options = &self.options;
        let shifts = shifts(head, &options.shift)?;
        let coefficients = coefficients(head, options, &shifts)?;
        let consistent = options.gradient == Gradient::Consistent;
        let form = Form { coefficients, shifts, near: near_keys(options), consistent };
        Ok(Box::new(OfHead { options: options.clone(), trees: self.trees.clone(), form, of_keys: None }))
    }
}

impl<T: Real> OfHead<T> {
    /// Calls `run` with the head's pass.
    fn with_pass<R>(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        direction: Direction,
        run: impl FnOnce(Pass<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let Form { coefficients, shifts, near, consistent } = &self.form;
        let (tree, consistent) = (self.trees.get(direction)?, *consistent);
        let potential_degree = potential_degree(&self.options);
        let scale = head.scores.scale;
        let features = Polynomials { tree: &tree, coefficients, potential_degree, consistent, scale };
        let weights = match self.options.diagonal {
            Diagonal::Exact => NearWeights::Exponential,
            Diagonal::Polynomial => NearWeights::Polynomial { coefficients, consistent },
        };
        run(Pass::new(ctx, head, &features, shifts, Nearby { keys: *near, weights })?)
    }
}

impl<T: Real> Prepared<T> for OfHead<T> {
    fn name(&self) -> String {
        format!("degree {}", self.options.degree)
    }

    fn forward(
        &mut self,
        ctx: &Context,
        head: &Head<'_, T>,
        out: &mut [T],
        row_max: &mut [T],
        row_scale: &mut [T],
    ) -> Result<()> {
        self.of_keys = self.with_pass(ctx, head, Direction::Forward, |pass| {
            if !head.mask.is_none() {
                return scan::forward(&pass, out, row_max, row_scale).map(|()| None);
            }
            let state = full::forward(&pass, out, row_max, row_scale)?;
            // Only where it is smaller than the keys and values that it stands for.
            let small = state.sum.len() <= head.m() * (head.d() + head.d_v());
            Ok((small && self.form.consistent).then_some(state))
        })?;
        Ok(())
    }

    fn backward(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
        _: Option<BiasGrads<'_, T>>,
    ) -> Result<()> {
        self.with_pass(ctx, head, Direction::Backward, |pass| {
            if !head.mask.is_none() {
                scan::backward(&pass, up, grads)
            } else if self.options.shift == Shift::Mean && self.form.consistent {
                full::backward_through_means(&pass, self.of_keys.as_ref(), up, grads)
            } else {
                full::backward(&pass, self.of_keys.as_ref(), up, grads)
            }
        })
    }

    fn log_row_sums(&self, head: &Head<'_, T>, rows: RowFactors<'_, T>) -> Result<Vec<f64>> {
        levels::log_row_sums(head, &self.form.shifts, None, rows)
    }

    fn error_bound(&self, head: &Head<'_, T>, out: &[T]) -> Option<f64> {
        bound::error_bound(head, &self.form, out)
    }

    fn polynomial(&self) -> Option<&Form<T>> {
        Some(&self.form)
    }
}

/// `α` and `β`.
pub(crate) fn shifts<T: Real>(head: &Head<'_, T>, shift: &Shift) -> Result<Shifts<T>> {
    Ok(match shift {
        Shift::None => Shifts::none(),
        Shift::Mean => {
            let keys = live_keys(head, head.m())?;
            Shifts { query: mean(head.q, 0..head.n()), key: mean(head.k, keys.into_iter()) }
        }
        Shift::Given(query, key) => {
            let d = head.d();
            for (name, given) in [("query", query), ("key", key)] {
                if given.len() != d {
                    return Err(Error::Shape(format!(
                        "shift has {} numbers for the {name}; expected d = {d}",
                        given.len()
                    )));
                }
            }
            let round = |x: &[f64]| x.iter().map(|&x| T::of(x)).collect();
            Shifts { query: round(query), key: round(key) }
        }
    })
}

/// `a_0 .. a_g`.
fn coefficients<T: Real>(head: &Head<'_, T>, options: &spec::Polynomial, shifts: &Shifts<T>) -> Result<Vec<f64>> {
    match &options.coefficients {
        Coefficients::Taylor => Ok(taylor(options.degree)),
        Coefficients::Given(a) => collected(a.iter().copied(), "coefficients"),
        // Under a causal mask the fit sees only the prefix: every query that meets the polynomial is later.
        Coefficients::Fitted => {
            let causal = !head.mask.is_none();
            fit_sample(head, shifts, causal, |i, j| !causal || j <= i)?.fit(options.degree)
        }
    }
}

/// The scores that coefficients are fitted to; of the first [`PREFIX`] tokens only where `prefix`. `sees(i, j)` is
/// whether query i sees key j.
pub(crate) fn fit_sample<T: Real>(
    head: &Head<'_, T>,
    shifts: &Shifts<T>,
    prefix: bool,
    sees: impl Fn(usize, usize) -> bool,
) -> Result<Sample> {
    let seen = |all: usize| if prefix { all.min(PREFIX) } else { all };
    // A prefix is of causal heads, whose engines refuse the biases that this refuses.
    let relative = if prefix { Relative::ToNothing } else { Relative::ToLargest };
    let biases = biases(head, relative, shifts, 0.0)?;
    let keys = live_keys(head, seen(head.m()))?;
    let bias = |j: usize| biases.as_ref().map_or(0.0, |b| b.of_keys[j]);
    let level = keys.iter().map(|&j| bias(j)).fold(f64::NEG_INFINITY, f64::max);
    let weight = |j: usize| (bias(j) - level).exp();
    Sample::new(
        (head.q.subrows(0, seen(head.n())), &shifts.query),
        (head.k, &keys, &shifts.key),
        weight,
        head.scores.scale,
        sees,
    )
}

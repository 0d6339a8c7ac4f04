//! The polynomial engine: `exp(s)` replaced by `p(s) = sum_{j<=g} a_j s^j`, so that attention costs time linear in its
//! length.
//!
//! With the monomial features `φ` of [`Monomials`], `p(c q.k) = φ(q)^T diag(ω_p) φ(k)`; `low_rank.rs` makes attention of
//! that.
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

use crate::attention::{Attention, Head, HeadGrads, Upstream};
use crate::context::Context;
use crate::engines::fit;
use crate::error::{Error, Result};
use crate::linear::monomials::{self, Monomials};
use crate::linear::pass::{Features, LARGEST_STATE, PREFIX, Pass, Settings, Shifts, biases, live_keys, mean};
use crate::linear::scan;
use crate::numerics::real::Real;
use crate::spec::{self, Coefficients, Gradient, Shift};

/// What a head's data decide before its pass: kept for the backward pass, which takes it as given.
#[derive(Debug, Clone)]
pub(crate) struct Constants<T> {
    /// `a_0 .. a_g`.
    pub coefficients: Vec<f64>,
    pub shifts: Shifts<T>,
    /// The state of all keys, not weighted, where the backward pass without a mask uses the same one and it is small.
    key_state: Option<Vec<f64>>,
}

/// The degree of the potential: see the top of this file.
fn potential_degree(engine: &spec::Polynomial) -> usize {
    engine.degree.saturating_add(usize::from(engine.gradient == Gradient::ClosedForm))
}

/// Coefficients of the polynomial whose gradient stands in dq and dk, for those of p: of `P` with `P' = p`, or of `p`
/// itself where the gradient is consistent.
///
/// The constant of `P` is free. With that of `p`, Taylor's `P` continues `p`: then one weighted state is both.
pub(crate) fn potential(a: &[f64], consistent: bool) -> Vec<f64> {
    if consistent {
        return a.to_vec();
    }
    std::iter::once(a[0]).chain(a.iter().enumerate().map(|(j, a)| a / (j + 1) as f64)).collect()
}

/// The monomials that every head's pass needs: up to the degree of p, and of the potential where there is a `backward`
/// pass. An error where that one is out of reach, before a forward pass that could have no backward one.
pub(crate) fn tree(engine: &spec::Polynomial, d: usize, e: usize, backward: bool) -> Result<Monomials> {
    let potential_degree = potential_degree(engine);
    match monomials::rank(d, potential_degree) {
        Some(r) if r.saturating_mul(e) <= LARGEST_STATE => {
            Monomials::new(d, if backward { potential_degree } else { engine.degree })
        }
        _ => Err(Error::Argument(format!(
            "degree = {} with d = {d} and dv = {} needs more monomials (up to degree {potential_degree}) than memory holds; \
             use a lower degree, gradient=\"consistent\", or Exact()",
            engine.degree,
            e - 1
        ))),
    }
}

pub(crate) fn settings(engine: &spec::Polynomial) -> Settings {
    Settings {
        degree: engine.degree,
        potential_degree: potential_degree(engine),
        consistent: engine.gradient == Gradient::Consistent,
        diagonal: engine.diagonal,
        window: engine.window,
        from_prefix: engine.coefficients == Coefficients::Fitted,
    }
}

/// Writes `out` and the row factors of one head, and returns its constants.
pub(crate) fn forward<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    engine: &spec::Polynomial,
    tree: &Monomials,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<Constants<T>> {
    let shifts = shifts(head, &engine.shift)?;
    let coefficients = coefficients(head, attention, engine, &shifts)?;
    let features = Features::Monomials(tree);
    let pass =
        Pass::new(ctx, head, settings(engine), (attention.causal, attention.scale), features, &coefficients, &shifts)?;
    let mut key_state = None;
    if attention.causal {
        scan::forward(&pass, out, row_max, row_scale)?;
    } else {
        let state = pass.forward(out, row_max, row_scale)?;
        // Only where it is smaller than the keys and values that it stands for.
        let small = state.len() <= head.k.nrows() * (head.k.ncols() + head.v.ncols());
        key_state = (small && engine.gradient == Gradient::Consistent).then_some(state);
    }
    Ok(Constants { coefficients, shifts, key_state })
}

/// Adds one head's gradients.
pub(crate) fn backward<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    engine: &spec::Polynomial,
    tree: &Monomials,
    constants: &Constants<T>,
    up: Upstream<'_, T>,
    grads: HeadGrads<'_, T>,
) -> Result<()> {
    let Constants { coefficients, shifts, key_state } = constants;
    if coefficients.len() != engine.degree + 1 {
        return Err(Error::Argument("saved comes from a forward pass of another degree".into()));
    }
    let features = Features::Monomials(tree);
    let pass =
        Pass::new(ctx, head, settings(engine), (attention.causal, attention.scale), features, coefficients, shifts)?;
    if attention.causal {
        scan::backward(&pass, up, grads)
    } else if engine.shift == Shift::Mean && engine.gradient == Gradient::Consistent {
        pass.backward_through_means(key_state.as_deref(), up, grads)
    } else {
        pass.backward(key_state.as_deref(), up, grads)
    }
}

/// `α` and `β`.
pub(crate) fn shifts<T: Real>(head: &Head<'_, T>, shift: &Shift) -> Result<Shifts<T>> {
    Ok(match shift {
        Shift::None => Shifts { query: Vec::new(), key: Vec::new() },
        Shift::Mean => {
            let keys = live_keys(head, head.k.nrows())?;
            Shifts { query: mean(head.q, 0..head.q.nrows()), key: mean(head.k, keys.into_iter()) }
        }
        Shift::Given { query, key } => {
            let d = head.q.ncols();
            for (name, by) in [("query", query), ("key", key)] {
                if by.len() != d {
                    return Err(Error::Shape(format!(
                        "shift has {} numbers for the {name}; expected d = {d}",
                        by.len()
                    )));
                }
            }
            let round = |x: &[f64]| x.iter().map(|&x| T::of(x)).collect();
            Shifts { query: round(query), key: round(key) }
        }
    })
}

/// `a_0 .. a_g`.
fn coefficients<T: Real>(
    head: &Head<'_, T>,
    attention: &Attention,
    engine: &spec::Polynomial,
    shifts: &Shifts<T>,
) -> Result<Vec<f64>> {
    match &engine.coefficients {
        Coefficients::Taylor => Ok(fit::taylor(engine.degree)),
        Coefficients::Given(a) => Ok(a.clone()),
        // Under a causal mask the fit sees only the prefix: every query that meets the polynomial is later.
        Coefficients::Fitted => {
            let sees = |i, j| !attention.causal || j <= i;
            fit_sample(head, attention.scale, shifts, attention.causal, sees)?.fit(engine.degree)
        }
    }
}

/// The scores that coefficients are fitted to; of the first [`PREFIX`] tokens only where `prefix`. `sees(i, j)` is
/// whether query i sees key j.
pub(crate) fn fit_sample<T: Real>(
    head: &Head<'_, T>,
    scale: f64,
    shifts: &Shifts<T>,
    prefix: bool,
    sees: impl Fn(usize, usize) -> bool,
) -> Result<fit::Sample> {
    let seen = |all: usize| if prefix { all.min(PREFIX) } else { all };
    // A prefix is of causal heads, whose engines refuse the biases that this refuses.
    let biases = biases(head, (prefix, scale), shifts, 0.0)?;
    let keys = live_keys(head, seen(head.k.nrows()))?;
    let bias = |j: usize| biases.as_ref().map_or(0.0, |b| b.of_keys[j]);
    let level = keys.iter().map(|&j| bias(j)).fold(f64::NEG_INFINITY, f64::max);
    let weight = |j: usize| (bias(j) - level).exp();
    fit::Sample::new(
        (head.q.subrows(0, seen(head.q.nrows())), &shifts.query),
        (head.k, &keys, &shifts.key),
        weight,
        scale,
        sees,
    )
}

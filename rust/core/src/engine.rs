//! What an attention engine is, as data.

use crate::error::{Error, Result};

/// How attention is computed.
#[derive(Debug, Clone, PartialEq)]
pub enum Engine {
    /// Softmax, blocked.
    Exact,
    /// The exponential replaced by a polynomial of the scores.
    Polynomial(Polynomial),
}

/// The polynomial engine: `exp(s)` replaced by `p(s) = sum_j a_j s^j`.
#[derive(Debug, Clone, PartialEq)]
pub struct Polynomial {
    /// Degree `g >= 1` of `p`.
    pub degree: usize,
    /// Where `a_0 .. a_g` come from.
    pub coefficients: Coefficients,
    /// Which gradient the backward pass computes.
    pub gradient: Gradient,
    /// What is subtracted from queries and keys before the scores are formed.
    pub shift: Shift,
    /// How the scores near the diagonal are computed under a causal mask.
    pub diagonal: Diagonal,
    /// At least so many tokens before each query are exact, with [`Diagonal::Exact`].
    pub window: usize,
}

impl Default for Polynomial {
    fn default() -> Self {
        Self {
            degree: 2,
            coefficients: Coefficients::Taylor,
            gradient: Gradient::ClosedForm,
            shift: Shift::None,
            diagonal: Diagonal::Exact,
            window: 64,
        }
    }
}

/// Where the coefficients of the polynomial come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Coefficients {
    /// `a_j = 1/j!`.
    Taylor,
    /// Weighted least squares on a sample of the call's own (shifted) scores; under a causal mask, those of the first
    /// 1024 tokens, whose own scores are then all exact: no token's answer depends on a later one.
    Fitted,
    /// Given, `a_0 .. a_g`.
    Given(Vec<f64>),
}

/// Which gradient the backward pass of the polynomial engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gradient {
    /// The exact gradient's formula with the softmax matrix replaced by its low-rank form.
    ClosedForm,
    /// The derivative of the approximate forward pass.
    Consistent,
}

/// What is subtracted from queries and keys before the scores are formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    /// Nothing.
    None,
    /// The mean query and the mean key of the head.
    Mean,
}

/// How the scores near the diagonal are computed under a causal mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Diagonal {
    /// By the exponential.
    Exact,
    /// By the polynomial, as everywhere else.
    Polynomial,
}

impl Engine {
    /// Checks everything that does not depend on the data.
    pub fn validate(&self, causal: bool) -> Result<()> {
        let Engine::Polynomial(p) = self else {
            return Ok(());
        };
        if p.degree == 0 {
            return Err(Error::Argument("degree is 0; expected an integer >= 1".into()));
        }
        if let Coefficients::Given(a) = &p.coefficients {
            if a.len() != p.degree + 1 {
                return Err(Error::Argument(format!(
                    "coefficients has {} entries; expected degree + 1 = {}",
                    a.len(),
                    p.degree + 1
                )));
            }
            if a.iter().any(|x| !x.is_finite()) {
                return Err(Error::NonFinite("coefficients holds NaN or infinity".into()));
            }
        }
        if causal && p.shift == Shift::Mean {
            return Err(Error::Argument(
                "shift=\"mean\" takes means over all tokens, so with causal=True a token would see later ones; \
                 use shift=\"none\""
                    .into(),
            ));
        }
        if causal && p.coefficients == Coefficients::Fitted && p.diagonal == Diagonal::Polynomial {
            return Err(Error::Argument(
                "coefficients=\"fitted\" with causal=True and diagonal=\"polynomial\" would let the first tokens \
                 see later ones through the fit; use diagonal=\"exact\", or give the coefficients as numbers"
                    .into(),
            ));
        }
        Ok(())
    }
}

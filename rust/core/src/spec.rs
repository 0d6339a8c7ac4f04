//! What an attention engine is, and what a tolerance asks for, as data that checks itself and crosses to other languages
//! through serde: an engine is its options and a `kind`, named as there.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::problem::scores::{Mask, Scores};

/// How attention is computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Engine {
    /// Softmax, blocked.
    Exact,
    /// The exponential replaced by a polynomial of the scores.
    Polynomial(Polynomial),
    /// The exponential by its values at a few points.
    Landmark(Landmark),
}

/// A tolerance for every head's results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Auto {
    /// The largest relative error, in (0, 1) and not below [`floor`].
    pub tol: f64,
    /// Whether it holds for gradients too.
    pub gradients: bool,
    /// Whether, under a causal mask, no constant of an engine may be taken from later tokens.
    pub strict_causal: bool,
    /// Of the draws.
    pub seed: u64,
}

/// Landmarks at the most: their kernel matrix and its inverse are dense.
const LARGEST_RANK: usize = 8192;

/// The least tolerance that numbers of so many bytes allow.
pub fn floor(bytes: usize) -> f64 {
    if bytes == 4 { 1e-5 } else { 1e-12 }
}

/// The polynomial engine: `exp(s)` replaced by `p(s) = sum_j a_j s^j`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Coefficients {
    /// `a_j = 1/j!`.
    Taylor,
    /// Weighted least squares on a sample of the call's own (shifted) scores; under a causal mask, those of the first
    /// 1024 tokens, whose own scores are then all exact: no token's answer depends on a later one.
    Fitted,
    /// Given, `a_0 .. a_g`.
    #[serde(untagged)]
    Given(Vec<f64>),
}

/// Which gradient the backward pass of the polynomial engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gradient {
    /// The exact gradient's formula with the softmax matrix replaced by its low-rank form.
    ClosedForm,
    /// The derivative of the approximate forward pass.
    Consistent,
}

/// What is subtracted from queries and keys before the scores are formed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shift {
    /// Nothing.
    None,
    /// The mean query and the mean key of the head.
    Mean,
    /// Constants, `(d,)` each: from every query, and from every key.
    #[serde(untagged)]
    Given(Vec<f64>, Vec<f64>),
}

/// How the scores near the diagonal are computed under a causal mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Diagonal {
    /// By the exponential.
    Exact,
    /// By the polynomial, as everywhere else.
    Polynomial,
}

/// The landmark engine: `e^{c q.k}` by its values at `rank` points among the shifted queries and keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Landmark {
    /// Landmarks at the most.
    pub rank: usize,
    /// Of the draws.
    pub seed: u64,
    /// What was drawn before; `None`: drawn in the call, under a causal mask from its first 1024 tokens, whose own
    /// scores are then all exact.
    #[serde(skip)]
    pub constants: Option<Arc<LandmarkConstants>>,
}

/// What landmarks are: see `engines/landmark`. They cross to other languages as arrays.
#[derive(Debug, Clone, PartialEq)]
pub struct LandmarkConstants {
    /// The factor of the scores that they were made for.
    pub scale: f64,
    /// `(d,)`, subtracted from every query.
    pub query_shift: Vec<f64>,
    /// `(d,)`, subtracted from every key.
    pub key_shift: Vec<f64>,
    /// What shifted queries are divided by, and shifted keys multiplied with.
    pub balance: f64,
    /// `(r, d)`, row-major.
    pub landmarks: Vec<f64>,
    /// `(r, r)`, row-major.
    pub matrix: Vec<f64>,
}

impl LandmarkConstants {
    /// Landmarks.
    pub fn rank(&self) -> usize {
        self.landmarks.len() / self.query_shift.len().max(1)
    }

    /// An error where they do not fit heads of width `d`.
    pub(crate) fn check(&self, d: usize) -> Result<()> {
        let r = self.rank();
        if self.query_shift.len() != d || self.key_shift.len() != d {
            return Err(Error::Shape(format!("landmarks are of width {}; expected d = {d}", self.query_shift.len())));
        }
        if r == 0 || self.landmarks.len() != r * d || self.matrix.len() != r * r {
            return Err(Error::Shape(format!(
                "landmarks hold {} numbers and their matrix {}; expected (r, {d}) and (r, r) with r >= 1",
                self.landmarks.len(),
                self.matrix.len()
            )));
        }
        let all = [&self.query_shift, &self.key_shift, &self.landmarks, &self.matrix];
        let usable = self.balance.is_finite() && self.balance > 0.0 && self.scale.is_finite();
        if !usable || all.iter().any(|x| x.iter().any(|x| !x.is_finite())) {
            return Err(Error::NonFinite("landmarks hold NaN or infinity".into()));
        }
        Ok(())
    }
}

impl Auto {
    /// An error where the tolerance is out of range, or below the [`floor`] of numbers of so many bytes.
    pub fn check(&self, bytes: usize) -> Result<()> {
        if !(self.tol > 0.0 && self.tol < 1.0) {
            return Err(Error::Tolerance(format!("tol is {}; expected a number in (0, 1)", self.tol)));
        }
        if self.tol < floor(bytes) {
            return Err(Error::Tolerance(format!(
                "tol is {:e}; expected at least {:e} for numbers of {bytes} bytes",
                self.tol,
                floor(bytes)
            )));
        }
        Ok(())
    }
}

impl Engine {
    /// What users call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Exact => "Exact",
            Self::Polynomial(_) => "Polynomial",
            Self::Landmark(_) => "Landmark",
        }
    }

    /// An error where its options do not fit together, or not with the scores.
    pub fn check(&self, scores: &Scores) -> Result<()> {
        if *self == Self::Exact {
            return Ok(());
        }
        if let Some(option) = not_low_rank(scores) {
            return Err(self.refuses(option));
        }
        scores.masks.iter().try_for_each(|mask| match self {
            Self::Exact => Ok(()),
            Self::Polynomial(options) => options.check(mask),
            Self::Landmark(options) => options.check(),
        })
    }

    /// The error of an engine that has no such option.
    pub(crate) fn refuses(&self, option: &str) -> Error {
        Error::Argument(format!("{} has no {option}; use Exact()", self.name()))
    }
}

/// An option of scores that low-rank engines do not have, if there is one.
pub(crate) fn not_low_rank(scores: &Scores) -> Option<&'static str> {
    if scores.softcap.is_some() {
        return Some("softcap");
    }
    scores.masks.iter().any(|mask| mask.lower.is_some()).then_some("window")
}

impl Landmark {
    /// An error where the rank is out of range.
    pub fn check(&self) -> Result<()> {
        if self.rank == 0 || self.rank > LARGEST_RANK {
            return Err(Error::Argument(format!("rank is {}; expected an integer of 1 to {LARGEST_RANK}", self.rank)));
        }
        Ok(())
    }
}

impl Polynomial {
    fn check(&self, mask: &Mask) -> Result<()> {
        let causal = mask.upper.is_some();
        if self.degree == 0 {
            return Err(Error::Argument("degree is 0; expected an integer >= 1".into()));
        }
        if let Coefficients::Given(a) = &self.coefficients {
            if a.len() != self.degree.saturating_add(1) {
                return Err(Error::Argument(format!(
                    "coefficients has {} entries; expected degree + 1 = {}",
                    a.len(),
                    self.degree.saturating_add(1)
                )));
            }
            if a.iter().any(|x| !x.is_finite()) {
                return Err(Error::NonFinite("coefficients holds NaN or infinity".into()));
            }
        }
        if causal && self.shift == Shift::Mean {
            return Err(Error::Argument(
                "shift=\"mean\" takes means over all tokens, so with causal=True a token would see later ones; \
                 use shift=\"none\""
                    .into(),
            ));
        }
        if let Shift::Given(query, key) = &self.shift {
            if query.iter().chain(key).any(|x| !x.is_finite()) {
                return Err(Error::NonFinite("shift holds NaN or infinity".into()));
            }
            if causal && self.diagonal == Diagonal::Polynomial {
                return Err(Error::Argument(
                    "a shift with causal=True and diagonal=\"polynomial\" is not supported; use diagonal=\"exact\""
                        .into(),
                ));
            }
        }
        if causal && self.coefficients == Coefficients::Fitted && self.diagonal == Diagonal::Polynomial {
            return Err(Error::Argument(
                "coefficients=\"fitted\" with causal=True and diagonal=\"polynomial\" would let the first tokens \
                 see later ones through the fit; use diagonal=\"exact\", or give the coefficients as numbers"
                    .into(),
            ));
        }
        Ok(())
    }
}

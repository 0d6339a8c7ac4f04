//! What an attention engine is, as data.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::plan::HeadPlan;
use crate::tolerance::HeadReport;

/// How attention is computed.
#[derive(Debug, Clone, PartialEq)]
pub enum Engine {
    /// Softmax, blocked.
    Exact,
    /// The exponential replaced by a polynomial of the scores.
    Polynomial(Polynomial),
    /// The exponential by its values at a few points.
    Landmark(Landmark),
    /// Chosen for each head, within a tolerance.
    Auto(Auto),
    /// Chosen before, head by head, and held to the same tolerance.
    Planned(Planned),
}

/// A tolerance for every head's results.
#[derive(Debug, Clone, PartialEq)]
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

/// A plan, with a head plan for every head.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// What it was made for.
    pub auto: Auto,
    /// The engines.
    pub heads: Arc<Vec<HeadPlan>>,
    /// What is known of them already, on the same data: they are not verified again then.
    pub known: Option<Arc<Vec<HeadReport>>>,
}

/// Landmarks at the most: their kernel matrix and its inverse are dense.
const LARGEST_RANK: usize = 8192;

/// The least tolerance that numbers of so many bytes allow.
pub fn floor(bytes: usize) -> f64 {
    if bytes == 4 { 1e-5 } else { 1e-12 }
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
#[derive(Debug, Clone, PartialEq)]
pub enum Shift {
    /// Nothing.
    None,
    /// The mean query and the mean key of the head.
    Mean,
    /// Constants.
    Given {
        /// `(d,)`, from every query.
        query: Vec<f64>,
        /// `(d,)`, from every key.
        key: Vec<f64>,
    },
}

/// How the scores near the diagonal are computed under a causal mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Diagonal {
    /// By the exponential.
    Exact,
    /// By the polynomial, as everywhere else.
    Polynomial,
}

/// The landmark engine: `e^{c q.k}` by its values at `rank` points among the shifted queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Landmark {
    /// Landmarks at the most.
    pub rank: usize,
    /// Of the draws.
    pub seed: u64,
    /// What was drawn before; `None`: drawn in the call, under a causal mask from its first 1024 tokens, whose own
    /// scores are then all exact.
    pub constants: Option<Arc<LandmarkConstants>>,
}

/// What landmarks are: see `landmark.rs`.
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
    fn validate(&self) -> Result<()> {
        if self.tol > 0.0 && self.tol < 1.0 {
            return Ok(());
        }
        Err(Error::Tolerance(format!("tol is {}; expected a number in (0, 1)", self.tol)))
    }
}

impl Engine {
    /// The tolerance that results are held to, if any.
    pub fn tolerance(&self) -> Option<&Auto> {
        match self {
            Engine::Auto(auto) => Some(auto),
            Engine::Planned(plan) => Some(&plan.auto),
            _ => None,
        }
    }

    /// An error where there is a tolerance below the [`floor`] of numbers of so many bytes.
    pub fn check_floor(&self, bytes: usize) -> Result<()> {
        match self.tolerance() {
            Some(auto) if auto.tol < floor(bytes) => Err(Error::Tolerance(format!(
                "tol is {:e}; expected at least {:e} for numbers of {bytes} bytes",
                auto.tol,
                floor(bytes)
            ))),
            _ => Ok(()),
        }
    }

    /// Checks everything that does not depend on the data.
    pub fn validate(&self, causal: bool) -> Result<()> {
        let p = match self {
            Engine::Exact => return Ok(()),
            Engine::Landmark(l) if l.rank == 0 || l.rank > LARGEST_RANK => {
                return Err(Error::Argument(format!("rank is {}; expected an integer of 1 to {LARGEST_RANK}", l.rank)));
            }
            Engine::Landmark(_) => return Ok(()),
            Engine::Auto(auto) => return auto.validate(),
            Engine::Planned(plan) => {
                plan.auto.validate()?;
                for head in plan.heads.iter() {
                    match &head.engine {
                        Engine::Auto(_) | Engine::Planned(_) => {
                            return Err(Error::Argument("a plan holds an engine that is not one".into()));
                        }
                        engine => engine.validate(causal)?,
                    }
                }
                return Ok(());
            }
            Engine::Polynomial(p) => p,
        };
        if p.degree == 0 {
            return Err(Error::Argument("degree is 0; expected an integer >= 1".into()));
        }
        if let Coefficients::Given(a) = &p.coefficients {
            if a.len() != p.degree.saturating_add(1) {
                return Err(Error::Argument(format!(
                    "coefficients has {} entries; expected degree + 1 = {}",
                    a.len(),
                    p.degree.saturating_add(1)
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
        if let Shift::Given { query, key } = &p.shift {
            if query.iter().chain(key).any(|x| !x.is_finite()) {
                return Err(Error::NonFinite("shift holds NaN or infinity".into()));
            }
            if causal && p.diagonal == Diagonal::Polynomial {
                return Err(Error::Argument(
                    "a shift with causal=True and diagonal=\"polynomial\" is not supported; use diagonal=\"exact\""
                        .into(),
                ));
            }
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

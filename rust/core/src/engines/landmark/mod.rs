//! The landmark engine: the exponential kernel by its values at a few points that lie among the queries and keys.
//!
//! Queries and keys are shifted by `α` and `β` and balanced, `q̂ = ±(q - α) / t`, `k̂ = t (k - β)` (minus where `c <
//! 0`), so that `c q'.k' = |c| q̂.k̂` and both clouds have the same size. With the Gaussian kernel `g(x, y) = e^{-|c| |x -
//! y|^2 / 2}`,
//!
//! ```text
//! e^{c q'.k'} = e^{|c| |q̂|^2 / 2} g(q̂, k̂) e^{|c| |k̂|^2 / 2},        g(q̂, k̂) ≈ φ(q̂)^T M φ(k̂),   φ_l(x) = g(x, x_l)
//! ```
//!
//! for landmarks `x_l`. The first factor cancels in a row, the last is part of the key's weight; features are at most 1.
//! `linear` makes attention of that. Its gradient is the derivative of the forward pass, for fixed landmarks and
//! `M`: as `e^{|c| |q̂|^2 / 2} φ_l(q̂)` is `e` to a linear function of `q`, `J_φ^T u = sum_l u_l φ_l(q̂) p_l` with constant
//! points `p_l`.
//!
//! Landmarks are taken from a sample of queries and keys by randomly pivoted Cholesky (Chen, Epperly, Tropp and Webber,
//! arXiv 2207.06503): each is drawn with a probability proportional to what the others leave of its own kernel value,
//! times a weight: 1, or the largest share that the point may have in a row of attention, since by Cauchy and Schwarz a
//! remainder `ρ` errs by `|ρ(q, k)| <= sqrt(ρ(q, q) ρ(k, k))`. `M` is the inverse of the landmarks' kernel matrix, or
//! minimises `sum_ij (w_j / D_i)^2 (g_ij - φ_i^T M φ_j)^2` over the sample, with a ridge. What errs least on another
//! sample is taken.

mod candidates;
mod judge;
mod sample;

use std::sync::Arc;

pub(crate) use self::candidates::Hopes;
pub(crate) use self::sample::{Candidate, Sample, fit_size};
use super::{Engine, Prepared};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::linear::full;
use crate::linear::gaussians::Gaussians;
use crate::linear::levels;
use crate::linear::nearby::{NearKeys, NearWeights, Nearby};
use crate::linear::pass::Pass;
use crate::linear::scan;
use crate::linear::shifts::Shifts;
use crate::linear::state::LARGEST_STATE;
use crate::numerics::real::Real;
use crate::problem::grads::{BiasGrads, HeadGrads, RowFactors, Upstream};
use crate::problem::heads::Head;
use crate::spec::{self, LandmarkConstants};

/// Tokens before each query that are exact under a causal mask.
pub const WINDOW: usize = 64;

/// The landmark engine with its options.
#[derive(Debug)]
pub(crate) struct Landmark(spec::Landmark);

/// What is known of a head before its pass.
#[derive(Debug)]
struct OfHead<T> {
    features: Gaussians<T>,
    shifts: Shifts<T>,
    near: NearKeys,
}

/// Which keys are near, under a causal mask.
pub(crate) fn near_keys(drawn_in_the_call: bool) -> NearKeys {
    NearKeys { window: WINDOW, from_prefix: drawn_in_the_call }
}

impl Landmark {
    pub fn new(options: spec::Landmark) -> Self {
        Self(options)
    }
}

impl<T: Real> Engine<T> for Landmark {
    fn prepare(&self, ctx: &Context, head: &Head<'_, T>) -> Result<Box<dyn Prepared<T>>> {
        let given = match &self.0.constants {
            Some(given) => given.clone(),
            None => Arc::new(draw(ctx, head, &self.0)?),
        };
        let scale = head.scores.scale;
        given.check(head.d())?;
        if given.scale != scale {
            return Err(Error::Argument(format!(
                "scale is {scale}; expected {}, for which the landmarks were made",
                given.scale
            )));
        }
        let rank = given.rank();
        if rank.saturating_mul(head.d_v() + 1) > LARGEST_STATE {
            return Err(Error::Argument(format!("rank = {rank} needs more memory than there is; use a lower rank")));
        }
        let round = |x: &[f64]| x.iter().map(|&x| T::of(x)).collect();
        let shifts = Shifts { query: round(&given.query_shift), key: round(&given.key_shift) };
        let near = near_keys(self.0.constants.is_none());
        Ok(Box::new(OfHead { features: Gaussians::new(&given, scale)?, shifts, near }))
    }
}

/// Draws the landmarks of a head; under a causal mask from its first 1024 tokens.
pub(crate) fn draw<T: Real>(ctx: &Context, head: &Head<'_, T>, options: &spec::Landmark) -> Result<LandmarkConstants> {
    let sample = Sample::new(head, !head.mask.is_none(), options.rank, options.seed)?;
    let best = sample.candidates(ctx, &[options.rank], false, Hopes::ALL)?.into_iter().next();
    best.map(|best| best.constants).ok_or_else(|| sample.no_landmarks())
}

impl<T: Real> OfHead<T> {
    fn pass<'a>(&'a self, ctx: &'a Context, head: &'a Head<'a, T>) -> Result<Pass<'a, T>> {
        let near = Nearby { keys: self.near, weights: NearWeights::Exponential };
        Pass::new(ctx, head, &self.features, &self.shifts, near)
    }
}

impl<T: Real> Prepared<T> for OfHead<T> {
    fn name(&self) -> String {
        format!("{} landmarks", self.features.rank())
    }

    fn forward(
        &mut self,
        ctx: &Context,
        head: &Head<'_, T>,
        out: &mut [T],
        row_max: &mut [T],
        row_scale: &mut [T],
    ) -> Result<()> {
        let pass = self.pass(ctx, head)?;
        if head.mask.is_none() {
            full::forward(&pass, out, row_max, row_scale).map(drop)
        } else {
            scan::forward(&pass, out, row_max, row_scale)
        }
    }

    fn backward(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
        _: Option<BiasGrads<'_, T>>,
    ) -> Result<()> {
        let pass = self.pass(ctx, head)?;
        if head.mask.is_none() { full::backward(&pass, None, up, grads) } else { scan::backward(&pass, up, grads) }
    }

    fn log_row_sums(&self, head: &Head<'_, T>, rows: RowFactors<'_, T>) -> Result<Vec<f64>> {
        levels::log_row_sums(head, &self.shifts, Some(&self.features), rows)
    }
}

//! The engines: what turns a head's queries, keys and values into its output, and back into gradients.
//!
//! A new one is a file here that implements [`Engine`] and [`Prepared`], and a line in [`of`].

use std::fmt::Debug;

use crate::context::Context;
use crate::error::Result;
use crate::numerics::real::Real;
use crate::problem::grads::{BiasGrads, HeadGrads, RowFactors, Upstream};
use crate::problem::heads::{Head, Sizes};
use crate::problem::scores::Scores;
use crate::spec;

pub(crate) mod exact;
pub(crate) mod landmark;
mod pieces;
pub(crate) mod polynomial;

/// An engine with its options, for all heads of a call.
pub(crate) trait Engine<T: Real>: Debug + Send + Sync {
    /// Takes from a head's data what its pass needs to know first.
    fn prepare(&self, ctx: &Context, head: &Head<'_, T>) -> Result<Box<dyn Prepared<T>>>;
}

/// An engine with what it has taken from one head's data. It holds none of that data: the same head is handed to it again.
pub(crate) trait Prepared<T: Real>: Debug + Send + Sync {
    /// What reports call it.
    fn name(&self) -> String;

    /// Writes `out` and the row factors of the head.
    fn forward(
        &mut self,
        ctx: &Context,
        head: &Head<'_, T>,
        out: &mut [T],
        row_max: &mut [T],
        row_scale: &mut [T],
    ) -> Result<()>;

    /// Adds the head's gradients; `dbias` is asked of engines that have a bias of pairs.
    fn backward(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
        dbias: Option<BiasGrads<'_, T>>,
    ) -> Result<()>;

    /// `ln sum_j A_ij` of every query, from what the forward pass left.
    fn log_row_sums(&self, head: &Head<'_, T>, rows: RowFactors<'_, T>) -> Result<Vec<f64>>;

    /// The a-priori bound of the relative Frobenius error of `out`, before rounding; `None` where it says nothing.
    fn error_bound(&self, _head: &Head<'_, T>, _out: &[T]) -> Option<f64> {
        None
    }

    /// Its weights pair by pair, where they are a polynomial of the scores.
    fn polynomial(&self) -> Option<&polynomial::Form<T>> {
        None
    }

    /// Whether it errs by rounding alone.
    fn is_exact(&self) -> bool {
        false
    }
}

/// The engine of some data, for heads of these sizes whose scores are made so. `may_be_empty`: rows without keys may be
/// met, and are 0.
pub(crate) fn of<T: Real>(
    engine: &spec::Engine,
    sizes: &Sizes,
    scores: &Scores,
    may_be_empty: bool,
) -> Result<Box<dyn Engine<T>>> {
    let low_rank: Box<dyn Engine<T>> = match engine {
        spec::Engine::Exact => return Ok(Box::new(exact::Exact)),
        spec::Engine::Polynomial(options) => Box::new(polynomial::Polynomial::new(options.clone(), sizes)?),
        spec::Engine::Landmark(options) => Box::new(landmark::Landmark::new(options.clone())),
    };
    let plain = !may_be_empty && scores.masks.iter().all(|mask| mask.is_plain(sizes.n, sizes.m));
    Ok(if plain { low_rank } else { Box::new(pieces::Pieces(low_rank)) })
}

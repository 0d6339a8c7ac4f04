//! The modules of a transformer: forward beside backward, one file each.
//!
//! Every function reads a batch of sequences as [`Rows`] and overwrites contiguous outputs. `x_backward`
//! takes the gradient `dy` of any loss with respect to what `x_forward` computed, and returns the gradients with
//! respect to its inputs. Results have the same bits for any number of threads, and in float32 the error of a
//! weight's gradient does not grow with the number of tokens: it is summed in float64.

use crate::error::{Error, Result};
use crate::problem::rows::Rows;

pub mod activation;
pub mod attention_block;
pub mod cross_entropy;
pub mod embedding;
pub mod feed_forward;
mod heads;
pub mod linear;
pub mod norm;
pub(crate) mod panels;
mod rope;
pub(crate) mod tiles;

/// `matches` says what the expected shape follows from.
pub(crate) fn expect_shape(
    name: &str,
    got: (usize, usize),
    expected: (usize, usize),
    matches: impl std::fmt::Display,
) -> Result<()> {
    if got == expected {
        Ok(())
    } else {
        Err(Error::Shape(format!("{name} has shape {got:?}; expected {expected:?} to match {matches}")))
    }
}

pub(crate) fn expect_rows<T>(name: &str, got: &Rows<'_, T>, batch: usize, n: usize, d: usize) -> Result<()> {
    let (got, expected) = ((got.batch(), got.n(), got.d()), (batch, n, d));
    if got == expected { Ok(()) } else { Err(Error::Shape(format!("{name} has shape {got:?}; expected {expected:?}"))) }
}

/// An error naming the first of `ids` that is not below `count`.
pub(crate) fn expect_below(name: &str, ids: &[u32], count: usize, what: &str) -> Result<()> {
    match ids.iter().position(|id| *id as usize >= count) {
        None => Ok(()),
        Some(i) => Err(Error::Argument(format!(
            "{name} holds {} at position {i}; expected less than {count}, the {what}",
            ids[i]
        ))),
    }
}

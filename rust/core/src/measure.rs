//! Measured errors: exact rows drawn at random, compared with given ones.
//!
//! The relative error is `‖out - exact‖_F / ‖exact‖_F`.

use crate::attention::Heads;
use crate::context::Context;
use crate::error::Result;
use crate::real::Real;
use faer::MatRef;

/// An estimate of a relative Frobenius error, with its 95% confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ErrorEstimate {
    /// The estimate.
    pub relative: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Rows that were computed exactly.
    pub rows: usize,
}

//! Softmax attention, exact or in low-rank form, transformer layers, and the gradients of both.
//!
//! The mathematics is that of "Multi-Layer Transformers Gradient Can be Approximated in Almost Linear Time"
//! (arXiv 2408.13233), with its printed gradients corrected. Nothing here knows of Python.
//!
//! Every module below uses only those above it.

pub mod context;
pub mod error;
pub mod memory;

pub mod numerics;

pub mod problem;

pub mod spec;

mod linear;

mod engines;

pub mod measure;

pub mod plan;

pub mod tolerance;

pub mod attention;

mod halves;

pub mod naive;

pub mod layers;

pub mod model;

/// What another backend must have in common with this one.
pub mod limits {
    pub use crate::engines::landmark::WINDOW;
    pub use crate::linear::floor::LEAST_OF_FLOOR;
    pub use crate::linear::gaussians::REMEDY as LANDMARK_REMEDY;
    pub use crate::linear::shifts::{LARGEST_BIAS, PREFIX};
    pub use crate::linear::state::LARGEST_STATE;
    pub use crate::problem::scores::NO_KEY_REMEDY;
}

pub use attention::{Attention, Method};
pub use context::Context;
pub use error::{Error, Result};
pub use faer::{ColRef, MatRef};
pub use numerics::real::Real;
pub use numerics::stored::Stored;
pub use plan::report::HeadReport;
pub use problem::grads::{AttentionGrads, BiasGrads};
pub use problem::heads::Heads;
pub use problem::rows::Rows;
pub use problem::scores::{Mask, Scores};
pub use spec::Engine;
pub use tolerance::{Planned, Saved};

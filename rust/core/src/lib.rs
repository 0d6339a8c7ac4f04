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

pub mod spec;

pub mod problem;

mod linear;

mod engines;

pub mod measure;

pub mod plan;

pub mod tolerance;

pub mod attention;

pub mod naive;

pub mod layers;

pub mod model;

pub use attention::{Attention, AttentionGrads, Heads, Saved};
pub use context::Context;
pub use error::{Error, Result};
pub use faer::{ColRef, MatRef};
pub use numerics::real::Real;
pub use problem::rows::Rows;
pub use spec::Engine;
pub use tolerance::HeadReport;

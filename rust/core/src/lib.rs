//! Softmax attention, exact or in polynomial low-rank form, transformer layers, and the gradients of both.
//!
//! The mathematics is that of "Multi-Layer Transformers Gradient Can be Approximated in Almost Linear Time"
//! (arXiv 2408.13233), with its printed gradients corrected. Nothing here knows of Python.

pub mod attention;
mod causal;
pub mod context;
pub mod engine;
pub mod error;
mod exact;
mod fit;
mod guides;
mod kernel;
mod landmark;
pub mod layers;
mod low_rank;
pub mod measure;
pub mod memory;
mod monomials;
pub mod naive;
pub mod plan;
mod polynomial;
pub mod real;
pub mod rows;
mod sample;
pub mod sampled;
mod state;
mod tile;
pub mod tolerance;
pub mod transformer;

pub use attention::{Attention, AttentionGrads, Heads, Saved};
pub use context::Context;
pub use engine::Engine;
pub use error::{Error, Result};
pub use faer::{ColRef, MatRef};
pub use real::Real;
pub use rows::Rows;
pub use tolerance::HeadReport;

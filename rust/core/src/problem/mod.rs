//! What is computed, whatever computes it: heads, how their scores are made, and where gradients go.

pub mod finite;
pub mod grads;
pub mod heads;
pub mod rows;
pub mod scores;
pub mod state;

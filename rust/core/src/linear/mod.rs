//! Linear attention: what the low-rank engines share.
//!
//! With [feature maps](features) `φ` of queries and `χ` of keys, weights are `A_ij ≈ φ(q_i)^T W χ(k_j)`: all keys together
//! are one [state](state), which queries are then applied to. [`pass`] has the equations of attention and of its gradients;
//! [`full`] computes them without a mask, [`scan`] under a causal one, where [near](near) keys are met one by one.

pub(crate) mod features;
pub(crate) mod floor;
pub(crate) mod full;
pub(crate) mod gaussians;
pub(crate) mod levels;
pub(crate) mod monomials;
pub(crate) mod near;
pub(crate) mod nearby;
pub(crate) mod pass;
pub(crate) mod polynomials;
pub(crate) mod scan;
pub(crate) mod shifts;
pub(crate) mod state;

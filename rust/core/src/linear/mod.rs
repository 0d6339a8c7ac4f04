//! What the low-rank engines share.

pub(crate) mod monomials;
pub(crate) mod pass;
pub(crate) mod scan;
pub(crate) mod state;

//! The engines.

pub(crate) mod exact;
pub(crate) mod fit;
pub(crate) mod landmark;
pub(crate) mod polynomial;

//! The functions that Python calls: arrays in, one call of the core, arrays out.

pub mod attention;
pub mod layers;
pub mod model;
pub mod plan;

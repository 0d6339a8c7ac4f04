//! Numbers: the scalar types, small products, tiles, and draws.

pub(crate) mod draws;
pub(crate) mod product;
pub mod real;
pub(crate) mod softmax;
pub mod stored;
pub(crate) mod tile;

//! What crosses between Python's dataclasses and the core's data: through serde, but for arrays, which cross as arrays.

mod engine;
mod report;

pub use engine::AnyMethod;
pub use report::{Estimate, constants_dict, estimate, report_dict, reports};

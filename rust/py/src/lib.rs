//! The Python module `lingrad_rs._lingrad_rs`: arrays in, the core's functions without the GIL, arrays and errors out.
//!
//! Private to the Python package, which checks what users hand in and gives the errors its names. What is checked here
//! again is what memory safety hangs on.

mod arrays;
mod bind;
mod convert;
mod crew;
mod entry;
mod error;
mod huge_pages;
mod reserve;
mod run;

use pyo3::prelude::*;

use crate::entry::{Outcome, entry};

#[global_allocator]
static ALLOCATOR: huge_pages::HugePages = huge_pages::HugePages;

/// Private: the compiled part of `lingrad_rs`.
#[pymodule]
mod _lingrad_rs {
    #[pymodule_export]
    use crate::bind::attention::{
        AttentionState, attention_backward, attention_backward_again, attention_forward, check_engine, measure_error,
    };
    #[pymodule_export]
    use crate::bind::layers::{
        activation_backward, activation_forward, embedding_backward, embedding_forward, feed_forward_backward,
        feed_forward_forward, linear_backward, linear_forward, norm_backward, norm_forward, self_attention_backward,
        self_attention_forward,
    };
    #[pymodule_export]
    use crate::bind::model::{
        TransformerTrace, transformer_backward, transformer_forward, transformer_param_shapes,
        transformer_value_and_grad,
    };
    #[pymodule_export]
    use crate::bind::plan::{
        HeadPlanner, draw_rows, estimate_error, fitted_coefficients, landmark_constants, largest_relative_error,
        random_dout, rows_to_plan, rows_to_verify, set_rates, stratified, unseen_row_sums,
    };
    #[pymodule_export]
    use crate::{get_num_threads, set_num_threads, simd_level};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    const DEGREES: usize = lingrad_core::plan::choice::DEGREES;
    #[pymodule_export]
    const RANKS: [usize; 4] = lingrad_core::plan::choice::RANKS;
    #[pymodule_export]
    const LARGEST_BOUND: f64 = lingrad_core::plan::moments::LARGEST_BOUND;
    #[pymodule_export]
    const LARGEST_STATE: usize = lingrad_core::limits::LARGEST_STATE;
    #[pymodule_export]
    const LARGEST_BIAS: f64 = lingrad_core::limits::LARGEST_BIAS;
    #[pymodule_export]
    const LEAST_OF_FLOOR: f64 = lingrad_core::limits::LEAST_OF_FLOOR;
    #[pymodule_export]
    const NO_KEY_REMEDY: &str = lingrad_core::limits::NO_KEY_REMEDY;
    #[pymodule_export]
    const LANDMARK_REMEDY: &str = lingrad_core::limits::LANDMARK_REMEDY;
    #[pymodule_export]
    const PREFIX: usize = lingrad_core::limits::PREFIX;
    #[pymodule_export]
    const WINDOW: usize = lingrad_core::limits::WINDOW;
}

/// The number of threads that the next call works with.
#[pyfunction]
fn get_num_threads(py: Python<'_>) -> Outcome<usize> {
    entry(|| Ok(run::num_threads(py)))
}

/// Sets the number of threads that later calls work with.
#[pyfunction]
fn set_num_threads(py: Python<'_>, n: usize) -> Outcome<()> {
    entry(|| run::set_num_threads(py, n))
}

/// The vector instructions that this machine has and the kernels use.
#[pyfunction]
fn simd_level() -> Outcome<&'static str> {
    entry(|| {
        Ok(match pulp::Arch::new() {
            #[cfg(target_arch = "x86_64")]
            pulp::Arch::V4(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            pulp::Arch::V3(_) => "avx2",
            #[cfg(target_arch = "aarch64")]
            pulp::Arch::Neon(_) => "neon",
            _ => "scalar",
        })
    })
}

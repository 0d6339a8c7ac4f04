//! The Python module `lingrad_rs._lingrad_rs`: arrays in, the core's functions without the GIL, arrays and errors out.
//!
//! Private to the Python package, which checks what users hand in and gives the errors its names. What is checked here
//! again is what memory safety hangs on.

mod arrays;
mod attention;
mod engine;
mod entry;
mod error;
mod huge_pages;
mod layers;
mod plan;
mod reserve;
mod run;
mod sample;
mod transformer;

use pyo3::prelude::*;

use crate::entry::{Outcome, entry};

#[global_allocator]
static ALLOCATOR: huge_pages::HugePages = huge_pages::HugePages;

/// Private: the compiled part of `lingrad_rs`.
#[pymodule]
mod _lingrad_rs {
    #[pymodule_export]
    use crate::attention::{AttentionState, attention_backward, attention_forward, measure_error};
    #[pymodule_export]
    use crate::engine::check_engine;
    #[pymodule_export]
    use crate::layers::{
        activation_backward, activation_forward, embedding_backward, embedding_forward, feed_forward_backward,
        feed_forward_forward, linear_backward, linear_forward, norm_backward, norm_forward, self_attention_backward,
        self_attention_forward,
    };
    #[pymodule_export]
    use crate::sample::{
        draw_rows, estimate_error, fitted_coefficients, fitted_polynomials, landmark_candidates, landmark_constants,
        largest_relative_error, rows_to_verify, stratified, unseen_row_sums,
    };
    #[pymodule_export]
    use crate::transformer::{
        TransformerTrace, transformer_backward, transformer_forward, transformer_param_shapes,
        transformer_value_and_grad,
    };
    #[pymodule_export]
    use crate::{get_num_threads, set_num_threads, simd_level};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
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

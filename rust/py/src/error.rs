//! The one error type of the bindings: an exception that is already Python's.

use lingrad_core::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError};

use crate::reserve;

/// Importable from Rust, defined in `lingrad_rs/errors.py`.
mod classes {
    pyo3::import_exception!(lingrad_rs.errors, ArgumentError);
    pyo3::import_exception!(lingrad_rs.errors, DenominatorError);
    pyo3::import_exception!(lingrad_rs.errors, DtypeError);
    pyo3::import_exception!(lingrad_rs.errors, LingradError);
    pyo3::import_exception!(lingrad_rs.errors, NonFiniteError);
    pyo3::import_exception!(lingrad_rs.errors, ShapeError);
    pyo3::import_exception!(lingrad_rs.errors, ToleranceError);
}
pub use classes::{ArgumentError, DtypeError, LingradError, ShapeError};

/// What every binding fails with: `?` turns errors of the core and of Python into it, and PyO3 turns it into a `PyErr`.
pub struct Failure(PyErr);

/// What every binding returns.
pub type Result<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        Self(match error {
            Error::Shape(_) => ShapeError::new_err(text),
            Error::Argument(_) => ArgumentError::new_err(text),
            Error::NonFinite(_) => classes::NonFiniteError::new_err(text),
            Error::Denominator(_) => classes::DenominatorError::new_err(text),
            Error::Tolerance(_) => classes::ToleranceError::new_err(text),
            Error::Memory { .. } => return no_memory(text),
            Error::Cancelled => PyKeyboardInterrupt::new_err(()),
        })
    }
}

/// A `MemoryError`, and memory for what Python makes of it.
pub fn no_memory(text: String) -> Failure {
    reserve::make_room();
    Failure(PyMemoryError::new_err(text))
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

//! The way into every function of this module.

use std::any::Any;
use std::convert::Infallible;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::prelude::*;

use crate::error::{Failure, LingradError, Result};
use crate::reserve;

/// What a function of this module raises. Only [`entry`] makes one, so that none can leave it out and use `?`.
pub struct Raised(PyErr);

/// What functions of this module return to Python.
pub type Outcome<T> = std::result::Result<T, Raised>;

impl From<Raised> for PyErr {
    fn from(raised: Raised) -> Self {
        raised.0
    }
}

/// Runs the body of a function, all of it: the reading of its arguments, and the making of its results. A panic becomes a
/// `LingradError`; PyO3 would make an exception of it that `except Exception` does not catch.
pub fn entry<T>(body: impl FnOnce() -> Result<T>) -> Outcome<T> {
    // What is missing is [`run`](crate::run::run)'s to refuse: little is needed without it.
    let _ = reserve::lay();
    reserve::make_room();
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result.map_err(|failure| Raised(failure.into())),
        Err(panic) => Err(Raised(internal_error(&*panic))),
    }
}

/// An argument that [`read`](Self::read) reads once [`entry`] has begun.
pub struct Later<'py, T> {
    object: Bound<'py, PyAny>,
    of: PhantomData<fn() -> T>,
}

impl<'py, T> FromPyObject<'_, 'py> for Later<'py, T> {
    type Error = Infallible;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> std::result::Result<Self, Infallible> {
        Ok(Self { object: object.to_owned(), of: PhantomData })
    }
}

impl<'py, T: for<'a> FromPyObject<'a, 'py>> Later<'py, T> {
    /// The argument.
    pub fn read(&self) -> Result<T> {
        self.object.extract().map_err(|error: <T as FromPyObject<'_, 'py>>::Error| Failure::from(error.into()))
    }
}

/// The error for a panic, or for text that says what cannot be.
pub fn internal_error(panic: &(dyn Any + Send)) -> PyErr {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("unknown");
    LingradError::new_err(format!("internal error: {text}; please report it with the call that led to it"))
}

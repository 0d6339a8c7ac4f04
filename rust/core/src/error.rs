//! The one error type of the crate.

/// Why a computation was refused or stopped.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{0}")]
    Shape(String),
    /// An argument has a value that it may not have.
    #[error("{0}")]
    Argument(String),
    /// An argument, or a result, holds NaN or infinity.
    #[error("{0}")]
    NonFinite(String),
    /// A row of the attention matrix has a denominator that is not positive, or not finite.
    #[error("{0}")]
    Denominator(String),
    /// A tolerance is out of range, or below what the arrays' type allows.
    #[error("{0}")]
    Tolerance(String),
    /// There is no room for something.
    #[error("no memory for {what}: {bytes} bytes")]
    Memory {
        /// What was to be allocated.
        what: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// The caller asked to stop; the outputs hold nothing of use.
    #[error("the computation was cancelled")]
    Cancelled,
}

/// What every fallible function of the crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// An error where a slice does not hold `expected` numbers.
pub(crate) fn expect_len(name: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Shape(format!("{name} holds {got} numbers; expected {expected}"))) }
}

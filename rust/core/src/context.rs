//! What a long computation shares with whoever waits for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};

/// A cancel flag and a progress figure, shared between a computation and its watcher.
#[derive(Debug, Default)]
pub struct Context {
    cancelled: AtomicBool,
    progress: AtomicU64,
}

impl Context {
    /// A context that nobody has cancelled, at progress 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the computation to stop at its next check.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// `Err(Cancelled)` once someone has called [`cancel`](Self::cancel). Called once a tile.
    #[inline]
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Sets the fraction of the work that is done, in `[0, 1]`.
    pub fn set_progress(&self, fraction: f64) {
        self.progress.store(fraction.to_bits(), Ordering::Relaxed);
    }

    /// The fraction of the work that is done.
    pub fn progress(&self) -> f64 {
        f64::from_bits(self.progress.load(Ordering::Relaxed))
    }
}

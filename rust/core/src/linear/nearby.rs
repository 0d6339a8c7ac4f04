//! Which keys of a causal head are near a query, and what they weigh, as data; [`near`](super::near) computes with them.

use super::shifts::PREFIX;

/// Tokens a block.
pub(crate) const BLOCK: usize = 112;

/// Which keys are near.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NearKeys {
    /// At least so many tokens before each query.
    pub window: usize,
    /// Whether constants of the head were taken from its first [`PREFIX`] tokens: these are near each other then.
    pub from_prefix: bool,
}

impl NearKeys {
    /// The first token near block `c`. It never falls as `c` grows.
    pub fn start(&self, c: usize) -> usize {
        if c < self.prefix_blocks() { 0 } else { (c * BLOCK).saturating_sub(self.window) }
    }

    /// The first token near query `i`.
    pub fn start_of_query(&self, i: usize) -> usize {
        self.start(i / BLOCK)
    }

    /// Blocks at the start that constants were taken from.
    pub fn prefix_blocks(&self) -> usize {
        if self.from_prefix { PREFIX.div_ceil(BLOCK) } else { 0 }
    }

    /// Near keys of a block at the most, where there are `n` tokens.
    pub fn longest(&self, n: usize) -> usize {
        (BLOCK + self.window.min(n)).max(self.prefix_blocks() * BLOCK).min(n)
    }
}

/// What near keys weigh.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NearWeights<'a> {
    /// `e^s`.
    Exponential,
    /// `p(s)`, as far keys do.
    Polynomial {
        /// `a_0 .. a_g`.
        coefficients: &'a [f64],
        /// Whether the gradient is the derivative of that.
        consistent: bool,
    },
}

/// The near keys of a pass, and what they weigh.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Nearby<'a> {
    pub keys: NearKeys,
    pub weights: NearWeights<'a>,
}

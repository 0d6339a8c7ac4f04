//! States: sums over tokens of outer products of values and features, `sum_t values_t features_t^T`, `(e, r)`: what stands
//! for all the keys, or queries, that a low-rank engine has seen.
//!
//! Products of a few hundred tokens (of a causal scan's blocks; of up to about a thousand where a fitted prefix ends) are
//! formed in the arrays' own type and added up in float64. A state is relative to `e^level`: those of keys of different
//! levels are merged as `S = e^{l_1 - l} S_1 + e^{l_2 - l} S_2`, with `l` the larger level.

use faer::{Accum, MatRef};

use crate::error::{Error, Result};
use crate::memory::{collected, room, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{product, view, view_mut, widen};
use crate::problem::state::{State, expect_same, pack, unpack};

/// Numbers in one state at the most (1 GiB): beyond this neither memory nor time is reasonable.
pub const LARGEST_STATE: usize = 1 << 27;
/// Tokens summed in the arrays' own type before they are added to a float64 sum.
const FLUSH: usize = 512;

/// What errors call one.
pub(crate) const STATE: &str = "a state of values and features";

/// The state of some tokens, not weighted yet.
#[derive(Debug, Clone)]
pub(crate) struct LinearState {
    /// What the tokens' weights are relative to, as a logarithm.
    pub level: f64,
    /// Features.
    pub r: usize,
    /// `(e, r)`.
    pub sum: Vec<f64>,
}

impl LinearState {
    /// That of no tokens.
    pub fn new(level: f64, e: usize, r: usize) -> Result<Self> {
        Ok(Self { level, r, sum: zeroed(e * r, STATE)? })
    }
}

impl State for LinearState {
    fn merge(&mut self, other: &Self) -> Result<()> {
        expect_same(&[self.sum.len(), self.r], &[other.sum.len(), other.r])?;
        let level = self.level.max(other.level);
        merge(&mut self.sum, decay(self.level, level), &other.sum, decay(other.level, level));
        self.level = level;
        Ok(())
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        pack(&[self.r], &[&[self.level], &self.sum])
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let ([r], numbers) = unpack::<1>(bytes)?;
        match numbers.split_first() {
            Some((&level, sum)) if r > 0 && sum.len().is_multiple_of(r) => {
                Ok(Self { level, r, sum: collected(sum.iter().copied(), STATE)? })
            }
            _ => Err(Error::Argument("the bytes are not those of a state of values and features".into())),
        }
    }
}

/// `e^(from - to)`, for two levels that may both be `-inf`.
pub(crate) fn decay(from: f64, to: f64) -> f64 {
    if from == to { 1.0 } else { (from - to).exp() }
}

/// `sum = decay sum + factor part`.
fn merge<T: Real>(sum: &mut [f64], decay: f64, part: &[T], factor: f64) {
    vectorised(
        #[inline(always)]
        || {
            for (sum, part) in sum.iter_mut().zip(part) {
                *sum = *sum * decay + part.to_f64() * factor;
            }
        },
    );
}

/// A state that grows token by token.
pub(crate) struct Growing<T> {
    state: LinearState,
    pending: Vec<T>,
    tokens: usize,
}

impl<T: Real> Growing<T> {
    pub fn new(level: f64, e: usize, r: usize) -> Result<Self> {
        Ok(Self { state: LinearState::new(level, e, r)?, pending: zeroed(e * r, STATE)?, tokens: 0 })
    }

    /// Room for a tile of `len` tokens, and whether they are added to what it holds.
    pub fn tile(&mut self, len: usize) -> (&mut [T], Accum) {
        if self.tokens + len > FLUSH {
            self.flush();
        }
        let accum = if self.tokens == 0 { Accum::Replace } else { Accum::Add };
        self.tokens += len;
        (&mut self.pending, accum)
    }

    fn flush(&mut self) {
        if self.tokens > 0 {
            widen(&self.pending, &mut self.state.sum);
            self.tokens = 0;
        }
    }

    pub fn finish(mut self) -> LinearState {
        self.flush();
        self.state
    }
}

/// What turns a sum over tokens, `(e, r)`, into the state that features are applied to.
pub(crate) enum Weighting<'a> {
    /// The sum's first columns, each times a number.
    Diagonal(Vec<f64>),
    /// The sum times a square matrix.
    Matrix(MatRef<'a, f64>),
}

impl Weighting<'_> {
    /// The weighted `sum (e, r)`, rounded to the arrays' type.
    pub fn weigh<T: Real>(&self, sum: &[f64], r: usize) -> Result<Vec<T>> {
        let e = sum.len() / r;
        match self {
            Self::Diagonal(weights) => {
                let mut weighted = zeroed(e * weights.len(), STATE)?;
                for (to, from) in weighted.chunks_exact_mut(weights.len()).zip(sum.chunks_exact(r)) {
                    weigh_row(from, weights, to);
                }
                Ok(weighted)
            }
            Self::Matrix(matrix) => {
                let mut exact = zeroed(e * r, STATE)?;
                product(view_mut(&mut exact, e, r), view(sum, e, r), *matrix, 1.0);
                collected(exact.into_iter().map(T::of), STATE)
            }
        }
    }

    /// A scan along one row of the states of many blocks: `sum = decay sum + part`, and `part` becomes the weighted sum;
    /// with `second` weights of the first features, `second_parts` become another.
    pub fn scan<T: Real>(
        &self,
        sum: &mut [f64],
        decays: &[f64],
        parts: &mut [&mut [T]],
        second: Option<&[f64]>,
        second_parts: &mut [&mut [T]],
    ) -> Result<()> {
        match self {
            Self::Diagonal(weights) => {
                for (i, (part, &decay)) in parts.iter_mut().zip(decays).enumerate() {
                    step(sum, decay, part, weights);
                    if let (Some(weights), Some(part)) = (second, second_parts.get_mut(i)) {
                        weigh_row(sum, weights, part);
                    }
                }
            }
            Self::Matrix(matrix) => {
                let mut sums = room(parts.len() * sum.len(), "states of a scan")?;
                for (part, &decay) in parts.iter().zip(decays) {
                    merge(sum, decay, part, 1.0);
                    sums.extend_from_slice(sum);
                }
                let (count, r) = (parts.len(), sum.len());
                let mut weighted = zeroed(count * r, "states of a scan")?;
                product(view_mut(&mut weighted, count, r), view(&sums, count, r), *matrix, 1.0);
                for (part, weighted) in parts.iter_mut().zip(weighted.chunks_exact(r)) {
                    part.iter_mut().zip(weighted).for_each(|(part, &x)| *part = T::of(x));
                }
            }
        }
        Ok(())
    }
}

/// The first columns of one row of a sum, each times a number, rounded.
pub(crate) fn weigh_row<T: Real>(sum: &[f64], weights: &[f64], weighted: &mut [T]) {
    vectorised(
        #[inline(always)]
        || {
            for ((to, &from), &w) in weighted.iter_mut().zip(sum).zip(weights) {
                *to = T::of(from * w);
            }
        },
    );
}

/// One step of a scan along one row of a state: `sum = decay sum + part`, and `part = sum diag(weights)`, rounded.
fn step<T: Real>(sum: &mut [f64], decay: f64, part: &mut [T], weights: &[f64]) {
    vectorised(
        #[inline(always)]
        || {
            for ((sum, part), &w) in sum.iter_mut().zip(part).zip(weights) {
                *sum = *sum * decay + part.to_f64();
                *part = T::of(*sum * w);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(level: f64, first: usize) -> LinearState {
        let mut state = LinearState::new(level, 3, 5).expect("room");
        state.sum.iter_mut().enumerate().for_each(|(i, x)| *x = ((i + first) * 7 % 11) as f64 - 5.0);
        state
    }

    #[test]
    fn merged_states_are_the_sum_relative_to_the_larger_level_also_by_way_of_bytes() {
        for (own, other) in [(0.0, 0.0), (1.5, -2.0), (-2.0, 1.5), (f64::NEG_INFINITY, 3.0), (800.0, -800.0)] {
            let (mut merged, part) = (state(own, 0), state(other, 4));
            if own == f64::NEG_INFINITY {
                merged.sum.fill(0.0);
            }
            let before = merged.clone();
            merged
                .merge(&LinearState::from_bytes(&part.to_bytes().expect("room")).expect("a state"))
                .expect("one head");
            assert_eq!(merged.level, own.max(other));
            for ((got, a), b) in merged.sum.iter().zip(&before.sum).zip(&part.sum) {
                let want = a * decay(own, merged.level) + b * decay(other, merged.level);
                assert_eq!(*got, want);
            }
        }
    }

    #[test]
    fn states_of_other_sizes_and_other_bytes_are_refused() {
        let mut state = state(0.0, 0);
        assert!(state.merge(&LinearState::new(0.0, 3, 4).expect("room")).is_err());
        assert!(state.merge(&LinearState::new(0.0, 2, 5).expect("room")).is_err());
        let bytes = state.to_bytes().expect("room");
        assert!(LinearState::from_bytes(&bytes[..bytes.len() - 8]).is_err());
        assert!(LinearState::from_bytes(&pack(&[0], &[&[1.0]]).expect("room")).is_err());
        assert!(LinearState::from_bytes(&pack(&[2], &[&[1.0, 2.0]]).expect("room")).is_err());
    }
}

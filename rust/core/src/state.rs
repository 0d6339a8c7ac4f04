//! Sums over tokens of outer products of values and features: what stands for all the keys, or queries, that a low-rank
//! engine has seen. Products of a few hundred tokens are formed in the arrays' own type and added up in float64.

use std::ops::Range;

use crate::real::{Real, vectorised};
use crate::tile::{add_product, view, view_mut};

/// Tokens summed in the arrays' own type before they are added to the float64 sum.
const FLUSH: usize = 512;

/// `sum_t values_t features_t^T`, `(e, r)`.
pub(crate) struct State<T> {
    sum: Vec<f64>,
    pending: Vec<T>,
    tokens: usize,
    e: usize,
}

impl<T: Real> State<T> {
    pub fn new(e: usize, r: usize) -> Self {
        Self::from_sum(vec![0.0; r * e], e)
    }

    pub fn from_sum(sum: Vec<f64>, e: usize) -> Self {
        Self { pending: vec![T::ZERO; sum.len()], tokens: 0, e, sum }
    }

    /// Makes room for a tile of `len` tokens, whose pieces [`add`](Self::add) then adds one by one.
    pub fn start_tile(&mut self, len: usize) {
        if self.tokens + len > FLUSH {
            self.flush();
        }
        if self.tokens == 0 {
            self.pending.fill(T::ZERO);
        }
        self.tokens += len;
    }

    /// Adds `values f^T` to the columns `piece`, for values `(e, len)` and that piece of the features of a tile,
    /// `(piece, len)`.
    pub fn add(&mut self, values: &[T], piece: Range<usize>, f: &[T], len: usize) {
        let (e, r) = (self.e, self.sum.len() / self.e);
        let pending = view_mut(&mut self.pending, e, r).subcols_mut(piece.start, piece.len());
        add_product(pending, view(values, e, len), view(f, piece.len(), len).transpose(), T::ONE);
    }

    fn flush(&mut self) {
        if self.tokens > 0 {
            let (sum, pending) = (&mut self.sum, &self.pending);
            vectorised(
                #[inline(always)]
                || {
                    for (sum, &x) in sum.iter_mut().zip(pending) {
                        *sum += x.to_f64();
                    }
                },
            );
            self.tokens = 0;
        }
    }

    /// Multiplies the sum.
    pub fn scale(&mut self, by: f64) {
        self.flush();
        self.sum.iter_mut().for_each(|x| *x *= by);
    }

    /// The sum so far.
    pub fn sum(&mut self) -> &[f64] {
        self.flush();
        &self.sum
    }

    /// Writes [`weigh`] of the sum so far, for weights of all features.
    pub fn weigh_into(&mut self, weights: &[f64], weighted: &mut [T]) {
        if self.tokens == 0 {
            return weigh_into(&self.sum, weights.len(), weights, weighted);
        }
        let r = weights.len();
        let (sum, pending) = (&mut self.sum, &self.pending);
        vectorised(
            #[inline(always)]
            || {
                for ((sum, pending), to) in
                    sum.chunks_exact_mut(r).zip(pending.chunks_exact(r)).zip(weighted.chunks_exact_mut(r))
                {
                    for (((sum, &x), to), &w) in sum.iter_mut().zip(pending).zip(to).zip(weights) {
                        *sum += x.to_f64();
                        *to = T::of(*sum * w);
                    }
                }
            },
        );
        self.tokens = 0;
    }

    pub fn finish(mut self) -> Vec<f64> {
        self.flush();
        self.sum
    }
}

/// The first `weights.len()` columns of `sum diag(weights)`, `sum` being `(e, r)`, rounded to the arrays' type.
pub(crate) fn weigh<T: Real>(sum: &[f64], r: usize, weights: &[f64]) -> Vec<T> {
    let mut weighted = vec![T::ZERO; sum.len() / r * weights.len()];
    weigh_into(sum, r, weights, &mut weighted);
    weighted
}

/// [`weigh`], into a buffer.
pub(crate) fn weigh_into<T: Real>(sum: &[f64], r: usize, weights: &[f64], weighted: &mut [T]) {
    vectorised(
        #[inline(always)]
        || {
            for (to, from) in weighted.chunks_exact_mut(weights.len()).zip(sum.chunks_exact(r)) {
                for ((to, &from), &w) in to.iter_mut().zip(from).zip(weights) {
                    *to = T::of(from * w);
                }
            }
        },
    );
}

/// `sum += x`.
pub(crate) fn add(sum: &mut [f64], x: &[f64]) {
    vectorised(
        #[inline(always)]
        || {
            for (sum, x) in sum.iter_mut().zip(x) {
                *sum += x;
            }
        },
    );
}

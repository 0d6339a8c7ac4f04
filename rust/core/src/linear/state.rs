//! Sums over tokens of outer products of values and features, `sum_t values_t features_t^T`, `(e, r)`: what stands for
//! all the keys, or queries, that a low-rank engine has seen.
//!
//! Products of a few hundred tokens (of a causal scan's blocks; of up to about a thousand where a fitted prefix ends) are
//! formed in the arrays' own type and added up in float64. Here the features of a
//! token lie side by side, unlike those of a tile that a state is applied to.

use faer::prelude::ReborrowMut;
use faer::{Accum, MatMut, MatRef};

use crate::error::Result;
use crate::linear::monomials::{Monomials, PIECE_WIDTH, Run};
use crate::linear::pass::{Features, Side};
use crate::memory::{collected, room, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{multiply, product, view, view_mut, widen};

/// Tokens summed in the arrays' own type before they are added to a float64 sum.
const FLUSH: usize = 512;

/// A tile of tokens, one a row, to be added to a state; and room for their features.
pub(crate) struct Tokens<T> {
    /// Queries or keys, `(len, d)` in rows of `width`.
    pub x: Vec<T>,
    /// What a vector read at the end of a row may run into is added to d.
    pub width: usize,
    /// Extended values or upstream gradients, `(len, e)`.
    pub values: Vec<T>,
    /// The features up to a low degree, and a piece of the others.
    low: Vec<T>,
    piece: Vec<T>,
    runs: Vec<Run>,
}

impl<T: Real> Tokens<T> {
    /// For tiles of at most `len` tokens and features up to `degree`.
    pub fn new(features: Features<'_, T>, d: usize, e: usize, len: usize, degree: usize) -> Result<Self> {
        let width = d + Monomials::OVERRUN;
        let zeros = |width: usize| zeroed(len * width, "a tile of tokens and features");
        let (low, piece, runs) = match features {
            Features::Monomials(tree) => {
                let piece = if tree.low_degree(degree) < degree { PIECE_WIDTH } else { 0 };
                (tree.low_width(degree), piece, tree.most_runs(degree))
            }
            Features::Landmarks(landmarks) => (landmarks.rank(), 0, 0),
        };
        Ok(Self {
            x: zeros(width)?,
            width,
            values: zeros(e)?,
            low: zeros(low)?,
            piece: zeros(piece)?,
            runs: room(runs, "runs of monomials")?,
        })
    }

    /// Adds `values^T φ(x)` of the first `len` tokens to `state`, `(e, r)`, or replaces it.
    pub fn add_to(
        &mut self,
        state: &mut [T],
        accum: Accum,
        (features, side): (Features<'_, T>, Side),
        degree: usize,
        len: usize,
    ) {
        let r = features.rank(degree);
        let e = state.len() / r;
        let values = view(&self.values, len, e).transpose();
        let state = MatMut::from_row_major_slice_mut(state, e, r);
        let tree = match features {
            Features::Monomials(tree) => tree,
            Features::Landmarks(landmarks) => {
                landmarks.map(side).rows(&self.x, self.width, len, &mut self.low);
                multiply(state, accum, values, view(&self.low, len, r), T::ONE);
                return;
            }
        };
        let mut state = state;
        tree.low_rows(&self.x, self.width, len, degree, &mut self.low, &mut self.runs);
        for piece in tree.pieces(degree) {
            let (start, width) = (piece.start, piece.len());
            let features = if start == 0 {
                view(&self.low, len, tree.low_width(degree))
            } else {
                tree.piece_rows(&self.x, self.width, &self.low, len, degree, piece, &mut self.piece, &mut self.runs);
                view(&self.piece, len, PIECE_WIDTH)
            };
            multiply(state.rb_mut().subcols_mut(start, width), accum, values, features, T::ONE);
        }
    }
}

/// What errors call one.
pub(crate) const STATE: &str = "a state of values and features";

/// A state that grows, its sum in float64.
pub(crate) struct State<T> {
    sum: Vec<f64>,
    pending: Vec<T>,
    tokens: usize,
}

impl<T: Real> State<T> {
    pub fn new(e: usize, r: usize) -> Result<Self> {
        Ok(Self { sum: zeroed(e * r, STATE)?, pending: zeroed(e * r, STATE)?, tokens: 0 })
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
            widen(&self.pending, &mut self.sum);
            self.tokens = 0;
        }
    }

    pub fn finish(mut self) -> Vec<f64> {
        self.flush();
        self.sum
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
    /// with the weights `more` of the first features, `more_parts` does.
    pub fn scan<T: Real>(
        &self,
        sum: &mut [f64],
        decays: &[f64],
        parts: &mut [&mut [T]],
        more: Option<&[f64]>,
        more_parts: &mut [&mut [T]],
    ) -> Result<()> {
        match self {
            Self::Diagonal(weights) => {
                for (i, (part, &decay)) in parts.iter_mut().zip(decays).enumerate() {
                    step(sum, decay, part, weights);
                    if let (Some(weights), Some(part)) = (more, more_parts.get_mut(i)) {
                        weigh_row(sum, weights, part);
                    }
                }
            }
            Self::Matrix(matrix) => {
                let mut sums = room(parts.len() * sum.len(), "states of a scan")?;
                for (part, &decay) in parts.iter().zip(decays) {
                    for (sum, part) in sum.iter_mut().zip(part.iter()) {
                        *sum = *sum * decay + part.to_f64();
                    }
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

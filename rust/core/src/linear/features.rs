//! Feature maps: what a low-rank engine makes of a query and of a key.

use faer::{Accum, MatMut, MatRef};

use super::monomials::{Monomials, Run};
use super::state::Weighting;
use crate::error::Result;
use crate::memory::{room, zeroed};
use crate::numerics::real::Real;

/// Whose features, or whose state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Queries,
    Keys,
}

/// What features are for. Those for the weights are the first of those for the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Weights,
    Gradient,
}

/// The matrices that turn a sum over tokens into a state that features are applied to.
pub(crate) struct Weightings<'a> {
    /// For the gradient.
    pub gradient: Weighting<'a>,
    /// For the weights themselves, where they are not the first of those.
    pub weights: Option<Vec<f64>>,
}

/// The feature maps `φ` of queries and `χ` of keys of one head, and the matrix `W` between them.
///
/// Tiles hold tokens in columns ([`Tile`]) or in rows ([`TokenRows`]); features are formed a piece at a time where they are
/// many.
pub(crate) trait FeatureMap<T: Real>: Sync {
    /// Features of a token.
    fn rank(&self, purpose: Purpose) -> usize;

    /// Of those, how many are formed before any is used.
    fn formed_at_once(&self, purpose: Purpose) -> usize;

    /// Numbers a token that its features take as columns and as rows, and runs of monomials.
    fn sizes(&self, purpose: Purpose) -> FeatureSizes;

    /// The weighting of a state of keys, for the weights.
    fn weighting(&self) -> Result<Weighting<'_>>;

    /// The weightings of a state of one side, for the backward pass.
    fn backward_weightings(&self, state_of: Side) -> Result<Weightings<'_>>;

    /// Adds `values^T φ(x)` of the first `len` tokens to `state`, `(e, r)`, or replaces it.
    fn add_outer(
        &self,
        side: Side,
        purpose: Purpose,
        tokens: &mut TokenRows<T>,
        len: usize,
        state: MatMut<'_, T>,
        accum: Accum,
    );

    /// `tile.out = state φ(tile.x)`, for a weighted state of at least so many columns.
    fn apply(&self, side: Side, purpose: Purpose, state: MatRef<'_, T>, tile: &mut Tile<T>, len: usize);

    /// `tile.dx = J_φ(tile.x)^T state^T tile.values`, for a weighted state `(e, r)`.
    fn pull_back(&self, side: Side, purpose: Purpose, state: MatRef<'_, T>, tile: &mut Tile<T>, len: usize);

    /// Features leave out a factor `e^(h |x|^2)` of the weights of their side: this `h`.
    fn half(&self, _side: Side) -> f64 {
        0.0
    }

    /// Whether weights are those of a kernel whose rows have Jensen's lower bound: see [`floor`](super::floor).
    fn has_floor(&self) -> bool {
        false
    }

    /// What to do where a row's sum of weights is no use.
    fn remedy(&self) -> String;
}

/// Numbers a token that features take: see [`FeatureMap::sizes`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct FeatureSizes {
    /// In a [`Tile`]: the features that are formed at once, and a piece of the others.
    pub columns: [usize; 2],
    /// In [`TokenRows`].
    pub rows: [usize; 2],
    /// Runs of monomials, for the whole tile.
    pub runs: usize,
}

/// A tile of tokens, one a row, that are to be added to a state; and room for their features.
pub(crate) struct TokenRows<T> {
    /// Queries or keys, `(len, d)` in rows of `width`.
    pub x: Vec<T>,
    /// What a vector that is read at the end of a row may run into is added to d.
    pub width: usize,
    /// Extended values or upstream gradients, `(len, e)`.
    pub values: Vec<T>,
    /// The features that are formed at once, and a piece of the others.
    pub low: Vec<T>,
    pub piece: Vec<T>,
    pub runs: Vec<Run>,
}

impl<T: Real> TokenRows<T> {
    /// For tiles of at most `len` tokens.
    pub fn new(features: &dyn FeatureMap<T>, purpose: Purpose, d: usize, e: usize, len: usize) -> Result<Self> {
        let width = d + Monomials::OVERRUN;
        let zeros = |width: usize| zeroed(len * width, "a tile of tokens and features");
        let FeatureSizes { rows: [low, piece], runs, .. } = features.sizes(purpose);
        Ok(Self {
            x: zeros(width)?,
            width,
            values: zeros(e)?,
            low: zeros(low)?,
            piece: zeros(piece)?,
            runs: room(runs, "runs of monomials")?,
        })
    }
}

/// A tile of tokens along the lanes, and what states are applied to and pulled back through.
pub(crate) struct Tile<T> {
    /// Queries or keys, `(d, len)`.
    pub x: Vec<T>,
    /// Extended values or upstream gradients, `(e, len)`.
    pub values: Vec<T>,
    /// Gradients of x, `(d, len)`.
    pub dx: Vec<T>,
    /// A state times features, `(e, len)`.
    pub out: Vec<T>,
    /// The features that are formed at once, and a piece of the others.
    pub low: Vec<T>,
    pub piece: Vec<T>,
    /// Their gradients.
    pub dlow: Vec<T>,
    pub dpiece: Vec<T>,
}

impl<T: Real> Tile<T> {
    /// For tiles of at most `len` tokens, with room for a pullback where that is asked for.
    pub fn new(
        features: &dyn FeatureMap<T>,
        purpose: Purpose,
        (d, e): (usize, usize),
        len: usize,
        pullback: bool,
    ) -> Result<Self> {
        let zeros = |rows: usize| zeroed(rows * len, "a tile of features");
        let FeatureSizes { columns: [low, piece], .. } = features.sizes(purpose);
        let only = |rows: usize| if pullback { zeros(rows) } else { Ok(Vec::new()) };
        Ok(Self {
            x: zeros(d)?,
            values: only(e)?,
            dx: only(d)?,
            out: zeros(e)?,
            low: zeros(low)?,
            piece: zeros(piece)?,
            dlow: only(low)?,
            dpiece: only(piece)?,
        })
    }
}

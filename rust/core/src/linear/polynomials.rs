//! The feature map of the polynomial engine: monomials, so that `p(c q.k) = φ(q)^T diag(ω_p) φ(k)`.

use faer::prelude::ReborrowMut;
use faer::{Accum, MatMut, MatRef};

use super::features::{FeatureMap, FeatureSizes, Purpose, Side, Tile, TokenRows, Weightings};
use super::monomials::{Monomials, PIECE, PIECE_WIDTH};
use super::state::Weighting;
use crate::error::Result;
use crate::numerics::real::Real;
use crate::numerics::tile::{multiply, product, view, view_mut};

/// Monomials up to the degree of `p`, and up to that of the potential whose gradient stands in dq and dk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Polynomials<'a> {
    pub tree: &'a Monomials,
    /// `a_0 .. a_g`.
    pub coefficients: &'a [f64],
    pub potential_degree: usize,
    /// Whether the gradient is the derivative of the forward pass.
    pub consistent: bool,
    /// Factor of the scores.
    pub scale: f64,
}

/// Coefficients of the polynomial whose gradient stands in dq and dk, for those of p: of `P` with `P' = p`, or of `p`
/// itself where the gradient is consistent.
///
/// The constant of `P` is free. With that of `p`, Taylor's `P` continues `p`: then one weighted state is both.
fn potential(a: &[f64], consistent: bool) -> Vec<f64> {
    if consistent {
        return a.to_vec();
    }
    std::iter::once(a[0]).chain(a.iter().enumerate().map(|(j, a)| a / (j + 1) as f64)).collect()
}

impl Polynomials<'_> {
    fn degree(&self, purpose: Purpose) -> usize {
        match purpose {
            Purpose::Weights => self.coefficients.len() - 1,
            Purpose::Gradient => self.potential_degree,
        }
    }
}

impl<T: Real> FeatureMap<T> for Polynomials<'_> {
    fn rank(&self, purpose: Purpose) -> usize {
        self.tree.rank(self.degree(purpose))
    }

    fn formed_at_once(&self, purpose: Purpose) -> usize {
        self.tree.rank(self.degree(purpose) - 1).max(PIECE)
    }

    fn sizes(&self, purpose: Purpose) -> FeatureSizes {
        let degree = self.degree(purpose);
        let low_degree = self.tree.low_degree(degree);
        let more = low_degree < degree;
        FeatureSizes {
            columns: [self.tree.rank(low_degree), if more { PIECE } else { 0 }],
            rows: [self.tree.low_width(degree), if more { PIECE_WIDTH } else { 0 }],
            runs: self.tree.most_runs(degree),
        }
    }

    fn weighting(&self) -> Result<Weighting<'_>> {
        Ok(Weighting::Diagonal(self.tree.weights(self.coefficients, self.scale)?))
    }

    fn backward_weightings(&self, _: Side) -> Result<Weightings<'_>> {
        let a = self.coefficients;
        let potential = potential(a, self.consistent);
        let differ = potential[..a.len()] != *a;
        Ok(Weightings {
            gradient: Weighting::Diagonal(self.tree.weights(&potential, self.scale)?),
            weights: differ.then(|| self.tree.weights(a, self.scale)).transpose()?,
        })
    }

    fn add_outer(
        &self,
        _: Side,
        purpose: Purpose,
        tokens: &mut TokenRows<T>,
        len: usize,
        mut state: MatMut<'_, T>,
        accum: Accum,
    ) {
        let (tree, degree) = (self.tree, self.degree(purpose));
        let TokenRows { x, width, values, low, piece, runs } = tokens;
        let values = view(values, len, state.nrows()).transpose();
        tree.low_rows(x, *width, len, degree, low, runs);
        for features in tree.pieces(degree) {
            let (start, count) = (features.start, features.len());
            let features = if start == 0 {
                view(low, len, tree.low_width(degree))
            } else {
                tree.piece_rows(x, *width, low, len, degree, features, piece, runs);
                view(piece, len, PIECE_WIDTH)
            };
            multiply(state.rb_mut().subcols_mut(start, count), accum, values, features, T::ONE);
        }
    }

    fn apply(&self, _: Side, purpose: Purpose, state: MatRef<'_, T>, tile: &mut Tile<T>, len: usize) {
        let (tree, degree) = (self.tree, self.degree(purpose));
        for piece in tree.pieces(degree) {
            let features = if piece.start == 0 {
                tree.features(&tile.x, len, tree.low_degree(degree), &mut tile.low);
                &tile.low
            } else {
                tree.piece(&tile.x, &tile.low, len, piece.clone(), &mut tile.piece);
                &tile.piece
            };
            let (state, features) = (state.subcols(piece.start, piece.len()), view(features, piece.len(), len));
            let out = view_mut(&mut tile.out, state.nrows(), len);
            let accum = if piece.start == 0 { Accum::Replace } else { Accum::Add };
            multiply(out, accum, state, features, T::ONE);
        }
    }

    fn pull_back(&self, _: Side, purpose: Purpose, state: MatRef<'_, T>, tile: &mut Tile<T>, len: usize) {
        let (tree, degree) = (self.tree, self.degree(purpose));
        let Tile { x, values, dx, low, dlow, dpiece, .. } = tile;
        let values = view(values, state.nrows(), len);
        dx.fill(T::ZERO);
        for piece in tree.pieces(degree) {
            let dfeatures = if piece.start == 0 { &mut *dlow } else { &mut *dpiece };
            let columns = state.subcols(piece.start, piece.len()).transpose();
            product(view_mut(dfeatures, piece.len(), len), columns, values, T::ONE);
            if piece.start == 0 {
                tree.features(x, len, degree - 1, low);
            } else {
                tree.pullback_piece(x, low, len, piece, dpiece, dlow, dx);
            }
        }
        tree.pullback(x, low, len, tree.low_degree(degree), dlow, dx);
    }

    fn remedy(&self) -> String {
        format!(
            "its scores lie outside the region where this polynomial of degree {} resembles exp; use an even degree \
             with coefficients=\"taylor\", a smaller scale, or Exact()",
            self.coefficients.len() - 1
        )
    }
}

//! The feature maps of the landmark engine: Gaussians around a few points, of queries and of keys. See
//! [`landmark`](crate::engines::landmark).

use faer::{Accum, Mat, MatMut, MatRef};

use super::features::{FeatureMap, FeatureSizes, Purpose, Side, Tile, TokenRows, Weightings};
use super::monomials::PIECE;
use super::state::Weighting;
use crate::error::Result;
use crate::memory::{matrix, room, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{multiply, product, view, view_mut};
use crate::spec::LandmarkConstants;

/// The largest part of a tile of tokens.
pub(crate) const LONGEST_TILE: usize = 128;

/// One feature map, `φ_l(x) = e^{points_l.x + offsets_l - half |x|^2}`.
#[derive(Debug, Clone)]
pub(crate) struct Map<T> {
    r: usize,
    d: usize,
    /// `(r, d)`, and the same by columns.
    points: Vec<T>,
    transposed: Vec<T>,
    offsets: Vec<T>,
    pub half: f64,
}

/// Landmarks, ready for tiles.
#[derive(Debug, Clone)]
pub(crate) struct Gaussians<T> {
    pub query: Map<T>,
    pub key: Map<T>,
    /// `M`.
    pub matrix: Mat<f64>,
}

impl<T: Real> Map<T> {
    fn new(landmarks: MatRef<'_, f64>, factor: f64, offset: f64, half: f64) -> Result<Self> {
        let (r, d) = landmarks.shape();
        let mut map = Self {
            r,
            d,
            points: room(r * d, "landmarks")?,
            transposed: zeroed(r * d, "landmarks")?,
            offsets: room(r, "landmarks")?,
            half,
        };
        for l in 0..r {
            let mut square = 0.0;
            for c in 0..d {
                let x = landmarks[(l, c)];
                square += x * x;
                map.points.push(T::of(factor * x));
                map.transposed[c * r + l] = T::of(factor * x);
            }
            map.offsets.push(T::of(offset * square));
        }
        Ok(map)
    }

    /// The features of `x (d, len)`, `(r, len)`.
    pub fn columns(&self, x: &[T], len: usize, f: &mut [T]) {
        product(view_mut(f, self.r, len), view(&self.points, self.r, self.d), view(x, self.d, len), T::ONE);
        let half = T::of(self.half);
        let mut norms = [T::ZERO; LONGEST_TILE];
        let norms = &mut norms[..len];
        vectorised(
            #[inline(always)]
            || {
                for x in x[..self.d * len].chunks_exact(len) {
                    norms.iter_mut().zip(x).for_each(|(norm, &x)| *norm += half * x * x);
                }
                for (f, &offset) in f.chunks_exact_mut(len).zip(&self.offsets) {
                    for (f, &norm) in f.iter_mut().zip(&*norms) {
                        *f = (*f + offset - norm).exp_nonpositive();
                    }
                }
            },
        );
    }

    /// The features of `x`, `len` rows of `width` numbers, `(len, r)`.
    pub fn rows(&self, x: &[T], width: usize, len: usize, f: &mut [T]) {
        let x = view(x, len, width).subcols(0, self.d);
        product(view_mut(f, len, self.r), x, view(&self.transposed, self.d, self.r), T::ONE);
        let half = T::of(self.half);
        for (t, f) in f.chunks_exact_mut(self.r).enumerate().take(len) {
            let norm: T = x.row(t).iter().map(|&x| half * x * x).sum();
            vectorised(
                #[inline(always)]
                || {
                    for (f, &offset) in f.iter_mut().zip(&self.offsets) {
                        *f = (*f + offset - norm).exp_nonpositive();
                    }
                },
            );
        }
    }

    /// `dx (d, len)`, from the gradients of the features, `(r, len)`, whose features are left in `f`; those gradients
    /// are lost.
    pub fn pullback(&self, x: &[T], len: usize, f: &mut [T], df: &mut [T], dx: &mut [T]) {
        self.columns(x, len, f);
        for (df, &f) in df[..self.r * len].iter_mut().zip(&*f) {
            *df *= f;
        }
        product(view_mut(dx, self.d, len), view(&self.transposed, self.d, self.r), view(df, self.r, len), T::ONE);
    }
}

impl<T: Real> Gaussians<T> {
    /// Of landmarks that were drawn, for scores of this factor.
    pub fn new(given: &LandmarkConstants, scale: f64) -> Result<Self> {
        let (r, d) = (given.rank(), given.query_shift.len());
        let points = MatRef::from_row_major_slice(&given.landmarks, r, d);
        let (c, t) = (scale.abs(), given.balance);
        let sign = if scale < 0.0 { -1.0 } else { 1.0 };
        Ok(Self {
            query: Map::new(points, sign * c / t, -c / 2.0, c / (2.0 * t * t))?,
            key: Map::new(points, c * t, -c / 2.0, c * t * t / 2.0)?,
            matrix: matrix(r, r, "the matrix of landmarks", |i, j| given.matrix[i * r + j])?,
        })
    }

    /// How many.
    pub fn rank(&self) -> usize {
        self.query.r
    }

    /// The features of one side.
    pub fn map(&self, side: Side) -> &Map<T> {
        match side {
            Side::Queries => &self.query,
            Side::Keys => &self.key,
        }
    }
}

/// What to do where landmarks do not resolve a row.
pub const REMEDY: &str =
    "its weights are not resolved by these landmarks; use a higher rank, tol= in place of an engine, or Exact()";

impl<T: Real> FeatureMap<T> for Gaussians<T> {
    fn rank(&self, _: Purpose) -> usize {
        self.query.r
    }

    fn formed_at_once(&self, _: Purpose) -> usize {
        self.query.r.max(PIECE)
    }

    fn sizes(&self, _: Purpose) -> FeatureSizes {
        FeatureSizes { columns: [self.query.r, 0], rows: [self.query.r, 0], runs: 0 }
    }

    fn weighting(&self) -> Result<Weighting<'_>> {
        Ok(Weighting::Matrix(self.matrix.transpose()))
    }

    fn backward_weightings(&self, state_of: Side) -> Result<Weightings<'_>> {
        let matrix = match state_of {
            Side::Keys => self.matrix.transpose(),
            Side::Queries => self.matrix.as_ref(),
        };
        Ok(Weightings { gradient: Weighting::Matrix(matrix), weights: None })
    }

    fn add_outer(
        &self,
        side: Side,
        _: Purpose,
        tokens: &mut TokenRows<T>,
        len: usize,
        state: MatMut<'_, T>,
        accum: Accum,
    ) {
        let (e, r) = state.shape();
        self.map(side).rows(&tokens.x, tokens.width, len, &mut tokens.low);
        multiply(state, accum, view(&tokens.values, len, e).transpose(), view(&tokens.low, len, r), T::ONE);
    }

    fn apply(&self, side: Side, _: Purpose, state: MatRef<'_, T>, tile: &mut Tile<T>, len: usize) {
        self.map(side).columns(&tile.x, len, &mut tile.low);
        let features = view(&tile.low, self.query.r, len);
        product(view_mut(&mut tile.out, state.nrows(), len), state, features, T::ONE);
    }

    fn pull_back(&self, side: Side, _: Purpose, state: MatRef<'_, T>, tile: &mut Tile<T>, len: usize) {
        let Tile { x, values, dx, low, dlow, .. } = tile;
        let values = view(values, state.nrows(), len);
        product(view_mut(dlow, self.query.r, len), state.transpose(), values, T::ONE);
        self.map(side).pullback(x, len, low, dlow, dx);
    }

    fn half(&self, side: Side) -> f64 {
        self.map(side).half
    }

    fn has_floor(&self) -> bool {
        true
    }

    fn remedy(&self) -> String {
        REMEDY.into()
    }
}

//! Which landmarks, with which matrix, err least on a sample: see the top of [`landmark`](super).

use faer::{Mat, MatRef};

use super::sample::{Candidate, Sample, normalise};
use crate::error::Result;
use crate::linear::features::Side;
use crate::linear::gaussians::{Gaussians, LONGEST_TILE};
use crate::linear::state::Weighting;
use crate::memory::{copied, zeroed};
use crate::numerics::draws::uniform;
use crate::numerics::real::Real;
use crate::numerics::tile::{product, view, view_mut};
use crate::spec::LandmarkConstants;

/// Queries and keys of the sample that landmarks are judged on.
const JUDGE: [usize; 2] = [128, 512];

/// What errors call what it works on.
const JUDGED: &str = "features of landmarks that are judged";

/// A sample on which landmarks are judged, with its exact attention.
pub(super) struct Judge<'a, T> {
    sample: &'a Sample<'a, T>,
    /// Shifted queries, `(d, queries)`.
    queries: Vec<T>,
    /// Shifted keys, `(keys, d)`.
    keys: Vec<T>,
    /// `[w_j v_j, w_j]`, `(keys, e)`.
    values: Vec<T>,
    /// Queries, and keys.
    count: [usize; 2],
    /// Exact outputs, `(queries, d_v)`.
    out: Mat<f64>,
    gradients: Option<JudgedGradients<T>>,
}

/// A random dout, and the exact dq and dk that it gives.
struct JudgedGradients<T> {
    /// `(queries, d_v)`.
    dout: Mat<f64>,
    /// `(queries, d)`.
    dq: Mat<f64>,
    /// `(keys, d)`.
    dk: Mat<f64>,
    /// Shifted queries, `(queries, d)`, and keys, `(d, keys)`: the other way round than the judge has them.
    query_rows: Vec<T>,
    key_columns: Vec<T>,
}

impl<'a, T: Real> Judge<'a, T> {
    /// Draws the tokens, other ones than landmarks are drawn from or fitted to, and computes them exactly; their gradients
    /// too where that is asked for.
    pub fn new(sample: &'a Sample<'a, T>, gradients: bool) -> Result<Self> {
        let (_, q) = sample.points(Side::Queries, JUDGE[0], 5)?;
        let (key_rows, k) = sample.points(Side::Keys, JUDGE[1], 6)?;
        if k.nrows() == 0 {
            return Err(sample.no_landmarks());
        }
        let mut f = sample.kernel(&q, &k)?;
        let (_, weights) = normalise(&mut f, &sample.log_weights(&key_rows, &k)); // f is (queries, keys) now
        let (d, d_v, count) = (k.ncols(), sample.head.v.ncols(), [q.nrows(), k.nrows()]);
        let v = Mat::from_fn(count[1], d_v, |j, c| sample.head.v[(key_rows[j], c)].to_f64());
        let out = &f * &v;
        // Points are balanced, and features take tokens that are not.
        let factor = sample.scale.signum() / sample.balance;
        let mut queries = vec![T::ZERO; d * count[0]];
        for c in 0..d {
            for i in 0..count[0] {
                queries[c * count[0] + i] = T::of(q[(i, c)] / factor);
            }
        }
        let mut keys = vec![T::ZERO; count[1] * d];
        for j in 0..count[1] {
            for c in 0..d {
                keys[j * d + c] = T::of(k[(j, c)] / sample.balance);
            }
        }
        let mut values = Vec::with_capacity(count[1] * (d_v + 1));
        for (j, w) in weights.iter().enumerate() {
            values.extend((0..d_v).map(|c| T::of(w * v[(j, c)])).chain([T::of(*w)]));
        }
        let mut judge = Self { sample, queries, keys, values, count, out, gradients: None };
        if gradients {
            judge.gradients = Some(JudgedGradients::new(&judge, &f, &v));
        }
        Ok(judge)
    }

    /// Puts in `best` what errs least: these landmarks, `(r, d)`, with one of these matrices, `(r, r)`, or what is there.
    pub fn best(&self, points: MatRef<'_, f64>, matrices: Vec<Mat<f64>>, best: &mut Option<Candidate>) -> Result<()> {
        let ([count, keys], (r, d)) = (self.count, points.shape());
        let e = self.values.len() / keys;
        let data = |x: MatRef<'_, f64>| x.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<_>>()).collect();
        let mut given = LandmarkConstants {
            scale: self.sample.scale,
            query_shift: self.sample.shifts[0].clone(),
            key_shift: self.sample.shifts[1].clone(),
            balance: self.sample.balance,
            landmarks: data(points),
            matrix: vec![0.0; r * r],
        };
        let landmarks = Gaussians::<T>::new(&given, self.sample.scale)?;
        let mut features = zeroed(count.max(keys) * r, JUDGED)?;
        landmarks.key.rows(&self.keys, d, keys, &mut features);
        let mut state = zeroed(e * r, JUDGED)?;
        product(view_mut(&mut state, e, r), view(&self.values, keys, e).transpose(), view(&features, keys, r), T::ONE);
        let key_sum: Vec<f64> = state.iter().map(|x| x.to_f64()).collect(); // (e, r)
        landmarks.query.columns(&self.queries, count, &mut features);
        for matrix in matrices {
            let state: Vec<T> = Weighting::Matrix(matrix.transpose()).weigh(&key_sum, r)?;
            let mut sums = vec![T::ZERO; e * count];
            product(view_mut(&mut sums, e, count), view(&state, e, r), view(&features, r, count), T::ONE);
            let denominators = &sums[(e - 1) * count..];
            if !denominators.iter().all(|&x| x > T::ZERO && x.finite()) {
                continue;
            }
            let out = Mat::from_fn(count, e - 1, |i, c| (sums[c * count + i] / denominators[i]).to_f64());
            let error = relative_error(&out, &self.out);
            let gradients = match &self.gradients {
                Some(gradients) => {
                    let judged = Judged { judge: self, landmarks: &landmarks, matrix: &matrix, state: &state };
                    Some(gradients.error(judged, &out, denominators, &mut copied(&features, JUDGED)?)?)
                }
                None => None,
            };
            let before = best.as_ref().map_or(f64::INFINITY, Candidate::worst);
            if gradients.map_or(error, |gradients| gradients.max(error)) < before {
                given.matrix = data(matrix.as_ref());
                *best = Some(Candidate { constants: given.clone(), out: error, gradients });
            }
        }
        Ok(())
    }
}

/// Landmarks that are being judged, with one of their matrices.
#[derive(Clone, Copy)]
struct Judged<'a, T> {
    judge: &'a Judge<'a, T>,
    landmarks: &'a Gaussians<T>,
    /// `M`.
    matrix: &'a Mat<f64>,
    /// The weighted state of the keys, `(e, r)`.
    state: &'a [T],
}

impl<T: Real> JudgedGradients<T> {
    /// From the exact weights `f`, `(queries, keys)`, and the values.
    fn new(judge: &Judge<'_, T>, f: &Mat<f64>, v: &Mat<f64>) -> Self {
        let ([count, keys], d_v, sample) = (judge.count, v.ncols(), judge.sample);
        let d = judge.keys.len() / keys;
        let dout = Mat::from_fn(count, d_v, |i, c| 2.0 * uniform(sample.seed ^ 7, (i * d_v + c) as u64) - 1.0);
        let mut ds = &dout * v.transpose();
        for i in 0..count {
            let delta: f64 = (0..d_v).map(|c| dout[(i, c)] * judge.out[(i, c)]).sum();
            for j in 0..keys {
                ds[(i, j)] = f[(i, j)] * (ds[(i, j)] - delta) * sample.scale;
            }
        }
        let dq = &ds * Mat::from_fn(keys, d, |j, c| judge.keys[j * d + c].to_f64());
        let dk = ds.transpose() * Mat::from_fn(count, d, |i, c| judge.queries[c * count + i].to_f64());
        let query_rows = (0..count * d).map(|at| judge.queries[at % d * count + at / d]).collect();
        let key_columns = (0..keys * d).map(|at| judge.keys[at % keys * d + at / keys]).collect();
        Self { dout, dq, dk, query_rows, key_columns }
    }

    /// The larger of the errors of dq and dk, given the outputs and denominators of what is judged. `buffer` has room for
    /// the features of all tokens.
    fn error(&self, judged: Judged<'_, T>, out: &Mat<f64>, denominators: &[T], buffer: &mut [T]) -> Result<f64> {
        let ([count, keys], d, r) = (judged.judge.count, self.dq.ncols(), judged.landmarks.rank());
        let e = judged.judge.values.len() / keys;
        let mut upstream = vec![T::ZERO; count * e]; // [dout_i, -delta_i] / D_i, (queries, e)
        for (i, row) in upstream.chunks_exact_mut(e).enumerate() {
            let inverse = 1.0 / denominators[i].to_f64();
            let delta: f64 = (0..e - 1).map(|c| self.dout[(i, c)] * out[(i, c)]).sum();
            for (c, x) in row.iter_mut().enumerate() {
                *x = T::of(inverse * if c < e - 1 { self.dout[(i, c)] } else { -delta });
            }
        }
        let longest = count.max(keys);
        let (mut df, mut dx) = (zeroed(r * longest, JUDGED)?, zeroed(d * longest, JUDGED)?);
        let upstream = view(&upstream, count, e);
        let dq = self.dq_error(judged, upstream, buffer, &mut df, &mut dx);
        Ok(dq.max(self.dk_error(judged, upstream, buffer, &mut df, &mut dx)?))
    }

    /// The error of `dq_i = J_φ(q_i)^T W S^T upstream_i`.
    fn dq_error(
        &self,
        judged: Judged<'_, T>,
        upstream: MatRef<'_, T>,
        features: &mut [T],
        df: &mut [T],
        dx: &mut [T],
    ) -> f64 {
        let Judged { judge, landmarks, state, .. } = judged;
        let (count, d, r, e) = (judge.count[0], self.dq.ncols(), landmarks.rank(), upstream.ncols());
        product(view_mut(df, r, count), view(state, e, r).transpose(), upstream.transpose(), T::ONE);
        landmarks.query.pullback(&judge.queries, count, features, df, dx);
        relative_error(&Mat::from_fn(count, d, |i, c| dx[c * count + i].to_f64()), &self.dq)
    }

    /// The error of `dk_j = w_j J_χ(k_j)^T W^T R^T [v_j; 1]`.
    fn dk_error(
        &self,
        judged: Judged<'_, T>,
        upstream: MatRef<'_, T>,
        features: &mut [T],
        df: &mut [T],
        dx: &mut [T],
    ) -> Result<f64> {
        let Judged { judge, landmarks, matrix, .. } = judged;
        let ([count, keys], d, r, e) = (judge.count, self.dq.ncols(), landmarks.rank(), upstream.ncols());
        landmarks.query.rows(&self.query_rows, d, count, features);
        let mut state = vec![T::ZERO; e * r]; // R, (e, r)
        product(view_mut(&mut state, e, r), upstream.transpose(), view(features, count, r), T::ONE);
        let query_sum: Vec<f64> = state.iter().map(|x| x.to_f64()).collect();
        let state: Vec<T> = Weighting::Matrix(matrix.as_ref()).weigh(&query_sum, r)?;
        let values = view(&judge.values, keys, e);
        product(view_mut(df, r, keys), view(&state, e, r).transpose(), values.transpose(), T::ONE);
        let mut dk = Mat::zeros(keys, d);
        // A tile of keys at a time, as a feature map takes them.
        for start in (0..keys).step_by(LONGEST_TILE) {
            let len = LONGEST_TILE.min(keys - start);
            let columns = |x: &[T], rows: usize| -> Vec<T> {
                (0..rows * len).map(|at| x[at / len * keys + start + at % len]).collect()
            };
            let (x, mut df) = (columns(&self.key_columns, d), columns(df, r));
            landmarks.key.pullback(&x, len, features, &mut df, dx);
            for j in 0..len {
                for c in 0..d {
                    dk[(start + j, c)] = dx[c * len + j].to_f64();
                }
            }
        }
        Ok(relative_error(&dk, &self.dk))
    }
}

/// `‖got - want‖ / ‖want‖`: 0 where both are, infinite where it is no number.
fn relative_error(got: &Mat<f64>, want: &Mat<f64>) -> f64 {
    let (error, size) = ((got - want).norm_l2(), want.norm_l2());
    let relative = if error == 0.0 { 0.0 } else { error / size };
    if relative.is_nan() { f64::INFINITY } else { relative }
}

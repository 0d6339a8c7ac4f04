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
    /// Shifted queries `(d, count)` and keys, in rows of `d`.
    queries: Vec<T>,
    keys: Vec<T>,
    weights: Vec<f64>,
    /// `[w_j v_j, w_j]`, `(count, e)`.
    values: Vec<T>,
    count: [usize; 2],
    out: Mat<f64>,
    gradients: Option<JudgedGradients<T>>,
}

/// A random dout, and the exact dq and dk that it gives.
struct JudgedGradients<T> {
    dout: Mat<f64>,
    dq: Mat<f64>,
    dk: Mat<f64>,
    /// The queries in rows, and the keys as `(d, count)`: the other way round than the judge has them.
    query_rows: Vec<T>,
    key_columns: Vec<T>,
}

impl<'a, T: Real> Judge<'a, T> {
    pub fn new(sample: &'a Sample<'a, T>, gradients: bool) -> Result<Self> {
        let (_, q) = sample.points(Side::Queries, JUDGE[0], 5)?;
        let (key_rows, k) = sample.points(Side::Keys, JUDGE[1], 6)?;
        if k.nrows() == 0 {
            return Err(sample.no_landmarks());
        }
        let mut exact = sample.kernel(&q, &k)?;
        let log_weights = sample.log_weights(&key_rows, &k);
        let (_, weights) = normalise(&mut exact, &log_weights);
        let (d, dv) = (k.ncols(), sample.head.v.ncols());
        let v = Mat::from_fn(key_rows.len(), dv, |j, c| sample.head.v[(key_rows[j], c)].to_f64());
        let out = &exact * &v;
        let shifted = |x: &Mat<f64>, i: usize, c: usize, factor: f64| x[(i, c)] / factor;
        let factor = sample.scale.signum() / sample.balance;
        let mut queries = vec![T::ZERO; d * q.nrows()];
        for c in 0..d {
            for i in 0..q.nrows() {
                queries[c * q.nrows() + i] = T::of(shifted(&q, i, c, factor));
            }
        }
        let mut keys = vec![T::ZERO; k.nrows() * d];
        for j in 0..k.nrows() {
            for c in 0..d {
                keys[j * d + c] = T::of(shifted(&k, j, c, sample.balance));
            }
        }
        let mut values = Vec::with_capacity(k.nrows() * (dv + 1));
        for (j, w) in weights.iter().enumerate() {
            values.extend((0..dv).map(|c| T::of(w * v[(j, c)])).chain([T::of(*w)]));
        }
        let gradients = gradients.then(|| {
            let dout = Mat::from_fn(q.nrows(), dv, |i, c| 2.0 * uniform(sample.seed ^ 7, (i * dv + c) as u64) - 1.0);
            let mut ds = &dout * v.transpose();
            for i in 0..q.nrows() {
                let delta: f64 = (0..dv).map(|c| dout[(i, c)] * out[(i, c)]).sum();
                for j in 0..k.nrows() {
                    ds[(i, j)] = exact[(i, j)] * (ds[(i, j)] - delta) * sample.scale;
                }
            }
            let dq = &ds * Mat::from_fn(k.nrows(), d, |j, c| keys[j * d + c].to_f64());
            let dk = ds.transpose() * Mat::from_fn(q.nrows(), d, |i, c| queries[c * q.nrows() + i].to_f64());
            let query_rows = (0..q.nrows() * d).map(|at| queries[at % d * q.nrows() + at / d]).collect();
            let key_columns = (0..k.nrows() * d).map(|at| keys[at % k.nrows() * d + at / k.nrows()]).collect();
            JudgedGradients { dout, dq, dk, query_rows, key_columns }
        });
        Ok(Self { sample, queries, keys, weights, values, count: [q.nrows(), k.nrows()], out, gradients })
    }

    /// Puts what errs least, of these landmarks with any of these matrices and what is there, in `best`.
    pub fn best(&self, points: MatRef<'_, f64>, matrices: Vec<Mat<f64>>, best: &mut Option<Candidate>) -> Result<()> {
        let ([count, keys], (r, d)) = (self.count, points.shape());
        let e = self.values.len() / self.weights.len();
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
        let sum: Vec<f64> = state.iter().map(|x| x.to_f64()).collect();
        landmarks.query.columns(&self.queries, count, &mut features);
        for matrix in matrices {
            let state: Vec<T> = Weighting::Matrix(matrix.transpose()).weigh(&sum, r)?;
            let mut out = vec![T::ZERO; e * count];
            product(view_mut(&mut out, e, count), view(&state, e, r), view(&features, r, count), T::ONE);
            let denominators = &out[(e - 1) * count..];
            if !denominators.iter().all(|&x| x > T::ZERO && x.finite()) {
                continue;
            }
            let got = Mat::from_fn(count, e - 1, |i, c| (out[c * count + i] / denominators[i]).to_f64());
            let error = relative(&got, &self.out);
            let gradients = (self.gradients.as_ref())
                .map(|gradients| {
                    let buffer = &mut copied(&features, JUDGED)?;
                    gradients.error(self, &landmarks, &matrix, &state, &got, denominators, buffer)
                })
                .transpose()?;
            let candidate = |constants| Candidate { constants, out: error, gradients };
            let before = best.as_ref().map_or(f64::INFINITY, Candidate::worst);
            if gradients.map_or(error, |gradients| gradients.max(error)) < before {
                given.matrix = data(matrix.as_ref());
                *best = Some(candidate(given.clone()));
            }
        }
        Ok(())
    }
}

impl<T: Real> JudgedGradients<T> {
    /// The larger of the errors of dq and dk, for the weighted state of the keys and what it gave. `buffer` has room for the
    /// features of all tokens.
    fn error(
        &self,
        judge: &Judge<'_, T>,
        landmarks: &Gaussians<T>,
        matrix: &Mat<f64>,
        state: &[T],
        out: &Mat<f64>,
        denominators: &[T],
        buffer: &mut [T],
    ) -> Result<f64> {
        let ([count, keys], d, r) = (judge.count, self.dq.ncols(), landmarks.rank());
        let e = judge.values.len() / keys;
        // [dout_i, -delta_i] / D_i, in rows.
        let mut upstream = vec![T::ZERO; count * e];
        for (i, row) in upstream.chunks_exact_mut(e).enumerate() {
            let by = 1.0 / denominators[i].to_f64();
            let delta: f64 = (0..e - 1).map(|c| self.dout[(i, c)] * out[(i, c)]).sum();
            for (c, x) in row.iter_mut().enumerate() {
                *x = T::of(by * if c < e - 1 { self.dout[(i, c)] } else { -delta });
            }
        }
        let most = count.max(keys);
        let (mut df, mut dx) = (zeroed(r * most, JUDGED)?, zeroed(d * most, JUDGED)?);
        let (upstream, values) = (view(&upstream, count, e), view(&judge.values, keys, e));
        product(view_mut(&mut df, r, count), view(state, e, r).transpose(), upstream.transpose(), T::ONE);
        landmarks.query.pullback(&judge.queries, count, buffer, &mut df, &mut dx);
        let dq = relative(&Mat::from_fn(count, d, |i, c| dx[c * count + i].to_f64()), &self.dq);

        landmarks.query.rows(&self.query_rows, d, count, buffer);
        let mut sum = vec![T::ZERO; e * r];
        product(view_mut(&mut sum, e, r), upstream.transpose(), view(buffer, count, r), T::ONE);
        let sum: Vec<f64> = sum.iter().map(|x| x.to_f64()).collect();
        let of_keys: Vec<T> = Weighting::Matrix(matrix.as_ref()).weigh(&sum, r)?;
        product(view_mut(&mut df, r, keys), view(&of_keys, e, r).transpose(), values.transpose(), T::ONE);
        let mut dk = Mat::zeros(keys, d);
        // A tile of keys at a time, as a feature map takes them.
        for start in (0..keys).step_by(LONGEST_TILE) {
            let len = LONGEST_TILE.min(keys - start);
            let part = |x: &[T], rows: usize| -> Vec<T> {
                (0..rows * len).map(|at| x[at / len * keys + start + at % len]).collect()
            };
            let (x, mut df) = (part(&self.key_columns, d), part(&df, r));
            landmarks.key.pullback(&x, len, buffer, &mut df, &mut dx);
            for j in 0..len {
                for c in 0..d {
                    dk[(start + j, c)] = dx[c * len + j].to_f64();
                }
            }
        }
        Ok(dq.max(relative(&dk, &self.dk)))
    }
}

/// `‖got - want‖ / ‖want‖`: 0 where both are, infinite where it is no number.
fn relative(got: &Mat<f64>, want: &Mat<f64>) -> f64 {
    let (error, size) = ((got - want).norm_l2(), want.norm_l2());
    let relative = if error == 0.0 { 0.0 } else { error / size };
    if relative.is_nan() { f64::INFINITY } else { relative }
}

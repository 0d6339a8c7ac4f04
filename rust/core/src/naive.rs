//! The float64 oracle: `O(n m)` time and memory, obvious on purpose. Every test compares with it.

use faer::{Mat, MatRef};

use crate::problem::scores::Mask;
use crate::spec::Gradient;

/// One head, and how its scores become weights.
#[derive(Debug, Clone)]
pub struct Naive<'a> {
    /// `(n, d)`.
    pub q: MatRef<'a, f64>,
    /// `(m, d)`.
    pub k: MatRef<'a, f64>,
    /// `(m, d_v)`.
    pub v: MatRef<'a, f64>,
    /// Added to the scores; empty for none.
    pub key_bias: &'a [f64],
    /// Which keys a query sees.
    pub mask: Mask,
    /// Factor of the scores.
    pub scale: f64,
    /// What exact scores alone have.
    pub options: Options<'a>,
    /// `None` for `exp`; else the coefficients of the polynomial of `scale q.k`, and its gradient.
    pub polynomial: Option<(&'a [f64], Gradient)>,
}

/// Options of exact scores: `c tanh(s / c)`, which pairs are allowed and what is added to them, and a score that joins
/// every denominator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// `c`.
    pub softcap: Option<f64>,
    /// `(n, m)`.
    pub allowed: Option<MatRef<'a, bool>>,
    /// `(n, m)`.
    pub bias: Option<MatRef<'a, f64>>,
    /// The score without a value.
    pub sink: Option<f64>,
}

/// The gradients.
#[derive(Debug, Clone)]
pub struct NaiveGrads {
    /// `(n, d)`.
    pub dq: Mat<f64>,
    /// `(m, d)`.
    pub dk: Mat<f64>,
    /// `(m, d_v)`.
    pub dv: Mat<f64>,
    /// `(m,)`.
    pub dkey_bias: Vec<f64>,
    /// `(n, m)`.
    pub dbias: Mat<f64>,
    /// Of the sink.
    pub dsink: f64,
}

impl Naive<'_> {
    fn score(&self, i: usize, j: usize) -> f64 {
        self.scale * (0..self.q.ncols()).map(|c| self.q[(i, c)] * self.k[(j, c)]).sum::<f64>()
    }

    fn bias(&self, j: usize) -> f64 {
        self.key_bias.get(j).copied().unwrap_or(0.0)
    }

    /// Row i of `(A, A')`: the weight of each key that query i sees, before normalisation, and the factor that its
    /// score's gradient takes in its place: the derivative of the weight, or (closed form) the weight itself.
    fn row(&self, i: usize) -> Vec<(f64, f64)> {
        let seen = || self.mask.seen(i, self.k.nrows());
        match self.polynomial {
            None => {
                let Options { softcap, allowed, bias, .. } = self.options;
                let total = |j| {
                    let s = softcap.map_or(self.score(i, j), |c| c * (self.score(i, j) / c).tanh());
                    let hidden = allowed.is_some_and(|allowed| !allowed[(i, j)]);
                    if hidden { f64::NEG_INFINITY } else { s + self.bias(j) + bias.map_or(0.0, |bias| bias[(i, j)]) }
                };
                let max = seen().map(total).fold(self.options.sink.unwrap_or(f64::NEG_INFINITY), f64::max);
                let weight = |j| if total(j) == f64::NEG_INFINITY { 0.0 } else { (total(j) - max).exp() };
                let sink = self.options.sink.map(|sink| (sink - max).exp());
                seen().map(weight).chain(sink).map(|a| (a, a)).collect()
            }
            Some((a, gradient)) => {
                let level = seen().map(|j| self.bias(j)).fold(f64::NEG_INFINITY, f64::max);
                let weights = |j| {
                    let (s, w) = (self.score(i, j), (self.bias(j) - level).exp());
                    let p: f64 = a.iter().enumerate().map(|(l, a)| a * s.powi(l as i32)).sum();
                    let slope: f64 =
                        a.iter().enumerate().skip(1).map(|(l, a)| l as f64 * a * s.powi(l as i32 - 1)).sum();
                    (w * p, w * if gradient == Gradient::Consistent { slope } else { p })
                };
                seen().map(weights).collect()
            }
        }
    }

    /// `f = D^-1 A`, and the score factor `D^-1 A'`.
    fn matrices(&self) -> (Mat<f64>, Mat<f64>) {
        let rows: Vec<_> = (0..self.q.nrows()).map(|i| self.row(i)).collect();
        let sums: Vec<f64> = rows.iter().map(|row| row.iter().map(|a| a.0).sum()).collect();
        let (n, m) = (self.q.nrows(), self.k.nrows());
        // A row without weights is 0.
        let sums: Vec<f64> = sums.into_iter().map(|sum| if sum == 0.0 { 1.0 } else { sum }).collect();
        let entry = |i: usize, j: usize| {
            let seen = self.mask.seen(i, m);
            if seen.contains(&j) { rows[i][j - seen.start] } else { (0.0, 0.0) }
        };

        (Mat::from_fn(n, m, |i, j| entry(i, j).0 / sums[i]), Mat::from_fn(n, m, |i, j| entry(i, j).1 / sums[i]))
    }

    /// `out = f v`.
    pub fn forward(&self) -> Mat<f64> {
        self.matrices().0 * self.v
    }

    /// With `e_ij = dout_i.v_j - dout_i.out_i`: `dv = f^T dout`, `dkey_bias = (f * e)^T 1`, and with `dS = D^-1 A' * e`
    /// `dq = c dS k`, `dk = c dS^T q`.
    pub fn backward(&self, dout: MatRef<'_, f64>) -> NaiveGrads {
        let (f, g) = self.matrices();
        let out = &f * self.v;
        let e = dout * self.v.transpose();
        let delta: Vec<f64> =
            (0..out.nrows()).map(|i| (0..out.ncols()).map(|c| dout[(i, c)] * out[(i, c)]).sum()).collect();
        let of = |x: &Mat<f64>| Mat::from_fn(f.nrows(), f.ncols(), |i, j| x[(i, j)] * (e[(i, j)] - delta[i]));
        let slope = |i, j| self.options.softcap.map_or(1.0, |c| 1.0 - (self.score(i, j) / c).tanh().powi(2));
        let (db, ds) = (of(&f), of(&g));
        let ds = Mat::from_fn(f.nrows(), f.ncols(), |i, j| ds[(i, j)] * slope(i, j));
        // What of a row's weights is no key's is the sink's, whose value is 0.
        let share = |i: usize| 1.0 - f.row(i).iter().sum::<f64>();
        let dsink = self.options.sink.map_or(0.0, |_| (0..f.nrows()).map(|i| -share(i) * delta[i]).sum());
        NaiveGrads {
            dq: faer::Scale(self.scale) * (&ds * self.k),
            dk: faer::Scale(self.scale) * (ds.transpose() * self.q),
            dv: f.transpose() * dout,
            dkey_bias: (0..f.ncols()).map(|j| db.col(j).iter().sum()).collect(),
            dbias: db,
            dsink,
        }
    }
}

/// `‖a - b‖_F / ‖b‖_F`, NaN where either holds a NaN.
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let error: f64 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    if error == 0.0 { 0.0 } else { (error / size).sqrt() }
}

#[cfg(test)]
mod tests;

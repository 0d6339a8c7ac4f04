//! The float64 oracle: `O(n m)` time and memory, obvious on purpose. Every test compares with it.

use faer::{Mat, MatRef};

use crate::engine::Gradient;

/// One head, and how its scores become weights.
#[derive(Debug, Clone)]
pub struct Naive<'a> {
    /// `(n, d)`.
    pub q: MatRef<'a, f64>,
    /// `(m, d)`.
    pub k: MatRef<'a, f64>,
    /// `(m, dv)`.
    pub v: MatRef<'a, f64>,
    /// Added to the scores; empty for none.
    pub key_bias: &'a [f64],
    /// Whether query `i` sees only keys `j <= i`.
    pub causal: bool,
    /// Factor of the scores.
    pub scale: f64,
    /// `None` for `exp`; else the coefficients of the polynomial of `scale q.k`, and its gradient.
    pub polynomial: Option<(&'a [f64], Gradient)>,
}

/// `dq, dk, dv, dkey_bias`.
#[derive(Debug, Clone)]
pub struct NaiveGrads {
    /// `(n, d)`.
    pub dq: Mat<f64>,
    /// `(m, d)`.
    pub dk: Mat<f64>,
    /// `(m, dv)`.
    pub dv: Mat<f64>,
    /// `(m,)`.
    pub dkey_bias: Vec<f64>,
}

impl Naive<'_> {
    /// `(A_ij, A'_ij)`: the weight of key j for query i before normalisation, and the factor that its score's gradient
    /// takes in its place: the derivative of the weight, or (closed form) the weight itself.
    fn weight(&self, i: usize, j: usize) -> (f64, f64) {
        if self.causal && j > i {
            return (0.0, 0.0);
        }
        let score: f64 = self.scale
            * (0..self.q.ncols())
                .map(|c| self.q[(i, c)] * self.k[(j, c)])
                .sum::<f64>();
        let w = self.key_bias.get(j).map_or(1.0, |b| b.exp());
        match self.polynomial {
            None => (w * score.exp(), w * score.exp()),
            Some((a, gradient)) => {
                let p: f64 = a
                    .iter()
                    .enumerate()
                    .map(|(l, a)| a * score.powi(l as i32))
                    .sum();
                let slope: f64 = a
                    .iter()
                    .enumerate()
                    .skip(1)
                    .map(|(l, a)| l as f64 * a * score.powi(l as i32 - 1))
                    .sum();
                match gradient {
                    Gradient::ClosedForm => (w * p, w * p),
                    Gradient::Consistent => (w * p, w * slope),
                }
            }
        }
    }

    /// `f = D^-1 A`, and the score factor `D^-1 A'`.
    fn matrices(&self) -> (Mat<f64>, Mat<f64>) {
        let (n, m) = (self.q.nrows(), self.k.nrows());
        let weights = |i, j| self.weight(i, j);
        let sums: Vec<f64> = (0..n)
            .map(|i| (0..m).map(|j| weights(i, j).0).sum())
            .collect();
        (
            Mat::from_fn(n, m, |i, j| weights(i, j).0 / sums[i]),
            Mat::from_fn(n, m, |i, j| weights(i, j).1 / sums[i]),
        )
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
        let delta: Vec<f64> = (0..out.nrows())
            .map(|i| (0..out.ncols()).map(|c| dout[(i, c)] * out[(i, c)]).sum())
            .collect();
        let of = |x: &Mat<f64>| {
            Mat::from_fn(f.nrows(), f.ncols(), |i, j| {
                x[(i, j)] * (e[(i, j)] - delta[i])
            })
        };
        let (db, ds) = (of(&f), of(&g));
        NaiveGrads {
            dq: faer::Scale(self.scale) * (&ds * self.k),
            dk: faer::Scale(self.scale) * (ds.transpose() * self.q),
            dv: f.transpose() * dout,
            dkey_bias: (0..f.ncols()).map(|j| db.col(j).iter().sum()).collect(),
        }
    }
}

/// `‖a - b‖_F / ‖b‖_F`, NaN where either holds a NaN.
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let error: f64 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    if error == 0.0 {
        0.0
    } else {
        (error / size).sqrt()
    }
}

//! What backward passes read beside the inputs, and where they put their results.

use faer::MatRef;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::memory::collected_in_parallel;
use crate::numerics::real::Real;

/// Where the backward pass puts its results. Contiguous, head after head; what they held before is lost.
#[derive(Debug)]
pub struct AttentionGrads<'a, T> {
    /// `(heads, n, d)`.
    pub dq: &'a mut [T],
    /// `(key heads, m, d)`.
    pub dk: &'a mut [T],
    /// `(key heads, m, d_v)`.
    pub dv: &'a mut [T],
    /// `(key heads, m)`.
    pub dkey_bias: Option<&'a mut [T]>,
}

/// The factors that turn a row of scores into a row of `f`: `f_ij = exp(s_ij - max_i) scale_i`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowFactors<'a, T> {
    pub max: &'a [T],
    pub scale: &'a [T],
}

impl<T: Real> RowFactors<'_, T> {
    /// `ln D_i` of the scores that these factors belong to.
    pub fn log_sums(&self) -> impl ExactSizeIterator<Item = f64> {
        self.max.iter().zip(self.scale).map(|(max, scale)| max.to_f64() - scale.to_f64().ln())
    }
}

/// What an engine's backward pass reads beside the head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Upstream<'a, T> {
    pub dout: MatRef<'a, T>,
    /// `dout_i . out_i`.
    pub delta: &'a [T],
    pub rows: RowFactors<'a, T>,
}

/// One head's results. `dq` is overwritten, the others are added to.
#[derive(Debug)]
pub(crate) struct HeadGrads<'a, T> {
    pub dq: &'a mut [T],
    pub dk: &'a mut [T],
    pub dv: &'a mut [T],
    pub dkey_bias: Option<&'a mut [T]>,
}

/// An error where `views` are not `h` heads of shape `(n, d)`.
pub(crate) fn expect_views<T>(name: &str, views: &[MatRef<'_, T>], h: usize, n: usize, d: usize) -> Result<()> {
    if views.len() != h {
        return Err(Error::Shape(format!("{name} has {} heads; expected {h}", views.len())));
    }
    match views.iter().find(|x| x.nrows() != n || x.ncols() != d) {
        None => Ok(()),
        Some(x) => {
            Err(Error::Shape(format!("a head of {name} has shape ({}, {}); expected ({n}, {d})", x.nrows(), x.ncols())))
        }
    }
}

/// `delta_i = dout_i . out_i`.
pub(crate) fn delta<T: Real>(dout: MatRef<'_, T>, out: &[T]) -> Result<Vec<T>> {
    let of_row = |(i, out): (usize, &[T])| {
        let sum: f64 = dout.row(i).iter().zip(out).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
        T::of(sum)
    };
    collected_in_parallel(out.par_chunks(dout.ncols()).enumerate().map(of_row), "products of dout and out")
}

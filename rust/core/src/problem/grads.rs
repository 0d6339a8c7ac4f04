//! What backward passes read beside the inputs, and where they put their results.

use faer::MatRef;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::memory::collected_in_parallel;
use crate::numerics::real::Real;
use crate::numerics::stored::Stored;

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
    /// That of the bias of pairs.
    pub dbias: Option<BiasGrads<'a, T>>,
    /// `(heads,)`.
    pub dsinks: Option<&'a mut [T]>,
}

impl<'a, T> AttentionGrads<'a, T> {
    /// Of queries, keys and values alone.
    pub fn new(dq: &'a mut [T], dk: &'a mut [T], dv: &'a mut [T]) -> Self {
        Self { dq, dk, dv, dkey_bias: None, dbias: None, dsinks: None }
    }
}

/// The gradient of a bias of pairs, in the shape that the bias was given in: a stride of 0 stands for pairs that share a
/// number, whose gradients add up. What it held before is added to.
#[derive(Debug)]
pub struct BiasGrads<'a, T> {
    /// All of it.
    pub data: &'a mut [T],
    /// Where each query head's begins; heads may share one.
    pub offsets: &'a [usize],
    /// From a query to the next.
    pub row_stride: usize,
    /// From a key to the next.
    pub col_stride: usize,
}

impl<T> BiasGrads<'_, T> {
    /// The same, for a while.
    pub(crate) fn reborrow(&mut self) -> BiasGrads<'_, T> {
        BiasGrads { data: &mut *self.data, ..*self }
    }

    /// An error where it does not hold `h` heads of shape `(n, m)`.
    pub(crate) fn check(&self, h: usize, n: usize, m: usize) -> Result<()> {
        let row = m.saturating_sub(1) * self.col_stride;
        let last = n.saturating_sub(1) * self.row_stride + row;
        if n > 1 && self.row_stride != 0 && self.row_stride <= row {
            return Err(Error::Argument("two pairs of a bias share a number".into()));
        }
        if n * m == 0 || self.offsets.len() == h && self.offsets.iter().all(|offset| offset + last < self.data.len()) {
            return Ok(());
        }
        Err(Error::Shape(format!("dbias holds {} numbers; expected those of {h} heads of ({n}, {m})", self.data.len())))
    }
}

/// The factors that turn a row of scores into a row of `f`: `f_ij = exp(s_ij - max_i) scale_i`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowFactors<'a, T> {
    pub max: &'a [T],
    pub scale: &'a [T],
}

impl<T: Real> RowFactors<'_, T> {
    /// The factors of rows whose `ln D_i` are these.
    pub fn of_log_sums(lse: &[f64]) -> (Vec<T>, Vec<T>) {
        // The type need not hold a logarithm exactly: the factor takes what is left.
        let rows = |&lse: &f64| match lse == f64::NEG_INFINITY {
            true => (T::ZERO, T::ZERO),
            false => (T::of(lse), T::of((T::of(lse).to_f64() - lse).exp())),
        };
        lse.iter().map(rows).unzip()
    }

    /// `ln D_i` of the scores that these factors belong to; of rows without keys, whose factor is 0, minus infinity.
    pub fn log_sums(&self) -> impl ExactSizeIterator<Item = f64> {
        self.max.iter().zip(self.scale).map(|(max, scale)| match scale.to_f64() {
            0.0 => f64::NEG_INFINITY,
            scale => max.to_f64() - scale.ln(),
        })
    }
}

/// What an engine's backward pass reads beside the head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Upstream<'a, T, E = T> {
    pub dout: MatRef<'a, E>,
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

/// Gradients of what only some calls have, of the query heads of a group.
#[derive(Debug)]
pub(crate) struct Extras<'a, T> {
    /// Of all heads of the call.
    pub dbias: Option<BiasGrads<'a, T>>,
    /// One a query head of the group; empty where they are not asked for.
    pub dsinks: &'a mut [T],
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

/// The gradient of a sink: its share of row `i`, `e^(sink - lse_i)`, times `0 - delta_i`.
pub(crate) fn sink_gradient<T: Real>(sink: f64, lse: &[f64], delta: &[T]) -> T {
    let share = |lse: f64| if lse == f64::NEG_INFINITY { 0.0 } else { (sink - lse).exp() };
    T::of(-lse.iter().zip(delta).map(|(&lse, delta)| share(lse) * delta.to_f64()).sum::<f64>())
}

/// `delta_i = dout_i . out_i`.
pub(crate) fn delta<T: Real, E: Stored<T>>(dout: MatRef<'_, E>, out: &[E]) -> Result<Vec<T>> {
    let of_row = |(i, out): (usize, &[E])| {
        let sum: f64 = dout.row(i).iter().zip(out).map(|(a, b)| a.widen().to_f64() * b.widen().to_f64()).sum();
        T::of(sum)
    };
    collected_in_parallel(out.par_chunks(dout.ncols()).enumerate().map(of_row), "products of dout and out")
}

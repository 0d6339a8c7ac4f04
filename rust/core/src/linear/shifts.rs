//! Queries and keys less their shifts, and what that adds to the keys' biases.
//!
//! With `q' = q - α`, `k' = k - β` and the bias `b'_j = b_j + c α.k'_j`, `c q'.k' + b'` differs from `c q.k + b` by a
//! constant of the row, which exact attention does not see. Back from the primed gradients: `dk_j = dk'_j + c db_j α`, which
//! for constant shifts, and for the closed form, is all. Where `α` and `β` are the means of the call, `β` that of the `m'`
//! keys that no bias removes, the consistent gradient also goes through them:
//!
//! ```text
//! dα = -sum_i dq'_i + c sum_j db_j k'_j      dq_i = dq'_i + dα / n
//! dβ = -sum_j (dk'_j + c db_j α)             dk_j = dk'_j + c db_j α + dβ / m'
//! ```
//!
//! the last for those `m'` keys alone: a removed key gives nothing and gets nothing.

use std::ops::Range;

use faer::MatRef;
use rayon::prelude::*;

use super::features::TokenRows;
use crate::error::{Error, Result};
use crate::memory::{collected, collected_in_parallel, room};
use crate::numerics::real::Real;
use crate::numerics::tile::{load_rows, load_transposed};
use crate::problem::grads::Upstream;
use crate::problem::heads::Head;
use crate::problem::scores::Mask;

/// Tokens at the start of a causal sequence that constants are taken from.
pub const PREFIX: usize = 1024;

/// What is subtracted from queries and keys: `α` and `β`, each empty for none.
#[derive(Debug, Clone)]
pub(crate) struct Shifts<T> {
    pub query: Vec<T>,
    pub key: Vec<T>,
}

impl<T: Real> Shifts<T> {
    /// None.
    pub fn none() -> Self {
        Self { query: Vec::new(), key: Vec::new() }
    }

    /// Query `i`, less `α`.
    pub fn query<'a>(&'a self, head: &'a Head<'_, T>, i: usize) -> impl Iterator<Item = f64> + 'a {
        less(head.q, i, &self.query)
    }

    /// Key `j`, less `β`.
    pub fn key<'a>(&'a self, head: &'a Head<'_, T>, j: usize) -> impl Iterator<Item = f64> + 'a {
        less(head.k, j, &self.key)
    }
}

fn less<'a, T: Real>(x: MatRef<'a, T>, row: usize, shift: &'a [T]) -> impl Iterator<Item = f64> + 'a {
    x.row(row).iter().enumerate().map(|(c, x)| x.to_f64() - shift.get(c).map_or(0.0, |shift| shift.to_f64()))
}

/// A head's queries and keys less their shifts, and the weights of its keys.
pub(crate) struct Shifted<'a, T> {
    pub head: &'a Head<'a, T>,
    pub shifts: &'a Shifts<T>,
    /// `b'_j`, where not all are 0.
    biases: Option<Biases>,
}

impl<'a, T: Real> Shifted<'a, T> {
    /// `half`: see [`FeatureMap::half`](super::features::FeatureMap::half), of keys.
    pub fn new(head: &'a Head<'a, T>, shifts: &'a Shifts<T>, half: f64) -> Result<Self> {
        let biases = biases(head, Relative::under(head.mask), shifts, half)?;
        Ok(Self { head, shifts, biases })
    }

    /// `b'_j`.
    pub fn bias(&self, j: usize) -> f64 {
        self.biases.as_ref().map_or(0.0, |biases| biases.of_keys[j])
    }

    /// The largest `b'_j` of some keys, `-inf` where there are none.
    pub fn level(&self, keys: Range<usize>) -> f64 {
        keys.map(|j| self.bias(j)).fold(f64::NEG_INFINITY, f64::max)
    }

    /// `w_j = e^{b'_j - level}`, for a level that is not below `b'_j`.
    pub fn weight(&self, j: usize, level: f64) -> T {
        match &self.biases {
            None if level == 0.0 => T::ONE,
            _ if self.bias(j) == f64::NEG_INFINITY => T::ZERO,
            _ => T::of(self.bias(j) - level).exp_nonpositive(),
        }
    }

    /// Width of the extended values `[v, 1]`.
    pub fn e(&self) -> usize {
        self.head.d_v() + 1
    }

    /// What `c q_i.k_j + b_j` has more than `c q'_i.k'_j + b'_j`.
    pub fn row_constant(&self, i: usize) -> f64 {
        let q = self.head.q.row(i);
        let products = q.iter().zip(&self.shifts.key).map(|(q, beta)| q.to_f64() * beta.to_f64());
        self.head.scores.scale * products.sum::<f64>()
    }

    /// Shifted queries, `(d, len)`.
    pub fn load_queries(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.q, start, len, &self.shifts.query, x);
    }

    /// Shifted keys; those that a bias of `-inf` removes are 0, whatever they hold.
    pub fn load_keys(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.k, start, len, &self.shifts.key, x);
        self.clear_removed(start, len, self.head.d(), x);
    }

    /// `[v_j; 1]` as `(e, len)`, with the values of removed keys as 0.
    pub fn load_values(&self, start: usize, len: usize, x: &mut [T]) {
        load_transposed(self.head.v, start, len, &[], x);
        let e = self.e();
        self.clear_removed(start, len, e - 1, x);
        x[(e - 1) * len..e * len].fill(T::ONE);
    }

    /// Sets to 0 what removed keys hold in a tile `(width, len)`.
    fn clear_removed(&self, start: usize, len: usize, width: usize, x: &mut [T]) {
        if self.biases.is_some() {
            for t in (0..len).filter(|t| self.bias(start + t) == f64::NEG_INFINITY) {
                x.iter_mut().skip(t).step_by(len).take(width).for_each(|x| *x = T::ZERO);
            }
        }
    }

    /// `[dout_i; -delta_i]` as `(e, len)`.
    pub fn load_upstream(&self, up: &Upstream<'_, T>, start: usize, len: usize, x: &mut [T]) {
        load_transposed(up.dout, start, len, &[], x);
        let d_v = self.head.d_v();
        for (x, &delta) in x[d_v * len..].iter_mut().zip(&up.delta[start..start + len]) {
            *x = -delta;
        }
    }

    /// Keys and `w_j [v_j, 1]` in rows, the weights relative to `level`.
    pub fn load_key_rows(&self, start: usize, len: usize, level: f64, tokens: &mut TokenRows<T>) {
        let (head, e) = (self.head, self.e());
        load_rows(head.k, start, len, &self.shifts.key, tokens.width, &mut tokens.x);
        load_rows(head.v, start, len, &[], e, &mut tokens.values);
        let rows = tokens.x.chunks_exact_mut(tokens.width).zip(tokens.values.chunks_exact_mut(e));
        for (j, (x, values)) in (start..start + len).zip(rows) {
            let w = self.weight(j, level);
            values[e - 1] = T::ONE;
            if w != T::ONE {
                values.iter_mut().for_each(|v| *v *= w);
            }
            if self.bias(j) == f64::NEG_INFINITY {
                x[..head.d()].fill(T::ZERO);
            }
        }
    }

    /// Queries and `factor(i) [dout_i, -delta_i]` in rows.
    pub fn load_query_rows(
        &self,
        up: &Upstream<'_, T>,
        start: usize,
        len: usize,
        factor: impl Fn(usize) -> T,
        tokens: &mut TokenRows<T>,
    ) {
        let e = self.e();
        load_rows(self.head.q, start, len, &self.shifts.query, tokens.width, &mut tokens.x);
        load_rows(up.dout, start, len, &[], e, &mut tokens.values);
        for (i, values) in (start..start + len).zip(tokens.values.chunks_exact_mut(e)) {
            values[e - 1] = -up.delta[i];
            let factor = factor(i);
            values.iter_mut().for_each(|v| *v *= factor);
        }
    }
}

/// What keys add to all of their scores.
#[derive(Debug, Clone)]
pub(crate) struct Biases {
    /// `b'_j` less the base.
    pub of_keys: Vec<f64>,
    /// See [`Relative`].
    pub base: f64,
}

/// A number that is added to biases beyond this is off by more than a millionth: lost, beside a bias that stands for
/// minus infinity.
pub const LARGEST_BIAS: f64 = 1e-6 / f64::EPSILON;

/// What biases are relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Relative {
    /// The largest that was given.
    ToLargest,
    /// Nothing: what earlier queries see must not depend on later keys.
    ToNothing,
}

impl Relative {
    /// As a pass under this mask has them.
    pub fn under(mask: &Mask) -> Self {
        if mask.is_none() { Self::ToLargest } else { Self::ToNothing }
    }
}

/// `b'_j = b_j + c α.k'_j + half |k'_j|^2`, or `None` where all are 0.
pub(crate) fn biases<T: Real>(
    head: &Head<'_, T>,
    relative: Relative,
    shifts: &Shifts<T>,
    half: f64,
) -> Result<Option<Biases>> {
    let (alpha, beta) = (&shifts.query, &shifts.key);
    let adds = !alpha.is_empty() || half != 0.0;
    if head.key_bias.is_none() && !adds {
        return Ok(None);
    }
    let (m, scale, given) = (head.m(), head.scores.scale, |j: usize| head.bias(j));
    let in_order = relative == Relative::ToNothing;
    let Some(first) = (0..m).map(given).find(|b| *b > f64::NEG_INFINITY) else {
        return Err(Error::Denominator(format!(
            "head {} has no key to attend to: key_bias is -inf for every key",
            head.index
        )));
    };
    let largest = (0..m).map(given).fold(first, f64::max);
    // The largest bias that a row sees lies between these two.
    if let Some(bias) = [first, largest].into_iter().find(|b| in_order && adds && b.abs() > LARGEST_BIAS) {
        return Err(Error::Denominator(format!(
            "head {}: the largest key_bias that some row sees is {bias:e}, beside which this engine loses what keys add to \
             scores; remove keys by -inf, add a number to all of key_bias that brings it near 0, or use engine=Exact()",
            head.index
        )));
    }
    let base = if in_order { 0.0 } else { largest };
    let bias = |j: usize| {
        let mut bias = given(j) - base;
        if bias == f64::NEG_INFINITY {
            return bias; // whatever the key holds
        }
        for (c, k) in head.k.row(j).iter().enumerate() {
            let k = k.to_f64() - beta.get(c).map_or(0.0, |b| b.to_f64());
            bias += scale * alpha.get(c).map_or(0.0, |a| a.to_f64()) * k + half * k * k;
        }
        bias
    };
    let of_keys = collected_in_parallel((0..m).into_par_iter().map(bias), "biases of keys")?;
    Ok(Some(Biases { of_keys, base }))
}

/// The mean of some rows.
pub(crate) fn mean<T: Real>(x: MatRef<'_, T>, rows: impl ExactSizeIterator<Item = usize>) -> Vec<T> {
    let count = rows.len().max(1) as f64;
    sums_and_square(x, rows).0.into_iter().map(|sum| T::of(sum / count)).collect()
}

/// Those of the first `count` keys whose bias leaves them a weight beside the others: also numbers like -1e9 stand for
/// minus infinity.
pub(crate) fn live_keys<T: Real>(head: &Head<'_, T>, count: usize) -> Result<Vec<usize>> {
    const LIVE: &str = "the keys that have a weight";
    let Some(biases) = head.key_bias else { return collected(0..count, LIVE) };
    let bias = |j: usize| biases[j].to_f64();
    let largest = (0..count).map(bias).fold(f64::NEG_INFINITY, f64::max);
    let mut live = room(count, LIVE)?;
    // No key where all are -inf: their difference is NaN.
    live.extend((0..count).filter(|&j| (bias(j) - largest).exp() > 0.0));
    Ok(live)
}

/// The sum of each column, and the sum of all squares, of some rows, one after the other as they lie.
pub(crate) fn sums_and_square<T: Real>(x: MatRef<'_, T>, rows: impl Iterator<Item = usize>) -> (Vec<f64>, f64) {
    let (mut sums, mut square) = (vec![0.0; x.ncols()], 0.0);
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(x.row(row).iter()) {
            let x = x.to_f64();
            *sum += x;
            square += x * x;
        }
    }
    (sums, square)
}

//! The arrays of a call, head by head.

use std::borrow::Cow;
use std::ops::Range;

use faer::{ColRef, MatRef};
use rayon::prelude::*;

use super::finite::check_stored;
use super::scores::{Mask, PairArrays, Scores};
use crate::error::{Error, Result};
use crate::memory::room;
use crate::numerics::real::Real;
use crate::numerics::stored::Stored;

/// The inputs of attention, head by head (batch entries are heads too).
///
/// Query head `i` reads key head `i / (q.len() / k.len())`: with grouped queries several query heads share one.
#[derive(Debug, Clone)]
pub struct Heads<'a, T, E = T> {
    /// Queries, each `(n, d)`.
    pub q: Vec<MatRef<'a, E>>,
    /// Keys, each `(m, d)`.
    pub k: Vec<MatRef<'a, E>>,
    /// Values, each `(m, d_v)`.
    pub v: Vec<MatRef<'a, E>>,
    /// Added to the scores of a key, each `(m,)`; `-inf` removes the key.
    pub key_bias: Option<Vec<ColRef<'a, T>>>,
    /// Whether a query may attend to a key, `(n, m)` for each query head.
    pub allowed: Option<Vec<MatRef<'a, bool>>>,
    /// Added to the scores, `(n, m)` for each query head; `-inf` hides a pair.
    pub bias: Option<Vec<MatRef<'a, E>>>,
    /// A score for each query head that joins each of its denominators and has no value.
    pub sinks: Option<Vec<T>>,
}

/// One head, as the engines see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a, T, E = T> {
    /// Its number among the query heads of the call, which errors name.
    pub index: usize,
    /// `(n, d)`.
    pub q: MatRef<'a, E>,
    /// `(m, d)`.
    pub k: MatRef<'a, E>,
    /// `(m, d_v)`.
    pub v: MatRef<'a, E>,
    /// `(m,)`.
    pub key_bias: Option<ColRef<'a, T>>,
    /// What is known of single pairs.
    pub pairs: PairArrays<'a, E>,
    /// A score that joins the denominators.
    pub sink: Option<f64>,
    pub scores: &'a Scores,
    /// The one of the scores' masks that is the head's.
    pub mask: &'a Mask,
}

impl<T: Real, E: Stored<T>> Head<'_, T, E> {
    /// Queries.
    pub fn n(&self) -> usize {
        self.q.nrows()
    }

    /// Keys.
    pub fn m(&self) -> usize {
        self.k.nrows()
    }

    /// Width of queries and keys.
    pub fn d(&self) -> usize {
        self.q.ncols()
    }

    /// Width of values.
    pub fn d_v(&self) -> usize {
        self.v.ncols()
    }

    /// What is added to the scores of a key.
    pub fn bias(&self, key: usize) -> f64 {
        self.key_bias.map_or(0.0, |bias| bias[key].to_f64())
    }

    /// Whether a bias of `-inf` removes a key: whatever it holds, nothing takes from it and nothing goes to it.
    pub fn removed(&self, key: usize) -> bool {
        self.key_bias.is_some_and(|bias| bias[key] == T::NEG_INFINITY)
    }

    /// The keys that a query sees, removed ones among them.
    pub fn seen(&self, query: usize) -> Range<usize> {
        self.mask.seen(query, self.m())
    }

    /// Whether its scores are products and biases of keys: no mask, no cap, no arrays of pairs.
    pub fn is_plain(&self) -> bool {
        self.mask.is_none() && self.pairs.is_none() && self.scores.softcap.is_none()
    }

    /// Whether a row that has met no score is right to be 0: rows without keys may be, and it has none. (Scores that
    /// overflow leave none either.)
    pub fn may_be_empty(&self, query: usize) -> bool {
        (self.scores.empty_rows_are_zero || self.sink.is_some_and(|sink| sink > f64::NEG_INFINITY))
            && self.seen(query).all(|key| self.score(query, key, 0.0) == f64::NEG_INFINITY)
    }

    /// The score of a pair, whose product of query and key times the scale is given; `-inf` where it does not count.
    pub fn score(&self, query: usize, key: usize, product: f64) -> f64 {
        let bias = self.pairs.bias.map_or(0.0, |bias| bias[(query, key)].widen().to_f64());
        let hidden = self.removed(key)
            || bias == f64::NEG_INFINITY
            || self.pairs.allowed.is_some_and(|allowed| !allowed[(query, key)])
            || !self.mask.sees(query, key, self.m());
        if hidden { f64::NEG_INFINITY } else { self.scores.cap(product) + self.bias(key) + bias }
    }
}

/// Sizes of a call: heads, key heads, and n, m, d, d_v.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Query heads.
    pub h: usize,
    /// Key heads.
    pub h_kv: usize,
    /// Queries a head.
    pub n: usize,
    /// Keys a head.
    pub m: usize,
    /// Width of queries and keys.
    pub d: usize,
    /// Width of values.
    pub d_v: usize,
}

impl<'a, T: Real, E: Stored<T>> Heads<'a, T, E> {
    /// Queries, keys and values, and nothing else.
    pub fn new(q: Vec<MatRef<'a, E>>, k: Vec<MatRef<'a, E>>, v: Vec<MatRef<'a, E>>) -> Self {
        Self { q, k, v, key_bias: None, allowed: None, bias: None, sinks: None }
    }

    /// The sizes, once they are known to fit together.
    pub fn sizes(&self) -> Result<Sizes> {
        let shape = |text: String| Err(Error::Shape(text));
        let (h, h_kv) = (self.q.len(), self.k.len());
        if self.v.len() != h_kv {
            return shape(format!("v has {} heads; expected {h_kv}, as many as k", self.v.len()));
        }
        if (h_kv == 0 && h != 0) || (h_kv != 0 && h % h_kv != 0) {
            return shape(format!("q has {h} heads and k {h_kv}; expected a multiple"));
        }
        if h_kv == 0 {
            return Ok(Sizes { h, h_kv, n: 0, m: 0, d: 0, d_v: 0 });
        }
        let (n, d) = self.q.first().map_or((0, self.k[0].ncols()), |q| (q.nrows(), q.ncols()));
        let (m, d_v) = (self.k[0].nrows(), self.v[0].ncols());
        for (name, views, rows, cols) in [("q", &self.q, n, d), ("k", &self.k, m, d), ("v", &self.v, m, d_v)] {
            if let Some(x) = views.iter().find(|x| x.nrows() != rows || x.ncols() != cols) {
                return shape(format!(
                    "a head of {name} has shape ({}, {}); expected ({rows}, {cols})",
                    x.nrows(),
                    x.ncols()
                ));
            }
        }
        if let Some(bias) = &self.key_bias
            && (bias.len() != h_kv || bias.iter().any(|b| b.nrows() != m))
        {
            return shape(format!("key_bias does not hold {h_kv} heads of {m} numbers"));
        }
        let per_query = [
            ("mask", self.allowed.as_ref().map(|x| (x.len(), x.iter().all(|x| (x.nrows(), x.ncols()) == (n, m))))),
            ("bias", self.bias.as_ref().map(|x| (x.len(), x.iter().all(|x| (x.nrows(), x.ncols()) == (n, m))))),
            ("sinks", self.sinks.as_ref().map(|x| (x.len(), true))),
        ];
        for (name, given) in per_query {
            if given.is_some_and(|(count, fits)| count != h || !fits) {
                return shape(format!("{name} does not hold {h} heads of ({n}, {m})"));
            }
        }
        if d == 0 || d_v == 0 {
            return shape(format!("d = {d} and dv = {d_v}; expected at least 1"));
        }
        if m == 0 {
            return shape("k has no rows (m = 0); expected at least one key".into());
        }
        Ok(Sizes { h, h_kv, n, m, d, d_v })
    }

    /// Query head `index` of a call that makes its scores so.
    pub(crate) fn head<'b>(&'b self, index: usize, scores: &'b Scores) -> Head<'b, T, E> {
        let kv = index / (self.q.len() / self.k.len());
        let key_bias = self.key_bias.as_ref().map(|biases| biases[kv]);
        let pairs = PairArrays {
            allowed: self.allowed.as_ref().map(|allowed| allowed[index]),
            bias: self.bias.as_ref().map(|bias| bias[index]),
        };
        let sink = self.sinks.as_ref().map(|sinks| sinks[index].to_f64());
        let mask = scores.mask(index, self.q.len());
        Head { index, q: self.q[index], k: self.k[kv], v: self.v[kv], key_bias, pairs, sink, scores, mask }
    }

    /// The same heads with zeros in place of the infinities of removed keys, if there are any, in `copies`: what a removed
    /// key holds must not be seen, and products would show it.
    pub(crate) fn without_removed<'b>(&'b self, copies: &'b mut Copies<E>) -> Result<Cow<'b, Heads<'b, T, E>>> {
        let Some(biases) = &self.key_bias else { return Ok(Cow::Borrowed(self)) };
        let infinite = |(x, bias): (&MatRef<'a, E>, &ColRef<'a, T>)| {
            let removed = |j: &usize| bias[*j] == T::NEG_INFINITY;
            (0..x.nrows()).filter(removed).any(|j| x.row(j).iter().any(|x| x.widen().infinite()))
        };
        if !self.k.iter().zip(biases).any(infinite) && !self.v.iter().zip(biases).any(infinite) {
            return Ok(Cow::Borrowed(self));
        }
        let cleaned = |views: &[MatRef<'a, E>]| {
            let clean = |(x, bias): (&MatRef<'a, E>, &ColRef<'a, T>)| {
                let mut rows = room(x.nrows() * x.ncols(), "keys and values without removed ones")?;
                for (j, row) in x.row_iter().enumerate() {
                    let removed = bias[j] == T::NEG_INFINITY;
                    rows.extend(
                        row.iter().map(|x| if removed && x.widen().infinite() { E::narrow(T::ZERO) } else { *x }),
                    );
                }
                Ok(rows)
            };
            views.iter().zip(biases).map(clean).collect::<Result<_>>()
        };
        *copies = Copies { k: cleaned(&self.k)?, v: cleaned(&self.v)? };
        Ok(Cow::Owned(Heads { k: views(&copies.k, &self.k), v: views(&copies.v, &self.v), ..self.clone() }))
    }

    /// An error where q, k or v holds NaN or infinity, or key_bias NaN or plus infinity.
    pub(crate) fn check_finite(&self) -> Result<()> {
        for (name, views) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            check_stored::<T, E>(name, views)?;
        }
        for b in self.key_bias.iter().flatten() {
            if let Some(j) = b.iter().position(|x| !x.finite() && *x != T::NEG_INFINITY) {
                return Err(Error::NonFinite(format!(
                    "key_bias holds {:?} at key {j}; expected finite numbers or -inf",
                    b[j]
                )));
            }
        }
        for bias in self.bias.iter().flatten() {
            check_bias::<T, E>(*bias)?;
        }
        if let Some(sink) = self.sinks.iter().flatten().find(|x| !x.finite() && **x != T::NEG_INFINITY) {
            return Err(Error::NonFinite(format!("sinks holds {sink:?}; expected finite numbers or -inf")));
        }
        Ok(())
    }
}

/// Copies of keys and values, head by head.
#[derive(Debug)]
pub(crate) struct Copies<E> {
    k: Vec<Vec<E>>,
    v: Vec<Vec<E>>,
}

impl<E> Copies<E> {
    /// None yet.
    pub fn new() -> Self {
        Self { k: Vec::new(), v: Vec::new() }
    }
}

/// Copies as matrices of the shapes of others.
fn views<'b, E>(copies: &'b [Vec<E>], like: &[MatRef<'_, E>]) -> Vec<MatRef<'b, E>> {
    let view = |(x, like): (&'b Vec<E>, &MatRef<'_, E>)| MatRef::from_row_major_slice(x, like.nrows(), like.ncols());
    copies.iter().zip(like).map(view).collect()
}

/// An error where a bias of pairs holds NaN or plus infinity.
fn check_bias<T: Real, E: Stored<T>>(bias: MatRef<'_, E>) -> Result<()> {
    // Of entries that are all the same one, one is looked at.
    let bias = if bias.row_stride() == 0 { bias.subrows(0, bias.nrows().min(1)) } else { bias };
    let bias = if bias.col_stride() == 0 { bias.subcols(0, bias.ncols().min(1)) } else { bias };
    (0..bias.nrows()).into_par_iter().try_for_each(|i| {
        match bias.row(i).iter().map(|x| x.widen()).find(|x| !x.finite() && *x != T::NEG_INFINITY) {
            Some(x) => Err(Error::NonFinite(format!("bias holds {x:?}; expected finite numbers or -inf"))),
            None => Ok(()),
        }
    })
}

//! The arrays of a call, head by head.

use std::ops::Range;

use faer::{ColRef, MatRef};

use super::finite::check_finite;
use super::scores::Scores;
use crate::error::{Error, Result};
use crate::numerics::real::Real;

/// The inputs of attention, head by head (batch entries are heads too).
///
/// Query head `i` reads key head `i / (q.len() / k.len())`: with grouped queries several query heads share one.
#[derive(Debug, Clone)]
pub struct Heads<'a, T> {
    /// Queries, each `(n, d)`.
    pub q: Vec<MatRef<'a, T>>,
    /// Keys, each `(m, d)`.
    pub k: Vec<MatRef<'a, T>>,
    /// Values, each `(m, d_v)`.
    pub v: Vec<MatRef<'a, T>>,
    /// Added to the scores of a key, each `(m,)`; `-inf` removes the key.
    pub key_bias: Option<Vec<ColRef<'a, T>>>,
}

/// One head, as the engines see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a, T> {
    /// Its number among the query heads of the call, which errors name.
    pub index: usize,
    /// `(n, d)`.
    pub q: MatRef<'a, T>,
    /// `(m, d)`.
    pub k: MatRef<'a, T>,
    /// `(m, d_v)`.
    pub v: MatRef<'a, T>,
    /// `(m,)`.
    pub key_bias: Option<ColRef<'a, T>>,
    pub scores: &'a Scores,
}

impl<T: Real> Head<'_, T> {
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
        self.scores.mask.seen(query, self.m())
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

impl<'a, T: Real> Heads<'a, T> {
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
        if d == 0 || d_v == 0 {
            return shape(format!("d = {d} and dv = {d_v}; expected at least 1"));
        }
        if m == 0 {
            return shape("k has no rows (m = 0); expected at least one key".into());
        }
        Ok(Sizes { h, h_kv, n, m, d, d_v })
    }

    /// Query head `index` of a call that makes its scores so.
    pub(crate) fn head<'b>(&'b self, index: usize, scores: &'b Scores) -> Head<'b, T> {
        let kv = index / (self.q.len() / self.k.len());
        let key_bias = self.key_bias.as_ref().map(|biases| biases[kv]);
        Head { index, q: self.q[index], k: self.k[kv], v: self.v[kv], key_bias, scores }
    }

    /// An error where q, k or v holds NaN or infinity, or key_bias NaN or plus infinity.
    pub(crate) fn check_finite(&self) -> Result<()> {
        for (name, views) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            check_finite(name, views)?;
        }
        for b in self.key_bias.iter().flatten() {
            if let Some(j) = b.iter().position(|x| !x.finite() && *x != T::NEG_INFINITY) {
                return Err(Error::NonFinite(format!(
                    "key_bias holds {:?} at key {j}; expected finite numbers or -inf",
                    b[j]
                )));
            }
        }
        Ok(())
    }
}

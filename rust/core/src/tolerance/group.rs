//! A group: one key head, and the query heads that share it.

use std::ops::Range;

use faer::MatRef;

use super::Saved;
use crate::numerics::real::Real;
use crate::problem::heads::{Head, Heads};
use crate::problem::scores::Scores;

/// One key head, and the query heads `first..first + group` that share it: what their gradients are computed from.
pub(crate) struct Group<'a, 'b, T> {
    pub heads: &'a Heads<'b, T>,
    pub scores: &'a Scores,
    pub saved: &'a Saved<T>,
    /// The outputs of all heads of the call, `(heads, n, d_v)`.
    pub out: &'a [T],
    /// Of all heads too.
    pub dout: &'a [MatRef<'b, T>],
    pub first: usize,
    pub group: usize,
}

impl<T: Real> Group<'_, '_, T> {
    /// Query head `i` of the call.
    pub fn head(&self, i: usize) -> Head<'_, T> {
        self.heads.head(i, self.scores)
    }

    /// The query heads of the group.
    pub fn indices(&self) -> Range<usize> {
        self.first..self.first + self.group
    }

    /// Queries of a head.
    pub fn rows(&self) -> usize {
        self.heads.q[0].nrows()
    }

    /// The output of query head `i` of the call, `(n, d_v)`.
    pub fn out_of(&self, i: usize) -> &[T] {
        let len = self.rows() * self.heads.v[0].ncols();
        &self.out[i * len..(i + 1) * len]
    }
}

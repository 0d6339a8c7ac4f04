//! How scores are made of queries and keys, and which pairs count.
//!
//! `s_ij = scale q_i.k_j + key_bias_j` for the keys `j` that the [`Mask`] lets query `i` see. The biases lie with the
//! head's arrays (`Head`); everything else that makes a score is here.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::numerics::real::Real;

/// How scores are made, apart from the arrays.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// Factor of `q.k`.
    pub scale: f64,
    /// Which pairs count.
    pub mask: Mask,
}

/// Which keys a query sees: consecutive ones, and neither the first nor the last of them ever moves back from a query
/// to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mask {
    /// Every query sees every key.
    None,
    /// Query `i` sees keys `j <= i + offset`: `offset` keys come before query 0 (a cache).
    Causal {
        /// Keys before query 0.
        offset: usize,
    },
    /// Of the keys `j <= i + offset`, query `i` sees the last `width`.
    Window {
        /// Keys before query 0.
        offset: usize,
        /// At least 1.
        width: usize,
    },
    /// Packed sequences: token `i` sees the tokens of its own segment, with `causal` no later ones.
    Segments {
        /// Where each segment starts, from 0 on, in increasing order.
        starts: Arc<[usize]>,
        /// Whether a token sees no later one.
        causal: bool,
    },
}

/// How much of a tile of pairs a mask leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// No pair.
    Empty,
    /// Some pairs.
    Part,
    /// Every pair.
    Full,
}

impl Scores {
    /// An error where the scale is no number, or the mask does not fit `n` queries and `m` keys.
    pub fn check(&self, n: usize, m: usize) -> Result<()> {
        if !self.scale.is_finite() {
            return Err(Error::Argument(format!("scale is {}; expected a finite number", self.scale)));
        }
        self.mask.check(n, m)
    }
}

impl std::fmt::Display for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => write!(f, "mask"),
            Self::Causal { offset } => write!(f, "causal mask with {offset} keys before query 0"),
            Self::Window { width, .. } => write!(f, "window of {width} keys"),
            Self::Segments { .. } => write!(f, "segments"),
        }
    }
}

impl Mask {
    /// [`Causal`](Self::Causal) without earlier keys, or [`None`](Self::None).
    pub fn causal(causal: bool) -> Self {
        if causal { Self::Causal { offset: 0 } } else { Self::None }
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// An error where it does not fit `n` queries and `m` keys.
    pub fn check(&self, n: usize, m: usize) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Causal { offset: 0 } if n != m => {
                Err(Error::Shape(format!("causal=True with n = {n} queries and m = {m} keys; expected n == m")))
            }
            Self::Window { width: 0, .. } => Err(Error::Argument("a window of 0 keys; expected at least 1".into())),
            Self::Causal { offset } | Self::Window { offset, .. } if n.checked_add(*offset) != Some(m) => {
                Err(Error::Shape(format!(
                    "a mask with {offset} keys before query 0, n = {n} queries and m = {m} keys; expected n + {offset} == m"
                )))
            }
            Self::Causal { .. } | Self::Window { .. } => Ok(()),
            Self::Segments { starts, .. } => {
                let increasing = starts.first().is_none_or(|&first| first == 0) && starts.is_sorted_by(|a, b| a < b);
                if n == m && increasing && starts.is_empty() == (n == 0) && starts.last().is_none_or(|&last| last < n) {
                    return Ok(());
                }
                Err(Error::Shape(format!(
                    "segments of n = {n} queries and m = {m} keys; expected n == m, and starts that increase from 0 to \
                     less than n"
                )))
            }
        }
    }

    /// The keys, of `m`, that query `i` sees.
    pub fn seen(&self, i: usize, m: usize) -> Range<usize> {
        let last = |offset: usize| (i + offset + 1).min(m);
        match self {
            Self::None => 0..m,
            Self::Causal { offset } => 0..last(*offset),
            Self::Window { offset, width } => (i + offset + 1).saturating_sub(*width).min(m)..last(*offset),
            Self::Segments { starts, causal } => {
                let next = starts.partition_point(|&start| start <= i);
                let end = if *causal { i + 1 } else { starts.get(next).copied().unwrap_or(m) };
                starts[next - 1]..end.min(m)
            }
        }
    }

    /// Whether query `i` sees key `j`, of `m`.
    pub fn sees(&self, i: usize, j: usize, m: usize) -> bool {
        self.is_none() || self.seen(i, m).contains(&j)
    }

    /// The keys, of `m`, that any of some consecutive queries sees: they are consecutive too.
    pub fn seen_by(&self, queries: Range<usize>, m: usize) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        self.seen(queries.start, m).start..self.seen(queries.end - 1, m).end
    }

    /// How much it leaves of a tile that is not empty.
    pub fn coverage(&self, queries: Range<usize>, keys: Range<usize>, m: usize) -> Coverage {
        if self.is_none() {
            return Coverage::Full;
        }
        let (first, last) = (self.seen(queries.start, m), self.seen(queries.end - 1, m));
        if last.end <= keys.start || first.start >= keys.end {
            Coverage::Empty
        } else if last.start <= keys.start && first.end >= keys.end {
            Coverage::Full
        } else {
            Coverage::Part
        }
    }

    /// Sets to `-inf` the scores of a tile `(keys, queries)` that it hides.
    pub(crate) fn hide<T: Real>(&self, queries: Range<usize>, keys: Range<usize>, m: usize, scores: &mut [T]) {
        if self.coverage(queries.clone(), keys.clone(), m) == Coverage::Full {
            return;
        }
        let count = queries.len();
        // The queries that see a key are consecutive too, and move on from a key to the next.
        let (mut first, mut end) = (0, 0);
        for (j, scores) in keys.zip(scores.chunks_exact_mut(count)) {
            while first < count && self.seen(queries.start + first, m).end <= j {
                first += 1;
            }
            while end < count && self.seen(queries.start + end, m).start <= j {
                end += 1;
            }
            scores[..first].fill(T::NEG_INFINITY);
            scores[end.max(first)..].fill(T::NEG_INFINITY);
        }
    }
}

/// Adds each key's bias to its row of scores; a removed key's scores are `-inf`, whatever they were.
pub(crate) fn add_bias<T: Real>(bias: impl Iterator<Item = T>, bq: usize, s: &mut [T]) {
    for (row, b) in s.chunks_exact_mut(bq).zip(bias) {
        if b == T::NEG_INFINITY {
            row.fill(b);
        } else {
            row.iter_mut().for_each(|s| *s += b);
        }
    }
}

/// What to do about a row without keys.
pub const NO_KEY_REMEDY: &str = "leave such rows out, pad on the right where causal, or give removed keys a large \
                                        negative bias (-1e4, say) in place of -inf";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any mask of up to 40 queries, which it fits, and its keys.
    fn mask() -> impl Strategy<Value = (Mask, usize, usize)> {
        (1usize..=40, 0usize..60, 0usize..60, 1usize..60, proptest::collection::vec(any::<bool>(), 40), any::<bool>())
            .prop_flat_map(|(n, m, offset, width, cuts, causal)| {
                let starts: Arc<[usize]> = (0..n).filter(|&i| i == 0 || cuts[i]).collect();
                prop_oneof![
                    Just((Mask::None, n, m)),
                    Just((Mask::Causal { offset }, n, n + offset)),
                    Just((Mask::Window { offset, width }, n, n + offset)),
                    Just((Mask::Segments { starts, causal }, n, n)),
                ]
            })
    }

    /// Whether query `i` sees key `j`, by the masks' definitions.
    fn sees_by_definition(mask: &Mask, i: usize, j: usize) -> bool {
        match mask {
            Mask::None => true,
            Mask::Causal { offset } => j <= i + offset,
            Mask::Window { offset, width } => j <= i + offset && j + width > i + offset,
            Mask::Segments { starts, causal } => {
                let segment = |token: usize| starts.iter().filter(|&&start| start <= token).count();
                segment(i) == segment(j) && (!causal || j <= i)
            }
        }
    }

    proptest! {
        #[test]
        fn what_a_mask_says_of_rows_tiles_and_scores_is_what_it_says_of_every_pair(
            (mask, n, m) in mask(),
            corners in proptest::array::uniform4(any::<proptest::sample::Index>()),
        ) {
            prop_assert!(mask.check(n, m).is_ok());
            let sees = |i: usize, j: usize| sees_by_definition(&mask, i, j);
            for (i, j) in (0..n).flat_map(|i| (0..m).map(move |j| (i, j))) {
                prop_assert_eq!(mask.sees(i, j, m), sees(i, j));
                prop_assert_eq!(mask.seen(i, m).contains(&j), sees(i, j));
            }
            for i in 1..n {
                let (before, seen) = (mask.seen(i - 1, m), mask.seen(i, m));
                prop_assert!(before.start <= seen.start && before.end <= seen.end);
            }
            prop_assert!(mask.seen_by(0..0, m).is_empty());

            let between = |a: &proptest::sample::Index, b: &proptest::sample::Index, count: usize| {
                let (a, b) = (a.index(count + 1), b.index(count + 1));
                a.min(b)..a.max(b)
            };
            let [a, b, c, d] = &corners;
            let (queries, keys) = (between(a, b, n), between(c, d, m));
            let seen_by = mask.seen_by(queries.clone(), m);
            for j in 0..m {
                prop_assert_eq!(seen_by.contains(&j), queries.clone().any(|i| sees(i, j)));
            }
            if queries.is_empty() || keys.is_empty() {
                return Ok(());
            }
            let pairs: Vec<bool> = keys.clone().flat_map(|j| queries.clone().map(move |i| (i, j))).map(|(i, j)| sees(i, j)).collect();
            let seen = pairs.iter().filter(|&&seen| seen).count();
            let expected = match seen {
                0 => Coverage::Empty,
                _ if seen == pairs.len() => Coverage::Full,
                _ => Coverage::Part,
            };
            prop_assert_eq!(mask.coverage(queries.clone(), keys.clone(), m), expected);
            let mut scores = vec![1.0f64; pairs.len()];
            mask.hide(queries, keys, m, &mut scores);
            let expected: Vec<f64> = pairs.iter().map(|&seen| if seen { 1.0 } else { f64::NEG_INFINITY }).collect();
            prop_assert_eq!(scores, expected);
        }
    }

    #[test]
    fn masks_that_do_not_fit_are_refused() {
        let segments = |starts: &[usize]| Mask::Segments { starts: starts.into(), causal: false };
        for (mask, n, m) in [
            (Mask::Causal { offset: 0 }, 3, 4),
            (Mask::Causal { offset: usize::MAX }, 3, 2),
            (Mask::Window { offset: 0, width: 0 }, 3, 3),
            (Mask::Window { offset: 2, width: 2 }, 3, 3),
            (segments(&[0, 3]), 3, 3),
            (segments(&[1]), 3, 3),
            (segments(&[0, 2, 2]), 3, 3),
            (segments(&[]), 3, 3),
            (segments(&[0]), 3, 4),
        ] {
            assert!(mask.check(n, m).is_err(), "{mask:?} {n} {m}");
        }
    }
}

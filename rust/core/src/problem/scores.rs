//! How scores are made of queries and keys, and which pairs count.
//!
//! ```text
//! s_ij = cap(scale q_i.k_j) + key_bias_j + bias_ij,    cap(x) = softcap tanh(x / softcap), or x
//! ```
//!
//! for the keys `j` that the [`Mask`] lets query `i` see, and that no array hides. The arrays lie with the head
//! (`heads`); everything else that makes a score is here.

use std::ops::Range;
use std::sync::Arc;

use faer::MatRef;

use crate::error::{Error, Result};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::stored::Stored;

/// How scores are made, apart from the arrays.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// Factor of `q.k`.
    pub scale: f64,
    /// Scores stay below this in size: `c tanh(s / c)`.
    pub softcap: Option<f64>,
    /// Which pairs count: one mask for all heads, or one for each of so many equal runs of them.
    pub masks: Vec<Mask>,
    /// Whether a row without a key to attend to is 0, and no error.
    pub empty_rows_are_zero: bool,
}

/// Which keys a query sees: a band of diagonals, cut by packed sequences. They are consecutive, and neither the first nor
/// the last of them ever moves back from a query to the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mask {
    /// Query `i` sees keys `j >= i + lower`.
    pub lower: Option<isize>,
    /// Query `i` sees keys `j <= i + upper`.
    pub upper: Option<isize>,
    /// Packed sequences: where each starts, from 0 on, in increasing order. A token sees those of its own sequence.
    pub starts: Option<Arc<[usize]>>,
}

/// How much of a tile of pairs a mask leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// No pair.
    Empty,
    /// Some pairs (or none, where rows without keys lie in the tile).
    Part,
    /// Every pair.
    Full,
}

impl Scores {
    /// Without a cap, one mask for all heads.
    pub fn new(scale: f64, mask: Mask) -> Self {
        Self { scale, softcap: None, masks: vec![mask], empty_rows_are_zero: false }
    }

    /// The mask of head `index` of `count`.
    pub fn mask(&self, index: usize, count: usize) -> &Mask {
        &self.masks[index * self.masks.len() / count.max(1)]
    }

    /// An error where the numbers are none, or the masks do not fit `n` queries and `m` keys of `h` heads.
    pub fn check(&self, h: usize, n: usize, m: usize) -> Result<()> {
        if !self.scale.is_finite() {
            return Err(Error::Argument(format!("scale is {}; expected a finite number", self.scale)));
        }
        if let Some(cap) = self.softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(Error::Argument(format!("softcap is {cap}; expected a finite number above 0")));
        }
        if self.masks.is_empty() || !h.is_multiple_of(self.masks.len()) {
            return Err(Error::Shape(format!("{} masks for {h} heads; expected a divisor", self.masks.len())));
        }
        self.masks.iter().try_for_each(|mask| mask.check(n, m))
    }

    /// `cap(x)`.
    pub fn cap(&self, x: f64) -> f64 {
        self.softcap.map_or(x, |cap| cap * (x / cap).tanh())
    }

    /// The derivative of [`cap`](Self::cap).
    pub fn cap_slope(&self, x: f64) -> f64 {
        self.softcap.map_or(1.0, |cap| 1.0 - (x / cap).tanh().powi(2))
    }
}

impl Mask {
    /// Every query sees every key.
    pub const NONE: Self = Self { lower: None, upper: None, starts: None };

    /// Query `i` sees keys `j <= i`; or every key.
    pub fn causal(causal: bool) -> Self {
        Self { upper: causal.then_some(0), ..Self::NONE }
    }

    /// The band of queries whose first one stands at position `offset` of the keys: with `causal` they see none after
    /// their own, and of a window `left` before and `right` after it.
    pub fn band(causal: bool, offset: isize, left: Option<usize>, right: Option<usize>) -> Self {
        let far = |x: usize| isize::try_from(x).unwrap_or(isize::MAX);
        let right = if causal { Some(0) } else { right.map(far) };
        let (lower, upper) =
            (left.map(|left| offset.saturating_sub(far(left))), right.map(|right| offset.saturating_add(right)));
        Self { lower, upper, starts: None }
    }

    /// Of these packed sequences, too.
    pub fn packed(self, starts: Arc<[usize]>) -> Self {
        Self { starts: Some(starts), ..self }
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// Whether low-rank passes have it as it is: none, or `j <= i` of as many keys as queries.
    pub fn is_plain(&self, n: usize, m: usize) -> bool {
        self.is_none() || (n == m && *self == Self::causal(true))
    }

    /// An error where it does not fit `n` queries and `m` keys.
    pub fn check(&self, n: usize, m: usize) -> Result<()> {
        let Some(starts) = &self.starts else { return Ok(()) };
        let increasing = starts.first().is_none_or(|&first| first == 0) && starts.is_sorted_by(|a, b| a < b);
        let sees_itself = self.lower.is_none_or(|lower| lower <= 0) && self.upper.is_none_or(|upper| upper >= 0);
        let fit = starts.is_empty() == (n == 0) && starts.last().is_none_or(|&last| last < n);
        if n == m && increasing && sees_itself && fit {
            return Ok(());
        }
        Err(Error::Shape(format!(
            "segments of n = {n} queries and m = {m} keys; expected n == m, no query_offset, and starts that increase from \
             0 to less than n"
        )))
    }

    /// The keys, of `m`, that query `i` sees.
    pub fn seen(&self, i: usize, m: usize) -> Range<usize> {
        let key = |diagonal: isize| (i as isize).saturating_add(diagonal).clamp(0, m as isize) as usize;
        let mut start = self.lower.map_or(0, key);
        let mut end = self.upper.map_or(m, |upper| key(upper.saturating_add(1)));
        if let Some(starts) = &self.starts {
            let next = starts.partition_point(|&start| start <= i);
            start = start.max(starts[next - 1]);
            end = end.min(starts.get(next).copied().unwrap_or(m));
        }
        start..end.max(start)
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

/// What arrays say of the pairs of a tile, `(n, m)` each, read in place: neither need hold every pair by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PairArrays<'a, E> {
    /// Whether a query may attend to a key.
    pub allowed: Option<MatRef<'a, bool>>,
    /// Added to the scores.
    pub bias: Option<MatRef<'a, E>>,
}

impl<E: Copy> PairArrays<'_, E> {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        self.allowed.is_none() && self.bias.is_none()
    }

    /// Whether no pair of a tile is allowed.
    pub fn hide_all(&self, queries: Range<usize>, keys: Range<usize>) -> bool {
        let Some(allowed) = self.allowed else { return false };
        let tile = allowed.submatrix(queries.start, keys.start, queries.len(), keys.len());
        // Of rows, or columns, that are all the same one, one is looked at.
        let tile = if tile.row_stride() == 0 { tile.subrows(0, tile.nrows().min(1)) } else { tile };
        let tile = if tile.col_stride() == 0 { tile.subcols(0, tile.ncols().min(1)) } else { tile };
        tile.row_iter().all(|row| match row.try_as_row_major() {
            Some(row) => !row.as_slice().contains(&true),
            None => row.iter().all(|allowed| !allowed),
        })
    }

    /// Adds to a tile of scores what the arrays say of it.
    pub fn apply<T: Real>(&self, queries: Range<usize>, keys: Range<usize>, rows: RowsOf, s: &mut [T])
    where
        E: Stored<T>,
    {
        let (first, count) = ((queries.start, keys.start), (queries.len(), keys.len()));
        if let Some(bias) = self.bias {
            let bias = bias.submatrix(first.0, first.1, count.0, count.1);
            rows.combine(bias, s, |s, b: E| with_bias(s, b.widen()));
        }
        if let Some(allowed) = self.allowed {
            let allowed = allowed.submatrix(first.0, first.1, count.0, count.1);
            rows.combine(allowed, s, |s, allowed| if allowed { s } else { T::NEG_INFINITY });
        }
    }
}

/// What the rows of a tile of scores are of.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RowsOf {
    Queries,
    Keys,
}

impl RowsOf {
    /// `s = f(s, x)` for each pair of a tile, of whose rows `x (queries, keys)` has those of queries.
    fn combine<T: Real, X: Copy>(self, x: MatRef<'_, X>, s: &mut [T], f: impl Fn(T, X) -> T) {
        match self {
            Self::Queries => by_rows(x, s, f),
            Self::Keys => by_columns(x, s, f),
        }
    }
}

/// A score with a bias; what a hidden pair's score is may be anything.
#[inline(always)]
fn with_bias<T: Real>(s: T, bias: T) -> T {
    if bias == T::NEG_INFINITY { bias } else { s + bias }
}

/// `s_ij = f(s_ij, x_ij)` for a contiguous `s` of the shape of `x`.
fn by_rows<T: Real, X: Copy>(x: MatRef<'_, X>, s: &mut [T], f: impl Fn(T, X) -> T) {
    vectorised(
        #[inline(always)]
        || {
            for (s, x) in s.chunks_exact_mut(x.ncols()).zip(x.row_iter()) {
                match x.try_as_row_major() {
                    Some(x) => s.iter_mut().zip(x.as_slice()).for_each(|(s, &x)| *s = f(*s, x)),
                    None => s.iter_mut().zip(x.iter()).for_each(|(s, &x)| *s = f(*s, x)),
                }
            }
        },
    );
}

/// `s_ji = f(s_ji, x_ij)`: so many rows of `x` at a time as fill a line of the cache in each row of `s`.
fn by_columns<T: Real, X: Copy>(x: MatRef<'_, X>, s: &mut [T], f: impl Fn(T, X) -> T) {
    const ROWS: usize = 16;
    let (count, keys) = (x.nrows(), x.ncols());
    vectorised(
        #[inline(always)]
        || {
            let mut first = 0;
            while first + ROWS <= count && x.col_stride() == 1 {
                let rows: [&[X]; ROWS] = std::array::from_fn(|i| {
                    x.row(first + i).try_as_row_major().map_or(&[][..], |row| &row.as_slice()[..keys])
                });
                for (j, s) in s.chunks_exact_mut(count).enumerate().take(keys) {
                    for (s, row) in s[first..first + ROWS].iter_mut().zip(&rows) {
                        *s = f(*s, row[j]);
                    }
                }
                first += ROWS;
            }
            for i in first..count {
                for (s, &x) in s.chunks_exact_mut(count).zip(x.row(i).iter()) {
                    s[i] = f(s[i], x);
                }
            }
        },
    );
}

/// Caps scores, and where `slopes` has room, writes the derivative of that.
pub(crate) fn cap_all<T: Real>(cap: T, s: &mut [T], slopes: Option<&mut [T]>) {
    vectorised(
        #[inline(always)]
        || match slopes {
            None => s.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh_fast()),
            Some(slopes) => {
                for (s, slope) in s.iter_mut().zip(slopes) {
                    let t = (*s / cap).tanh_fast();
                    *s = cap * t;
                    *slope = T::ONE - t * t;
                }
            }
        },
    );
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

/// Adds `e^sink` to a denominator, whose logarithm is given, and returns the share that it had: what numerators over the
/// denominator are to be multiplied with. A row without keys has the logarithm of nothing, or any with a share of 0.
pub(crate) fn join_sink(log_sum: &mut f64, sink: f64) -> f64 {
    let (high, low) = if *log_sum > sink { (*log_sum, sink) } else { (sink, *log_sum) };
    if low == f64::NEG_INFINITY {
        return if *log_sum > sink {
            1.0
        } else {
            *log_sum = sink;
            0.0
        };
    }
    let joined = high + (low - high).exp().ln_1p();
    (std::mem::replace(log_sum, joined) - joined).exp()
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
        let side = || proptest::option::of(0usize..60);
        let cuts = proptest::collection::vec(any::<bool>(), 40);
        (1usize..=40, 0usize..60, -70isize..70, side(), side(), cuts, any::<bool>(), any::<bool>()).prop_map(
            |(n, m, offset, left, right, cuts, causal, packed)| match packed {
                false => (Mask::band(causal, offset, left, right), n, m),
                true => {
                    let starts: Arc<[usize]> = (0..n).filter(|&i| i == 0 || cuts[i]).collect();
                    (Mask::band(causal, 0, left, right).packed(starts), n, n)
                }
            },
        )
    }

    /// Whether query `i` sees key `j`, by the masks' definitions.
    fn sees_by_definition(mask: &Mask, i: usize, j: usize) -> bool {
        let diagonal = j as isize - i as isize;
        let segment = |token: usize| mask.starts.iter().flat_map(|x| x.iter()).filter(|&&start| start <= token).count();
        mask.lower.is_none_or(|lower| lower <= diagonal)
            && mask.upper.is_none_or(|upper| diagonal <= upper)
            && (mask.starts.is_none() || segment(i) == segment(j))
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
                prop_assert!(seen_by.contains(&j) || !queries.clone().any(|i| sees(i, j)));
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
            let coverage = mask.coverage(queries.clone(), keys.clone(), m);
            prop_assert!(coverage == expected || (expected, coverage) == (Coverage::Empty, Coverage::Part));
            let mut scores = vec![1.0f64; pairs.len()];
            mask.hide(queries, keys, m, &mut scores);
            let expected: Vec<f64> = pairs.iter().map(|&seen| if seen { 1.0 } else { f64::NEG_INFINITY }).collect();
            prop_assert_eq!(scores, expected);
        }
    }

    #[test]
    fn masks_that_do_not_fit_are_refused() {
        let segments = |starts: &[usize]| Mask::NONE.packed(starts.into());
        for (mask, n, m) in [
            (segments(&[0, 3]), 3, 3),
            (segments(&[1]), 3, 3),
            (segments(&[0, 2, 2]), 3, 3),
            (segments(&[]), 3, 3),
            (segments(&[0]), 3, 4),
            (Mask::band(true, -1, None, None).packed([0].into()), 3, 3),
        ] {
            assert!(mask.check(n, m).is_err(), "{mask:?} {n} {m}");
        }
    }
}

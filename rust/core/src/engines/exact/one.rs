//! One query after another against all keys, on one thread: for heads of a single query, as in decoding, which read keys and
//! values once, and for heads that are no work to speak of.

use std::ops::Range;

use faer::{MatRef, RowRef};
use pulp::{Arch, Simd, WithSimd};

use crate::error::Result;
use crate::memory::zeroed;
use crate::numerics::real::{Real, vectorised};
use crate::numerics::stored::Stored;
use crate::numerics::tile::{TILE, tiles};
use crate::problem::heads::Head;
use crate::problem::scores::{RowsOf, add_bias, cap_all};

/// One thread's memory, for heads of one size.
struct One<T> {
    q: Vec<T>,
    scores: Vec<T>,
    tile_out: Vec<T>,
    weighted: Vec<f64>,
    row: Vec<T>,
}

/// Multiplications of a head that are done before another thread would have begun.
const FEW: usize = 1 << 15;

/// Whether a head is computed query after query. Its backward pass makes the scores in the same way, to the last bit.
pub(crate) fn serves<T: Real, E: Stored<T>>(head: &Head<'_, T, E>) -> bool {
    head.n() == 1 || head.n() * head.m() * (head.d() + head.d_v()) <= FEW
}

/// Writes `out` and the row factors of a head. `None` where a number was not finite, or a row has no key to attend to:
/// another way is to find out what is to be said of it.
pub(crate) fn forward<T: Real, E: Stored<T>, O: Stored<T>>(
    head: &Head<'_, T, E>,
    out: &mut [O],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Option<()> {
    let mut one = One::new(head.d(), head.d_v()).ok()?;
    for (i, out) in out.chunks_exact_mut(head.d_v()).enumerate() {
        (row_max[i], row_scale[i]) = one.forward(head, i, out)?;
    }
    Some(())
}

impl<T: Real> One<T> {
    fn new(d: usize, d_v: usize) -> Result<Self> {
        let numbers = |len: usize| zeroed(len, "a query");
        Ok(Self {
            q: numbers(d)?,
            scores: numbers(TILE)?,
            tile_out: numbers(d_v)?,
            weighted: zeroed(d_v, "a query")?,
            row: numbers(d.max(d_v))?,
        })
    }

    /// Writes the row of a query, and returns its factors.
    fn forward<E: Stored<T>, O: Stored<T>>(
        &mut self,
        head: &Head<'_, T, E>,
        query: usize,
        out: &mut [O],
    ) -> Option<(T, T)> {
        let Self { q, scores, tile_out, weighted, row } = self;
        q.iter_mut().zip(head.q.row(query).iter()).for_each(|(to, x)| *to = x.widen());
        weighted.fill(0.0);
        let (mut max, mut sum) = ([T::NEG_INFINITY], 0.0);
        for (first, count) in tiles(head.seen(query), TILE) {
            let (keys, s) = (first..first + count, &mut scores[..count]);
            dots(q, head.k, keys.clone(), T::of(head.scores.scale), s, row);
            if !s.iter().all(|s| s.finite()) {
                return None;
            }
            if let Some(cap) = head.scores.softcap {
                cap_all(T::of(cap), s, None);
            }
            if let Some(bias) = head.key_bias {
                add_bias(bias.subrows(first, count).iter().copied(), 1, s);
            }
            if !head.pairs.is_none() {
                head.pairs.apply(query..query + 1, keys.clone(), RowsOf::Queries, s);
            }
            let (before, mut tile_sum) = (max[0], [T::ZERO]);
            column_exponentials(s, &mut max, &mut tile_sum);
            let kept = if before == T::NEG_INFINITY { 0.0 } else { (before - max[0]).exp_nonpositive().to_f64() };
            sum = sum * kept + tile_sum[0].to_f64();
            combine(s, head.v, keys, tile_out, row);
            for (sum, x) in weighted.iter_mut().zip(&*tile_out) {
                *sum = *sum * kept + x.to_f64();
            }
        }
        if !(sum > 0.0 && sum.is_finite() && weighted.iter().all(|x| x.is_finite())) {
            return None;
        }
        out.iter_mut().zip(&*weighted).for_each(|(out, x)| *out = O::of_sum(x / sum));
        Some((max[0], T::of(1.0 / sum)))
    }
}

/// Raises `max`, writes `e^(s - max)` in place of `s`, and their sum.
fn column_exponentials<T: Real>(s: &mut [T], max: &mut [T; 1], sum: &mut [T; 1]) {
    const LANES: usize = 16;
    let largest = vectorised(
        #[inline(always)]
        || {
            let mut lanes = [T::NEG_INFINITY; LANES];
            let (whole, rest) = s.as_chunks::<LANES>();
            for s in whole {
                for (largest, &s) in lanes.iter_mut().zip(s) {
                    *largest = s.larger(*largest);
                }
            }
            lanes.iter().chain(rest).fold(T::NEG_INFINITY, |a, &b| b.larger(a))
        },
    );
    max[0] = largest.larger(max[0]);
    let level = if max[0] == T::NEG_INFINITY { T::ZERO } else { max[0] };
    sum[0] = vectorised(
        #[inline(always)]
        || {
            let mut lanes = [T::ZERO; LANES];
            let (whole, rest) = s.as_chunks_mut::<LANES>();
            for s in whole {
                for (sum, s) in lanes.iter_mut().zip(s) {
                    *s = (*s - level).exp_nonpositive();
                    *sum += *s;
                }
            }
            for s in rest.iter_mut() {
                *s = (*s - level).exp_nonpositive();
            }
            lanes.iter().chain(&*rest).copied().sum()
        },
    );
}

/// `s_j = scale q.k_j`; `row` has room for a key.
pub(super) fn dots<T: Real, E: Stored<T>>(
    q: &[T],
    k: MatRef<'_, E>,
    keys: Range<usize>,
    scale: T,
    s: &mut [T],
    row: &mut [T],
) {
    let k = k.subrows(keys.start, keys.len());
    match E::plain(k) {
        Some(k) if k.col_stride() == 1 => {
            let rows = k.row_iter().map(|row| row.try_as_row_major().map_or(&[][..], |row| row.as_slice()));
            Arch::new().dispatch(Dots { q, rows, scale, s });
        }
        _ => {
            for (s, k) in s.iter_mut().zip(k.row_iter()) {
                load_row(k, &mut row[..q.len()]);
                let rows = std::iter::once(&row[..q.len()]);
                Arch::new().dispatch(Dots { q, rows, scale, s: std::slice::from_mut(s) });
            }
        }
    }
}

/// A row in the type that is computed with.
fn load_row<T: Real, E: Stored<T>>(x: RowRef<'_, E>, to: &mut [T]) {
    match x.try_as_row_major() {
        Some(x) => E::widen_all(x.as_slice(), to),
        None => to.iter_mut().zip(x.iter()).for_each(|(to, x)| *to = x.widen()),
    }
}

/// Products of `q` with rows of its length.
struct Dots<'a, T, I> {
    q: &'a [T],
    rows: I,
    scale: T,
    s: &'a mut [T],
}

impl<'b, T: Real, I: Iterator<Item = &'b [T]>> WithSimd for Dots<'_, T, I> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { q, rows, scale, s } = self;
        let lanes = T::lanes::<S>();
        let whole = q.len() / lanes;
        let rest = q.len() - whole * lanes;
        for (s, k) in s.iter_mut().zip(rows) {
            assert!(k.len() == q.len(), "keys as wide as queries");
            let mut sums = [T::splat(simd, T::ZERO); 4];
            // SAFETY: vector `c < whole`, and the `rest` numbers after them, lie within both slices.
            unsafe {
                for c in 0..whole {
                    let (x, y) = (T::load(simd, q.as_ptr().add(c * lanes)), T::load(simd, k.as_ptr().add(c * lanes)));
                    sums[c % 4] = T::multiply_add(simd, x, y, sums[c % 4]);
                }
                if rest > 0 {
                    let at = whole * lanes;
                    let (x, y) = (q.as_ptr().add(at), k.as_ptr().add(at));
                    let (x, y) = (T::load_first(simd, x, rest), T::load_first(simd, y, rest));
                    sums[3] = T::multiply_add(simd, x, y, sums[3]);
                }
            }
            let one = T::splat(simd, T::ONE);
            let [a, b, c, d] = sums;
            let (a, c) = (T::multiply_add(simd, a, one, b), T::multiply_add(simd, c, one, d));
            *s = scale * T::sum_of_lanes(simd, T::multiply_add(simd, a, one, c));
        }
    }
}

/// `sum_j s_j v_j`; `row` has room for a value.
fn combine<T: Real, E: Stored<T>>(s: &[T], v: MatRef<'_, E>, keys: Range<usize>, out: &mut [T], row: &mut [T]) {
    let v = v.subrows(keys.start, keys.len());
    out.fill(T::ZERO);
    match E::plain(v) {
        Some(v) if v.col_stride() == 1 => {
            Arch::new().dispatch(Combination { s, v: v.as_ptr(), stride: v.row_stride(), out });
        }
        _ => {
            for (s, v) in s.iter().zip(v.row_iter()) {
                load_row(v, &mut row[..out.len()]);
                vectorised(
                    #[inline(always)]
                    || out.iter_mut().zip(&*row).for_each(|(out, &x)| *out += *s * x),
                );
            }
        }
    }
}

/// Adds `sum_j s_j v_j` to `out`, for contiguous rows of its length from `v` on.
struct Combination<'a, T> {
    s: &'a [T],
    v: *const T,
    stride: isize,
    out: &'a mut [T],
}

impl<T: Real> WithSimd for Combination<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        const VECTORS: usize = 4;
        let Self { s, v, stride, out } = self;
        let lanes = T::lanes::<S>();
        let mut first = 0;
        while first + VECTORS * lanes <= out.len() {
            let mut sums = [T::splat(simd, T::ZERO); VECTORS];
            for (j, &s) in s.iter().enumerate() {
                let s = T::splat(simd, s);
                for (c, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: row `j`, and `VECTORS` vectors of it from column `first` on, lie within the values.
                    let x = unsafe { T::load(simd, v.offset(j as isize * stride).add(first + c * lanes)) };
                    *sum = T::multiply_add(simd, s, x, *sum);
                }
            }
            for (c, &sum) in sums.iter().enumerate() {
                // SAFETY: these vectors lie within `out`.
                unsafe { T::store(simd, out.as_mut_ptr().add(first + c * lanes), sum) };
            }
            first += VECTORS * lanes;
        }
        while first < out.len() {
            let count = (out.len() - first).min(lanes);
            let mut sum = T::splat(simd, T::ZERO);
            for (j, &s) in s.iter().enumerate() {
                // SAFETY: row `j`, and `count` numbers of it from column `first` on, lie within the values.
                let x = unsafe { T::load_first(simd, v.offset(j as isize * stride).add(first), count) };
                sum = T::multiply_add(simd, T::splat(simd, s), x, sum);
            }
            // SAFETY: these numbers lie within `out`.
            unsafe { T::store_first(simd, out.as_mut_ptr().add(first), count, sum) };
            first += count;
        }
    }
}

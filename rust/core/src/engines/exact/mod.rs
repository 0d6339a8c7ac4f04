//! The exact engine: softmax attention by blocks, never an `n x m` array.
//!
//! Forward, a block of queries against block after block of keys, with a running row maximum `M_i`:
//!
//! ```text
//! s_ij = c q_i.k_j + b_ij     D_i = sum_j e^(s_ij - M_i)      out_i = (1/D_i) sum_j e^(s_ij - M_i) v_j
//! ```
//!
//! Backward. With `f_ij = e^(s_ij - M_i) / D_i`, `out = f v`, so for a loss `L` with `dL/dout = dout`:
//! `dL/dv = f^T dout` and `dL/df_ij = dout_i.v_j`. The softmax of a row has `df_ij/ds_ik = f_ij (1[j=k] - f_ik)`, hence
//!
//! ```text
//! dS_ij = f_ij (dout_i.v_j - sum_k f_ik dout_i.v_k) = f_ij (dout_i.v_j - delta_i),   delta_i = dout_i.out_i
//! dq = c dS k        dk = c dS^T q        db = dS
//! ```
//!
//! of which a key's bias takes the sums over the queries. Where scores are capped, `dq` and `dk` take `dS_ij` times the
//! derivative of the cap. Where `f_ij` rounds to 1, the row has no other key that counts, and `dS_ij` is 0.

pub(crate) mod one;
mod softmax;

use std::ops::Range;

use faer::MatRef;
use rayon::prelude::*;

pub(crate) use self::softmax::Softmax;
use super::{Engine, Prepared};
use crate::context::Context;
use crate::error::Result;
use crate::memory::{Aligned, aligned, collected, made, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::stored::Stored;
use crate::numerics::tile::{TILE, add_product, load_rows, load_transposed, product, tiles, view, view_mut, widen};
use crate::problem::grads::{BiasGrads, HeadGrads, RowFactors, Upstream};
use crate::problem::heads::Head;
use crate::problem::scores::{Coverage, RowsOf, add_bias, cap_all};

/// Softmax attention; it takes nothing from a head's data.
#[derive(Debug)]
pub(crate) struct Exact;

impl<T: Real> Engine<T> for Exact {
    fn prepare(&self, _: &Context, _: &Head<'_, T>) -> Result<Box<dyn Prepared<T>>> {
        Ok(Box::new(Self))
    }
}

impl<T: Real> Prepared<T> for Exact {
    fn name(&self) -> String {
        "exact".into()
    }

    fn forward(
        &mut self,
        ctx: &Context,
        head: &Head<'_, T>,
        out: &mut [T],
        row_max: &mut [T],
        row_scale: &mut [T],
    ) -> Result<()> {
        forward(ctx, head, out, row_max, row_scale)
    }

    fn backward(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        up: Upstream<'_, T>,
        grads: HeadGrads<'_, T>,
        dbias: Option<BiasGrads<'_, T>>,
    ) -> Result<()> {
        backward(ctx, head, up, grads, dbias)
    }

    fn log_row_sums(&self, _: &Head<'_, T>, rows: RowFactors<'_, T>) -> Result<Vec<f64>> {
        collected(rows.log_sums(), "logarithms of row sums")
    }

    fn is_exact(&self) -> bool {
        true
    }
}

/// Writes `out` and the row factors of one head.
pub(crate) fn forward<T: Real, E: Stored<T>, O: Stored<T>>(
    ctx: &Context,
    head: &Head<'_, T, E>,
    out: &mut [O],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<()> {
    let (m, d, d_v) = (head.m(), head.d(), head.d_v());
    if one::serves(head) && one::forward(head, out, row_max, row_scale).is_some() {
        return Ok(());
    }
    (out.par_chunks_mut(TILE * d_v), row_max.par_chunks_mut(TILE), row_scale.par_chunks_mut(TILE))
        .into_par_iter()
        .enumerate()
        .try_for_each_init(
            || {
                Ok((
                    Softmax::new(d_v)?,
                    aligned(d * TILE, "a tile of queries")?,
                    Aligned::default(),
                    Aligned::default(),
                ))
            },
            |scratch, (block, (out, max, scale))| {
                let (softmax, q, k, v) = made(scratch)?;
                let queries = block * TILE..block * TILE + max.len();
                load_transposed(head.q, queries.start, queries.len(), &[], q);
                let q = view(q, d, queries.len());
                softmax.start(queries.len());
                for (first, count) in tiles(head.mask.seen_by(queries.clone(), m), TILE) {
                    ctx.check()?;
                    if head.pairs.hide_all(queries.clone(), first..first + count) {
                        continue;
                    }
                    let k = tile_rows(head.k, first, count, k)?;
                    scores(head, q, k, queries.clone(), first..first + count, &mut softmax.scores);
                    softmax.add(count, tile_rows(head.v, first, count, v)?);
                }
                softmax.finish(head.index, |i| queries.start + i, |row| head.may_be_empty(row), out, max, scale)
            },
        )
}

/// The tile `s_ij` of some queries `q`, `(d, queries)`, and keys, as `(keys, queries)`: `-inf` where a query does not see
/// a key.
fn scores<T: Real, E: Stored<T>>(
    head: &Head<'_, T, E>,
    q: MatRef<'_, T>,
    k: MatRef<'_, T>,
    queries: Range<usize>,
    keys: Range<usize>,
    s: &mut [T],
) {
    let (bq, bk) = (queries.len(), keys.len());
    product(view_mut(s, bk, bq), k, q, T::of(head.scores.scale));
    if let Some(cap) = head.scores.softcap {
        cap_all(T::of(cap), &mut s[..bk * bq], None);
    }
    if let Some(bias) = head.key_bias {
        add_bias(bias.subrows(keys.start, bk).iter().copied(), bq, s);
    }
    if !head.pairs.is_none() {
        head.pairs.apply(queries.clone(), keys.clone(), RowsOf::Keys, s);
    }
    head.mask.hide(queries, keys, head.m(), s);
}

/// Rows of keys or values: where they lie, or a copy of those in half precision.
fn tile_rows<'a, T: Real, E: Stored<T>>(
    x: MatRef<'a, E>,
    first: usize,
    count: usize,
    copy: &'a mut Aligned<T>,
) -> Result<MatRef<'a, T>> {
    if let Some(x) = E::plain(x) {
        return Ok(x.subrows(first, count));
    }
    if copy.is_empty() {
        *copy = aligned(TILE * x.ncols(), "a tile of keys or values")?;
    }
    load_rows(x, first, count, &[], x.ncols(), copy);
    Ok(view(copy, count, x.ncols()))
}

/// Adds one head's gradients.
///
/// The `(query, key)` plane is cut into `p x p` squares. In round `t` square `((j + t) mod p, j)` is done for every `j`
/// at once: no two squares of a round share a query or a key, so each owns its rows of dq, dk and dv, every score is
/// computed once, and every sum has an order that does not depend on the number of threads. Sums over more than
/// [`MAX_SIDE`] tokens are kept in float64.
pub(crate) fn backward<T: Real, E: Stored<T>>(
    ctx: &Context,
    head: &Head<'_, T, E>,
    up: Upstream<'_, T, E>,
    grads: HeadGrads<'_, T>,
    mut dbias: Option<BiasGrads<'_, T>>,
) -> Result<()> {
    let (n, m, d, d_v) = (head.n(), head.m(), head.d(), head.d_v());
    let p = (n.max(m) / MAX_SIDE).max(SQUARES);
    let [side_q, side_k] = [n, m].map(|tokens| tokens.div_ceil(p).next_multiple_of(TILE));
    let p = n.div_ceil(side_q).max(m.div_ceil(side_k));
    // A bias whose numbers are shared by all queries, or by all keys, takes sums; any other has each pair's own place.
    let shared = dbias.as_ref().map(|dbias| (dbias.row_stride == 0, dbias.col_stride == 0));
    let biased = grads.dkey_bias.is_some() || shared.is_some_and(|(by_queries, _)| by_queries);
    let rows_wanted = shared == Some((false, true));
    let plane = match (&mut dbias, shared) {
        (Some(dbias), Some((false, false))) => Some(Plane::new(dbias, head.index)),
        _ => None,
    };
    let zeros = |len: usize| zeroed::<f64>(len, "a head's gradients in float64");
    let (mut sum_q, mut sum_k) = (zeros(n * d)?, zeros(m * d)?);
    let (mut sum_v, mut sum_b) = (zeros(m * d_v)?, zeros(if biased { m } else { 0 })?);
    let mut sum_rows = zeros(if rows_wanted { n } else { 0 })?;
    let mut queries: Vec<_> =
        pieces(&mut sum_q, side_q * d, p).into_iter().zip(pieces(&mut sum_rows, side_q, p)).collect();
    let keys = pieces(&mut sum_k, side_k * d, p).into_iter().zip(pieces(&mut sum_v, side_k * d_v, p));
    let mut keys: Vec<_> = keys.zip(pieces(&mut sum_b, side_k, p)).collect();
    for t in 0..p {
        keys.par_iter_mut().zip(&mut queries).enumerate().try_for_each_init(
            || Scratch::new(side_q.min(MAX_SIDE), head),
            |scratch, (square, (((dk, dv), db), (dq, rows)))| {
                let scratch = made(scratch)?;
                let (i0, j0) = ((square + t) % p * side_q, square * side_k);
                let side = |first: usize, side: usize, count: usize| first..(first + side).min(count);
                let (queries, keys) = (side(i0, side_q, n), side(j0, side_k, m));
                if queries.is_empty() || head.mask.coverage(queries, keys, m) == Coverage::Empty {
                    return Ok(());
                }
                let sums = Sums { dq, dk, dv, db, rows, plane };
                backward_square(ctx, head, up, (i0, j0), sums, scratch)
            },
        )?;
        queries.rotate_left(1);
    }
    let round = |sum: &[f64], to: &mut [T]| to.iter_mut().zip(sum).for_each(|(to, sum)| *to = T::of(to.to_f64() + sum));
    grads.dq.fill(T::ZERO);
    round(&sum_q, grads.dq);
    round(&sum_k, grads.dk);
    round(&sum_v, grads.dv);
    if let Some(db) = grads.dkey_bias {
        round(&sum_b, db);
    }
    if let (Some(dbias), Some((by_queries, by_keys))) = (dbias, shared) {
        let to = &mut dbias.data[dbias.offsets[head.index]..];
        match (by_queries, by_keys) {
            (true, true) => round(&[sum_b.iter().sum()], &mut to[..1]),
            (true, false) => {
                sum_b.iter().enumerate().for_each(|(j, sum)| round(&[*sum], &mut to[j * dbias.col_stride..][..1]))
            }
            (false, true) => {
                sum_rows.iter().enumerate().for_each(|(i, sum)| round(&[*sum], &mut to[i * dbias.row_stride..][..1]))
            }
            (false, false) => {}
        }
    }
    Ok(())
}

/// Where each pair's gradient has a place of its own.
#[derive(Clone, Copy)]
struct Plane<T> {
    at: *mut T,
    row_stride: usize,
    col_stride: usize,
}

// SAFETY: threads write to the pairs of squares that are theirs alone: see `add`.
unsafe impl<T: Send> Send for Plane<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Plane<T> {}

impl<T: Real> Plane<T> {
    fn new(dbias: &mut BiasGrads<'_, T>, head: usize) -> Self {
        let at = dbias.data[dbias.offsets[head]..].as_mut_ptr();
        Self { at, row_stride: dbias.row_stride, col_stride: dbias.col_stride }
    }

    /// Adds a row of `dS`, from query `i` and key `j` on.
    ///
    /// # Safety
    /// The head has these pairs, and no other thread adds to them.
    unsafe fn add(&self, i: usize, j: usize, ds: &[T]) {
        for (j, &ds) in (j..).zip(ds) {
            // SAFETY: `BiasGrads::check` has found room for every pair of the head, at places of their own, as neither
            // stride is 0; the caller promises the rest.
            unsafe { *self.at.add(i * self.row_stride + j * self.col_stride) += ds };
        }
    }
}

/// Tokens that are summed in the arrays' own type at the most; and squares a side at the least, where they are not
/// smaller than a tile.
const MAX_SIDE: usize = 18 * TILE;
const SQUARES: usize = 16;

/// `x` in `count` consecutive pieces of `len`, the last ones shorter or empty.
fn pieces<T>(x: &mut [T], len: usize, count: usize) -> Vec<&mut [T]> {
    let mut pieces: Vec<_> = x.chunks_mut(len).collect();
    pieces.resize_with(count, Default::default);
    pieces
}

/// Gradients of a square's tokens, in float64. `db` and `rows`, sums of `dS` over the queries and over the keys, are empty
/// where they are not asked for.
struct Sums<'a, T> {
    dq: &'a mut [f64],
    dk: &'a mut [f64],
    dv: &'a mut [f64],
    db: &'a mut [f64],
    rows: &'a mut [f64],
    plane: Option<Plane<T>>,
}

impl<T: Real> Sums<'_, T> {
    /// Adds a tile of `dS`, `(queries, keys)`, to the gradients of the biases. It begins at query `first` and key
    /// `first_key` of the head, which are `i` and `j` of the square.
    fn add_biases(&mut self, first_key: usize, first: usize, (i, j): (usize, usize), bk: usize, ds: &[T]) {
        if !self.db.is_empty() {
            for ds in ds.chunks_exact(bk) {
                self.db[j..j + bk].iter_mut().zip(ds).for_each(|(db, ds)| *db += ds.to_f64());
            }
        }
        if !self.rows.is_empty() {
            for (sum, ds) in self.rows[i..].iter_mut().zip(ds.chunks_exact(bk)) {
                *sum += ds.iter().map(|ds| ds.to_f64()).sum::<f64>();
            }
        }
        if let Some(plane) = &self.plane {
            for (i, ds) in (first..).zip(ds.chunks_exact(bk)) {
                // SAFETY: the tile is the square's, and no two squares that run at once share a query or a key.
                unsafe { plane.add(i, first_key, ds) };
            }
        }
    }
}

/// One thread's tiles. Those of queries and keys are copies with some numbers behind each row: rows of 64 numbers, say,
/// would share a few places in the cache.
struct Scratch<T> {
    q: Aligned<T>,
    dout: Aligned<T>,
    k: Aligned<T>,
    /// `(d, keys)`.
    k_columns: Aligned<T>,
    /// `(d_v, keys)`.
    v_columns: Aligned<T>,
    bias: Aligned<T>,
    f: Aligned<T>,
    ds: Aligned<T>,
    /// Derivatives of the cap, where there is one.
    slopes: Aligned<T>,
    /// A key.
    row: Vec<T>,
    dq: Aligned<T>,
    dk: Aligned<T>,
    dv: Aligned<T>,
}

/// Numbers behind a row: see [`Scratch`].
const PAD: usize = 16;

impl<T: Real> Scratch<T> {
    fn new<E: Stored<T>>(rows_q: usize, head: &Head<'_, T, E>) -> Result<Self> {
        let (d, d_v) = (head.d(), head.d_v());
        let tile = |width: usize| aligned(TILE * width, "a tile of exact gradients");
        Ok(Self {
            q: tile(d + PAD)?,
            dout: tile(d_v + PAD)?,
            k: tile(d + PAD)?,
            k_columns: tile(d)?,
            v_columns: tile(d_v)?,
            bias: tile(1)?,
            f: tile(TILE)?,
            ds: tile(TILE)?,
            slopes: tile(if head.scores.softcap.is_some() { TILE } else { 0 })?,
            row: zeroed(d, "a key")?,
            dq: aligned(rows_q * d, "a square's gradients of queries")?,
            dk: tile(d)?,
            dv: tile(d_v)?,
        })
    }
}

/// Adds what the queries from `i0` and the keys from `j0` on (as many as `sums` has rows) give each other. Tiles are
/// `(queries, keys)`.
fn backward_square<T: Real, E: Stored<T>>(
    ctx: &Context,
    head: &Head<'_, T, E>,
    up: Upstream<'_, T, E>,
    (i0, j0): (usize, usize),
    mut sums: Sums<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<()> {
    let (d, d_v) = (head.d(), head.d_v());
    let (rows_q, rows_k) = (sums.dq.len() / d, sums.dk.len() / d);
    let c = T::of(head.scores.scale);
    let Scratch { q, dout, k, k_columns, v_columns, bias, f, ds, slopes, row, dq, dk, dv: grad_v } = scratch;
    for (part_k, part_q) in
        (0..rows_k).step_by(MAX_SIDE).flat_map(|k| (0..rows_q).step_by(MAX_SIDE).map(move |q| (k, q)))
    {
        let (end_k, end_q) = ((part_k + MAX_SIDE).min(rows_k), (part_q + MAX_SIDE).min(rows_q));
        dq.fill(T::ZERO);
        for j in (part_k..end_k).step_by(TILE) {
            let bk = TILE.min(end_k - j);
            let first_key = j0 + j;
            load_rows(head.k, first_key, bk, &[], d + PAD, k);
            load_transposed(head.k, first_key, bk, &[], k_columns);
            load_transposed(head.v, first_key, bk, &[], v_columns);
            if let Some(b) = head.key_bias {
                bias.iter_mut().zip(b.subrows(first_key, bk).iter()).for_each(|(bias, b)| *bias = *b);
            }
            dk.fill(T::ZERO);
            grad_v.fill(T::ZERO);
            for i in (part_q..end_q).step_by(TILE) {
                let bq = TILE.min(end_q - i);
                let first = i0 + i;
                let (queries, keys) = (first..first + bq, first_key..first_key + bk);
                let coverage = head.mask.coverage(queries.clone(), keys.clone(), head.m());
                if coverage == Coverage::Empty || head.pairs.hide_all(queries.clone(), keys.clone()) {
                    continue;
                }
                ctx.check()?;
                load_rows(head.q, first, bq, &[], d + PAD, q);
                load_rows(up.dout, first, bq, &[], d_v + PAD, dout);
                let (q, dout) = (view(q, bq, d + PAD).subcols(0, d), view(dout, bq, d_v + PAD).subcols(0, d_v));
                if one::serves(head) {
                    // In the order in which its forward pass sums.
                    for (i, f) in f[..bq * bk].chunks_exact_mut(bk).enumerate() {
                        let q = q.row(i).try_as_row_major().map_or(&[][..], |q| q.as_slice());
                        one::dots(q, head.k, keys.clone(), c, f, row);
                    }
                } else {
                    product(view_mut(f, bq, bk), q, view(k_columns, d, bk), c);
                }
                product(view_mut(ds, bq, bk), dout, view(v_columns, d_v, bk), T::ONE);
                let biases = head.key_bias.map(|_| &bias[..bk]);
                let (f_tile, ds_tile) = (&mut f[..bq * bk], &mut ds[..bq * bk]);
                if let Some(cap) = head.scores.softcap {
                    cap_all(T::of(cap), f_tile, Some(slopes));
                }
                if !head.pairs.is_none() {
                    head.pairs.apply(queries, keys, RowsOf::Queries, f_tile);
                }
                score_gradients(&up, first, bk, biases, f_tile, ds_tile);
                if coverage == Coverage::Part {
                    hide(head, first, first_key, bk, f_tile, ds_tile);
                }
                sums.add_biases(first_key, first, (i, j), bk, ds_tile);
                if head.scores.softcap.is_some() {
                    ds_tile.iter_mut().zip(slopes.iter()).for_each(|(ds, slope)| *ds *= *slope);
                }
                let (f, ds) = (view(f, bq, bk), view(ds, bq, bk));
                add_product(view_mut(grad_v, bk, d_v), f.transpose(), dout, T::ONE);
                add_product(view_mut(dk, bk, d), ds.transpose(), q, c);
                let k = view(k, bk, d + PAD).subcols(0, d);
                add_product(view_mut(&mut dq[(i - part_q) * d..], bq, d), ds, k, c);
            }
            widen(dk, &mut sums.dk[j * d..(j + bk) * d]);
            widen(grad_v, &mut sums.dv[j * d_v..(j + bk) * d_v]);
        }
        widen(dq, &mut sums.dq[part_q * d..end_q * d]);
    }
    Ok(())
}

/// Turns a tile of scores into `f`, and one of `dout_i.v_j` into `dS`, for the queries from `first` on.
fn score_gradients<T: Real, E>(
    up: &Upstream<'_, T, E>,
    first: usize,
    bk: usize,
    biases: Option<&[T]>,
    f: &mut [T],
    ds: &mut [T],
) {
    vectorised(
        #[inline(always)]
        || {
            for (i, (f, ds)) in f.chunks_exact_mut(bk).zip(ds.chunks_exact_mut(bk)).enumerate() {
                let row = first + i;
                let (max, scale, delta) = (up.rows.max[row], up.rows.scale[row], up.delta[row]);
                if let Some(biases) = biases {
                    f.iter_mut().zip(biases).for_each(|(s, &b)| *s = if b == T::NEG_INFINITY { b } else { *s + b });
                }
                for (f, ds) in f.iter_mut().zip(ds.iter_mut()) {
                    *f = (*f - max).exp_nonpositive() * scale;
                    *ds = if *f >= T::ONE { T::ZERO } else { f.times(*ds - delta) };
                }
            }
        },
    );
}

/// Clears the pairs of a tile that the mask hides.
fn hide<T: Real, E: Stored<T>>(
    head: &Head<'_, T, E>,
    first: usize,
    first_key: usize,
    bk: usize,
    f: &mut [T],
    ds: &mut [T],
) {
    for (i, (f, ds)) in f.chunks_exact_mut(bk).zip(ds.chunks_exact_mut(bk)).enumerate() {
        let seen = head.seen(first + i);
        let [start, end] = [seen.start, seen.end].map(|key| key.saturating_sub(first_key).min(bk));
        for x in [f, ds] {
            x[..start].fill(T::ZERO);
            x[end.max(start)..].fill(T::ZERO);
        }
    }
}

//! The exact engine: softmax attention by blocks, never an `n x m` array.
//!
//! Forward, a block of queries against block after block of keys, with a running row maximum `M_i`:
//!
//! ```text
//! s_ij = c q_i.k_j + b_j      D_i = sum_j e^(s_ij - M_i)      out_i = (1/D_i) sum_j e^(s_ij - M_i) v_j
//! ```
//!
//! Backward. With `f_ij = e^(s_ij - M_i) / D_i`, `out = f v`, so for a loss `L` with `dL/dout = dout`:
//! `dL/dv = f^T dout` and `dL/df_ij = dout_i.v_j`. The softmax of a row has `df_ij/ds_ik = f_ij (1[j=k] - f_ik)`, hence
//!
//! ```text
//! dS_ij = f_ij (dout_i.v_j - sum_k f_ik dout_i.v_k) = f_ij (dout_i.v_j - delta_i),   delta_i = dout_i.out_i
//! dq = c dS k        dk = c dS^T q        db = dS^T 1
//! ```

use faer::MatRef;
use rayon::prelude::*;

use crate::attention::{Attention, Head, HeadGrads, Upstream};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::memory::{made, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{add_product, exponentials, load_rows, load_transposed, product, view, view_mut, widen};

/// Queries, and keys, of one tile of scores.
pub(crate) const TILE: usize = 112;

/// Writes `out` and the row factors of one head.
pub(crate) fn forward<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<()> {
    let (m, dv) = (head.k.nrows(), head.v.ncols());
    (out.par_chunks_mut(TILE * dv), row_max.par_chunks_mut(TILE), row_scale.par_chunks_mut(TILE))
        .into_par_iter()
        .enumerate()
        .try_for_each_init(
            || Ok((Softmax::new(dv)?, zeroed(head.q.ncols() * TILE, "a tile of queries")?)),
            |scratch, (block, (out, max, scale))| {
                let (softmax, q) = made(scratch)?;
                let (i0, bq) = (block * TILE, max.len());
                load_transposed(head.q, i0, bq, &[], q);
                let q = view(q, head.q.ncols(), bq);
                softmax.start(bq);
                let end = if attention.causal { i0 + bq } else { m };
                for j0 in (0..end).step_by(TILE) {
                    ctx.check()?;
                    let bk = TILE.min(end - j0);
                    scores(head, attention, q, i0, j0, bk, &mut softmax.scores);
                    softmax.add(bk, head.v.subrows(j0, bk));
                }
                softmax.finish(head.index, |i| i0 + i, out, max, scale)
            },
        )
}

/// The tile `s_ij`, as `(bk, bq)`: `-inf` where query `i0 + i` may not see key `j0 + j`. `q` is `(d, bq)`.
fn scores<T: Real>(
    head: &Head<'_, T>,
    attention: &Attention,
    q: MatRef<'_, T>,
    i0: usize,
    j0: usize,
    bk: usize,
    s: &mut [T],
) {
    let bq = q.ncols();
    product(view_mut(s, bk, bq), head.k.subrows(j0, bk), q, T::of(attention.scale));
    if let Some(bias) = head.key_bias {
        add_bias(bias.subrows(j0, bk).iter().copied(), bq, s);
    }
    if attention.causal {
        mask(i0, j0, bk, bq, s);
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
pub(crate) const NO_KEY_REMEDY: &str = "leave such rows out, pad on the right where causal, or give removed keys a large \
                                        negative bias (-1e4, say) in place of -inf";

/// Sets to `-inf` the scores of keys later than the query.
pub(crate) fn mask<T: Real>(i0: usize, j0: usize, bk: usize, bq: usize, s: &mut [T]) {
    for j in (i0 + 1).saturating_sub(j0)..bk {
        s[j * bq..j * bq + (j0 + j - i0).min(bq)].fill(T::NEG_INFINITY);
    }
}

/// The running softmax of a block of queries. Sums over many keys are kept in float64.
pub(crate) struct Softmax<T> {
    /// The tile of scores `(keys, queries)` that [`add`](Self::add) takes.
    pub scores: Vec<T>,
    bq: usize,
    dv: usize,
    max: Vec<T>,
    sum: Vec<f64>,
    weighted: Vec<f64>,
    correction: Vec<T>,
    tile_sum: Vec<T>,
    tile_out: Vec<T>,
}

impl<T: Real> Softmax<T> {
    pub fn new(dv: usize) -> Result<Self> {
        let tile = |rows: usize| zeroed(rows * TILE, "a tile of exact attention");
        Ok(Self {
            scores: tile(TILE)?,
            bq: 0,
            dv,
            max: tile(1)?,
            sum: zeroed(TILE, "a tile's row sums")?,
            weighted: zeroed(dv * TILE, "a tile's sums of values")?,
            correction: tile(1)?,
            tile_sum: tile(1)?,
            tile_out: tile(dv)?,
        })
    }

    pub fn start(&mut self, bq: usize) {
        self.bq = bq;
        self.max[..bq].fill(T::NEG_INFINITY);
        self.sum[..bq].fill(0.0);
        self.weighted.fill(0.0);
    }

    /// Adds the keys whose scores are in `self.scores`.
    pub fn add(&mut self, bk: usize, v: MatRef<'_, T>) {
        self.add_with(bk, &[(v, None)]);
    }

    /// The same for several values side by side, each pair's weight times a factor `(keys, queries)` where there is one.
    pub fn add_with(&mut self, bk: usize, values: &[(MatRef<'_, T>, Option<&[T]>)]) {
        let bq = self.bq;
        let s = &mut self.scores[..bk * bq];
        let (max, correction) = (&mut self.max[..bq], &mut self.correction[..bq]);
        let (sum, tile_sum) = (&mut self.sum[..bq], &mut self.tile_sum[..bq]);
        correction.copy_from_slice(max);
        exponentials(s, max, tile_sum);
        for ((sum, (c, &max)), &t) in sum.iter_mut().zip(correction.iter_mut().zip(&*max)).zip(&*tile_sum) {
            // A row that has seen no key yet has -inf here, perhaps twice; whatever it scales is 0.
            *c = if *c == T::NEG_INFINITY { T::ZERO } else { (*c - max).exp_nonpositive() };
            *sum = *sum * c.to_f64() + t.to_f64();
        }
        let mut first = 0;
        for (v, factor) in values {
            if let Some(factor) = factor {
                self.scores[..bk * bq].iter_mut().zip(*factor).for_each(|(s, by)| *s = s.times(*by));
            }
            let width = v.ncols();
            let tile_out = view_mut(&mut self.tile_out[first * bq..], width, bq);
            product(tile_out, v.transpose(), view(&self.scores, bk, bq), T::ONE);
            first += width;
        }
        let (weighted, tile_out) = (&mut self.weighted[..], &self.tile_out[..]);
        vectorised(
            #[inline(always)]
            || {
                for (acc, tile) in weighted.chunks_exact_mut(bq).zip(tile_out.chunks_exact(bq)) {
                    for ((acc, &t), &c) in acc.iter_mut().zip(tile).zip(&*correction) {
                        *acc = *acc * c.to_f64() + t.to_f64();
                    }
                }
            },
        );
    }

    /// Adds the keys of another running softmax of the same queries.
    pub fn merge(&mut self, other: &Self) {
        let bq = self.bq;
        for i in 0..bq {
            let max = self.max[i].larger(other.max[i]);
            let by = |own: T| if own == T::NEG_INFINITY { 0.0 } else { (own - max).to_f64().exp() };
            let (mine, theirs) = (by(self.max[i]), by(other.max[i]));
            self.max[i] = max;
            self.sum[i] = self.sum[i] * mine + other.sum[i] * theirs;
            for c in 0..self.dv {
                let weighted = &mut self.weighted[c * bq + i];
                *weighted = *weighted * mine + other.weighted[c * bq + i] * theirs;
            }
        }
    }

    /// Writes the rows, or says which one (`row(i)` of the head, for query i of the block) has no usable denominator.
    pub fn finish(
        &mut self,
        head: usize,
        row: impl Fn(usize) -> usize,
        out: &mut [T],
        max: &mut [T],
        scale: &mut [T],
    ) -> Result<()> {
        let bq = self.bq;
        for i in 0..bq {
            if self.max[i] == T::NEG_INFINITY {
                return Err(Error::Denominator(format!(
                    "row {} of head {head} has no key to attend to: key_bias is -inf (or its scores overflow) for every key \
                     that it may see; {NO_KEY_REMEDY}",
                    row(i)
                )));
            }
            if !(self.sum[i] > 0.0 && self.sum[i].is_finite()) {
                return Err(Error::Denominator(format!(
                    "row {} of head {head} has scores that overflow; make q, k, scale or key_bias smaller",
                    row(i)
                )));
            }
            let inverse = 1.0 / self.sum[i];
            max[i] = self.max[i];
            scale[i] = T::of(inverse);
            for c in 0..self.dv {
                out[i * self.dv + c] = T::of(self.weighted[c * bq + i] * inverse);
            }
        }
        Ok(())
    }
}

/// Adds one head's gradients.
///
/// The `(query, key)` plane is cut into `p x p` squares. In round `t` square `((j + t) mod p, j)` is done for every `j`
/// at once: no two squares of a round share a query or a key, so each owns its rows of dq, dk and dv, every score is
/// computed once, and every sum has an order that does not depend on the number of threads. Sums over more than
/// [`MAX_SIDE`] tokens are kept in float64.
pub(crate) fn backward<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    up: Upstream<'_, T>,
    grads: HeadGrads<'_, T>,
) -> Result<()> {
    let (n, m, d, dv) = (head.q.nrows(), head.k.nrows(), head.q.ncols(), head.v.ncols());
    let p = (n.max(m) / MAX_SIDE).max(SQUARES);
    let [side_q, side_k] = [n, m].map(|tokens| tokens.div_ceil(p).next_multiple_of(TILE));
    let p = n.div_ceil(side_q).max(m.div_ceil(side_k));
    let biased = grads.dkey_bias.is_some();
    let zeros = |len: usize| zeroed::<f64>(len, "a head's gradients in float64");
    let (mut sum_q, mut sum_k) = (zeros(n * d)?, zeros(m * d)?);
    let (mut sum_v, mut sum_b) = (zeros(m * dv)?, zeros(if biased { m } else { 0 })?);
    let mut queries = pieces(&mut sum_q, side_q * d, p);
    let keys = pieces(&mut sum_k, side_k * d, p).into_iter().zip(pieces(&mut sum_v, side_k * dv, p));
    let mut keys: Vec<_> = keys.zip(pieces(&mut sum_b, side_k, p)).collect();
    for t in 0..p {
        keys.par_iter_mut().zip(&mut queries).enumerate().try_for_each_init(
            || Scratch::new(side_q.min(MAX_SIDE), d, dv),
            |scratch, (square, (((dk, dv), db), dq))| {
                let scratch = made(scratch)?;
                let (i0, j0) = ((square + t) % p * side_q, square * side_k);
                if attention.causal && i0 < j0 {
                    return Ok(());
                }
                let sums = Sums { dq, dk, dv, db };
                backward_square(ctx, head, attention, up, (i0, j0), sums, scratch)
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
    Ok(())
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

/// Gradients of a square's tokens, in float64. `db` is empty where it is not asked for.
struct Sums<'a> {
    dq: &'a mut [f64],
    dk: &'a mut [f64],
    dv: &'a mut [f64],
    db: &'a mut [f64],
}

/// One thread's tiles. Those of queries and keys are copies with some numbers behind each row: rows of 64 numbers, say,
/// would share a few places in the cache.
struct Scratch<T> {
    q: Vec<T>,
    dout: Vec<T>,
    k: Vec<T>,
    /// `(d, keys)`.
    k_columns: Vec<T>,
    /// `(dv, keys)`.
    v_columns: Vec<T>,
    bias: Vec<T>,
    f: Vec<T>,
    ds: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
}

/// Numbers behind a row: see [`Scratch`].
const PAD: usize = 16;

impl<T: Real> Scratch<T> {
    fn new(rows_q: usize, d: usize, dv: usize) -> Result<Self> {
        let tile = |width: usize| zeroed(TILE * width, "a tile of exact gradients");
        Ok(Self {
            q: tile(d + PAD)?,
            dout: tile(dv + PAD)?,
            k: tile(d + PAD)?,
            k_columns: tile(d)?,
            v_columns: tile(dv)?,
            bias: tile(1)?,
            f: tile(TILE)?,
            ds: tile(TILE)?,
            dq: zeroed(rows_q * d, "a square's gradients of queries")?,
            dk: tile(d)?,
            dv: tile(dv)?,
        })
    }
}

/// Adds what the queries from `i0` and the keys from `j0` on (as many as `sums` has rows) give each other. Tiles are
/// `(queries, keys)`.
fn backward_square<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    up: Upstream<'_, T>,
    (i0, j0): (usize, usize),
    sums: Sums<'_>,
    scratch: &mut Scratch<T>,
) -> Result<()> {
    let (d, dv) = (head.q.ncols(), head.v.ncols());
    let (rows_q, rows_k) = (sums.dq.len() / d, sums.dk.len() / d);
    let c = T::of(attention.scale);
    let Scratch { q, dout, k, k_columns, v_columns, bias, f, ds, dq, dk, dv: grad_v } = scratch;
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
                if attention.causal && first + bq <= first_key {
                    continue;
                }
                ctx.check()?;
                load_rows(head.q, first, bq, &[], d + PAD, q);
                load_rows(up.dout, first, bq, &[], dv + PAD, dout);
                let (q, dout) = (view(q, bq, d + PAD).subcols(0, d), view(dout, bq, dv + PAD).subcols(0, dv));
                product(view_mut(f, bq, bk), q, view(k_columns, d, bk), c);
                product(view_mut(ds, bq, bk), dout, view(v_columns, dv, bk), T::ONE);
                let biases = head.key_bias.map(|_| &bias[..bk]);
                let seen = attention.causal.then_some((first + 1).saturating_sub(first_key));
                score_gradients(&up, first, bk, biases, seen, &mut f[..bq * bk], &mut ds[..bq * bk]);
                let (f, ds) = (view(f, bq, bk), view(ds, bq, bk));
                add_product(view_mut(grad_v, bk, dv), f.transpose(), dout, T::ONE);
                add_product(view_mut(dk, bk, d), ds.transpose(), q, c);
                let k = view(k, bk, d + PAD).subcols(0, d);
                add_product(view_mut(&mut dq[(i - part_q) * d..], bq, d), ds, k, c);
                if !sums.db.is_empty() {
                    for ds in ds.row_iter() {
                        sums.db[j..j + bk].iter_mut().zip(ds.iter()).for_each(|(db, ds)| *db += ds.to_f64());
                    }
                }
            }
            widen(dk, &mut sums.dk[j * d..(j + bk) * d]);
            widen(grad_v, &mut sums.dv[j * dv..(j + bk) * dv]);
        }
        widen(dq, &mut sums.dq[part_q * d..end_q * d]);
    }
    Ok(())
}

/// Turns a tile of scores into `f`, and one of `dout_i.v_j` into `dS`, for the queries from `first` on. Where there is a
/// mask, the first of them sees `seen` of the keys, and each next one a key more.
fn score_gradients<T: Real>(
    up: &Upstream<'_, T>,
    first: usize,
    bk: usize,
    biases: Option<&[T]>,
    seen: Option<usize>,
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
                    *ds = f.times(*ds - delta);
                }
                let seen = seen.map_or(bk, |seen| (seen + i).min(bk));
                f[seen..].fill(T::ZERO);
                ds[seen..].fill(T::ZERO);
            }
        },
    );
}

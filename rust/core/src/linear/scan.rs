//! The polynomial engine under a causal mask: forward and reverse scans over blocks of tokens.
//!
//! The sequence is cut in blocks. A query of block `c` meets the *near* keys, those from `start_c` on (the engine's
//! window before the block, and the block itself) one by one: with `diagonal="exact"` by `exp`, with
//! `diagonal="polynomial"` (then there is no window) by the polynomial. In the first `prefix` blocks, which fitted
//! coefficients are taken from, all keys are near. Earlier keys it meets through their state `S_c` of the polynomial.
//! Numerators and denominators of both parts add up, each row scaled by `e^{-M_i}` and the state relative to its
//! *level* `l`, the largest bias of its keys, so that biases of any range fit. `M_i` is the largest of `l` and the near
//! scores (of the near biases, where the near scores go through the polynomial):
//!
//! ```text
//! [N_i, D_i] = e^{l - M_i} φ(q_i)^T diag(ω_p) S_c + sum_{near j} e^{-M_i} A_ij [v_j, 1]
//! ```
//!
//! The backward pass is that of `polynomial.rs` for the far part and of `exact.rs` for the near one, with the same
//! `D_i`. With the keys `K_c` from `start_{c-1}` to `start_c`, `S_c` is `S_{c-1}` and the keys `K_c`; and these are met
//! through the state by the queries of blocks `c` and later, so that their state `R_c` is `R_{c+1}` and the queries of
//! block `c`.
//!
//! Blocks are taken in segments, one after the other. In a segment each block's own part of the state is summed first,
//! then a scan makes of the parts, in place, the weighted states that the blocks meet, then the blocks go on by
//! themselves: the first and the last step in parallel over blocks, the second over the rows of the state. Every sum
//! has an order that depends on the sizes alone.

use std::ops::Range;

use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::features::{Purpose, Side, TokenRows, Weightings};
use super::floor::floors;
use super::near::{BLOCK, NEAR_TILE, Near, NearKeys, Row};
use super::pass::Pass;
use super::state::{LARGEST_STATE, STATE, Weighting, decay};
use crate::error::Result;
use crate::memory::{made, room, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{store_transposed, tiles, view};
use crate::problem::grads::{HeadGrads, Upstream};

/// Numbers in the states of a segment that stay in a shared cache.
const SEGMENT_NUMBERS: usize = 1 << 20;
/// Blocks of a segment at the least, for as many threads, and at the most.
const SEGMENT_BLOCKS: [usize; 2] = [32, 256];
/// Numbers in the states of a segment at the most, as long as that leaves eight blocks, and in their halos.
const SEGMENT_LIMIT: usize = 1 << 25;

/// The cutting of the sequence.
struct Cut {
    n: usize,
    blocks: usize,
    /// Which keys the blocks meet one by one.
    near: NearKeys,
    /// The largest bias of the keys far from each block, `-inf` where there are none.
    levels: Vec<f64>,
}

impl Cut {
    fn new<T: Real>(pass: &Pass<'_, T>) -> Result<Self> {
        let n = pass.tokens.head.n();
        let blocks = n.div_ceil(BLOCK);
        let mut cut = Self { n, blocks, near: pass.near.keys, levels: room(blocks, "levels of blocks")? };
        let mut level = f64::NEG_INFINITY;
        for c in 0..cut.blocks {
            level = level.max(pass.tokens.level(cut.keys(c)));
            cut.levels.push(level);
        }
        Ok(cut)
    }

    /// The tokens of block `c`.
    fn queries(&self, c: usize) -> Range<usize> {
        c * BLOCK..((c + 1) * BLOCK).min(self.n)
    }

    /// The first token near block `c`.
    fn start(&self, c: usize) -> usize {
        self.near.start(c)
    }

    /// The keys `K_c`.
    fn keys(&self, c: usize) -> Range<usize> {
        self.start(c.saturating_sub(1))..self.start(c)
    }

    /// Segments of blocks, for a state of so many numbers, and so many gradients of a key.
    fn segments(&self, state: usize, key: usize) -> Vec<Range<usize>> {
        let [least, most] = SEGMENT_BLOCKS;
        let halo = key * self.near.window.max(self.near.prefix_blocks() * BLOCK).min(self.n);
        let blocks = (SEGMENT_NUMBERS / state)
            .clamp(least, most)
            .min((SEGMENT_LIMIT / state).max(8))
            .min(LARGEST_STATE / state)
            .min(SEGMENT_LIMIT / halo.max(1))
            .max(1);
        (0..self.blocks).step_by(blocks).map(|first| first..(first + blocks).min(self.blocks)).collect()
    }
}

/// The states of a segment's blocks, and what they are a scan of.
struct Scan<'a, T> {
    e: usize,
    /// Features in the sum.
    r: usize,
    /// The running sum, `(e, r)`.
    sum: Vec<f64>,
    /// What the sum is multiplied by for the blocks.
    weighting: Weighting<'a>,
    /// The same for the first features, where a second weighting of them is asked for.
    second_weights: Option<Vec<f64>>,
    /// A state a block of the segment, in the order of the scan.
    states: Vec<T>,
    /// The same with the second weights.
    second: Vec<T>,
}

impl<'a, T: Real> Scan<'a, T> {
    /// At its start, and the segments of its blocks.
    fn new(
        pass: &Pass<'a, T>,
        cut: &Cut,
        purpose: Purpose,
        weighting: Weighting<'a>,
        second_weights: Option<Vec<f64>>,
    ) -> Result<(Self, Vec<Range<usize>>)> {
        let (e, r) = (pass.tokens.e(), pass.features.rank(purpose));
        let segments = cut.segments(e * r, pass.tokens.head.d() + e);
        let blocks = segments[0].len();
        let second = second_weights.as_ref().map_or(0, Vec::len);
        let scan = Self {
            e,
            r,
            sum: zeroed(e * r, STATE)?,
            states: zeroed(blocks * e * r, "the states of a segment's blocks")?,
            second: zeroed(blocks * e * second, "the states of a segment's blocks")?,
            weighting,
            second_weights,
        };
        Ok((scan, segments))
    }

    /// Numbers in a state.
    fn len(&self) -> usize {
        self.sum.len()
    }

    /// Columns of the state with the second weights.
    fn second_columns(&self) -> usize {
        self.second_weights.as_ref().map_or(0, Vec::len)
    }

    /// Moves on by a segment: `part(i, state)` writes what is the own of the i-th block, and `decays[i]` is what the sum
    /// is multiplied by before. Afterwards [`state`](Self::state) is the weighted sum with the i-th block.
    fn advance<B: Send>(
        &mut self,
        decays: &[f64],
        buffers: impl Fn() -> Result<B> + Sync + Send,
        part: impl Fn(usize, &mut [T], &mut B) -> Result<()> + Sync,
    ) -> Result<()> {
        let (len, r, second_r) = (self.len(), self.r, self.second_columns());
        let count = decays.len();
        self.states[..count * len]
            .par_chunks_mut(len)
            .enumerate()
            .try_for_each_init(buffers, |buffers, (i, state)| part(i, state, made(buffers)?))?;
        let mut rows: Vec<_> = self.sum.chunks_mut(r).map(|sum| (sum, Vec::new(), Vec::new())).collect();
        for state in self.states[..count * len].chunks_mut(len) {
            rows.iter_mut().zip(state.chunks_mut(r)).for_each(|(row, part)| row.1.push(part));
        }
        for state in self.second.chunks_mut((self.e * second_r).max(1)).take(count) {
            rows.iter_mut().zip(state.chunks_mut(second_r)).for_each(|(row, part)| row.2.push(part));
        }
        let (weighting, weights) = (&self.weighting, self.second_weights.as_deref());
        rows.into_par_iter()
            .try_for_each(|(sum, mut parts, mut second)| weighting.scan(sum, decays, &mut parts, weights, &mut second))
    }

    /// The weighted state of the i-th block.
    fn state(&self, i: usize) -> MatRef<'_, T> {
        view(&self.states[i * self.len()..], self.e, self.r)
    }

    /// The same with the second weights, or the same.
    fn second_state(&self, i: usize) -> MatRef<'_, T> {
        match self.second_columns() {
            0 => self.state(i),
            r => view(&self.second[i * self.e * r..], self.e, r),
        }
    }
}

/// Writes the sum of what `add` adds for every tile of a range to a state that it may replace.
fn sum_tiles<T: Real>(
    state: &mut [T],
    tokens: Range<usize>,
    tile: usize,
    mut add: impl FnMut((&mut [T], Accum), (usize, usize)) -> Result<()>,
) -> Result<()> {
    if tokens.is_empty() {
        state.fill(T::ZERO);
    }
    let first = tokens.start;
    tiles(tokens, tile).try_for_each(|(start, len)| {
        let accum = if start == first { Accum::Replace } else { Accum::Add };
        add((&mut *state, accum), (start, len))
    })
}

/// Moves a scan over keys on by a segment.
fn advance_keys<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    scan: &mut Scan<'_, T>,
    segment: &Range<usize>,
    purpose: Purpose,
) -> Result<()> {
    if cut.start(segment.end - 1) == 0 {
        return Ok(()); // nothing is far yet
    }
    let decays: Vec<f64> =
        segment.clone().map(|c| if c == 0 { 1.0 } else { decay(cut.levels[c - 1], cut.levels[c]) }).collect();
    scan.advance(
        &decays,
        || pass.token_rows(purpose),
        |i, state, rows: &mut TokenRows<T>| {
            let c = segment.start + i;
            sum_tiles(state, cut.keys(c), pass.tile_len(purpose), |state, tile| {
                pass.add_keys(purpose, state, tile, cut.levels[c], rows)
            })
        },
    )
}

/// Writes `out` and the row factors of one head.
pub(crate) fn forward<T: Real>(
    pass: &Pass<'_, T>,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<()> {
    let (purpose, d_v) = (Purpose::Weights, pass.tokens.head.d_v());
    let cut = Cut::new(pass)?;
    let floors = floors(pass, cut.blocks, |c| cut.keys(c))?;
    let (mut scan, segments) = Scan::new(pass, &cut, purpose, pass.features.weighting()?, None)?;
    for segment in segments {
        advance_keys(pass, &cut, &mut scan, &segment, purpose)?;
        let tokens = segment.start * BLOCK..cut.queries(segment.end - 1).end;
        (
            out[tokens.start * d_v..tokens.end * d_v].par_chunks_mut(BLOCK * d_v),
            row_max[tokens.clone()].par_chunks_mut(BLOCK),
            row_scale[tokens].par_chunks_mut(BLOCK),
        )
            .into_par_iter()
            .enumerate()
            .try_for_each_init(
                || Ok((pass.tile(purpose, false)?, Near::new(pass, cut.near.most(cut.n))?, Vec::new())),
                |buffers, (i, (out, max, scale))| {
                    let (tile, near, far) = made(buffers)?;
                    pass.ctx.check()?;
                    let c = segment.start + i;
                    let (level, first) = (cut.levels[c], cut.queries(c).start);
                    for (start, len) in tiles(cut.queries(c), pass.tile_len(purpose)) {
                        if level > f64::NEG_INFINITY {
                            pass.tokens.load_queries(start, len, &mut tile.x);
                            pass.features.apply(Side::Queries, purpose, scan.state(i), tile, len);
                            let floor = floors.as_ref().map(|floors| &floors[c]);
                            pass.far_levels(level, floor, start, &tile.out[d_v * len..(d_v + 1) * len], far)?;
                        }
                        for (query, count) in tiles(start..start + len, NEAR_TILE) {
                            let (queries, keys) = (query..query + count, cut.start(c)..query + count);
                            let rows = query - first..query - first + count;
                            let (max, scale) = (&mut max[rows.clone()], &mut scale[rows.clone()]);
                            near.load_queries(pass, queries.clone());
                            let far = (level > f64::NEG_INFINITY).then(|| &far[query - start..][..count]);
                            near.weigh(pass, queries, keys.clone(), Row::Find { max, far });
                            near.sum(pass, keys, count);
                            if let Some(far) = far {
                                near.add_far(view(&tile.out, d_v + 1, len).subcols(query - start, count), |t| {
                                    T::of(far[t].level - max[t].to_f64()).exp_nonpositive() * T::of(far[t].scale)
                                });
                            }
                            for (t, scale) in scale.iter_mut().enumerate() {
                                *scale = pass.inverse(near.out[d_v * count + t], query + t)?;
                            }
                            store_transposed(&near.out, count, d_v, &mut out[rows.start * d_v..rows.end * d_v], |t| {
                                scale[t]
                            });
                        }
                    }
                    Ok(())
                },
            )?;
    }
    Ok(())
}

/// Adds one head's gradients.
pub(crate) fn backward<T: Real>(pass: &Pass<'_, T>, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
    let HeadGrads { dq, dk, dv, mut dkey_bias } = grads;
    let cut = Cut::new(pass)?;
    pull_back_queries(pass, &cut, &up, dq, dk, dv, dkey_bias.as_deref_mut())?;
    pull_back_far_keys(pass, &cut, &up, dk, dv, dkey_bias)
}

/// Queries, forward: dq whole, and what the near queries give dk, dv and db.
fn pull_back_queries<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    up: &Upstream<'_, T>,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
    mut db: Option<&mut [T]>,
) -> Result<()> {
    let (purpose, d, d_v) = (Purpose::Gradient, pass.tokens.head.d(), pass.tokens.head.d_v());
    let (mut scan, segments) =
        Scan::new(pass, cut, purpose, pass.features.backward_weightings(Side::Keys)?.gradient, None)?;
    for segment in segments {
        advance_keys(pass, cut, &mut scan, &segment, purpose)?;
        let tokens = segment.start * BLOCK..cut.queries(segment.end - 1).end;
        let mut own_db: Vec<_> = match &mut db {
            Some(db) => db[tokens.clone()].chunks_mut(BLOCK).map(Some).collect(),
            None => segment.clone().map(|_| None).collect(),
        };
        let halos = (
            dq[tokens.start * d..tokens.end * d].par_chunks_mut(BLOCK * d),
            dk[tokens.start * d..tokens.end * d].par_chunks_mut(BLOCK * d),
            dv[tokens.start * d_v..tokens.end * d_v].par_chunks_mut(BLOCK * d_v),
            own_db.par_iter_mut(),
        )
            .into_par_iter()
            .enumerate()
            .map_init(
                || Ok((pass.tile(purpose, true)?, Near::new(pass, cut.near.most(cut.n))?)),
                |buffers, (i, (dq, dk, dv, db))| {
                    let (tile, near) = made(buffers)?;
                    pass.ctx.check()?;
                    let c = segment.start + i;
                    let (level, queries) = (cut.levels[c], cut.queries(c));
                    if level > f64::NEG_INFINITY {
                        let factor = pass.far_factor(up, level);
                        for (start, count) in tiles(queries.clone(), pass.tile_len(purpose)) {
                            pass.tokens.load_queries(start, count, &mut tile.x);
                            pass.tokens.load_upstream(up, start, count, &mut tile.values);
                            pass.features.pull_back(Side::Queries, purpose, scan.state(i), tile, count);
                            let dq = &mut dq[(start - queries.start) * d..][..count * d];
                            store_transposed(&tile.dx, count, d, dq, |t| factor(start + t));
                        }
                    } else {
                        dq.fill(T::ZERO);
                    }
                    // What falls to keys before the block's own is handed back, and added afterwards.
                    let mut halo = Halo::new(cut.start(c)..queries.start, d, d_v)?;
                    for (query, count) in tiles(queries.clone(), NEAR_TILE) {
                        let (some, keys) = (query..query + count, cut.start(c)..query + count);
                        let rows = (query - queries.start) * d..(query - queries.start + count) * d;
                        near.load_queries(pass, some.clone());
                        near.weigh(pass, some.clone(), keys.clone(), Row::Known(up));
                        near.score_gradients(pass, up, some.clone(), keys.clone());
                        near.add_query_gradients(pass, &keys, &mut dq[rows]);
                        let before = halo.grads(db.is_some());
                        near.add_key_gradients(pass, up, &some, &keys, keys.start..queries.start, before);
                        let own = HeadGrads { dq: &mut [], dk: &mut *dk, dv: &mut *dv, dkey_bias: db.as_deref_mut() };
                        near.add_key_gradients(pass, up, &some, &keys, queries.start..keys.end, own);
                    }
                    Ok(halo)
                },
            )
            .collect::<Result<Vec<_>>>()?;
        drop(own_db);
        for halo in halos {
            halo.add_to(d, d_v, dk, dv, db.as_deref_mut());
        }
    }
    Ok(())
}

/// Keys, in reverse: what the far queries give dk, dv and db.
fn pull_back_far_keys<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    up: &Upstream<'_, T>,
    mut dk: &mut [T],
    mut dv: &mut [T],
    mut db: Option<&mut [T]>,
) -> Result<()> {
    let (purpose, d, d_v) = (Purpose::Gradient, pass.tokens.head.d(), pass.tokens.head.d_v());
    let Weightings { gradient, weights } = pass.features.backward_weightings(Side::Queries)?;
    let (mut scan, segments) = Scan::new(pass, cut, purpose, gradient, weights)?;
    for segment in segments.into_iter().rev() {
        if cut.start(segment.end - 1) == 0 {
            break; // no key of these blocks, nor of those before, is far from anyone
        }
        let blocks: Vec<usize> = segment.rev().collect();
        let decays: Vec<f64> = (blocks.iter())
            .map(|&c| if c + 1 == cut.blocks { 1.0 } else { decay(cut.levels[c], cut.levels[c + 1]) })
            .collect();
        scan.advance(
            &decays,
            || pass.token_rows(purpose),
            |i, state, rows: &mut TokenRows<T>| {
                let (c, factor) = (blocks[i], pass.far_factor(up, cut.levels[blocks[i]]));
                let queries = if cut.start(c) == 0 { 0..0 } else { cut.queries(c) };
                sum_tiles(state, queries, pass.tile_len(purpose), |state, tile| {
                    pass.add_queries(state, up, tile, &factor, rows)
                })
            },
        )?;
        let mut tasks = Vec::with_capacity(blocks.len());
        for (i, &c) in blocks.iter().enumerate() {
            let keys = cut.keys(c);
            let grads = HeadGrads {
                dq: &mut [],
                dk: take_from(&mut dk, keys.start * d, keys.len() * d),
                dv: take_from(&mut dv, keys.start * d_v, keys.len() * d_v),
                dkey_bias: db.as_mut().map(|db| take_from(db, keys.start, keys.len())),
            };
            tasks.push((i, keys, grads));
        }
        tasks.into_par_iter().try_for_each_init(
            || pass.tile(purpose, true),
            |tile, (i, keys, mut grads)| {
                let tile = made(tile)?;
                for (start, count) in tiles(keys.clone(), pass.tile_len(purpose)) {
                    let local = start - keys.start..start - keys.start + count;
                    let grads = HeadGrads {
                        dq: &mut [],
                        dk: &mut grads.dk[local.start * d..local.end * d],
                        dv: &mut grads.dv[local.start * d_v..local.end * d_v],
                        dkey_bias: grads.dkey_bias.as_deref_mut().map(|db| &mut db[local]),
                    };
                    pass.key_gradients(start, cut.levels[blocks[i]], scan.state(i), scan.second_state(i), tile, grads)?;
                }
                Ok(())
            },
        )?;
    }
    Ok(())
}

/// Takes `len` entries from `start` on out of a slice, and leaves what comes before them.
fn take_from<'a, T>(slice: &mut &'a mut [T], start: usize, len: usize) -> &'a mut [T] {
    let (before, rest) = std::mem::take(slice).split_at_mut(start);
    *slice = before;
    &mut rest[..len]
}

/// Gradients of the near keys before a block's own.
struct Halo<T> {
    start: usize,
    dk: Vec<T>,
    dv: Vec<T>,
    db: Vec<T>,
}

impl<T: Real> Halo<T> {
    fn new(keys: Range<usize>, d: usize, dv: usize) -> Result<Self> {
        let zeros = |width: usize| zeroed(keys.len() * width, "gradients of near keys");
        Ok(Self { start: keys.start, dk: zeros(d)?, dv: zeros(dv)?, db: zeros(1)? })
    }

    fn grads(&mut self, with_bias: bool) -> HeadGrads<'_, T> {
        HeadGrads { dq: &mut [], dk: &mut self.dk, dv: &mut self.dv, dkey_bias: with_bias.then_some(&mut self.db[..]) }
    }

    fn add_to(self, d: usize, dv: usize, dk: &mut [T], grad_v: &mut [T], db: Option<&mut [T]>) {
        let into = |total: &mut [T], own: &[T], width: usize| {
            total[self.start * width..].iter_mut().zip(own).for_each(|(t, &o)| *t += o);
        };
        into(dk, &self.dk, d);
        into(grad_v, &self.dv, dv);
        if let Some(db) = db {
            into(db, &self.db, 1);
        }
    }
}

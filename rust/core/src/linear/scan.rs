//! A head's pass under a causal mask: forward and reverse scans over blocks of tokens.
//!
//! The sequence is cut into blocks. The keys from `start_c` on are *near* block `c`: those of the block and, where weights
//! of near keys are exact, those of the engine's window before it. Queries meet near keys one by one, and all earlier keys,
//! the *far* ones, through the state `S_c` of these. In the first blocks, which constants of the engine may be taken from,
//! all keys are near.
//!
//! Numerators and denominators of both parts add up. Each row is scaled by `e^{-M_i}`, and a state is relative to its
//! *level* `l`, the largest bias of its keys, so that biases of any range fit. `M_i` is the largest of `l` and the near
//! scores, or the near biases where a polynomial makes weights of the near scores too:
//!
//! ```text
//! [N_i, D_i] = e^{l - M_i} S_c W^T φ(q_i) + sum_{near j} e^{-M_i} A_ij [v_j, 1]
//! ```
//!
//! The backward pass is that of [`pass`](super::pass) for far keys and that of the [exact engine](crate::engines::exact)
//! for near ones, with the same `D_i`. Let `K_c` be the keys from `start_{c-1}` to `start_c`. `S_c` is `S_{c-1}` and the
//! keys `K_c`. The queries of the blocks from `c` on meet `K_c` through a state, so the state `R_c` of these queries is
//! `R_{c+1}` and the queries of block `c`.
//!
//! Blocks are taken in segments, one after the other. In a segment each block's own part of the state is summed first,
//! in parallel over blocks. A scan then turns the parts, in place, into the weighted states that the blocks meet, in
//! parallel over the rows of the state. Then the blocks go on independently of each other. Every sum has an order that
//! depends on the sizes alone.

use std::ops::Range;

use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::features::{Purpose, Side, Tile, TokenRows, Weightings};
use super::floor::{Floor, floors};
use super::levels::FarLevel;
use super::near::{NEAR_TILE, Near, Row};
use super::nearby::{BLOCK, NearKeys};
use super::pass::Pass;
use super::state::{LARGEST_STATE, STATE, Weighting, decay};
use crate::error::Result;
use crate::memory::{made, room, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::{store_transposed, tiles, view};
use crate::problem::grads::{HeadGrads, Upstream};

/// Numbers in the states of a segment that stay in a shared cache.
const SEGMENT_NUMBERS: usize = 1 << 20;
/// Blocks of a segment: at the least as many as threads can share, and at the most.
const SEGMENT_BLOCKS: [usize; 2] = [32, 256];
/// Numbers in the states of a segment at the most, as long as that leaves eight blocks; and in the halos of its blocks.
const SEGMENT_LIMIT: usize = 1 << 25;

/// How the sequence is cut into blocks.
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

    /// Segments of blocks, for states of `numbers` numbers and keys whose gradients have `key_numbers`.
    fn segments(&self, numbers: usize, key_numbers: usize) -> Vec<Range<usize>> {
        let [least, most] = SEGMENT_BLOCKS;
        let halo = key_numbers * self.near.window.max(self.near.prefix_blocks() * BLOCK).min(self.n);
        let blocks = (SEGMENT_NUMBERS / numbers)
            .clamp(least, most)
            .min((SEGMENT_LIMIT / numbers).max(8))
            .min(LARGEST_STATE / numbers)
            .min(SEGMENT_LIMIT / halo.max(1))
            .max(1);
        (0..self.blocks).step_by(blocks).map(|first| first..(first + blocks).min(self.blocks)).collect()
    }
}

/// A running sum over tokens, and the weighted states that it gives the blocks of a segment.
struct Scan<'a, T> {
    e: usize,
    /// Features in the sum.
    r: usize,
    /// The running sum, `(e, r)`.
    sum: Vec<f64>,
    /// What the sum is multiplied by for the blocks.
    weighting: Weighting<'a>,
    /// A second weighting, of the first features alone: that of the values where gradients have another.
    second_weights: Option<Vec<f64>>,
    /// The state of each block of the segment, in the order of the scan, `(blocks, e, r)`.
    states: Vec<T>,
    /// The same with the second weights, `(blocks, e, second_columns)`.
    second_states: Vec<T>,
}

impl<'a, T: Real> Scan<'a, T> {
    /// A scan at its start, and the segments that it goes through.
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
        let second_columns = second_weights.as_ref().map_or(0, Vec::len);
        let scan = Self {
            e,
            r,
            sum: zeroed(e * r, STATE)?,
            states: zeroed(blocks * e * r, "the states of a segment's blocks")?,
            second_states: zeroed(blocks * e * second_columns, "the states of a segment's blocks")?,
            weighting,
            second_weights,
        };
        Ok((scan, segments))
    }

    /// Numbers in a state: `e r`.
    fn len(&self) -> usize {
        self.sum.len()
    }

    /// Columns of the state with the second weights.
    fn second_columns(&self) -> usize {
        self.second_weights.as_ref().map_or(0, Vec::len)
    }

    /// Moves on by a segment: for each of its blocks, `sum = decays[i] sum + part_i`, where `part(i, state)` writes `part_i`
    /// to `state`. Afterwards [`state`](Self::state) is the weighted sum up to and with the i-th block.
    fn advance<B: Send>(
        &mut self,
        decays: &[f64],
        buffers: impl Fn() -> Result<B> + Sync + Send,
        part: impl Fn(usize, &mut [T], &mut B) -> Result<()> + Sync,
    ) -> Result<()> {
        let (len, r, second_columns) = (self.len(), self.r, self.second_columns());
        let count = decays.len();
        self.states[..count * len]
            .par_chunks_mut(len)
            .enumerate()
            .try_for_each_init(buffers, |buffers, (i, state)| part(i, state, made(buffers)?))?;
        // A row of the sum, with the same row of every block's state and of its second one.
        let mut rows: Vec<_> = self.sum.chunks_mut(r).map(|sum| (sum, Vec::new(), Vec::new())).collect();
        for state in self.states[..count * len].chunks_mut(len) {
            rows.iter_mut().zip(state.chunks_mut(r)).for_each(|(row, part)| row.1.push(part));
        }
        for state in self.second_states.chunks_mut((self.e * second_columns).max(1)).take(count) {
            rows.iter_mut().zip(state.chunks_mut(second_columns)).for_each(|(row, part)| row.2.push(part));
        }
        let (weighting, weights) = (&self.weighting, self.second_weights.as_deref());
        rows.into_par_iter()
            .try_for_each(|(sum, mut parts, mut second)| weighting.scan(sum, decays, &mut parts, weights, &mut second))
    }

    /// The weighted state of the i-th block.
    fn state(&self, i: usize) -> MatRef<'_, T> {
        view(&self.states[i * self.len()..], self.e, self.r)
    }

    /// The same with the second weights; [`state`](Self::state) where there are none.
    fn second_state(&self, i: usize) -> MatRef<'_, T> {
        match self.second_columns() {
            0 => self.state(i),
            r => view(&self.second_states[i * self.e * r..], self.e, r),
        }
    }
}

/// Sums tiles of a range of tokens: `add` adds one, `(start, len)`, to `state`, or replaces what `state` held by it.
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
///
/// Time `O(n r (d_v + 1))`, what `r` features of `n` tokens cost, and that of exact attention for the near pairs.
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
                || ForwardBuffers::new(pass, &cut),
                |buffers, (i, (out, max, scale))| {
                    let c = segment.start + i;
                    let floor = floors.as_ref().map(|floors| &floors[c]);
                    forward_block(pass, &cut, c, (scan.state(i), floor), made(buffers)?, BlockRows { out, max, scale })
                },
            )?;
    }
    Ok(())
}

/// One thread's buffers for blocks of a forward pass.
struct ForwardBuffers<T> {
    tile: Tile<T>,
    near: Near<T>,
    far: Vec<FarLevel>,
}

impl<T: Real> ForwardBuffers<T> {
    fn new(pass: &Pass<'_, T>, cut: &Cut) -> Result<Self> {
        let near = Near::new(pass, cut.near.longest(cut.n))?;
        Ok(Self { tile: pass.tile(Purpose::Weights, false)?, near, far: Vec::new() })
    }
}

/// A block's rows of the results of a forward pass.
struct BlockRows<'a, T> {
    /// `(rows, d_v)`.
    out: &'a mut [T],
    max: &'a mut [T],
    scale: &'a mut [T],
}

/// The forward pass of block `c`, from the weighted state of its far keys and their floor.
fn forward_block<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    c: usize,
    (state, floor): (MatRef<'_, T>, Option<&Floor>),
    buffers: &mut ForwardBuffers<T>,
    rows: BlockRows<'_, T>,
) -> Result<()> {
    pass.ctx.check()?;
    let (purpose, d_v) = (Purpose::Weights, pass.tokens.head.d_v());
    let ForwardBuffers { tile, near, far } = buffers;
    let (level, first) = (cut.levels[c], cut.queries(c).start);
    let has_far = level > f64::NEG_INFINITY;
    for (start, len) in tiles(cut.queries(c), pass.tile_len(purpose)) {
        if has_far {
            pass.tokens.load_queries(start, len, &mut tile.x);
            pass.features.apply(Side::Queries, purpose, state, tile, len);
            pass.far_levels(level, floor, start, &tile.out[d_v * len..(d_v + 1) * len], far)?;
        }
        for (query, count) in tiles(start..start + len, NEAR_TILE) {
            let (queries, keys) = (query..query + count, cut.start(c)..query + count);
            let local = query - first..query - first + count;
            let (max, scale) = (&mut rows.max[local.clone()], &mut rows.scale[local.clone()]);
            near.load_queries(pass, queries.clone());
            let far = has_far.then(|| &far[query - start..][..count]);
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
            let out = &mut rows.out[local.start * d_v..local.end * d_v];
            store_transposed(&near.out, count, d_v, out, |t| scale[t]);
        }
    }
    Ok(())
}

/// Adds one head's gradients.
pub(crate) fn backward<T: Real>(pass: &Pass<'_, T>, up: Upstream<'_, T>, mut grads: HeadGrads<'_, T>) -> Result<()> {
    let cut = Cut::new(pass)?;
    add_query_gradients(pass, &cut, &up, &mut grads)?;
    let HeadGrads { dk, dv, dkey_bias, .. } = grads;
    add_far_key_gradients(pass, &cut, &up, dk, dv, dkey_bias)
}

/// Goes through the queries in order: writes dq, and adds what near queries give dk, dv and db.
fn add_query_gradients<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    up: &Upstream<'_, T>,
    grads: &mut HeadGrads<'_, T>,
) -> Result<()> {
    let (purpose, d, d_v) = (Purpose::Gradient, pass.tokens.head.d(), pass.tokens.head.d_v());
    let weighting = pass.features.backward_weightings(Side::Keys)?.gradient;
    let (mut scan, segments) = Scan::new(pass, cut, purpose, weighting, None)?;
    for segment in segments {
        advance_keys(pass, cut, &mut scan, &segment, purpose)?;
        let tokens = segment.start * BLOCK..cut.queries(segment.end - 1).end;
        let mut db_of_blocks: Vec<_> = match &mut grads.dkey_bias {
            Some(db) => db[tokens.clone()].chunks_mut(BLOCK).map(Some).collect(),
            None => segment.clone().map(|_| None).collect(),
        };
        let halos = (
            grads.dq[tokens.start * d..tokens.end * d].par_chunks_mut(BLOCK * d),
            grads.dk[tokens.start * d..tokens.end * d].par_chunks_mut(BLOCK * d),
            grads.dv[tokens.start * d_v..tokens.end * d_v].par_chunks_mut(BLOCK * d_v),
            db_of_blocks.par_iter_mut(),
        )
            .into_par_iter()
            .enumerate()
            .map_init(
                || Ok((pass.tile(purpose, true)?, Near::new(pass, cut.near.longest(cut.n))?)),
                |buffers, (i, (dq, dk, dv, db))| {
                    let grads = HeadGrads { dq, dk, dv, dkey_bias: db.as_deref_mut() };
                    backward_block(pass, cut, segment.start + i, scan.state(i), up, made(buffers)?, grads)
                },
            )
            .collect::<Result<Vec<_>>>()?;
        drop(db_of_blocks);
        for halo in halos {
            halo.add_to([d, d_v], grads);
        }
    }
    Ok(())
}

/// The gradients that the queries of block `c` get, and those that they give to near keys: to the block's own in `grads`,
/// whose rows are those of the block, and to earlier ones in the halo, which is returned.
fn backward_block<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    c: usize,
    state: MatRef<'_, T>,
    up: &Upstream<'_, T>,
    (tile, near): &mut (Tile<T>, Near<T>),
    grads: HeadGrads<'_, T>,
) -> Result<Halo<T>> {
    pass.ctx.check()?;
    let HeadGrads { dq, dk, dv, dkey_bias: mut db } = grads;
    let (purpose, d, d_v) = (Purpose::Gradient, pass.tokens.head.d(), pass.tokens.head.d_v());
    let (level, queries) = (cut.levels[c], cut.queries(c));
    if level > f64::NEG_INFINITY {
        let factor = pass.far_factor(up, level);
        for (start, count) in tiles(queries.clone(), pass.tile_len(purpose)) {
            pass.tokens.load_queries(start, count, &mut tile.x);
            pass.tokens.load_upstream(up, start, count, &mut tile.values);
            pass.features.pull_back(Side::Queries, purpose, state, tile, count);
            let dq = &mut dq[(start - queries.start) * d..][..count * d];
            store_transposed(&tile.dx, count, d, dq, |t| factor(start + t));
        }
    } else {
        dq.fill(T::ZERO);
    }
    // Other blocks add to earlier keys at the same time.
    let mut halo = Halo::new(cut.start(c)..queries.start, [d, d_v])?;
    for (query, count) in tiles(queries.clone(), NEAR_TILE) {
        let (near_queries, keys) = (query..query + count, cut.start(c)..query + count);
        let rows = (query - queries.start) * d..(query - queries.start + count) * d;
        near.load_queries(pass, near_queries.clone());
        near.weigh(pass, near_queries.clone(), keys.clone(), Row::Known(up));
        near.score_gradients(pass, up, near_queries.clone(), keys.clone());
        near.add_query_gradients(pass, &keys, &mut dq[rows]);
        let earlier = halo.grads(db.is_some());
        near.add_key_gradients(pass, up, &near_queries, &keys, keys.start..queries.start, earlier);
        let of_block = HeadGrads { dq: &mut [], dk: &mut *dk, dv: &mut *dv, dkey_bias: db.as_deref_mut() };
        near.add_key_gradients(pass, up, &near_queries, &keys, queries.start..keys.end, of_block);
    }
    Ok(halo)
}

/// Goes through the keys in reverse: adds what far queries give dk, dv and db.
fn add_far_key_gradients<T: Real>(
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
                    pass.add_key_gradients(
                        start,
                        cut.levels[blocks[i]],
                        scan.state(i),
                        scan.second_state(i),
                        tile,
                        grads,
                    )?;
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

/// Gradients of the near keys that come before a block.
struct Halo<T> {
    start: usize,
    dk: Vec<T>,
    dv: Vec<T>,
    db: Vec<T>,
}

impl<T: Real> Halo<T> {
    fn new(keys: Range<usize>, [d, d_v]: [usize; 2]) -> Result<Self> {
        let zeros = |width: usize| zeroed(keys.len() * width, "gradients of near keys");
        Ok(Self { start: keys.start, dk: zeros(d)?, dv: zeros(d_v)?, db: zeros(1)? })
    }

    fn grads(&mut self, with_bias: bool) -> HeadGrads<'_, T> {
        HeadGrads { dq: &mut [], dk: &mut self.dk, dv: &mut self.dv, dkey_bias: with_bias.then_some(&mut self.db[..]) }
    }

    /// Adds them to those of all keys of the head.
    fn add_to(self, [d, d_v]: [usize; 2], grads: &mut HeadGrads<'_, T>) {
        let add = |total: &mut [T], part: &[T], width: usize| {
            total[self.start * width..].iter_mut().zip(part).for_each(|(total, &part)| *total += part);
        };
        add(grads.dk, &self.dk, d);
        add(grads.dv, &self.dv, d_v);
        if let Some(db) = &mut grads.dkey_bias {
            add(db, &self.db, 1);
        }
    }
}

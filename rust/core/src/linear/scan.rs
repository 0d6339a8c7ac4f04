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

use crate::attention::{HeadGrads, Upstream};
use crate::engines::exact::{add_bias, mask};
use crate::error::Result;
use crate::linear::pass::{Far, LARGEST_STATE, PREFIX, Pass, Settings, Side, Weightings, tiles};
use crate::linear::state::{STATE, Tokens, Weighting};
use crate::memory::{made, room, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{add_product, exponentials, load_transposed, product, store_transposed, view, view_mut};
use crate::spec::Diagonal;

/// Numbers in the states of a segment that stay in a shared cache.
const SEGMENT_NUMBERS: usize = 1 << 20;
/// Blocks of a segment at the least, for as many threads, and at the most.
const SEGMENT_BLOCKS: [usize; 2] = [32, 256];
/// Numbers in the states of a segment at the most, as long as that leaves eight blocks, and in their halos.
const SEGMENT_LIMIT: usize = 1 << 25;

/// Tokens a block.
const BLOCK: usize = 112;
/// Queries that meet their near keys at a time: few, so that little is computed behind the mask, and so that their
/// scores stay in the first-level cache.
const NEAR_TILE: usize = 32;

/// The first token near query `i`.
pub(crate) fn near_start(settings: &Settings, i: usize) -> usize {
    start_of_block(i / BLOCK, window(settings), prefix(settings))
}

fn start_of_block(c: usize, window: usize, prefix: usize) -> usize {
    if c < prefix { 0 } else { (c * BLOCK).saturating_sub(window) }
}

/// Tokens before a block that it meets one by one.
fn window(settings: &Settings) -> usize {
    if settings.diagonal == Diagonal::Exact { settings.window } else { 0 }
}

/// Blocks at the start that constants were taken from.
fn prefix(settings: &Settings) -> usize {
    if settings.from_prefix { PREFIX.div_ceil(BLOCK) } else { 0 }
}

/// The cutting of the sequence.
struct Cut {
    n: usize,
    blocks: usize,
    /// Tokens before a block that it meets one by one.
    window: usize,
    /// Blocks at the start whose queries meet all their keys one by one, so that coefficients may be fitted to them
    /// without any query's answer depending on a later token.
    prefix: usize,
    /// The largest bias of the keys far from each block, `-inf` where there are none.
    levels: Vec<f64>,
}

impl Cut {
    fn new<T: Real>(pass: &Pass<'_, T>) -> Result<Self> {
        let n = pass.head.q.nrows();
        let (window, prefix) = (window(&pass.settings).min(n), prefix(&pass.settings));
        let blocks = n.div_ceil(BLOCK);
        let mut cut = Self { n, blocks, window, prefix, levels: room(blocks, "levels of blocks")? };
        let mut level = f64::NEG_INFINITY;
        for c in 0..cut.blocks {
            level = level.max(pass.level(cut.keys(c)));
            cut.levels.push(level);
        }
        Ok(cut)
    }

    /// The tokens of block `c`.
    fn queries(&self, c: usize) -> Range<usize> {
        c * BLOCK..((c + 1) * BLOCK).min(self.n)
    }

    /// The first token near block `c`. It never falls as `c` grows.
    fn start(&self, c: usize) -> usize {
        start_of_block(c, self.window, self.prefix)
    }

    /// The keys `K_c`.
    fn keys(&self, c: usize) -> Range<usize> {
        self.start(c.saturating_sub(1))..self.start(c)
    }

    /// Segments of blocks, for a state of so many numbers, and so many gradients of a key.
    fn segments(&self, state: usize, key: usize) -> Vec<Range<usize>> {
        let [least, most] = SEGMENT_BLOCKS;
        let halo = key * self.window.max(self.prefix * BLOCK).min(self.n);
        let blocks = (SEGMENT_NUMBERS / state)
            .clamp(least, most)
            .min((SEGMENT_LIMIT / state).max(8))
            .min(LARGEST_STATE / state)
            .min(SEGMENT_LIMIT / halo.max(1))
            .max(1);
        (0..self.blocks).step_by(blocks).map(|first| first..(first + blocks).min(self.blocks)).collect()
    }
}

/// `e^(from - to)`, for two levels that may both be `-inf`.
fn decay(from: f64, to: f64) -> f64 {
    if from == to { 1.0 } else { (from - to).exp() }
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
    more_weights: Option<Vec<f64>>,
    /// A state a block of the segment, in the order of the scan.
    states: Vec<T>,
    /// The same with the second weights.
    more: Vec<T>,
}

impl<'a, T: Real> Scan<'a, T> {
    /// At its start, for features up to `degree`, and the segments of its blocks.
    fn new(
        pass: &Pass<'a, T>,
        cut: &Cut,
        degree: usize,
        weighting: Weighting<'a>,
        more_weights: Option<Vec<f64>>,
    ) -> Result<(Self, Vec<Range<usize>>)> {
        let (e, r) = (pass.e(), pass.features.rank(degree));
        let segments = cut.segments(e * r, pass.head.q.ncols() + e);
        let blocks = segments[0].len();
        let more = more_weights.as_ref().map_or(0, Vec::len);
        let scan = Self {
            e,
            r,
            sum: zeroed(e * r, STATE)?,
            states: zeroed(blocks * e * r, "the states of a segment's blocks")?,
            more: zeroed(blocks * e * more, "the states of a segment's blocks")?,
            weighting,
            more_weights,
        };
        Ok((scan, segments))
    }

    /// Numbers in a state.
    fn len(&self) -> usize {
        self.sum.len()
    }

    /// Columns of the state with the second weights.
    fn more_columns(&self) -> usize {
        self.more_weights.as_ref().map_or(0, Vec::len)
    }

    /// Moves on by a segment: `part(i, state)` writes what is the own of the i-th block, and `decays[i]` is what the sum
    /// is multiplied by before. Afterwards [`state`](Self::state) is the weighted sum with the i-th block.
    fn advance<B: Send>(
        &mut self,
        decays: &[f64],
        buffers: impl Fn() -> Result<B> + Sync + Send,
        part: impl Fn(usize, &mut [T], &mut B) -> Result<()> + Sync,
    ) -> Result<()> {
        let (len, r, more_r) = (self.len(), self.r, self.more_columns());
        let count = decays.len();
        self.states[..count * len]
            .par_chunks_mut(len)
            .enumerate()
            .try_for_each_init(buffers, |buffers, (i, state)| part(i, state, made(buffers)?))?;
        let mut rows: Vec<_> = self.sum.chunks_mut(r).map(|sum| (sum, Vec::new(), Vec::new())).collect();
        for state in self.states[..count * len].chunks_mut(len) {
            rows.iter_mut().zip(state.chunks_mut(r)).for_each(|(row, part)| row.1.push(part));
        }
        for more in self.more.chunks_mut((self.e * more_r).max(1)).take(count) {
            rows.iter_mut().zip(more.chunks_mut(more_r)).for_each(|(row, part)| row.2.push(part));
        }
        let (weighting, more_weights) = (&self.weighting, self.more_weights.as_deref());
        rows.into_par_iter()
            .try_for_each(|(sum, mut parts, mut more)| weighting.scan(sum, decays, &mut parts, more_weights, &mut more))
    }

    /// The weighted state of the i-th block.
    fn state(&self, i: usize) -> MatRef<'_, T> {
        view(&self.states[i * self.len()..], self.e, self.r)
    }

    /// The same with the second weights, or the same.
    fn more(&self, i: usize) -> MatRef<'_, T> {
        match self.more_columns() {
            0 => self.state(i),
            r => view(&self.more[i * self.e * r..], self.e, r),
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
    degree: usize,
) -> Result<()> {
    if cut.start(segment.end - 1) == 0 {
        return Ok(()); // nothing is far yet
    }
    let decays: Vec<f64> =
        segment.clone().map(|c| if c == 0 { 1.0 } else { decay(cut.levels[c - 1], cut.levels[c]) }).collect();
    scan.advance(
        &decays,
        || pass.tokens(degree),
        |i, state, tokens: &mut Tokens<T>| {
            let c = segment.start + i;
            sum_tiles(state, cut.keys(c), pass.tile(degree), |state, tile| {
                pass.add_keys(state, tile, cut.levels[c], degree, tokens)
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
    let (g, dv) = (pass.settings.degree, pass.e() - 1);
    let cut = Cut::new(pass)?;
    let floors = pass.floors(cut.blocks, |c| cut.keys(c))?;
    let (mut scan, segments) = Scan::new(pass, &cut, g, pass.forward_weighting()?, None)?;
    for segment in segments {
        advance_keys(pass, &cut, &mut scan, &segment, g)?;
        let tokens = segment.start * BLOCK..cut.queries(segment.end - 1).end;
        (
            out[tokens.start * dv..tokens.end * dv].par_chunks_mut(BLOCK * dv),
            row_max[tokens.clone()].par_chunks_mut(BLOCK),
            row_scale[tokens].par_chunks_mut(BLOCK),
        )
            .into_par_iter()
            .enumerate()
            .try_for_each_init(
                || Ok((pass.scratch(g, false)?, Near::new(pass, &cut)?, Vec::new())),
                |buffers, (i, (out, max, scale))| {
                    let (scratch, near, far) = made(buffers)?;
                    pass.ctx.check()?;
                    let c = segment.start + i;
                    let (level, first) = (cut.levels[c], cut.queries(c).start);
                    for (start, len) in tiles(cut.queries(c), pass.tile(g)) {
                        if level > f64::NEG_INFINITY {
                            pass.load_queries(start, len, &mut scratch.x);
                            scratch.apply((pass.features, Side::Queries), g, scan.state(i), len);
                            let floor = floors.as_ref().map(|floors| &floors[c]);
                            pass.far_levels(level, floor, start, &scratch.out[dv * len..(dv + 1) * len], far)?;
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
                                near.add_far(view(&scratch.out, dv + 1, len).subcols(query - start, count), |t| {
                                    T::of(far[t].level - max[t].to_f64()).exp_nonpositive() * T::of(far[t].scale)
                                });
                            }
                            for (t, scale) in scale.iter_mut().enumerate() {
                                *scale = pass.inverse(near.out[dv * count + t], query + t)?;
                            }
                            store_transposed(&near.out, count, dv, &mut out[rows.start * dv..rows.end * dv], |t| {
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
    queries_backward(pass, &cut, &up, dq, dk, dv, dkey_bias.as_deref_mut())?;
    far_keys_backward(pass, &cut, &up, dk, dv, dkey_bias)
}

/// Queries, forward: dq whole, and what the near queries give dk, dv and db.
fn queries_backward<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    up: &Upstream<'_, T>,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
    mut db: Option<&mut [T]>,
) -> Result<()> {
    let (degree, d, width) = (pass.settings.potential_degree, pass.head.q.ncols(), pass.e() - 1);
    let (mut scan, segments) = Scan::new(pass, cut, degree, pass.backward_weightings(Side::Keys)?.potential, None)?;
    for segment in segments {
        advance_keys(pass, cut, &mut scan, &segment, degree)?;
        let tokens = segment.start * BLOCK..cut.queries(segment.end - 1).end;
        let mut own_db: Vec<_> = match &mut db {
            Some(db) => db[tokens.clone()].chunks_mut(BLOCK).map(Some).collect(),
            None => segment.clone().map(|_| None).collect(),
        };
        let halos = (
            dq[tokens.start * d..tokens.end * d].par_chunks_mut(BLOCK * d),
            dk[tokens.start * d..tokens.end * d].par_chunks_mut(BLOCK * d),
            dv[tokens.start * width..tokens.end * width].par_chunks_mut(BLOCK * width),
            own_db.par_iter_mut(),
        )
            .into_par_iter()
            .enumerate()
            .map_init(
                || Ok((pass.scratch(degree, true)?, Near::new(pass, cut)?)),
                |buffers, (i, (dq, dk, dv, db))| {
                    let (scratch, near) = made(buffers)?;
                    pass.ctx.check()?;
                    let c = segment.start + i;
                    let (level, queries) = (cut.levels[c], cut.queries(c));
                    if level > f64::NEG_INFINITY {
                        let factor = pass.far_factor(up, level);
                        for (start, count) in tiles(queries.clone(), pass.tile(degree)) {
                            pass.load_queries(start, count, &mut scratch.x);
                            pass.load_upstream(up, start, count, &mut scratch.values);
                            scratch.pullback((pass.features, Side::Queries), degree, scan.state(i), count);
                            let dq = &mut dq[(start - queries.start) * d..][..count * d];
                            store_transposed(&scratch.dx, count, d, dq, |t| factor(start + t));
                        }
                    } else {
                        dq.fill(T::ZERO);
                    }
                    // What falls to keys before the block's own is handed back, and added afterwards.
                    let mut halo = Halo::new(cut.start(c)..queries.start, d, width)?;
                    for (query, count) in tiles(queries.clone(), NEAR_TILE) {
                        let (tile, keys) = (query..query + count, cut.start(c)..query + count);
                        let rows = (query - queries.start) * d..(query - queries.start + count) * d;
                        near.load_queries(pass, tile.clone());
                        near.weigh(pass, tile.clone(), keys.clone(), Row::Known(up));
                        near.score_gradients(pass, up, tile.clone(), keys.clone());
                        near.add_query_gradients(pass, &keys, &mut dq[rows]);
                        let before = halo.grads(db.is_some());
                        near.add_key_gradients(pass, up, &tile, &keys, keys.start..queries.start, before);
                        let own = HeadGrads { dq: &mut [], dk: &mut *dk, dv: &mut *dv, dkey_bias: db.as_deref_mut() };
                        near.add_key_gradients(pass, up, &tile, &keys, queries.start..keys.end, own);
                    }
                    Ok(halo)
                },
            )
            .collect::<Result<Vec<_>>>()?;
        drop(own_db);
        for halo in halos {
            halo.add_to(d, width, dk, dv, db.as_deref_mut());
        }
    }
    Ok(())
}

/// Keys, in reverse: what the far queries give dk, dv and db.
fn far_keys_backward<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    up: &Upstream<'_, T>,
    mut dk: &mut [T],
    mut dv: &mut [T],
    mut db: Option<&mut [T]>,
) -> Result<()> {
    let (degree, d, width) = (pass.settings.potential_degree, pass.head.q.ncols(), pass.e() - 1);
    let Weightings { potential, own } = pass.backward_weightings(Side::Queries)?;
    let (mut scan, segments) = Scan::new(pass, cut, degree, potential, own)?;
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
            || pass.tokens(degree),
            |i, state, tokens: &mut Tokens<T>| {
                let (c, factor) = (blocks[i], pass.far_factor(up, cut.levels[blocks[i]]));
                let queries = if cut.start(c) == 0 { 0..0 } else { cut.queries(c) };
                sum_tiles(state, queries, pass.tile(degree), |state, tile| {
                    pass.add_queries(state, up, tile, &factor, degree, tokens)
                })
            },
        )?;
        let mut tasks = Vec::with_capacity(blocks.len());
        for (i, &c) in blocks.iter().enumerate() {
            let keys = cut.keys(c);
            let grads = HeadGrads {
                dq: &mut [],
                dk: take_from(&mut dk, keys.start * d, keys.len() * d),
                dv: take_from(&mut dv, keys.start * width, keys.len() * width),
                dkey_bias: db.as_mut().map(|db| take_from(db, keys.start, keys.len())),
            };
            tasks.push((i, keys, grads));
        }
        tasks.into_par_iter().try_for_each_init(
            || pass.scratch(degree, true),
            |scratch, (i, keys, mut grads)| {
                let scratch = made(scratch)?;
                for (start, count) in tiles(keys.clone(), pass.tile(degree)) {
                    let local = start - keys.start..start - keys.start + count;
                    let grads = HeadGrads {
                        dq: &mut [],
                        dk: &mut grads.dk[local.start * d..local.end * d],
                        dv: &mut grads.dv[local.start * width..local.end * width],
                        dkey_bias: grads.dkey_bias.as_deref_mut().map(|db| &mut db[local]),
                    };
                    pass.key_gradients(start, cut.levels[blocks[i]], scan.state(i), scan.more(i), scratch, grads)?;
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

/// Where a row's maximum comes from: found among the near scores and the levels of the far keys, or known from the
/// forward pass (with the row's scale).
enum Row<'a, 'b, T> {
    Find { max: &'a mut [T], far: Option<&'a [Far]> },
    Known(&'a Upstream<'b, T>),
}

/// The near keys' part of one block of queries. Tiles are `(keys, queries)`.
struct Near<T> {
    /// Queries, then gradients of outputs, each `(width, queries)`.
    columns: Vec<T>,
    /// Weights `e^{-M_i} A_ij`, or (row known) `f_ij`.
    f: Vec<T>,
    /// The factor of `e_ij` in the score's gradient where it is not `f`: the derivative of a consistent polynomial.
    slope: Vec<T>,
    /// `dout_i.v_j`, then the gradient of the score.
    ds: Vec<T>,
    /// Sums over the keys of weights, where the rows' maxima were found.
    sums: [T; NEAR_TILE],
    /// Numerators and denominators, `(e, queries)`.
    out: Vec<T>,
}

impl<T: Real> Near<T> {
    fn new(pass: &Pass<'_, T>, cut: &Cut) -> Result<Self> {
        let keys = (BLOCK + cut.window).max(cut.prefix * BLOCK).min(cut.n);
        let tile = || zeroed(keys * NEAR_TILE, "a tile of near keys");
        let columns = pass.head.q.ncols().max(pass.e()) * NEAR_TILE;
        let slope = if Self::has_slope(pass) { tile()? } else { Vec::new() };
        Ok(Self {
            columns: zeroed(columns, "a tile of queries")?,
            f: tile()?,
            slope,
            ds: tile()?,
            sums: [T::ZERO; NEAR_TILE],
            out: zeroed(pass.e() * NEAR_TILE, "a tile of outputs")?,
        })
    }

    /// Whether a score's gradient has another factor than its weight.
    fn has_slope(pass: &Pass<'_, T>) -> bool {
        pass.settings.consistent && pass.settings.diagonal == Diagonal::Polynomial
    }

    fn load_queries(&mut self, pass: &Pass<'_, T>, queries: Range<usize>) {
        load_transposed(pass.head.q, queries.start, queries.len(), &[], &mut self.columns);
    }

    /// Fills `f` (and `slope`, where it differs).
    fn weigh(&mut self, pass: &Pass<'_, T>, queries: Range<usize>, keys: Range<usize>, row: Row<'_, '_, T>) {
        let (bq, bk) = (queries.len(), keys.len());
        let q = view(&self.columns, pass.head.q.ncols(), bq);
        product(view_mut(&mut self.f, bk, bq), pass.head.k.subrows(keys.start, bk), q, T::of(pass.scale));
        match pass.settings.diagonal {
            Diagonal::Exact => self.weigh_exactly(pass, queries, keys, row),
            Diagonal::Polynomial => self.weigh_by_polynomial(pass, queries, keys, row),
        }
    }

    /// Numerators and denominators of the near keys.
    fn sum(&mut self, pass: &Pass<'_, T>, keys: Range<usize>, bq: usize) {
        let dv = pass.e() - 1;
        let v = pass.head.v.subrows(keys.start, keys.len()).transpose();
        product(view_mut(&mut self.out, dv, bq), v, view(&self.f, keys.len(), bq), T::ONE);
        self.out[dv * bq..(dv + 1) * bq].copy_from_slice(&self.sums[..bq]);
    }

    /// Adds those of the far keys, each query's times its factor.
    fn add_far(&mut self, far: MatRef<'_, T>, factor: impl Fn(usize) -> T) {
        let mut factors = [T::ZERO; NEAR_TILE];
        factors.iter_mut().enumerate().take(far.ncols()).for_each(|(t, by)| *by = factor(t));
        for (out, far) in self.out.chunks_exact_mut(far.ncols()).zip(far.row_iter()) {
            for ((out, &far), &by) in out.iter_mut().zip(far.iter()).zip(&factors) {
                *out += far * by;
            }
        }
    }

    fn weigh_exactly(&mut self, pass: &Pass<'_, T>, queries: Range<usize>, keys: Range<usize>, row: Row<'_, '_, T>) {
        let (bq, bk) = (queries.len(), keys.len());
        let f = &mut self.f[..bk * bq];
        // Scores without the row's constant that the key shift takes from those of the far keys.
        if !pass.shifts.key.is_empty() {
            let mut constants = [T::ZERO; NEAR_TILE];
            for (constant, i) in constants.iter_mut().zip(queries.clone()) {
                *constant = T::of(pass.row_constant(i));
            }
            for row in f.chunks_exact_mut(bq) {
                row.iter_mut().zip(&constants).for_each(|(s, &by)| *s -= by);
            }
        }
        if let Some(bias) = pass.head.key_bias {
            add_bias(bias.subrows(keys.start, bk).iter().copied(), bq, f);
        }
        mask(queries.start, keys.start, bk, bq, f);
        match row {
            Row::Find { max, far } => {
                match far {
                    Some(far) => max.iter_mut().zip(far).for_each(|(max, far)| *max = T::of(far.level)),
                    None => max.fill(T::NEG_INFINITY),
                }
                exponentials(f, max, &mut self.sums[..bq]);
                max.iter_mut().filter(|max| **max == T::NEG_INFINITY).for_each(|max| *max = T::ZERO);
            }
            Row::Known(up) => {
                let (max, scale) = (&up.rows.max[queries.clone()], &up.rows.scale[queries]);
                vectorised(
                    #[inline(always)]
                    || {
                        for row in f.chunks_exact_mut(bq) {
                            for ((s, &max), &scale) in row.iter_mut().zip(max).zip(scale) {
                                *s = (*s - max).exp_nonpositive() * scale;
                            }
                        }
                    },
                );
            }
        }
    }

    fn weigh_by_polynomial(
        &mut self,
        pass: &Pass<'_, T>,
        queries: Range<usize>,
        keys: Range<usize>,
        row: Row<'_, '_, T>,
    ) {
        let bq = queries.len();
        let a: Vec<T> = pass.coefficients.iter().map(|&a| T::of(a)).collect();
        let (max, scale): (&[T], _) = match row {
            Row::Known(up) => (&up.rows.max[queries.clone()], Some(&up.rows.scale[queries.clone()])),
            Row::Find { max, far } => {
                // Weights are at most 1 relative to the largest bias that the query sees.
                let level = far.map_or(f64::NEG_INFINITY, |far| far[0].level);
                let mut seen = level.max(pass.level(keys.start..queries.start));
                for (max, i) in max.iter_mut().zip(queries.clone()) {
                    seen = seen.max(pass.bias(i));
                    *max = if seen.is_finite() { T::of(seen) } else { T::ZERO };
                }
                (&*max, None)
            }
        };
        self.sums.fill(T::ZERO);
        for j in 0..keys.len() {
            let f = &mut self.f[j * bq..][..bq];
            let mut slope = self.slope.get_mut(j * bq..(j + 1) * bq);
            for i in 0..bq {
                let seen = keys.start + j <= queries.start + i;
                let w = if seen { pass.weight(keys.start + j, max[i].to_f64()) } else { T::ZERO };
                let (s, by) = (f[i], w * scale.map_or(T::ONE, |s| s[i]));
                let (mut p, mut dp) = (T::ZERO, T::ZERO);
                for &a in a.iter().rev() {
                    dp = dp * s + p;
                    p = p * s + a;
                }
                let used = w != T::ZERO;
                f[i] = if used { p * by } else { T::ZERO };
                self.sums[i] += f[i];
                if let Some(slope) = &mut slope {
                    slope[i] = if used { dp * by } else { T::ZERO };
                }
            }
        }
    }

    /// Fills `ds`: the gradients of the scores, from `f`.
    fn score_gradients(&mut self, pass: &Pass<'_, T>, up: &Upstream<'_, T>, queries: Range<usize>, keys: Range<usize>) {
        let (bq, bk) = (queries.len(), keys.len());
        load_transposed(up.dout, queries.start, bq, &[], &mut self.columns);
        let dout = view(&self.columns, pass.e() - 1, bq);
        product(view_mut(&mut self.ds, bk, bq), pass.head.v.subrows(keys.start, bk), dout, T::ONE);
        let delta = &up.delta[queries];
        let slope = if Self::has_slope(pass) { &self.slope } else { &self.f };
        let (slope, ds) = (&slope[..bk * bq], &mut self.ds[..bk * bq]);
        vectorised(
            #[inline(always)]
            || {
                for (slope, ds) in slope.chunks_exact(bq).zip(ds.chunks_exact_mut(bq)) {
                    for ((ds, &slope), &delta) in ds.iter_mut().zip(slope).zip(delta) {
                        *ds = slope.times(*ds - delta);
                    }
                }
            },
        );
    }

    /// Adds dq.
    fn add_query_gradients(&self, pass: &Pass<'_, T>, keys: &Range<usize>, dq: &mut [T]) {
        let d = pass.head.q.ncols();
        let bq = dq.len() / d;
        let (ds, k) = (view(&self.ds, keys.len(), bq), pass.head.k.subrows(keys.start, keys.len()));
        add_product(view_mut(dq, bq, d), ds.transpose(), k, T::of(pass.scale));
        if !pass.shifts.key.is_empty() {
            // Of shifted keys, as the far part's is.
            for (t, dq) in dq.chunks_exact_mut(d).enumerate() {
                let by = T::of(pass.scale) * ds.col(t).iter().copied().sum::<T>();
                dq.iter_mut().zip(&pass.shifts.key).for_each(|(dq, &beta)| *dq -= by * beta);
            }
        }
    }

    /// Adds dk, dv and db of the keys `part` of `keys`.
    fn add_key_gradients(
        &self,
        pass: &Pass<'_, T>,
        up: &Upstream<'_, T>,
        queries: &Range<usize>,
        keys: &Range<usize>,
        part: Range<usize>,
        grads: HeadGrads<'_, T>,
    ) {
        let (d, dv, bq) = (pass.head.q.ncols(), pass.e() - 1, queries.len());
        let (q, dout) = (pass.head.q.subrows(queries.start, bq), up.dout.subrows(queries.start, bq));
        let rows = |x| view(x, keys.len(), bq).subrows(part.start - keys.start, part.len());
        let len = part.len();
        add_product(view_mut(grads.dk, len, d), rows(&self.ds), q, T::of(pass.scale));
        add_product(view_mut(grads.dv, len, dv), rows(&self.f), dout, T::ONE);
        if let Some(db) = grads.dkey_bias {
            if !Self::has_slope(pass) {
                for (db, ds) in db.iter_mut().zip(rows(&self.ds).row_iter()) {
                    *db += ds.iter().copied().sum::<T>();
                }
                return;
            }
            // db takes f where dk takes the slope: the weight's derivative by the bias is the weight itself.
            for (j, db) in db.iter_mut().enumerate().take(len) {
                let v = pass.head.v.row(part.start + j);
                let f = rows(&self.f).row(j);
                for i in 0..bq {
                    let dot: T = (0..dv).map(|c| dout[(i, c)] * v[c]).sum();
                    *db += f[i].times(dot - up.delta[queries.start + i]);
                }
            }
        }
    }
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

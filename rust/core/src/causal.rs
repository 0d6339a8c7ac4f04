//! The polynomial engine under a causal mask: forward and reverse scans over blocks of tokens.
//!
//! The sequence is cut in blocks. A query of block `c` meets the keys of blocks before `c - lag` through the state `S`
//! of the polynomial, carried forward from block to block, and the *near* keys, from block `c - lag` to itself, one by
//! one (in the first `prefix` blocks, which fitted coefficients are taken from, all keys are near): with
//! `diagonal="exact"` by `exp`, with `diagonal="polynomial"` (then `lag = 0`) by the polynomial. Numerators and
//! denominators of both parts add up, each row scaled by `e^{-M_i}` and the state kept relative to its *level* `l`, the
//! largest bias of its keys, so that biases of any range fit. `M_i` is the largest of `l` and the near scores (of the
//! near biases, where the near scores go through the polynomial):
//!
//! ```text
//! [N_i, D_i] = e^{l - M_i} φ(q_i)^T diag(ω_p) S + sum_{near j} e^{-M_i} A_ij [v_j, 1]
//! ```
//!
//! The backward pass is that of `polynomial.rs` for the far part and of `exact.rs` for the near one, with the same
//! `D_i`. A key of block `c` is met through the state by the queries of blocks `max(c + lag + 1, prefix)` and later, so
//! their state `R` is carried in reverse.
//!
//! Parallel over runs of consecutive blocks: each run's part of the state is summed first, prefix sums (suffix sums,
//! for `R`) give every run the state that it starts from, and the runs go on by themselves. Their number depends on the
//! sizes alone.

use std::ops::Range;

use rayon::prelude::*;

use crate::attention::{HeadGrads, Upstream};
use crate::engine::{Diagonal, Gradient};
use crate::error::Result;
use crate::exact::{add_bias, mask};
use crate::polynomial::{Pass, Scratch, optional_chunks, tiles};
use crate::real::{Real, vectorised};
use crate::state::{State, add, weigh_into};
use crate::tile::{add_product, load_transposed, product, store_transposed, view, view_mut};

/// The cutting of the sequence.
#[derive(Debug, Clone)]
struct Cut {
    n: usize,
    /// Tokens a block, and blocks.
    block: usize,
    blocks: usize,
    lag: usize,
    prefix: usize,
    /// Blocks a run, and runs.
    run: usize,
    runs: usize,
    /// The largest bias of the keys far from each block, `-inf` where there are none; one more entry than blocks.
    levels: Vec<f64>,
}

impl Cut {
    fn new<T: Real>(pass: &Pass<'_, T>, degree: usize) -> Self {
        let (n, block) = (pass.head.q.nrows(), pass.block());
        let (blocks, run) = (n.div_ceil(block), pass.partition(n, block, degree) / block);
        let (lag, prefix, runs) = (pass.lag(), pass.prefix(), blocks.div_ceil(run));
        let mut cut = Self { n, block, blocks, lag, prefix, run, runs, levels: Vec::with_capacity(blocks + 1) };
        let (mut level, mut far) = (f64::NEG_INFINITY, 0);
        for c in 0..blocks {
            level = level.max(pass.level(cut.tokens(far..cut.first_near(c))));
            far = cut.first_near(c);
            cut.levels.push(level);
        }
        cut.levels.push(level);
        cut
    }

    fn tokens(&self, blocks: Range<usize>) -> Range<usize> {
        (blocks.start * self.block).min(self.n)..(blocks.end * self.block).min(self.n)
    }

    /// The blocks of run `p`.
    fn of_run(&self, p: usize) -> Range<usize> {
        p * self.run..((p + 1) * self.run).min(self.blocks)
    }

    /// The first block that is near block `c`. It never falls as `c` grows.
    fn first_near(&self, c: usize) -> usize {
        if c < self.prefix { 0 } else { c.saturating_sub(self.lag) }
    }

    /// The first block that block `c` is not near to, or `blocks`. It never falls as `c` grows.
    fn first_far(&self, c: usize) -> usize {
        (c + self.lag + 1).max(self.prefix).min(self.blocks)
    }

    /// The tokens near block `c`, up to its own.
    fn near(&self, c: usize) -> Range<usize> {
        self.tokens(self.first_near(c)..c + 1)
    }
}

/// `states[p]` becomes the sum of all before it. Each comes relative to the level at which the next one is first used,
/// `levels[p]`, and leaves relative to `levels[p - 1]`.
fn exclusive_prefix_sums(states: &mut [Vec<f64>], levels: &[f64]) {
    let Some(first) = states.first() else { return };
    let mut total = vec![0.0; first.len()];
    for (p, state) in states.iter_mut().enumerate() {
        let by = if p == 0 { 1.0 } else { decay(levels[p - 1], levels[p]) };
        let mut next: Vec<f64> = total.iter().map(|x| x * by).collect();
        add(&mut next, state);
        *state = std::mem::replace(&mut total, next);
    }
}

/// `e^(from - to)`, for two levels that may both be `-inf`.
fn decay(from: f64, to: f64) -> f64 {
    if from == to { 1.0 } else { (from - to).exp() }
}

/// Writes `out` and the row factors of one head.
pub(crate) fn forward<T: Real>(
    pass: &Pass<'_, T>,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<()> {
    let (g, e, dv) = (pass.engine.degree, pass.e(), pass.e() - 1);
    let (cut, tile) = (Cut::new(pass, g), pass.tile(g));
    let weights = pass.tree.weights(&pass.constants.coefficients, pass.scale);
    let starts = key_states(pass, &cut, g)?;
    let rows = cut.run * cut.block;
    (out.par_chunks_mut(rows * dv), row_max.par_chunks_mut(rows), row_scale.par_chunks_mut(rows), starts)
        .into_par_iter()
        .enumerate()
        .try_for_each(|(p, (out, max, scale, start))| {
            let mut scratch = pass.scratch(g);
            let mut values = vec![T::ZERO; e * cut.block];
            let mut near = Near::new(pass, &cut);
            let mut far = Far::new(start, weights.clone(), e);
            for c in cut.of_run(p) {
                pass.ctx.check()?;
                let level = far.advance(pass, &cut, c, c > p * cut.run, g, &mut scratch)?;
                let has_far = level > f64::NEG_INFINITY;
                let (queries, keys) = (cut.tokens(c..c + 1), cut.near(c));
                let (len, first) = (queries.len(), queries.start - p * rows);
                let (max, scale) = (&mut max[first..first + len], &mut scale[first..first + len]);
                near.weigh(pass, queries.clone(), keys.clone(), Row::Find { max, level: T::of(level) });
                near.load_values(pass, keys.clone());
                if has_far {
                    for (start, count) in tiles(queries.clone(), tile) {
                        pass.load_queries(start, count, &mut scratch.x);
                        let out = view_mut(&mut values, e, len).subcols_mut(start - queries.start, count);
                        scratch.apply(pass.tree, g, far.weighted(), count, out);
                    }
                    for t in 0..len {
                        let by = T::of(level - max[t].to_f64()).exp_nonpositive();
                        for c in 0..e {
                            values[c * len + t] *= by;
                        }
                    }
                } else {
                    values[..e * len].fill(T::ZERO);
                }
                let (of_keys, weights) = (view(&near.values, e, keys.len()), view(&near.f, keys.len(), len));
                add_product(view_mut(&mut values, e, len), of_keys, weights, T::ONE);
                for (t, scale) in scale.iter_mut().enumerate() {
                    *scale = pass.inverse(values[dv * len + t], queries.start + t)?;
                }
                store_transposed(&values, len, dv, &mut out[first * dv..(first + len) * dv], |t| scale[t]);
            }
            Ok(())
        })
}

/// The state from which each run's forward scan starts: all keys before the near ones of its first block.
fn key_states<T: Real>(pass: &Pass<'_, T>, cut: &Cut, degree: usize) -> Result<Vec<Vec<f64>>> {
    let edge = |p: usize| cut.first_near(p * cut.run);
    let level_of = |p: usize| cut.levels[((p + 1) * cut.run).min(cut.blocks)];
    let mut states = (0..cut.runs)
        .into_par_iter()
        .map_init(
            || pass.scratch(degree),
            |scratch, p| {
                let last = p + 1 == cut.runs; // nobody reads its sum
                let keys = if last { 0..0 } else { cut.tokens(edge(p)..edge(p + 1)) };
                pass.key_state(keys, level_of(p), degree, scratch)
            },
        )
        .collect::<Result<Vec<_>>>()?;
    exclusive_prefix_sums(&mut states, &(0..cut.runs).map(level_of).collect::<Vec<_>>());
    Ok(states)
}

/// The state from which each run's reverse scan starts, last run first: all queries after those near its last block.
fn query_states<T: Real>(pass: &Pass<'_, T>, cut: &Cut, up: &Upstream<'_, T>, degree: usize) -> Result<Vec<Vec<f64>>> {
    let after = |p: usize| cut.first_far(cut.of_run(p).end - 1);
    // Run p's queries are first used by run p - 1, at the level of the first of them.
    let first = |p: usize| if p == 0 { 0 } else { after(p - 1) };
    let mut states = (0..cut.runs)
        .into_par_iter()
        .rev()
        .map_init(
            || pass.scratch(degree),
            |scratch, p| {
                let queries = if p == 0 { 0..0 } else { cut.tokens(first(p)..after(p)) };
                pass.query_state(up, queries, degree, up.rows.far_factor(cut.levels[first(p)]), scratch)
            },
        )
        .collect::<Result<Vec<_>>>()?;
    // Weights of keys fall with the level that they are relative to; factors of queries rise.
    exclusive_prefix_sums(&mut states, &(0..cut.runs).rev().map(|p| -cut.levels[first(p)]).collect::<Vec<_>>());
    Ok(states)
}

/// Adds one head's gradients.
pub(crate) fn backward<T: Real>(pass: &Pass<'_, T>, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
    let HeadGrads { dq, dk, dv: grad_v, mut dkey_bias } = grads;
    let (degree, e, d) = (pass.potential_degree(), pass.e(), pass.head.q.ncols());
    let dv = e - 1;
    let (cut, tile) = (Cut::new(pass, degree), pass.tile(degree));
    let potential = pass.tree.weights(&pass.potential(), pass.scale);
    let rows = cut.run * cut.block;

    // Queries, forward: dq whole, and what the near queries give dk, dv and db. What falls to keys of the run before is
    // handed back, and added afterwards.
    let starts = key_states(pass, &cut, degree)?;
    let mut db = optional_chunks(dkey_bias.as_deref_mut(), rows, cut.runs);
    let halos = (
        dq.par_chunks_mut(rows * d),
        dk.par_chunks_mut(rows * d),
        grad_v.par_chunks_mut(rows * dv),
        db.par_iter_mut(),
        starts,
    )
        .into_par_iter()
        .enumerate()
        .map(|(p, (dq, dk, dv_, db, start))| {
            let mut scratch = pass.scratch(degree);
            let mut near = Near::new(pass, &cut);
            let mut far = Far::new(start, potential.clone(), e);
            let own = p * rows;
            let halo_start = cut.near(p * cut.run).start;
            let mut halo = Halo::new(halo_start..own, d, dv);
            for c in cut.of_run(p) {
                pass.ctx.check()?;
                let level = far.advance(pass, &cut, c, c > p * cut.run, degree, &mut scratch)?;
                let has_far = level > f64::NEG_INFINITY;
                let (queries, keys) = (cut.tokens(c..c + 1), cut.near(c));
                let len = queries.len();
                let dq = &mut dq[(queries.start - own) * d..(queries.end - own) * d];
                if has_far {
                    for (start, count) in tiles(queries.clone(), tile) {
                        pass.load_queries(start, count, &mut scratch.x);
                        pass.load_upstream(&up, start, count, up.rows.far_factor(level), &mut scratch.values);
                        scratch.pullback(pass.tree, degree, far.weighted(), count);
                        let dq = &mut dq[(start - queries.start) * d..][..count * d];
                        store_transposed(&scratch.dx, count, d, dq, |_| T::ONE);
                    }
                } else {
                    dq.fill(T::ZERO);
                }
                near.weigh(pass, queries.clone(), keys.clone(), Row::Known(&up));
                near.score_gradients(pass, &up, queries.clone(), keys.clone());
                let scale = T::of(pass.scale);
                let ds = view(&near.ds, keys.len(), len);
                add_product(view_mut(dq, len, d), ds.transpose(), pass.head.k.subrows(keys.start, keys.len()), scale);
                let split = keys.start.max(own).min(keys.end);
                for (part, from_halo) in [(keys.start..split, true), (split..keys.end, false)] {
                    if part.is_empty() {
                        continue;
                    }
                    let into = if from_halo {
                        halo.grads(db.is_some())
                    } else {
                        HeadGrads { dq: &mut [], dk: &mut *dk, dv: &mut *dv_, dkey_bias: db.as_deref_mut() }
                    };
                    let origin = if from_halo { halo_start } else { own };
                    near.add_key_gradients(pass, &up, &queries, &keys, part, origin, into);
                }
            }
            Ok(halo)
        })
        .collect::<Result<Vec<_>>>()?;
    drop(db);
    for halo in halos {
        halo.add_to(d, dv, dk, grad_v, dkey_bias.as_deref_mut());
    }

    // Keys, in reverse: what the far queries give.
    let of_values = pass.tree.weights(&pass.constants.coefficients, pass.scale);
    let starts: Vec<_> = query_states(pass, &cut, &up, degree)?.into_iter().rev().collect();
    let mut db = optional_chunks(dkey_bias, rows, cut.runs);
    (dk.par_chunks_mut(rows * d), grad_v.par_chunks_mut(rows * dv), db.par_iter_mut(), starts)
        .into_par_iter()
        .enumerate()
        .try_for_each(|(p, (dk, dv_, db, start))| {
            let mut scratch = pass.scratch(degree);
            let mut far = Far::new(start, potential.clone(), e);
            let mut for_values = vec![T::ZERO; of_values.len() * e];
            let own = p * rows;
            for c in cut.of_run(p).rev() {
                pass.ctx.check()?;
                let first = cut.first_far(c);
                let level = cut.levels[first];
                if c + 1 < cut.of_run(p).end {
                    far.rescale(decay(level, cut.levels[cut.first_far(c + 1)]));
                    let queries = cut.tokens(first..cut.first_far(c + 1));
                    pass.add_queries(far.grow(), &up, queries, up.rows.far_factor(level), degree, &mut scratch)?;
                }
                if first >= cut.blocks {
                    continue;
                }
                weigh_into(far.state.sum(), potential.len(), &of_values, &mut for_values);
                for (start, count) in tiles(cut.tokens(c..c + 1), tile) {
                    let local = start - own..start - own + count;
                    let grads = HeadGrads {
                        dq: &mut [],
                        dk: &mut dk[local.start * d..local.end * d],
                        dv: &mut dv_[local.start * dv..local.end * dv],
                        dkey_bias: db.as_deref_mut().map(|db| &mut db[local]),
                    };
                    pass.key_gradients(start, level, far.weighted(), &for_values, &mut scratch, grads)?;
                }
            }
            Ok(())
        })
}

/// A state that walks along the blocks, and its weighted copy.
struct Far<T> {
    state: State<T>,
    weights: Vec<f64>,
    weighted: Vec<T>,
    stale: bool,
}

impl<T: Real> Far<T> {
    fn new(start: Vec<f64>, weights: Vec<f64>, e: usize) -> Self {
        Self { weighted: vec![T::ZERO; start.len()], state: State::from_sum(start, e), weights, stale: true }
    }

    fn weighted(&mut self) -> &[T] {
        if self.stale {
            self.state.weigh_into(&self.weights, &mut self.weighted);
            self.stale = false;
        }
        &self.weighted
    }

    /// Moves the state to another level.
    fn rescale(&mut self, by: f64) {
        if by != 1.0 {
            self.state.scale(by);
            self.stale = true;
        }
    }

    /// Moves a state of keys on to block `c`, from the block before (`moves`) or from the start of a run, and returns
    /// its level.
    fn advance(
        &mut self,
        pass: &Pass<'_, T>,
        cut: &Cut,
        c: usize,
        moves: bool,
        degree: usize,
        scratch: &mut Scratch<T>,
    ) -> Result<f64> {
        let level = cut.levels[c];
        if moves {
            self.rescale(decay(cut.levels[c - 1], level));
            let keys = cut.tokens(cut.first_near(c - 1)..cut.first_near(c));
            pass.add_keys(self.grow(), keys, level, degree, scratch)?;
        }
        Ok(level)
    }

    /// The state, to be added to.
    fn grow(&mut self) -> &mut State<T> {
        self.stale = true;
        &mut self.state
    }
}

/// Where a row's maximum comes from: found among the near scores and the level of the far keys, or known from the
/// forward pass (with the row's scale).
enum Row<'a, 'b, T> {
    Find { max: &'a mut [T], level: T },
    Known(&'a Upstream<'b, T>),
}

/// The near keys' part of one block of queries. Tiles are `(keys, queries)`.
struct Near<T> {
    /// Weights `e^{-M_i} A_ij`, or (row known) `f_ij`.
    f: Vec<T>,
    /// The factor of `e_ij` in the score's gradient: `f` itself, but for a consistent polynomial its derivative.
    slope: Vec<T>,
    /// `dout_i.v_j`, then the gradient of the score.
    ds: Vec<T>,
    /// `[v_j; 1]`.
    values: Vec<T>,
}

impl<T: Real> Near<T> {
    fn new(pass: &Pass<'_, T>, cut: &Cut) -> Self {
        let keys = ((cut.lag + 1).max(cut.prefix) * cut.block).min(cut.n);
        let tile = || vec![T::ZERO; keys * cut.block];
        Self { f: tile(), slope: tile(), ds: tile(), values: vec![T::ZERO; pass.e() * keys] }
    }

    fn load_values(&mut self, pass: &Pass<'_, T>, keys: Range<usize>) {
        let e = pass.e();
        load_transposed(pass.head.v, keys.start, keys.len(), &[], &mut self.values);
        self.values[(e - 1) * keys.len()..e * keys.len()].fill(T::ONE);
    }

    /// Fills `f` (and `slope`, where it differs).
    fn weigh(&mut self, pass: &Pass<'_, T>, queries: Range<usize>, keys: Range<usize>, row: Row<'_, '_, T>) {
        let (bq, bk) = (queries.len(), keys.len());
        let q = pass.head.q.subrows(queries.start, bq).transpose();
        product(view_mut(&mut self.f, bk, bq), pass.head.k.subrows(keys.start, bk), q, T::of(pass.scale));
        match pass.engine.diagonal {
            Diagonal::Exact => self.weigh_exactly(pass, queries, keys, row),
            Diagonal::Polynomial => self.weigh_by_polynomial(pass, queries, keys, row),
        }
    }

    fn weigh_exactly(&mut self, pass: &Pass<'_, T>, queries: Range<usize>, keys: Range<usize>, row: Row<'_, '_, T>) {
        let (bq, bk) = (queries.len(), keys.len());
        let f = &mut self.f[..bk * bq];
        if let Some(biases) = &pass.biases {
            add_bias(biases[keys.clone()].iter().map(|&b| T::of(b)), bq, f);
        }
        mask(queries.start, keys.start, bk, bq, f);
        match row {
            Row::Find { max, level } => vectorised(
                #[inline(always)]
                || {
                    max.fill(level);
                    for row in f.chunks_exact(bq) {
                        for (max, &s) in max.iter_mut().zip(row) {
                            *max = s.larger(*max);
                        }
                    }
                    for max in &mut *max {
                        *max = if *max == T::NEG_INFINITY { T::ZERO } else { *max };
                    }
                    for row in f.chunks_exact_mut(bq) {
                        for (s, &max) in row.iter_mut().zip(&*max) {
                            *s = (*s - max).exp_nonpositive();
                        }
                    }
                },
            ),
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
        let a: Vec<T> = pass.constants.coefficients.iter().map(|&a| T::of(a)).collect();
        let (max, scale): (&[T], _) = match row {
            Row::Known(up) => (&up.rows.max[queries.clone()], Some(&up.rows.scale[queries.clone()])),
            Row::Find { max, level } => {
                // Weights are at most 1 relative to the largest bias that the query sees.
                let mut seen = level.to_f64().max(pass.level(keys.start..queries.start));
                for (max, i) in max.iter_mut().zip(queries.clone()) {
                    seen = seen.max(pass.bias(i));
                    *max = if seen.is_finite() { T::of(seen) } else { T::ZERO };
                }
                (&*max, None)
            }
        };
        for j in 0..keys.len() {
            let (f, slope) = (&mut self.f[j * bq..][..bq], &mut self.slope[j * bq..][..bq]);
            for i in 0..bq {
                let seen = keys.start + j <= queries.start + i;
                let w = if seen { pass.weight(keys.start + j, max[i].to_f64()) } else { T::ZERO };
                if w == T::ZERO {
                    (f[i], slope[i]) = (T::ZERO, T::ZERO);
                    continue;
                }
                let (s, by) = (f[i], w * scale.map_or(T::ONE, |s| s[i]));
                let (mut p, mut dp) = (T::ZERO, T::ZERO);
                for &a in a.iter().rev() {
                    dp = dp * s + p;
                    p = p * s + a;
                }
                (f[i], slope[i]) = (p * by, dp * by);
            }
        }
    }

    /// Fills `ds`: the gradients of the scores, from `f`.
    fn score_gradients(&mut self, pass: &Pass<'_, T>, up: &Upstream<'_, T>, queries: Range<usize>, keys: Range<usize>) {
        let (bq, bk) = (queries.len(), keys.len());
        let dout = up.dout.subrows(queries.start, bq).transpose();
        product(view_mut(&mut self.ds, bk, bq), pass.head.v.subrows(keys.start, bk), dout, T::ONE);
        let delta = &up.delta[queries];
        let consistent = pass.engine.gradient == Gradient::Consistent && pass.engine.diagonal == Diagonal::Polynomial;
        let (f, slope, ds) = (&self.f[..bk * bq], &mut self.slope[..bk * bq], &mut self.ds[..bk * bq]);
        if !consistent {
            slope.copy_from_slice(f);
        }
        vectorised(
            #[inline(always)]
            || {
                for (slope, ds) in slope.chunks_exact(bq).zip(ds.chunks_exact_mut(bq)) {
                    for ((ds, &slope), &delta) in ds.iter_mut().zip(slope).zip(delta) {
                        *ds = slope * (*ds - delta);
                    }
                }
            },
        );
    }

    /// Adds dk, dv and db of the keys `part` of `keys`, to rows that start at token `origin`.
    fn add_key_gradients(
        &self,
        pass: &Pass<'_, T>,
        up: &Upstream<'_, T>,
        queries: &Range<usize>,
        keys: &Range<usize>,
        part: Range<usize>,
        origin: usize,
        grads: HeadGrads<'_, T>,
    ) {
        let (d, dv, bq) = (pass.head.q.ncols(), pass.e() - 1, queries.len());
        let (q, dout) = (pass.head.q.subrows(queries.start, bq), up.dout.subrows(queries.start, bq));
        let rows = |x| view(x, keys.len(), bq).subrows(part.start - keys.start, part.len());
        let (first, len) = (part.start - origin, part.len());
        add_product(view_mut(&mut grads.dk[first * d..], len, d), rows(&self.ds), q, T::of(pass.scale));
        add_product(view_mut(&mut grads.dv[first * dv..], len, dv), rows(&self.f), dout, T::ONE);
        if let Some(db) = grads.dkey_bias {
            // db takes f where dk takes the slope: the weight's derivative by the bias is the weight itself.
            for (j, db) in db[first..first + len].iter_mut().enumerate() {
                let v = pass.head.v.row(part.start + j);
                let f = rows(&self.f).row(j);
                for i in 0..bq {
                    let dot: T = (0..dv).map(|c| dout[(i, c)] * v[c]).sum();
                    *db += f[i] * (dot - up.delta[queries.start + i]);
                }
            }
        }
    }
}

/// Gradients of keys before a run's own.
struct Halo<T> {
    start: usize,
    dk: Vec<T>,
    dv: Vec<T>,
    db: Vec<T>,
}

impl<T: Real> Halo<T> {
    fn new(keys: Range<usize>, d: usize, dv: usize) -> Self {
        let zeros = |width: usize| vec![T::ZERO; keys.len() * width];
        Self { start: keys.start, dk: zeros(d), dv: zeros(dv), db: zeros(1) }
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

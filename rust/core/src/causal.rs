//! The polynomial engine under a causal mask: forward and reverse scans over blocks of tokens.
//!
//! The sequence is cut in blocks. A query of block `c` meets the keys of blocks before `c - lag` through the state `S` of the
//! polynomial, carried forward from block to block, and the *near* keys, from block `c - lag` to itself, one by one (in the first
//! `prefix` blocks, which fitted coefficients are taken from, all keys are near): with
//! `diagonal="exact"` by `exp`, with `diagonal="polynomial"` (then `lag = 0`) by the polynomial. Numerators and denominators of both parts
//! add up; all is scaled by `e^{-M_i}`, where `M_i` is the largest near score (but at least 0 where there is a far part):
//!
//! ```text
//! [N_i, D_i] = e^{-M_i} φ(q_i)^T diag(ω_p) S + sum_{near j} e^{-M_i} A_ij [v_j, 1]
//! ```
//!
//! The backward pass is that of `polynomial.rs` for the far part and of `exact.rs` for the near one, with the same `D_i`. A key of block
//! `c` is met through the state by the queries of blocks `max(c + lag + 1, prefix)` and later, so their state `R` is carried in reverse.
//!
//! Parallel over runs of consecutive blocks: each run's part of the state is summed first, prefix sums (suffix sums, for `R`) give
//! every run the state that it starts from, and the runs go on by themselves. Their number depends on the sizes alone.

use std::ops::Range;

use rayon::prelude::*;

use crate::attention::{HeadGrads, Upstream};
use crate::engine::{Diagonal, Gradient};
use crate::error::Result;
use crate::exact::{add_bias, mask};
use crate::polynomial::{Pass, Scratch, State, add, optional_chunks, weigh_into};
use crate::real::{Real, vectorised};
use crate::tile::{add_product, load_transposed, product, store_transposed, view, view_mut};

/// The cutting of the sequence.
#[derive(Debug, Clone, Copy)]
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
}

impl Cut {
    fn new<T: Real>(pass: &Pass<'_, T>, r: usize) -> Self {
        let (n, block) = (pass.head.q.nrows(), pass.block());
        let (blocks, run) = (n.div_ceil(block), pass.partition(n, block, r) / block);
        Self { n, block, blocks, lag: pass.lag(), prefix: pass.prefix(), run, runs: blocks.div_ceil(run) }
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

/// `sums[p]` becomes the sum of all before it.
fn exclusive_prefix_sums(sums: &mut [Vec<f64>]) {
    let Some(first) = sums.first() else { return };
    let mut total = vec![0.0; first.len()];
    for sum in sums {
        let mut next = total.clone();
        add(&mut next, sum);
        *sum = std::mem::replace(&mut total, next);
    }
}

/// Writes `out` and the row factors of one head.
pub(crate) fn forward<T: Real>(
    pass: &Pass<'_, T>,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<()> {
    let (r, e, dv) = (pass.rank(), pass.e(), pass.e() - 1);
    let cut = Cut::new(pass, r);
    let weights = pass.tree.weights(&pass.constants.coefficients, pass.scale);
    let starts = key_states(pass, &cut, r)?;
    let rows = cut.run * cut.block;
    (out.par_chunks_mut(rows * dv), row_max.par_chunks_mut(rows), row_scale.par_chunks_mut(rows), starts)
        .into_par_iter()
        .enumerate()
        .try_for_each(|(p, (out, max, scale, start))| {
            let mut scratch = Scratch::new(pass, cut.block, r, 0);
            let mut near = Near::new(pass, &cut);
            let mut far = Far::new(start, weights.clone(), e);
            for c in cut.of_run(p) {
                pass.ctx.check()?;
                if c > p * cut.run {
                    for block in cut.first_near(c - 1)..cut.first_near(c) {
                        far.add_keys(pass, cut.tokens(block..block + 1), &mut scratch);
                    }
                }
                let has_far = cut.first_near(c) > 0;
                let (queries, keys) = (cut.tokens(c..c + 1), cut.near(c));
                let (len, first) = (queries.len(), queries.start - p * rows);
                let (max, scale) = (&mut max[first..first + len], &mut scale[first..first + len]);
                // Without a far part nothing but the near scores has to fit in range, however low they are.
                let lowest = if has_far { T::ZERO } else { T::NEG_INFINITY };
                near.weigh(pass, queries.clone(), keys.clone(), Row::Find { max, lowest });
                near.load_values(pass, keys.clone());
                if has_far {
                    pass.load_queries(queries.start, len, &mut scratch.x);
                    pass.tree.features(&scratch.x, len, r, &mut scratch.features);
                    let state = view(far.weighted(), r, e).transpose();
                    product(view_mut(&mut scratch.values, e, len), state, view(&scratch.features, r, len), T::ONE);
                    for t in 0..len {
                        let by = (-max[t]).exp_nonpositive();
                        for c in 0..e {
                            scratch.values[c * len + t] *= by;
                        }
                    }
                } else {
                    scratch.values[..e * len].fill(T::ZERO);
                }
                let (values, weights) = (view(&near.values, e, keys.len()), view(&near.f, keys.len(), len));
                add_product(view_mut(&mut scratch.values, e, len), values, weights, T::ONE);
                for (t, scale) in scale.iter_mut().enumerate() {
                    *scale = pass.inverse(scratch.values[dv * len + t], queries.start + t)?;
                }
                store_transposed(&scratch.values, len, dv, &mut out[first * dv..(first + len) * dv], |t| scale[t]);
            }
            Ok(())
        })
}

/// The state from which each run's forward scan starts: all keys before the near ones of its first block.
fn key_states<T: Real>(pass: &Pass<'_, T>, cut: &Cut, r: usize) -> Result<Vec<Vec<f64>>> {
    let edge = |p: usize| cut.first_near(p * cut.run);
    let mut states = (0..cut.runs)
        .into_par_iter()
        .map(|p| {
            let last = p + 1 == cut.runs; // nobody reads its sum
            let keys = if last { 0..0 } else { cut.tokens(edge(p)..edge(p + 1)) };
            pass.key_state(keys, r)
        })
        .collect::<Result<Vec<_>>>()?;
    exclusive_prefix_sums(&mut states);
    Ok(states)
}

/// The state from which each run's reverse scan starts, last run first: all queries after those near its last block. `factor(i)` scales
/// query i.
fn query_states<T: Real>(
    pass: &Pass<'_, T>,
    cut: &Cut,
    up: &Upstream<'_, T>,
    factor: impl Fn(usize) -> T + Copy + Sync,
    r: usize,
) -> Result<Vec<Vec<f64>>> {
    let mut states = (0..cut.runs)
        .into_par_iter()
        .rev()
        .map(|p| {
            let after = |p: usize| cut.first_far(cut.of_run(p).end - 1);
            let queries = if p == 0 { 0..0 } else { cut.tokens(after(p - 1)..after(p)) };
            pass.query_state(up, queries, r, factor)
        })
        .collect::<Result<Vec<_>>>()?;
    exclusive_prefix_sums(&mut states);
    Ok(states)
}

/// Adds one head's gradients.
pub(crate) fn backward<T: Real>(pass: &Pass<'_, T>, up: Upstream<'_, T>, grads: HeadGrads<'_, T>) -> Result<()> {
    let HeadGrads { dq, dk, dv: grad_v, mut dkey_bias } = grads;
    let (r_plus, parents, e) = (pass.potential_rank(), pass.parent_rank(), pass.e());
    let (d, dv) = (pass.head.q.ncols(), e - 1);
    let cut = Cut::new(pass, r_plus);
    let potential = pass.tree.weights(&pass.potential(), pass.scale);
    let rows = cut.run * cut.block;
    // f_ij = factor_i w_j p(s_ij) for the far keys.
    let factor = |i: usize| up.rows.scale[i] * (-up.rows.max[i]).exp_nonpositive();

    // Queries, forward: dq whole, and what the near queries give dk, dv and db. What falls to keys of the run before is
    // handed back, and added afterwards.
    let starts = key_states(pass, &cut, r_plus)?;
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
            let mut scratch = Scratch::new(pass, cut.block, r_plus, r_plus);
            let mut near = Near::new(pass, &cut);
            let mut far = Far::new(start, potential.clone(), e);
            let own = p * rows;
            let halo_start = cut.near(p * cut.run).start;
            let mut halo = Halo::new(halo_start..own, d, dv);
            for c in cut.of_run(p) {
                pass.ctx.check()?;
                if c > p * cut.run {
                    for block in cut.first_near(c - 1)..cut.first_near(c) {
                        far.add_keys(pass, cut.tokens(block..block + 1), &mut scratch);
                    }
                }
                let has_far = cut.first_near(c) > 0;
                let (queries, keys) = (cut.tokens(c..c + 1), cut.near(c));
                let len = queries.len();
                let dq = &mut dq[(queries.start - own) * d..(queries.end - own) * d];
                if has_far {
                    pass.load_queries(queries.start, len, &mut scratch.x);
                    pass.tree.features(&scratch.x, len, parents, &mut scratch.features);
                    pass.load_upstream(&up, queries.start, len, factor, &mut scratch.values);
                    pass.pullback(far.weighted(), len, &mut scratch);
                    store_transposed(&scratch.dx, len, d, dq, |_| T::ONE);
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
    let r = pass.rank();
    let of_values = pass.tree.weights(&pass.constants.coefficients, pass.scale);
    let starts: Vec<_> = query_states(pass, &cut, &up, factor, r_plus)?.into_iter().rev().collect();
    let mut db = optional_chunks(dkey_bias, rows, cut.runs);
    (dk.par_chunks_mut(rows * d), grad_v.par_chunks_mut(rows * dv), db.par_iter_mut(), starts)
        .into_par_iter()
        .enumerate()
        .try_for_each(|(p, (dk, dv_, db, start))| {
            let mut scratch = Scratch::new(pass, cut.block, r_plus, r_plus);
            let mut far = Far::new(start, potential.clone(), e);
            let mut for_values = vec![T::ZERO; r * e];
            let own = p * rows;
            for c in cut.of_run(p).rev() {
                pass.ctx.check()?;
                let first = cut.first_far(c);
                if c + 1 < cut.of_run(p).end {
                    for block in first..cut.first_far(c + 1) {
                        far.add_queries(pass, &up, cut.tokens(block..block + 1), factor, &mut scratch);
                    }
                }
                if first >= cut.blocks {
                    continue;
                }
                weigh_into(&far.state.sum()[..r * e], &of_values, e, &mut for_values);
                let keys = cut.tokens(c..c + 1);
                let local = keys.start - own..keys.end - own;
                pass.key_gradients(
                    keys.start,
                    far.weighted(),
                    &for_values,
                    &mut scratch,
                    HeadGrads {
                        dq: &mut [],
                        dk: &mut dk[local.start * d..local.end * d],
                        dv: &mut dv_[local.start * dv..local.end * dv],
                        dkey_bias: db.as_deref_mut().map(|db| &mut db[local]),
                    },
                );
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
    e: usize,
}

impl<T: Real> Far<T> {
    fn new(start: Vec<f64>, weights: Vec<f64>, e: usize) -> Self {
        Self { weighted: vec![T::ZERO; start.len()], state: State::from_sum(start, e), weights, stale: true, e }
    }

    fn weighted(&mut self) -> &[T] {
        if self.stale {
            weigh_into(self.state.sum(), &self.weights, self.e, &mut self.weighted);
            self.stale = false;
        }
        &self.weighted
    }

    fn add_keys(&mut self, pass: &Pass<'_, T>, keys: Range<usize>, scratch: &mut Scratch<T>) {
        pass.load_keys(keys.start, keys.len(), &mut scratch.x);
        pass.load_values(keys.start, keys.len(), true, &mut scratch.values);
        self.add(pass, keys.len(), scratch);
    }

    fn add_queries(
        &mut self,
        pass: &Pass<'_, T>,
        up: &Upstream<'_, T>,
        queries: Range<usize>,
        factor: impl Fn(usize) -> T,
        scratch: &mut Scratch<T>,
    ) {
        pass.load_queries(queries.start, queries.len(), &mut scratch.x);
        pass.load_upstream(up, queries.start, queries.len(), factor, &mut scratch.values);
        self.add(pass, queries.len(), scratch);
    }

    fn add(&mut self, pass: &Pass<'_, T>, len: usize, scratch: &mut Scratch<T>) {
        pass.tree.features(&scratch.x, len, self.weights.len(), &mut scratch.features);
        self.state.add(&scratch.features, &scratch.values, len);
        self.stale = true;
    }
}

/// Where a row's maximum comes from: found among the near scores (and `lowest`), or known from the forward pass (with its scale).
enum Row<'a, 'b, T> {
    Find { max: &'a mut [T], lowest: T },
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
        if let Some(log_weights) = &pass.log_weights {
            add_bias(faer::ColRef::from_slice(&log_weights[keys.clone()]), bq, f);
        }
        mask(queries.start, keys.start, bk, bq, f);
        match row {
            Row::Find { max, lowest } => vectorised(
                #[inline(always)]
                || {
                    max.fill(lowest);
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
        let scale = match row {
            Row::Find { max, .. } => {
                max.fill(T::ZERO);
                None
            }
            Row::Known(up) => Some(&up.rows.scale[queries.clone()]),
        };
        for (j, (f, slope)) in
            self.f.chunks_exact_mut(bq).zip(self.slope.chunks_exact_mut(bq)).enumerate().take(keys.len())
        {
            let w = pass.weight(keys.start + j);
            for i in 0..bq {
                let s = f[i];
                let (mut p, mut dp) = (T::ZERO, T::ZERO);
                for &a in a.iter().rev() {
                    dp = dp * s + p;
                    p = p * s + a;
                }
                let by = if keys.start + j > queries.start + i { T::ZERO } else { w * scale.map_or(T::ONE, |s| s[i]) };
                f[i] = p * by;
                slope[i] = dp * by;
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
        for (slope, ds) in slope.chunks_exact(bq).zip(ds.chunks_exact_mut(bq)) {
            for ((ds, &slope), &delta) in ds.iter_mut().zip(slope).zip(delta) {
                *ds = slope * (*ds - delta);
            }
        }
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

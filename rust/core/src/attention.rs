//! The entry points of attention: checks, and the loop over heads.

use std::sync::Arc;

use faer::MatRef;
use rayon::prelude::*;

use crate::context::Context;
use crate::engines::{self, Prepared, exact};
use crate::error::{Error, Result, expect_len};
use crate::memory::{collected, copied, zeroed};
use crate::numerics::real::Real;
use crate::numerics::stored::Stored;
use crate::plan::report::HeadReport;
use crate::problem::finite::{check_finite, check_result};
use crate::problem::grads::{AttentionGrads, Extras, HeadGrads, RowFactors, expect_views};
use crate::problem::heads::{Copies, Heads, Sizes};
use crate::problem::scores::{Mask, Scores, join_sink};
use crate::spec::{Auto, Engine};
use crate::tolerance::{self, Given, Group, Planned, Saved};

/// What attention to compute: `out = D^-1 A v` with `A = exp(s)` of the [`Scores`], or its low-rank form.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// The engine, or a tolerance.
    pub method: Method,
    /// How scores are made.
    pub scores: Scores,
    /// Whether gradients that are not finite pass through, in place of an error: training in half precision looks for them.
    pub infinite_gradients_pass: bool,
}

/// What computes attention.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// One engine, for all heads.
    Engine(Engine),
    /// For each head the cheapest engine within a tolerance.
    Auto(Auto),
    /// What was chosen before, head by head, held to the same tolerance.
    Planned(Planned),
}

impl From<Engine> for Method {
    fn from(engine: Engine) -> Self {
        Self::Engine(engine)
    }
}

impl Method {
    /// The tolerance that results are held to, if any.
    pub fn tolerance(&self) -> Option<&Auto> {
        match self {
            Self::Engine(_) => None,
            Self::Auto(auto) => Some(auto),
            Self::Planned(plan) => Some(&plan.auto),
        }
    }

    /// Checks everything that does not depend on the arrays, but for the size of their numbers.
    pub fn check(&self, scores: &Scores, bytes: usize) -> Result<()> {
        if let Some(auto) = self.tolerance() {
            auto.check(bytes)?;
        }
        match self {
            Self::Engine(engine) => engine.check(scores),
            Self::Auto(_) => Ok(()),
            Self::Planned(plan) => plan.heads.iter().try_for_each(|head| head.engine.check(scores)),
        }
    }
}

impl Method {
    /// An error where there are arrays of pairs that an engine does not have.
    pub fn check_arrays(&self, mask: bool, bias: bool) -> Result<()> {
        let given = [(mask, "mask"), (bias, "bias")].into_iter().find(|(given, _)| *given);
        match (self, given) {
            (Self::Engine(engine), Some((_, name))) if *engine != Engine::Exact => Err(engine.refuses(name)),
            _ => Ok(()),
        }
    }
}

impl Attention {
    /// By an engine, or within a tolerance.
    pub fn new(method: impl Into<Method>, mask: Mask, scale: f64) -> Self {
        Self { method: method.into(), scores: Scores::new(scale, mask), infinite_gradients_pass: false }
    }

    pub(crate) fn check<T: Real, E: Stored<T>>(&self, heads: &Heads<'_, T, E>) -> Result<Sizes> {
        self.method.check(&self.scores, size_of::<T>())?;
        let sizes = heads.sizes()?;
        self.scores.check(sizes.h, sizes.n, sizes.m)?;
        self.method.check_arrays(heads.allowed.is_some(), heads.bias.is_some())?;
        if let Method::Planned(plan) = &self.method
            && plan.heads.len() != sizes.h
        {
            return Err(Error::Shape(format!("q has {} heads; expected {}, as the plan", sizes.h, plan.heads.len())));
        }
        Ok(sizes)
    }

    /// The engine for these heads.
    fn engine<T: Real>(
        &self,
        engine: &Engine,
        heads: &Heads<'_, T>,
        sizes: &Sizes,
    ) -> Result<Box<dyn engines::Engine<T>>> {
        let may_be_empty = (self.scores.empty_rows_are_zero || heads.sinks.is_some()) && heads.key_bias.is_some();
        engines::of(engine, sizes, &self.scores, may_be_empty)
    }

    /// What is to be run for a head within a tolerance.
    fn given(&self, head: usize) -> Result<(&Auto, Given<'_>)> {
        match &self.method {
            Method::Auto(auto) => Ok((auto, Given::Nothing)),
            Method::Planned(Planned { auto, known: Some(known), .. }) => Ok((auto, Given::Report(&known[head]))),
            Method::Planned(Planned { auto, heads, .. }) => Ok((auto, Given::Plan(&heads[head]))),
            Method::Engine(_) => Err(Error::Argument("no tolerance".into())),
        }
    }

    /// What [`forward`](Self::forward) returned, from the logarithms of the rows' denominators, `(heads, n)`: for exact
    /// attention, which takes nothing else from the data.
    pub fn restore<T: Real>(&self, heads: &Heads<'_, T>, lse: &[f64]) -> Result<Saved<T>> {
        let Sizes { h, n, .. } = self.check(heads)?;
        expect_len("lse", lse.len(), h * n)?;
        let exact = || Arc::new(exact::Exact) as Arc<dyn Prepared<T>>;
        let (row_max, row_scale) = RowFactors::of_log_sums(lse);
        let heads = collected((0..h).map(|_| exact()), "what engines know of the heads")?;
        Ok(Saved { row_max, row_scale, lse: copied(lse, "logarithms of row sums")?, heads, reports: Vec::new() })
    }

    /// Writes `out`, contiguous `(heads, n, d_v)`, and returns what [`backward`](Self::backward) needs.
    ///
    /// Time `O(n m (d + d_v))` a head for the exact engine, `O((n + m) r d_v)` with `r = C(d+g, g)` for the polynomial one,
    /// `O((n + m) r (d + d_v))` for `r` landmarks. Memory beyond `out`: two numbers a query, tiles, and for the low-rank
    /// engines states of `r (d_v + 1)` numbers (8 to 32 in float64, or under a mask 8 to 256 in the arrays' type) for every
    /// head under way, and a float64 number a key where there is a bias.
    pub fn forward<T: Real>(&self, ctx: &Context, heads: &Heads<'_, T>, out: &mut [T]) -> Result<Saved<T>> {
        self.forward_with(ctx, heads, out, false)
    }

    /// The same; with `wants_lse`, [`Saved::lse`] holds the logarithms of the rows' denominators.
    pub fn forward_with<T: Real>(
        &self,
        ctx: &Context,
        heads: &Heads<'_, T>,
        out: &mut [T],
        wants_lse: bool,
    ) -> Result<Saved<T>> {
        let sizes = self.check(heads)?;
        let Sizes { h, n, d_v, .. } = sizes;
        expect_len("out", out.len(), h * n * d_v)?;
        let engine = match &self.method {
            Method::Engine(engine) => Some(self.engine(engine, heads, &sizes)?),
            _ => None,
        };
        // A sink's gradient takes them too.
        let lse = if wants_lse || heads.sinks.is_some() { h * n } else { 0 };
        let mut saved = Saved {
            row_max: zeroed(h * n, "row maxima")?,
            row_scale: zeroed(h * n, "row sums")?,
            lse: zeroed(lse, "logarithms of row sums")?,
            heads: Vec::new(),
            reports: Vec::new(),
        };
        if n == 0 || h == 0 {
            let exact = || Arc::new(exact::Exact) as Arc<dyn Prepared<T>>;
            saved.heads = collected((0..h).map(|_| exact()), "what engines know of the heads")?;
            if self.method.tolerance().is_some() {
                saved.reports = collected((0..h).map(|_| HeadReport::given(Engine::Exact)), "the heads' reports")?;
            }
            return Ok(saved);
        }
        let mut copies = Copies::new();
        let heads = &*heads.without_removed(&mut copies)?;
        heads.check_finite()?;
        let mut lse = split(&mut saved.lse, n, h);
        let (prepared, reports): (Vec<_>, Vec<_>) =
            (out.par_chunks_mut(n * d_v), saved.row_max.par_chunks_mut(n), saved.row_scale.par_chunks_mut(n), &mut lse)
                .into_par_iter()
                .enumerate()
                .map(|(i, (out, max, scale, lse))| {
                    let head = heads.head(i, &self.scores);
                    let (prepared, report): (Arc<dyn Prepared<T>>, _) = match (&self.method, &engine) {
                        (Method::Engine(_), Some(engine)) => {
                            let mut prepared = engine.prepare(ctx, &head)?;
                            prepared.forward(ctx, &head, out, max, scale)?;
                            (Arc::from(prepared), None)
                        }
                        (Method::Engine(_), None) => return Err(Error::Argument("no engine".into())),
                        (Method::Auto(_) | Method::Planned(_), _) => {
                            let (auto, given) = self.given(i)?;
                            let (prepared, report) = tolerance::forward(ctx, &head, auto, given, out, max, scale)?;
                            (Arc::from(prepared), Some(report))
                        }
                    };
                    if !lse.is_empty() {
                        let sums = prepared.log_row_sums(&head, RowFactors { max, scale })?;
                        lse.copy_from_slice(&sums);
                    }
                    if let Some(sink) = head.sink {
                        join_sinks(sink, lse, scale, out);
                    }
                    Ok((prepared, report))
                })
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .unzip();
        saved.heads = prepared;
        saved.reports = reports.into_iter().flatten().collect();
        check_result("out", out, n * d_v)?;
        Ok(saved)
    }

    /// [`forward`](Self::forward) by the exact engine of heads of one query, or of little work, without the preparations
    /// that long calls make: in as many tasks as there is work for, up to `threads`, which `run` runs. `None` where that is
    /// not what was asked for, or where something is to be said of a number; then `forward` says it.
    pub fn forward_here<T: Real, E: Stored<T>>(
        &self,
        threads: usize,
        run: impl FnOnce(&mut [&mut (dyn FnMut() + Send)]),
        heads: &Heads<'_, T, E>,
        out: &mut [E],
        lse: &mut [f64],
    ) -> Option<()> {
        let Sizes { h, n, m, d, d_v, .. } = self.check(heads).ok()?;
        let served = self.method == Method::Engine(Engine::Exact)
            && heads.sinks.is_none()
            && h * n * m > 0
            && out.len() == h * n * d_v
            && exact::one::serves(&heads.head(0, &self.scores));
        if !served {
            return None;
        }
        let some = |first: usize, out: &mut [E], lse: &mut [f64]| {
            let (mut max, mut scale) = (zeroed(n, "row maxima").ok()?, zeroed(n, "row sums").ok()?);
            let mut lse = lse.chunks_mut(n);
            for (i, out) in out.chunks_exact_mut(n * d_v).enumerate() {
                exact::one::forward(&heads.head(first + i, &self.scores), out, &mut max, &mut scale)?;
                if let Some(lse) = lse.next() {
                    let sums = RowFactors { max: &max, scale: &scale };
                    lse.iter_mut().zip(sums.log_sums()).for_each(|(lse, sum)| *lse = sum);
                }
            }
            Some(())
        };
        let parts = (h * n * m * (d + d_v) / WORK_A_THREAD).clamp(1, threads.max(1)).min(h);
        let heads_a_part = h.div_ceil(parts);
        let mut results = vec![Some(()); parts];
        let chunks = out.chunks_mut(heads_a_part * n * d_v).zip(split(lse, heads_a_part * n, parts)).zip(&mut results);
        let mut tasks: Vec<_> = chunks
            .enumerate()
            .map(|(i, ((out, lse), result))| move || *result = some(i * heads_a_part, out, lse))
            .collect();
        let mut tasks: Vec<&mut (dyn FnMut() + Send)> = tasks.iter_mut().map(|task| task as _).collect();
        run(&mut tasks);
        results.into_iter().collect()
    }

    /// The gradients with respect to q, k, v and key_bias of any loss whose gradient with respect to `out` is `dout`
    /// (each `(n, d_v)`). `out` and `saved` are those of [`forward`](Self::forward) on the same inputs.
    ///
    /// Returns a report for each head where there is a tolerance, to which the gradients are then held; or where
    /// `samples > 0`: then the errors of every head's results are measured on so many queries and keys.
    pub fn backward<T: Real>(
        &self,
        ctx: &Context,
        heads: &Heads<'_, T>,
        saved: &Saved<T>,
        out: &[T],
        dout: &[MatRef<'_, T>],
        samples: usize,
        mut grads: AttentionGrads<'_, T>,
    ) -> Result<Vec<HeadReport>> {
        let sizes = self.check(heads)?;
        let Sizes { h, h_kv, n, m, d, d_v } = sizes;
        expect_len("out", out.len(), h * n * d_v)?;
        expect_len("saved", saved.row_max.len(), h * n)?;
        let reports = if self.method.tolerance().is_some() { h } else { 0 };
        if saved.heads.len() != h || saved.reports.len() != reports {
            return Err(Error::Argument("saved comes from another forward pass".into()));
        }
        expect_len("dq", grads.dq.len(), h * n * d)?;
        expect_len("dk", grads.dk.len(), h_kv * m * d)?;
        expect_len("dv", grads.dv.len(), h_kv * m * d_v)?;
        expect_views("dout", dout, h, n, d_v)?;
        if let Some(dbias) = &grads.dbias {
            dbias.check(h, n, m)?;
        }
        if let Some(dsinks) = &grads.dsinks {
            expect_len("dsinks", dsinks.len(), h)?;
            expect_len("saved", saved.lse.len(), h * n)?;
        }
        grads.dk.fill(T::ZERO);
        grads.dv.fill(T::ZERO);
        if let Some(db) = grads.dkey_bias.as_deref_mut() {
            expect_len("dkey_bias", db.len(), h_kv * m)?;
            db.fill(T::ZERO);
        }
        if n == 0 || h == 0 {
            return Ok(Vec::new());
        }
        if !self.infinite_gradients_pass {
            check_finite("dout", dout)?;
        }
        let mut copies = Copies::new();
        let heads = &*heads.without_removed(&mut copies)?;
        let group = h / h_kv;
        let AttentionGrads { dq, dk, dv, dbias, dsinks, dkey_bias } = &mut grads;
        let mut biases: Vec<Option<&mut [T]>> = match dkey_bias {
            Some(db) => db.chunks_mut(m).map(Some).collect(),
            None => (0..h_kv).map(|_| None).collect(),
        };
        let of_group = |kv: usize, dq: &mut [T], mut grads: HeadGrads<'_, T>, mut extras: Extras<'_, T>| {
            let heads = Group { heads, scores: &self.scores, saved, out, dout, first: kv * group, group };
            match (&self.method, self.method.tolerance()) {
                (_, Some(auto)) => heads.backward_within(ctx, auto, dq, grads, extras),
                (Method::Engine(engine), _) if samples > 0 => {
                    heads.backward_measured(ctx, engine, samples, dq, grads, extras)
                }
                _ => heads.backward(ctx, dq, &mut grads, &mut extras).map(|()| Vec::new()),
            }
        };
        let mut sinks = split(dsinks.as_deref_mut().unwrap_or_default(), group, h_kv);
        let reports: Vec<Vec<HeadReport>> = if let Some(dbias) = dbias {
            // Heads may add to the same numbers of a bias, so they take turns; each keeps every thread busy by itself.
            let mut reports = Vec::new();
            let parts = dq.chunks_mut(group * n * d).zip(dk.chunks_mut(m * d)).zip(dv.chunks_mut(m * d_v));
            for (kv, ((((dq, dk), dv), db), dsinks)) in parts.zip(&mut biases).zip(&mut sinks).enumerate() {
                let (dkey_bias, dsinks) = (db.as_deref_mut(), &mut **dsinks);
                let grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias };
                reports.push(of_group(kv, dq, grads, Extras { dbias: Some(dbias.reborrow()), dsinks })?);
            }
            reports
        } else {
            // So do heads that share keys, which add to the same dk and dv.
            let keys = (dk.par_chunks_mut(m * d), dv.par_chunks_mut(m * d_v), biases.par_iter_mut());
            (dq.par_chunks_mut(group * n * d), keys.0, keys.1, keys.2, &mut sinks)
                .into_par_iter()
                .enumerate()
                .map(|(kv, (dq, dk, dv, db, dsinks))| {
                    let (dkey_bias, dsinks) = (db.as_deref_mut(), &mut **dsinks);
                    let grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias };
                    of_group(kv, dq, grads, Extras { dbias: None, dsinks })
                })
                .collect::<Result<_>>()?
        };
        if self.infinite_gradients_pass {
            return Ok(reports.concat());
        }
        check_result("dq", grads.dq, n * d)?;
        check_result("dk", grads.dk, m * d)?;
        check_result("dv", grads.dv, m * d_v)?;
        if let Some(db) = grads.dkey_bias {
            check_result("dkey_bias", db, m)?;
        }
        if let Some(dsinks) = grads.dsinks {
            check_result("dsinks", dsinks, 1)?;
        }
        if let Some(dbias) = grads.dbias {
            check_result("dbias", dbias.data, dbias.data.len().max(1))?;
        }
        Ok(reports.concat())
    }
}

/// Multiplications that one thread does in about 20 microseconds: less is not worth another one.
const WORK_A_THREAD: usize = 1 << 18;

/// `count` consecutive parts of `len` each, or empty ones of nothing.
pub(crate) fn split<T>(x: &mut [T], len: usize, count: usize) -> Vec<&mut [T]> {
    let mut parts: Vec<_> = x.chunks_mut(len.max(1)).collect();
    parts.resize_with(count, Default::default);
    parts
}

/// Adds a sink to the denominators of a head's rows.
pub(crate) fn join_sinks<T: Real>(sink: f64, lse: &mut [f64], scale: &mut [T], out: &mut [T]) {
    let d_v = out.len() / lse.len();
    for ((lse, scale), out) in lse.iter_mut().zip(scale).zip(out.chunks_exact_mut(d_v)) {
        let share = join_sink(lse, sink);
        *scale = T::of(scale.to_f64() * share);
        out.iter_mut().for_each(|x| *x = T::of(x.to_f64() * share));
    }
}

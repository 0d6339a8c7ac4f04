//! The entry points of attention: checks, and the loop over heads.

use std::sync::Arc;

use faer::MatRef;
use rayon::prelude::*;

use crate::context::Context;
use crate::engines::{self, Prepared, exact};
use crate::error::{Error, Result, expect_len};
use crate::memory::{collected, zeroed};
use crate::numerics::real::Real;
use crate::plan::report::HeadReport;
use crate::problem::finite::{check_finite, check_result};
use crate::problem::grads::{AttentionGrads, HeadGrads, expect_views};
use crate::problem::heads::{Heads, Sizes};
use crate::problem::scores::{Mask, Scores};
use crate::spec::{Auto, Engine};
use crate::tolerance::{self, Given, Group, Planned, Saved};

/// What attention to compute: `out = D^-1 A v` with `A = exp(scale q k^T + key_bias)`, or its low-rank form.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// The engine, or a tolerance.
    pub method: Method,
    /// How scores are made.
    pub scores: Scores,
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
    pub fn check(&self, mask: &Mask, bytes: usize) -> Result<()> {
        if let Some(auto) = self.tolerance() {
            auto.check(bytes)?;
        }
        match self {
            Self::Engine(engine) => engine.check(mask),
            Self::Auto(_) => Ok(()),
            Self::Planned(plan) => plan.heads.iter().try_for_each(|head| head.engine.check(mask)),
        }
    }
}

impl Attention {
    /// By an engine, or within a tolerance.
    pub fn new(method: impl Into<Method>, mask: Mask, scale: f64) -> Self {
        Self { method: method.into(), scores: Scores { scale, mask } }
    }

    fn check<T: Real>(&self, heads: &Heads<'_, T>) -> Result<Sizes> {
        self.method.check(&self.scores.mask, size_of::<T>())?;
        let sizes = heads.sizes()?;
        self.scores.check(sizes.n, sizes.m)?;
        if let Method::Planned(plan) = &self.method
            && plan.heads.len() != sizes.h
        {
            return Err(Error::Shape(format!("q has {} heads; expected {}, as the plan", sizes.h, plan.heads.len())));
        }
        Ok(sizes)
    }

    /// Writes `out`, contiguous `(heads, n, d_v)`, and returns what [`backward`](Self::backward) needs.
    ///
    /// Time `O(n m (d + d_v))` a head for the exact engine, `O((n + m) r d_v)` with `r = C(d+g, g)` for the polynomial one,
    /// `O((n + m) r (d + d_v))` for `r` landmarks. Memory beyond `out`: two numbers a query, tiles, and for the low-rank
    /// engines states of `r (d_v + 1)` numbers (8 to 32 in float64, or under a mask 8 to 256 in the arrays' type) for every
    /// head under way, and a float64 number a key where there is a bias.
    pub fn forward<T: Real>(&self, ctx: &Context, heads: &Heads<'_, T>, out: &mut [T]) -> Result<Saved<T>> {
        let sizes = self.check(heads)?;
        let Sizes { h, n, d_v, .. } = sizes;
        expect_len("out", out.len(), h * n * d_v)?;
        let engine = match &self.method {
            Method::Engine(engine) => Some(engines::of(engine, &sizes)?),
            _ => None,
        };
        let mut saved = Saved {
            row_max: zeroed(h * n, "row maxima")?,
            row_scale: zeroed(h * n, "row sums")?,
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
        heads.check_finite()?;
        let (prepared, reports): (Vec<_>, Vec<_>) =
            (out.par_chunks_mut(n * d_v), saved.row_max.par_chunks_mut(n), saved.row_scale.par_chunks_mut(n))
                .into_par_iter()
                .enumerate()
                .map(|(i, (out, max, scale))| {
                    let head = heads.head(i, &self.scores);
                    let (auto, given) = match (&self.method, &engine) {
                        (Method::Auto(auto), _) => (auto, Given::Nothing),
                        (Method::Planned(Planned { auto, known: Some(known), .. }), _) => {
                            (auto, Given::Report(&known[i]))
                        }
                        (Method::Planned(Planned { auto, heads, .. }), _) => (auto, Given::Plan(&heads[i])),
                        (Method::Engine(_), Some(engine)) => {
                            let mut prepared = engine.prepare(ctx, &head)?;
                            prepared.forward(ctx, &head, out, max, scale)?;
                            return Ok((Arc::from(prepared), None));
                        }
                        (Method::Engine(_), None) => return Err(Error::Argument("no engine".into())),
                    };
                    let (prepared, report) = tolerance::forward(ctx, &head, auto, given, out, max, scale)?;
                    Ok((Arc::from(prepared), Some(report)))
                })
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .unzip();
        saved.heads = prepared;
        saved.reports = reports.into_iter().flatten().collect();
        check_result("out", out, n * d_v)?;
        Ok(saved)
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
        grads.dk.fill(T::ZERO);
        grads.dv.fill(T::ZERO);
        let mut biases: Vec<Option<&mut [T]>> = match grads.dkey_bias.as_deref_mut() {
            Some(b) => {
                expect_len("dkey_bias", b.len(), h_kv * m)?;
                b.fill(T::ZERO);
                b.chunks_mut(m.max(1)).map(Some).collect()
            }
            None => (0..h_kv).map(|_| None).collect(),
        };
        if n == 0 || h == 0 {
            return Ok(Vec::new());
        }
        check_finite("dout", dout)?;
        let group = h / h_kv;
        // Heads that share keys add to the same dk and dv, so they take turns; each keeps every thread busy by itself.
        let reports: Vec<Vec<HeadReport>> = (
            grads.dq.par_chunks_mut(group * n * d),
            grads.dk.par_chunks_mut(m * d),
            grads.dv.par_chunks_mut(m * d_v),
            biases.par_iter_mut(),
        )
            .into_par_iter()
            .enumerate()
            .map(|(kv, (dq, dk, dv, db))| {
                let heads = Group { heads, scores: &self.scores, saved, out, dout, first: kv * group, group };
                let mut grads = HeadGrads { dq: &mut [], dk, dv, dkey_bias: db.as_deref_mut() };
                match (&self.method, self.method.tolerance()) {
                    (_, Some(auto)) => heads.backward_within(ctx, auto, dq, grads),
                    (Method::Engine(engine), _) if samples > 0 => {
                        heads.backward_measured(ctx, engine, samples, dq, grads)
                    }
                    _ => heads.backward(ctx, dq, &mut grads).map(|()| Vec::new()),
                }
            })
            .collect::<Result<_>>()?;
        check_result("dq", grads.dq, n * d)?;
        check_result("dk", grads.dk, m * d)?;
        check_result("dv", grads.dv, m * d_v)?;
        if let Some(db) = grads.dkey_bias {
            check_result("dkey_bias", db, m)?;
        }
        Ok(reports.concat())
    }
}

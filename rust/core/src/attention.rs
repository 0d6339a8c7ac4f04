//! The entry points of attention: checks, the loop over heads, and the choice of engine.

use std::borrow::Cow;
use std::sync::Arc;

use faer::{ColRef, MatRef};
use rayon::prelude::*;

use crate::context::Context;
use crate::engines::{exact, landmark, polynomial};
use crate::error::{Error, Result, expect_len};
use crate::linear::monomials::Monomials;
use crate::memory::{collected, collected_in_parallel, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::spec::{Engine, Planned};
use crate::tolerance::{self, Group, HeadReport};

/// The inputs of attention, head by head (batch entries are heads too).
///
/// Query head `i` reads key head `i / (q.len() / k.len())`: with grouped queries several query heads share one.
#[derive(Debug, Clone)]
pub struct Heads<'a, T> {
    /// Queries, each `(n, d)`.
    pub q: Vec<MatRef<'a, T>>,
    /// Keys, each `(m, d)`.
    pub k: Vec<MatRef<'a, T>>,
    /// Values, each `(m, dv)`.
    pub v: Vec<MatRef<'a, T>>,
    /// Added to the scores of a key, each `(m,)`; `-inf` removes the key.
    pub key_bias: Option<Vec<ColRef<'a, T>>>,
}

/// What attention to compute: `out = D^-1 A v` with `A = exp(scale q k^T + key_bias)`, or its polynomial form.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// The engine.
    pub engine: Engine,
    /// Whether query `i` sees only keys `j <= i`.
    pub causal: bool,
    /// Factor of the scores.
    pub scale: f64,
}

/// What the backward pass needs beside the inputs and `out`: two numbers a row, and each head's constants (with
/// the consistent gradient and no mask also its state of the keys, where that is smaller than they are).
#[derive(Debug, Clone)]
pub struct Saved<T> {
    pub(crate) row_max: Vec<T>,
    pub(crate) row_scale: Vec<T>,
    pub(crate) constants: Vec<Constants<T>>,
    /// What is known of each head, where there is a tolerance.
    pub reports: Vec<HeadReport>,
}

/// What an engine's forward pass took from a head's data.
#[derive(Debug, Clone)]
pub(crate) enum Constants<T> {
    /// Nothing.
    Exact,
    Polynomial(polynomial::Constants<T>),
    Landmark(landmark::Constants<T>),
}

/// Where the backward pass puts its results. Contiguous, head after head; what they held before is lost.
#[derive(Debug)]
pub struct AttentionGrads<'a, T> {
    /// `(heads, n, d)`.
    pub dq: &'a mut [T],
    /// `(key heads, m, d)`.
    pub dk: &'a mut [T],
    /// `(key heads, m, dv)`.
    pub dv: &'a mut [T],
    /// `(key heads, m)`.
    pub dkey_bias: Option<&'a mut [T]>,
}

/// One head, as the engines see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a, T> {
    pub index: usize,
    pub q: MatRef<'a, T>,
    pub k: MatRef<'a, T>,
    pub v: MatRef<'a, T>,
    pub key_bias: Option<ColRef<'a, T>>,
}

impl<T: Real> Head<'_, T> {
    /// Whether a bias of `-inf` removes a key: whatever it holds, nothing takes from it and nothing goes to it.
    pub fn removed(&self, key: usize) -> bool {
        self.key_bias.is_some_and(|bias| bias[key] == T::NEG_INFINITY)
    }
}

/// The factors that turn a row of scores into a row of `f`: `f_ij = exp(s_ij - max_i) scale_i`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowFactors<'a, T> {
    pub max: &'a [T],
    pub scale: &'a [T],
}

/// What an engine's backward pass reads beside the head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Upstream<'a, T> {
    pub dout: MatRef<'a, T>,
    /// `dout_i . out_i`.
    pub delta: &'a [T],
    pub rows: RowFactors<'a, T>,
}

/// One head's results. `dq` is overwritten, the others are added to.
#[derive(Debug)]
pub(crate) struct HeadGrads<'a, T> {
    pub dq: &'a mut [T],
    pub dk: &'a mut [T],
    pub dv: &'a mut [T],
    pub dkey_bias: Option<&'a mut [T]>,
}

/// Sizes of a call: heads, key heads, and n, m, d, dv.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Query heads.
    pub h: usize,
    /// Key heads.
    pub h_kv: usize,
    /// Queries a head.
    pub n: usize,
    /// Keys a head.
    pub m: usize,
    /// Width of queries and keys.
    pub d: usize,
    /// Width of values.
    pub dv: usize,
}

impl<'a, T: Real> Heads<'a, T> {
    /// The sizes, once they are known to fit together.
    pub fn sizes(&self) -> Result<Sizes> {
        let shape = |text: String| Err(Error::Shape(text));
        let (h, h_kv) = (self.q.len(), self.k.len());
        if self.v.len() != h_kv {
            return shape(format!("v has {} heads; expected {h_kv}, as many as k", self.v.len()));
        }
        if (h_kv == 0 && h != 0) || (h_kv != 0 && h % h_kv != 0) {
            return shape(format!("q has {h} heads and k {h_kv}; expected a multiple"));
        }
        if h_kv == 0 {
            return Ok(Sizes { h, h_kv, n: 0, m: 0, d: 0, dv: 0 });
        }
        let (n, d) = self.q.first().map_or((0, self.k[0].ncols()), |q| (q.nrows(), q.ncols()));
        let (m, dv) = (self.k[0].nrows(), self.v[0].ncols());
        for (name, views, rows, cols) in [("q", &self.q, n, d), ("k", &self.k, m, d), ("v", &self.v, m, dv)] {
            if let Some(x) = views.iter().find(|x| x.nrows() != rows || x.ncols() != cols) {
                return shape(format!(
                    "a head of {name} has shape ({}, {}); expected ({rows}, {cols})",
                    x.nrows(),
                    x.ncols()
                ));
            }
        }
        if let Some(bias) = &self.key_bias
            && (bias.len() != h_kv || bias.iter().any(|b| b.nrows() != m))
        {
            return shape(format!("key_bias does not hold {h_kv} heads of {m} numbers"));
        }
        if d == 0 || dv == 0 {
            return shape(format!("d = {d} and dv = {dv}; expected at least 1"));
        }
        if m == 0 {
            return shape("k has no rows (m = 0); expected at least one key".into());
        }
        Ok(Sizes { h, h_kv, n, m, d, dv })
    }

    pub(crate) fn head(&self, index: usize) -> Head<'a, T> {
        let kv = index / (self.q.len() / self.k.len());
        Head { index, q: self.q[index], k: self.k[kv], v: self.v[kv], key_bias: self.key_bias.as_ref().map(|b| b[kv]) }
    }

    /// An error where q, k or v holds NaN or infinity, or key_bias NaN or plus infinity.
    pub(crate) fn check_finite(&self) -> Result<()> {
        for (name, views) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            check_finite(name, views)?;
        }
        for b in self.key_bias.iter().flatten() {
            if let Some(j) = b.iter().position(|x| !x.finite() && *x != T::NEG_INFINITY) {
                return Err(Error::NonFinite(format!(
                    "key_bias holds {:?} at key {j}; expected finite numbers or -inf",
                    b[j]
                )));
            }
        }
        Ok(())
    }
}

/// An error naming a head of `views` that holds NaN or infinity (the first, of those that run side by side).
pub fn check_finite<T: Real>(name: &str, views: &[MatRef<'_, T>]) -> Result<()> {
    views.par_iter().enumerate().try_for_each(|(h, x)| {
        let x = if x.row_stride() == 1 { x.transpose() } else { *x };
        // Of entries that are all the same one, one is looked at: there may be more of them than any memory holds; and of
        // rows without entries, none.
        let x = if x.ncols() == 0 { x.subrows(0, 0) } else { x };
        let x = if x.row_stride() == 0 { x.subrows(0, x.nrows().min(1)) } else { x };
        let x = if x.col_stride() == 0 { x.subcols(0, x.ncols().min(1)) } else { x };
        (0..x.nrows().div_ceil(ROWS_A_CHECK)).into_par_iter().try_for_each(|tile| {
            let start = tile * ROWS_A_CHECK;
            let rows = x.subrows(start, ROWS_A_CHECK.min(x.nrows() - start));
            if rows_are_finite(rows) {
                return Ok(());
            }
            Err(Error::NonFinite(format!(
                "{name} holds NaN or infinity (in head {h}, counting from 0); expected finite numbers"
            )))
        })
    })
}

const ROWS_A_CHECK: usize = 4096;

fn rows_are_finite<T: Real>(rows: MatRef<'_, T>) -> bool {
    if rows.col_stride() == 1 && rows.row_stride() == rows.ncols() as isize {
        // SAFETY: the rows follow each other without a gap, so that they are one slice.
        return all_finite(unsafe { std::slice::from_raw_parts(rows.as_ptr(), rows.nrows() * rows.ncols()) });
    }
    rows.row_iter().all(|row| match row.try_as_row_major() {
        Some(row) => all_finite(row.as_slice()),
        None => row.iter().all(|x| x.finite()),
    })
}

/// Whether no number is NaN or infinite.
///
/// 0 x is 0 for finite x and NaN otherwise, so sums tell of all; many of them, so that they vectorise.
pub fn all_finite<T: Real>(x: &[T]) -> bool {
    const SUMS: usize = 32;
    vectorised(
        #[inline(always)]
        || {
            let mut sums = [T::ZERO; SUMS];
            let (whole, rest) = x.as_chunks::<SUMS>();
            for x in whole {
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum += *x * T::ZERO;
                }
            }
            sums.iter().chain(rest).all(|x| x.finite())
        },
    )
}

impl Attention {
    fn check<T: Real>(&self, heads: &Heads<'_, T>) -> Result<Sizes> {
        self.engine.validate(self.causal)?;
        self.engine.check_floor(size_of::<T>())?;
        if !self.scale.is_finite() {
            return Err(Error::Argument(format!("scale is {}; expected a finite number", self.scale)));
        }
        let sizes = heads.sizes()?;
        if let Engine::Planned(plan) = &self.engine
            && plan.heads.len() != sizes.h
        {
            return Err(Error::Shape(format!("q has {} heads; expected {}, as the plan", sizes.h, plan.heads.len())));
        }
        if self.causal && sizes.n != sizes.m {
            return Err(Error::Shape(format!(
                "causal=True with n = {} queries and m = {} keys; expected n == m",
                sizes.n, sizes.m
            )));
        }
        Ok(sizes)
    }

    /// Writes `out`, contiguous `(heads, n, dv)`, and returns what [`backward`](Self::backward) needs.
    ///
    /// Time `O(n m (d + dv))` a head for the exact engine, `O((n + m) r dv)` with `r = C(d+g, g)` for the polynomial one,
    /// `O((n + m) r (d + dv))` for `r` landmarks. Memory beyond `out`: two numbers a query, tiles, and for the low-rank
    /// engines states of `r (dv + 1)` numbers (8 to 32 in float64, or under a mask 8 to 256 in the arrays' type) for every
    /// head under way, and a float64 number a key where there is a bias.
    pub fn forward<T: Real>(&self, ctx: &Context, heads: &Heads<'_, T>, out: &mut [T]) -> Result<Saved<T>> {
        let sizes = self.check(heads)?;
        let Sizes { h, n, dv, .. } = sizes;
        expect_len("out", out.len(), h * n * dv)?;
        let tree = self.tree(&sizes, false)?;
        let mut saved = Saved {
            row_max: zeroed(h * n, "row maxima")?,
            row_scale: zeroed(h * n, "row sums")?,
            constants: collected((0..h).map(|_| Constants::Exact), "what engines know of the heads")?,
            reports: Vec::new(),
        };
        if n == 0 || h == 0 {
            if self.engine.tolerance().is_some() {
                saved.reports = collected((0..h).map(|_| HeadReport::of(Engine::Exact)), "the heads' reports")?;
            }
            return Ok(saved);
        }
        heads.check_finite()?;
        let reports: Vec<Option<HeadReport>> = (
            out.par_chunks_mut(n * dv),
            saved.row_max.par_chunks_mut(n),
            saved.row_scale.par_chunks_mut(n),
            saved.constants.par_iter_mut(),
        )
            .into_par_iter()
            .enumerate()
            .map(|(i, (out, max, scale, constants))| {
                let head = heads.head(i);
                let Some(auto) = self.engine.tolerance() else {
                    *constants = self.run_forward(ctx, &head, &self.engine, tree.as_ref(), out, max, scale)?;
                    return Ok(None);
                };
                let (given, known) = match &self.engine {
                    Engine::Planned(plan) => (Some(&plan.heads[i]), plan.known.as_ref().map(|known| &known[i])),
                    _ => (None, None),
                };
                let (own, report) = tolerance::forward(ctx, &head, self, auto, given, known, out, max, scale)?;
                *constants = own;
                Ok(Some(report))
            })
            .collect::<Result<_>>()?;
        saved.reports = reports.into_iter().flatten().collect();
        check_result("out", out, n * dv)?;
        Ok(saved)
    }

    /// One head's forward pass by one engine. `tree` holds its monomials, if somebody has them.
    pub(crate) fn run_forward<T: Real>(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        engine: &Engine,
        tree: Option<&Monomials>,
        out: &mut [T],
        max: &mut [T],
        scale: &mut [T],
    ) -> Result<Constants<T>> {
        match engine {
            Engine::Polynomial(p) => {
                let (d, e) = (head.q.ncols(), head.v.ncols() + 1);
                let tree =
                    tree.map_or_else(|| polynomial::tree(p, d, e, false).map(Cow::Owned), |t| Ok(Cow::Borrowed(t)))?;
                polynomial::forward(ctx, head, self, p, &tree, out, max, scale).map(Constants::Polynomial)
            }
            Engine::Landmark(l) => landmark::forward(ctx, head, self, l, out, max, scale).map(Constants::Landmark),
            Engine::Exact => exact::forward(ctx, head, self, out, max, scale).map(|()| Constants::Exact),
            Engine::Auto(_) | Engine::Planned(_) => {
                Err(Error::Argument("a tolerance is not an engine of a head".into()))
            }
        }
    }

    /// Adds one head's gradients by the engine of its forward pass.
    pub(crate) fn run_backward<T: Real>(
        &self,
        ctx: &Context,
        head: &Head<'_, T>,
        saved: &Saved<T>,
        (out, dout): (&[T], MatRef<'_, T>),
        tree: Option<&Monomials>,
        grads: HeadGrads<'_, T>,
    ) -> Result<()> {
        let delta = delta(dout, out)?;
        let (max, scale) = saved.rows(head.index);
        let up = Upstream { dout, delta: &delta, rows: RowFactors { max, scale } };
        match (&saved.constants[head.index], saved.engine(head.index, self)) {
            (Constants::Exact, _) => exact::backward(ctx, head, self, up, grads),
            (Constants::Polynomial(constants), Engine::Polynomial(p)) => {
                let (d, e) = (head.q.ncols(), head.v.ncols() + 1);
                let tree =
                    tree.map_or_else(|| polynomial::tree(p, d, e, true).map(Cow::Owned), |t| Ok(Cow::Borrowed(t)))?;
                polynomial::backward(ctx, head, self, p, &tree, constants, up, grads)
            }
            (Constants::Landmark(constants), Engine::Landmark(l)) => {
                landmark::backward(ctx, head, self, l, constants, up, grads)
            }
            _ => Err(Error::Argument("saved comes from another engine's forward pass".into())),
        }
    }

    /// The gradients with respect to q, k, v and key_bias of any loss whose gradient with respect to `out` is `dout`
    /// (each `(n, dv)`). `out` and `saved` are those of [`forward`](Self::forward) on the same inputs.
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
        let Sizes { h, h_kv, n, m, d, dv } = sizes;
        expect_len("out", out.len(), h * n * dv)?;
        expect_len("saved", saved.row_max.len(), h * n)?;
        let reports = if self.engine.tolerance().is_some() { h } else { 0 };
        if saved.constants.len() != h || saved.reports.len() != reports {
            return Err(Error::Argument("saved comes from another forward pass".into()));
        }
        expect_len("dq", grads.dq.len(), h * n * d)?;
        expect_len("dk", grads.dk.len(), h_kv * m * d)?;
        expect_len("dv", grads.dv.len(), h_kv * m * dv)?;
        expect_views("dout", dout, h, n, dv)?;
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
        let tree = self.tree(&sizes, true)?;
        let group = h / h_kv;
        // Heads that share keys add to the same dk and dv, so they take turns; each keeps every thread busy by itself.
        let reports: Vec<Vec<HeadReport>> = (
            grads.dq.par_chunks_mut(group * n * d),
            grads.dk.par_chunks_mut(m * d),
            grads.dv.par_chunks_mut(m * dv),
            biases.par_iter_mut(),
        )
            .into_par_iter()
            .enumerate()
            .map(|(kv, (dq, dk, dv_, db))| {
                let of =
                    Group { heads, attention: self, saved, out, dout, first: kv * group, group, tree: tree.as_ref() };
                let mut grads = HeadGrads { dq: &mut [], dk, dv: dv_, dkey_bias: db.as_deref_mut() };
                match self.engine.tolerance() {
                    Some(auto) => of.backward_within(ctx, auto, dq, grads),
                    None if samples > 0 => of.backward_measured(ctx, samples, dq, grads),
                    None => of.backward(ctx, dq, &mut grads).map(|()| Vec::new()),
                }
            })
            .collect::<Result<_>>()?;
        check_result("dq", grads.dq, n * d)?;
        check_result("dk", grads.dk, m * d)?;
        check_result("dv", grads.dv, m * dv)?;
        if let Some(db) = grads.dkey_bias {
            check_result("dkey_bias", db, m)?;
        }
        Ok(reports.concat())
    }

    /// The monomials that all heads share.
    fn tree(&self, sizes: &Sizes, backward: bool) -> Result<Option<Monomials>> {
        match &self.engine {
            Engine::Polynomial(p) => polynomial::tree(p, sizes.d, sizes.dv + 1, backward).map(Some),
            _ => Ok(None),
        }
    }
}

impl<T> Saved<T> {
    /// The engines that were used within a tolerance, to be used again on the same data.
    pub fn planned(&self, attention: &Attention) -> Option<Planned> {
        let auto = attention.engine.tolerance()?.clone();
        let heads = self.reports.iter().map(|report| report.plan.clone()).collect();
        Some(Planned { auto, heads: Arc::new(heads), known: Some(Arc::new(self.reports.clone())) })
    }

    /// A head's row factors.
    pub(crate) fn rows(&self, head: usize) -> (&[T], &[T]) {
        let n = self.row_max.len() / self.constants.len();
        (&self.row_max[head * n..(head + 1) * n], &self.row_scale[head * n..(head + 1) * n])
    }

    /// The engine that computed a head.
    pub(crate) fn engine<'a>(&'a self, head: usize, attention: &'a Attention) -> &'a Engine {
        self.reports.get(head).map_or(&attention.engine, |report| &report.plan.engine)
    }
}

/// An error where a result of one head is not finite: its inputs were, so something overflowed.
fn check_result<T: Real>(name: &str, result: &[T], head: usize) -> Result<()> {
    let bad = result.par_chunks(head).position_first(|x| !all_finite(x));
    match bad {
        None => Ok(()),
        Some(h) => Err(Error::NonFinite(format!(
            "{name} overflows in head {h} (counting from 0): its inputs are too large for their dtype; scale them down, or use \
             float64"
        ))),
    }
}

/// An error where `views` are not `h` heads of shape `(n, d)`.
pub(crate) fn expect_views<T>(name: &str, views: &[MatRef<'_, T>], h: usize, n: usize, d: usize) -> Result<()> {
    if views.len() != h {
        return Err(Error::Shape(format!("{name} has {} heads; expected {h}", views.len())));
    }
    match views.iter().find(|x| x.nrows() != n || x.ncols() != d) {
        None => Ok(()),
        Some(x) => {
            Err(Error::Shape(format!("a head of {name} has shape ({}, {}); expected ({n}, {d})", x.nrows(), x.ncols())))
        }
    }
}

/// `delta_i = dout_i . out_i`.
pub(crate) fn delta<T: Real>(dout: MatRef<'_, T>, out: &[T]) -> Result<Vec<T>> {
    let of_row = |(i, out): (usize, &[T])| {
        let sum: f64 = dout.row(i).iter().zip(out).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
        T::of(sum)
    };
    collected_in_parallel(out.par_chunks(dout.ncols()).enumerate().map(of_row), "products of dout and out")
}

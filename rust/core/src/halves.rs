//! Attention of arrays in half precision: computed in float32, sums kept in float32 or wider, results rounded once.
//!
//! The exact engine reads arrays as they lie, tile by tile. Other engines get a group of heads at a time in float32.

use faer::MatRef;
use rayon::prelude::*;

use crate::attention::{Attention, Method, join_sinks, split};
use crate::context::Context;
use crate::engines::exact;
use crate::error::{Error, Result, expect_len};
use crate::memory::{room, zeroed};
use crate::numerics::stored::Stored;
use crate::plan::report::HeadReport;
use crate::problem::finite::{check_result, check_stored};
use crate::problem::grads::{
    AttentionGrads, BiasGrads, HeadGrads, RowFactors, Upstream, delta, expect_views, sink_gradient,
};
use crate::problem::heads::{Copies, Heads, Sizes};
use crate::problem::scores::Scores;
use crate::spec::Engine;

/// What errors call copies of a group of heads.
const COPIES: &str = "a group of heads in float32";

/// Number after number, rounded.
fn narrow<E: Stored<f32>>(x: &[f32], to: &mut [E]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to = E::narrow(*x));
}

/// Views of some matrices in float32, whose numbers `copy` takes.
fn widened<'a, E: Stored<f32>>(views: &[MatRef<'_, E>], copy: &'a mut Vec<f32>) -> Result<Vec<MatRef<'a, f32>>> {
    let count = views.iter().map(|x| x.nrows() * x.ncols()).sum();
    *copy = room(count, COPIES)?;
    for row in views.iter().flat_map(|x| x.row_iter()) {
        copy.extend(row.iter().map(|x| x.widen()));
    }
    let mut first = 0;
    let view = |x: &MatRef<'_, E>| {
        let len = x.nrows() * x.ncols();
        first += len;
        MatRef::from_row_major_slice(&copy[first - len..first], x.nrows(), x.ncols())
    };
    Ok(views.iter().map(view).collect())
}

/// Query heads that share keys, in float32.
#[derive(Default)]
struct Widened {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Attention {
    fn is_exact(&self) -> bool {
        self.method == Method::Engine(Engine::Exact)
    }

    /// The same for some of the heads.
    fn of_heads(&self, first: usize, count: usize, h: usize) -> Self {
        let masks = (first..first + count).map(|i| self.scores.mask(i, h).clone()).collect();
        let method = match &self.method {
            Method::Planned(plan) => {
                let heads = plan.heads[first..first + count].to_vec().into();
                let known = plan.known.as_ref().map(|known| known[first..first + count].to_vec().into());
                Method::Planned(crate::tolerance::Planned { heads, known, ..plan.clone() })
            }
            method => method.clone(),
        };
        Self { method, scores: Scores { masks, ..self.scores.clone() }, ..self.clone() }
    }

    /// Writes `out`, contiguous `(heads, n, d_v)`, and into `lse (heads, n)` the logarithms of the rows' denominators, where
    /// it has room. Returns a report for each head where there is a tolerance, which is held before results are rounded.
    pub fn forward_half<E: Stored<f32>>(
        &self,
        ctx: &Context,
        heads: &Heads<'_, f32, E>,
        out: &mut [E],
        lse: &mut [f64],
    ) -> Result<Vec<HeadReport>> {
        let Sizes { h, h_kv, n, d_v, .. } = self.check(heads)?;
        expect_len("out", out.len(), h * n * d_v)?;
        expect_len("lse", lse.len(), if lse.is_empty() { 0 } else { h * n })?;
        if n == 0 || h == 0 {
            return Ok(Vec::new());
        }
        let mut copies = Copies::new();
        let heads = &*heads.without_removed(&mut copies)?;
        heads.check_finite()?;
        let reports = if self.is_exact() {
            let mut lse = split(lse, n, h);
            (out.par_chunks_mut(n * d_v), &mut lse).into_par_iter().enumerate().try_for_each(|(i, (out, lse))| {
                let head = heads.head(i, &self.scores);
                let (mut max, mut scale) = (zeroed(n, "row maxima")?, zeroed(n, "row sums")?);
                let Some(sink) = head.sink else {
                    exact::forward(ctx, &head, out, &mut max, &mut scale)?;
                    let sums = RowFactors { max: &max, scale: &scale };
                    lse.iter_mut().zip(sums.log_sums()).for_each(|(lse, sum)| *lse = sum);
                    return Ok(());
                };
                let mut wide = zeroed(n * d_v, COPIES)?;
                exact::forward(ctx, &head, &mut wide, &mut max, &mut scale)?;
                let mut sums: Vec<f64> = RowFactors { max: &max, scale: &scale }.log_sums().collect();
                join_sinks(sink, &mut sums, &mut scale, &mut wide);
                lse.iter_mut().zip(sums).for_each(|(lse, sum)| *lse = sum);
                narrow(&wide, out);
                Ok(())
            })?;
            Vec::new()
        } else {
            let group = h / h_kv;
            let mut lse = split(lse, group * n, h_kv);
            let mut reports = Vec::new();
            for (kv, (out, lse)) in out.chunks_mut(group * n * d_v).zip(&mut lse).enumerate() {
                let mut copies = Widened::default();
                let heads = group_of(heads, kv, group, &mut copies)?;
                let mut wide = zeroed(out.len(), COPIES)?;
                let some = self.of_heads(kv * group, group, h);
                let saved =
                    some.forward_with(ctx, &heads, &mut wide, !lse.is_empty()).map_err(|e| named(e, kv * group))?;
                lse.iter_mut().zip(&saved.lse).for_each(|(lse, sum)| *lse = *sum);
                narrow(&wide, out);
                reports.extend(saved.reports);
            }
            reports
        };
        let good = |row: &[E]| row.iter().all(|x| x.widen().is_finite());
        match out.par_chunks(n * d_v).position_first(|out| !good(out)) {
            None => Ok(reports),
            Some(head) => Err(overflow("out", head)),
        }
    }

    /// The gradients, from what [`forward_half`](Self::forward_half) was given and returned; see
    /// [`backward`](Self::backward).
    pub fn backward_half<E: Stored<f32>>(
        &self,
        ctx: &Context,
        heads: &Heads<'_, f32, E>,
        (out, lse): (&[E], &[f64]),
        dout: &[MatRef<'_, E>],
        samples: usize,
        grads: AttentionGrads<'_, E>,
    ) -> Result<Vec<HeadReport>> {
        let sizes = self.check(heads)?;
        let Sizes { h, h_kv, n, m, d, d_v } = sizes;
        expect_len("out", out.len(), h * n * d_v)?;
        expect_len("lse", lse.len(), h * n)?;
        expect_views("dout", dout, h, n, d_v)?;
        if n == 0 || h == 0 {
            return Ok(Vec::new());
        }
        if !self.infinite_gradients_pass {
            check_stored("dout", dout)?;
        }
        let mut copies = Copies::new();
        let heads = &*heads.without_removed(&mut copies)?;
        let group = h / h_kv;
        let AttentionGrads { dq, dk, dv, dkey_bias, dbias, dsinks } = grads;
        let mut wide_bias = zeroed::<f32>(dbias.as_ref().map_or(0, |dbias| dbias.data.len()), "gradients of a bias")?;
        let call = Call { attention: self, ctx, heads, out, lse, dout, samples, sizes, group };
        let biased = dkey_bias.is_some();
        let mut key_biases = split(dkey_bias.unwrap_or_default(), m, h_kv);
        let mut sinks = split(dsinks.unwrap_or_default(), group, h_kv);
        let of_group = |kv, to: [&mut [E]; 5], dbias: Option<BiasGrads<'_, f32>>| {
            let [dq, dk, dv, db, dsinks] = to;
            let zeros = |len: usize| zeroed::<f32>(len, COPIES);
            let (mut wide_q, mut wide_k, mut wide_v) = (zeros(group * n * d)?, zeros(m * d)?, zeros(m * d_v)?);
            let (mut wide_b, mut wide_s) = (zeros(if biased { m } else { 0 })?, zeros(dsinks.len())?);
            let grads = AttentionGrads {
                dkey_bias: biased.then_some(&mut wide_b[..]),
                dbias,
                dsinks: (!wide_s.is_empty()).then_some(&mut wide_s[..]),
                ..AttentionGrads::new(&mut wide_q, &mut wide_k, &mut wide_v)
            };
            let reports = call.group(kv, grads)?;
            for (to, x) in [(dq, &wide_q), (dk, &wide_k), (dv, &wide_v), (db, &wide_b), (dsinks, &wide_s)] {
                narrow(x, to);
            }
            Ok(reports)
        };
        let parts = dq.chunks_mut(group * n * d).zip(dk.chunks_mut(m * d)).zip(dv.chunks_mut(m * d_v));
        let parts: Vec<_> = parts.zip(&mut key_biases).zip(&mut sinks).enumerate().collect();
        let reports: Vec<Vec<HeadReport>> = match dbias {
            None => parts
                .into_par_iter()
                .map(|(kv, ((((dq, dk), dv), db), sinks))| of_group(kv, [dq, dk, dv, db, sinks], None))
                .collect::<Result<_>>()?,
            // Heads may share numbers of the bias: they take turns.
            Some(dbias) => {
                let mut wide = BiasGrads {
                    data: &mut wide_bias,
                    offsets: dbias.offsets,
                    row_stride: dbias.row_stride,
                    col_stride: dbias.col_stride,
                };
                let mut reports = Vec::new();
                for (kv, ((((dq, dk), dv), db), sinks)) in parts {
                    reports.push(of_group(kv, [dq, dk, dv, db, sinks], Some(wide.reborrow()))?);
                }
                narrow(&wide_bias, dbias.data);
                reports
            }
        };
        Ok(reports.concat())
    }
}

/// A call of the backward pass.
struct Call<'a, 'b, E> {
    attention: &'a Attention,
    ctx: &'a Context,
    heads: &'a Heads<'b, f32, E>,
    out: &'a [E],
    lse: &'a [f64],
    dout: &'a [MatRef<'b, E>],
    samples: usize,
    sizes: Sizes,
    group: usize,
}

impl<E: Stored<f32>> Call<'_, '_, E> {
    /// The gradients of the query heads that share key head `kv`.
    fn group(&self, kv: usize, grads: AttentionGrads<'_, f32>) -> Result<Vec<HeadReport>> {
        let Sizes { h, n, m, d, d_v, .. } = self.sizes;
        let (first, group) = (kv * self.group, self.group);
        let rows = |i: usize| i * n..(i + 1) * n;
        if !self.attention.is_exact() || self.samples > 0 {
            let mut copies = (Widened::default(), Vec::new(), Vec::new());
            let heads = group_of(self.heads, kv, group, &mut copies.0)?;
            let dout = widened(&self.dout[first..first + group], &mut copies.1)?;
            let some = self.attention.of_heads(first, group, h);
            let out = &self.out[first * n * d_v..(first + group) * n * d_v];
            let mut wide = zeroed(out.len(), COPIES)?;
            let saved = some.forward_with(self.ctx, &heads, &mut wide, false).map_err(|e| named(e, first))?;
            copies.2 = wide;
            return some
                .backward(self.ctx, &heads, &saved, &copies.2, &dout, self.samples, grads)
                .map_err(|e| named(e, first));
        }
        let AttentionGrads { dq, dk, dv, mut dkey_bias, mut dbias, mut dsinks } = grads;
        for (i, dq) in (first..first + group).zip(dq.chunks_mut(n * d)) {
            let head = self.heads.head(i, &self.attention.scores);
            let delta = delta(self.dout[i], &self.out[i * n * d_v..(i + 1) * n * d_v])?;
            let (max, scale) = RowFactors::of_log_sums(&self.lse[rows(i)]);
            let up = Upstream { dout: self.dout[i], delta: &delta, rows: RowFactors { max: &max, scale: &scale } };
            let (dk, dv) = (&mut dk[..m * d], &mut dv[..m * d_v]);
            let grads = HeadGrads { dq, dk, dv, dkey_bias: dkey_bias.as_deref_mut() };
            exact::backward(self.ctx, &head, up, grads, dbias.as_mut().map(BiasGrads::reborrow))?;
            if let (Some(sink), Some(dsinks)) = (head.sink, &mut dsinks) {
                dsinks[i - first] = sink_gradient(sink, &self.lse[rows(i)], &delta);
            }
        }
        if !self.attention.infinite_gradients_pass {
            for (name, x, len) in [("dq", &*dq, n * d), ("dk", &*dk, m * d), ("dv", &*dv, m * d_v)] {
                check_result(name, x, len)?;
            }
        }
        Ok(Vec::new())
    }
}

/// The query heads that share key head `kv`, in float32, of a call without arrays of pairs.
fn group_of<'a, E: Stored<f32>>(
    heads: &'a Heads<'_, f32, E>,
    kv: usize,
    group: usize,
    copies: &'a mut Widened,
) -> Result<Heads<'a, f32>> {
    let first = kv * group;
    let q = widened(&heads.q[first..first + group], &mut copies.q)?;
    let k = widened(&heads.k[kv..kv + 1], &mut copies.k)?;
    let v = widened(&heads.v[kv..kv + 1], &mut copies.v)?;
    if heads.bias.is_some() {
        return Err(Error::Argument("a bias in half precision is read by Exact() alone, without samples".into()));
    }
    Ok(Heads {
        key_bias: heads.key_bias.as_ref().map(|biases| vec![biases[kv]]),
        allowed: heads.allowed.as_ref().map(|allowed| allowed[first..first + group].to_vec()),
        sinks: heads.sinks.as_ref().map(|sinks| sinks[first..first + group].to_vec()),
        ..Heads::new(q, k, v)
    })
}

/// An error of a group, whose heads are counted from its first one.
fn named(error: Error, first: usize) -> Error {
    let text = |text: String| if first == 0 { text } else { format!("{text} (of heads counted from {first} on)") };
    match error {
        Error::Denominator(t) => Error::Denominator(text(t)),
        Error::NonFinite(t) => Error::NonFinite(text(t)),
        other => other,
    }
}

fn overflow(name: &str, head: usize) -> Error {
    Error::NonFinite(format!("{name} overflows its dtype in head {head} (counting from 0); use float32"))
}

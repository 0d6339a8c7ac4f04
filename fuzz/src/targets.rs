//! The functions that inputs are made for.

use std::collections::BTreeMap;
use std::sync::Arc;

use lingrad_core::layers::activation::{self, ActivationKind};
use lingrad_core::layers::attention_block::{SelfAttention, Weights};
use lingrad_core::layers::{cross_entropy, embedding, feed_forward, linear, norm};
use lingrad_core::measure::{ErrorEstimate, Squares, measure_error};
use lingrad_core::model::{self as transformer, Config, Input, Norm, Params};
use lingrad_core::plan::choice::{Costs, DEGREES, Planner, RANKS};
use lingrad_core::plan::report::HeadPlan;
use lingrad_core::plan::sampled::{self, HeadArrays};
use lingrad_core::spec::{
    Auto, Coefficients, Diagonal, Engine, Gradient, Landmark, LandmarkConstants, Polynomial, Shift,
};
use lingrad_core::{Attention, AttentionGrads, Context, HeadReport, Heads, Mask, Method, Planned, Real, Rows, Scores};

use crate::Find;
use crate::source::{Column, Matrix, Source};

/// What an input is computed by, and in how many of them.
#[derive(Debug)]
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    pub(crate) weight: usize,
    pub(crate) run: fn(&mut Source<'_>) -> Result<(), Find>,
}

/// All of them.
pub static TARGETS: [Target; 8] = [
    Target { name: "attention, float32", weight: 22, run: attention::<f32> },
    Target { name: "attention, float64", weight: 22, run: attention::<f64> },
    Target { name: "measure", weight: 10, run: measure::<f64> },
    Target { name: "sampled", weight: 10, run: of_samples::<f32> },
    Target { name: "layers, float32", weight: 10, run: layer::<f32> },
    Target { name: "layers, float64", weight: 10, run: layer::<f64> },
    Target { name: "self-attention", weight: 8, run: self_attention::<f32> },
    Target { name: "transformer", weight: 8, run: whole::<f64> },
];

/// No number of these is NaN or infinite.
fn finite<T: Real>(name: &str, numbers: &[T]) -> Result<(), Find> {
    match numbers.iter().all(|x| x.to_f64().is_finite()) {
        true => Ok(()),
        false => Err(format!("{name} is not finite")),
    }
}

fn proper(e: &ErrorEstimate) -> Result<(), Find> {
    match e.low >= 0.0 && e.low <= e.high && !e.relative.is_nan() {
        true => Ok(()),
        false => Err(format!("an estimate is not proper: {e:?}")),
    }
}

/// All that a function writes is finite where nothing that it was given is odd; it may refuse.
fn written<T: Real, X>(
    s: &Source<'_>,
    name: &str,
    done: lingrad_core::Result<X>,
    results: &[&[T]],
) -> Result<(), Find> {
    match done {
        Ok(_) if s.plain() => results.iter().try_for_each(|x| finite(name, x)),
        _ => Ok(()),
    }
}

/// A buffer for results, which holds what is not finite until it is written.
fn buffer<T: Real>(s: &mut Source<'_>, count: usize) -> Vec<T> {
    vec![T::of(f64::NAN); s.near(count)]
}

fn context(s: &mut Source<'_>) -> Context {
    let ctx = Context::new();
    if s.oddly() && s.one_in(4) {
        ctx.cancel();
    }
    ctx
}

fn polynomial(s: &mut Source<'_>, d: usize) -> Polynomial {
    // What high degrees need for wide heads is a matter of memory alone.
    let high = match d {
        0..=2 => 12,
        3..=8 => 5,
        _ => 2,
    };
    let degree = match s.size(&[1, 1, 2, 2, 3, 4, high]) {
        large if large > high && large < 1 << 31 && d > 1 => high,
        degree => degree,
    };
    let count = s.near(degree.saturating_add(1).min(20));
    let given: Vec<f64> = (0..count).map(|_| s.number(&[1.0, 0.5, 0.2, 0.0, -0.1])).collect();
    let ends = |s: &mut Source<'_>| {
        let count = s.near(d);
        (0..count).map(|_| s.number(&[0.0, 0.1, -1.0])).collect::<Vec<f64>>()
    };
    let shift = Shift::Given(ends(s), ends(s));
    Polynomial {
        degree,
        coefficients: s.pick(&[Coefficients::Taylor, Coefficients::Fitted, Coefficients::Given(given)]),
        gradient: s.pick(&[Gradient::ClosedForm, Gradient::Consistent]),
        shift: s.pick(&[Shift::None, Shift::None, Shift::Mean, shift]),
        diagonal: s.pick(&[Diagonal::Exact, Diagonal::Polynomial]),
        window: s.size(&[0, 1, 2, 5, 16, 64, 64, 1000]),
    }
}

fn landmark(s: &mut Source<'_>, d: usize) -> Landmark {
    let rank = s.size(&[1, 2, 4, 16, 64, 256]);
    let r = s.pick(&[1, 2, 5]);
    let given = s.one_in(4).then(|| {
        let numbers = |s: &mut Source<'_>, count: usize| {
            let count = s.near(count);
            s.numbers::<f64>(count)
        };
        Arc::new(LandmarkConstants {
            scale: s.number(&[0.5, 1.0, -1.0]),
            query_shift: numbers(s, d),
            key_shift: numbers(s, d),
            balance: s.number(&[1.0, 0.5, 2.0]),
            landmarks: numbers(s, r * d),
            matrix: numbers(s, r * r),
        })
    });
    Landmark { rank, seed: s.bits(), constants: given }
}

fn auto(s: &mut Source<'_>) -> Auto {
    let tol = s.number(&[0.9, 0.5, 0.1, 1e-2, 1e-4, 1e-5, 1e-12]);
    Auto { tol, gradients: s.flag(), strict_causal: s.flag(), seed: s.bits() }
}

fn engine(s: &mut Source<'_>, d: usize, heads: usize) -> Method {
    match s.below(8) {
        0 => Engine::Exact.into(),
        1..=3 => Engine::Polynomial(polynomial(s, d)).into(),
        4 => Engine::Landmark(landmark(s, d)).into(),
        5 => Method::Auto(auto(s)),
        _ => {
            let heads = s.near(heads).min(100);
            let plans = (0..heads).map(|_| HeadPlan {
                engine: match s.below(4) {
                    0 => Engine::Exact,
                    1 | 2 => Engine::Polynomial(polynomial(s, d)),
                    _ => Engine::Landmark(landmark(s, d)),
                },
                predicted_error: Some(s.number(&[0.1])),
                cost: s.number(&[1.0]),
                exact_cost: s.number(&[2.0]),
                whole_sequence: Vec::new(),
                reason: String::new(),
            });
            let plans = Arc::new(plans.collect());
            Method::Planned(Planned { auto: auto(s), heads: plans, known: None })
        }
    }
}

/// The arrays of attention.
struct Arrays<T> {
    q: Vec<Matrix<T>>,
    k: Vec<Matrix<T>>,
    v: Vec<Matrix<T>>,
    bias: Option<Vec<Column<T>>>,
    causal: bool,
    /// h, h_kv, n, m, d, dv
    sizes: [usize; 6],
}

impl<T: Real> Arrays<T> {
    fn new(s: &mut Source<'_>) -> Self {
        let (n, causal) = (s.tokens(), s.flag());
        let m = if causal || s.flag() { n } else { s.tokens() };
        let m = if s.oddly() { m } else { m.max(1) };
        let n = if causal && !s.oddly() { m } else { n };
        let (d, dv) = (s.size(&[1, 2, 3, 5, 8]).min(70), s.size(&[1, 2, 3, 5]).min(70));
        let h_kv = if n.max(m) > 300 { 1 } else { s.pick(&[1, 1, 1, 2, 3]) };
        let h = h_kv * s.pick(&[1, 1, 2]);
        let (h, h_kv) = (s.near(h), s.near(h_kv));
        let all = |s: &mut Source<'_>, count, n, d| (0..count).map(|_| s.matrix(n, d)).collect::<Vec<_>>();
        let (q, k, v) = (all(s, h, n, d), all(s, h_kv, m, d), all(s, h_kv, m, dv));
        let bias = s.one_in(3).then(|| (0..s.near(h_kv)).map(|_| s.column(m, true)).collect());
        Self { q, k, v, bias, causal, sizes: [h, h_kv, n, m, d, dv] }
    }

    fn heads(&self) -> Heads<'_, T> {
        fn views<T: Real>(x: &[Matrix<T>]) -> Vec<lingrad_core::MatRef<'_, T>> {
            x.iter().map(Matrix::view).collect()
        }
        let key_bias = self.bias.as_ref().map(|bias| bias.iter().map(Column::view).collect());
        Heads { key_bias, ..Heads::new(views(&self.q), views(&self.k), views(&self.v)) }
    }
}

fn attention<T: Real>(s: &mut Source<'_>) -> Result<(), Find> {
    let arrays = Arrays::<T>::new(s);
    let [h, h_kv, n, m, d, dv] = arrays.sizes;
    let mut heads = arrays.heads();
    let scale = s.number(&[0.5, 1.0, -1.0, 0.0, 3.0]);
    let mut attention = Attention::new(engine(s, d, h), Mask::causal(arrays.causal), scale);
    if s.one_in(3) {
        with_options(s, n, m, &mut attention);
        let count = s.near(h);
        heads.sinks = s.one_in(3).then(|| s.numbers(count));
    }
    s.tell(&(arrays.sizes, &attention));
    let ctx = context(s);
    for turn in 0..2 {
        let mut out = buffer::<T>(s, h * n * dv);
        let Ok(saved) = attention.forward(&ctx, &heads, &mut out) else { return Ok(()) };
        finite("out", &out)?;
        of_heads(&saved.reports)?;
        let dout: Vec<Matrix<T>> = (0..s.near(h)).map(|_| s.matrix(n, dv)).collect();
        let dout: Vec<_> = dout.iter().map(Matrix::view).collect();
        let (mut dq, mut dk, mut dv_) =
            (buffer::<T>(s, h * n * d), buffer::<T>(s, h_kv * m * d), buffer(s, h_kv * m * dv));
        let mut db = heads.key_bias.is_some().then(|| buffer::<T>(s, h_kv * m));
        let grads = AttentionGrads { dkey_bias: db.as_deref_mut(), ..AttentionGrads::new(&mut dq, &mut dk, &mut dv_) };
        let samples = s.size(&[0, 0, 1, 2, 8, 64]);
        if let Ok(reports) = attention.backward(&ctx, &heads, &saved, &out, &dout, samples, grads) {
            for (name, x) in [("dq", &dq), ("dk", &dk), ("dv", &dv_), ("dkey_bias", db.as_ref().unwrap_or(&Vec::new()))]
            {
                finite(name, x)?;
            }
            of_heads(&reports)?;
        }
        match attention.method.tolerance() {
            Some(auto) if turn == 0 => {
                let (auto, heads) = (auto.clone(), saved.reports.iter().map(|report| report.plan.clone()).collect());
                let known = s.flag().then(|| Arc::new(saved.reports.clone()));
                attention.method = Method::Planned(Planned { auto, heads: Arc::new(heads), known });
            }
            _ => break,
        }
    }
    Ok(())
}

/// Options of scores, which need not fit.
fn with_options(s: &mut Source<'_>, n: usize, m: usize, attention: &mut Attention) {
    let side = |s: &mut Source<'_>| s.one_in(3).then(|| s.size(&[0, 1, 7, 64, 200]));
    let offset = s.size(&[0, 1, m / 2, m]) as isize - s.size(&[0, 0, 1, n]) as isize;
    let mut mask = Mask::band(s.flag(), offset, side(s), side(s));
    if s.one_in(3) {
        let cut = s.size(&[1, 2, 5, 40]).max(1);
        mask = Mask::causal(s.flag()).packed((0..s.near(n)).step_by(cut).collect());
    }
    let scores = &mut attention.scores;
    scores.masks = vec![mask; s.size(&[1, 1, 2]).min(8)];
    scores.softcap = s.one_in(3).then(|| s.number(&[1.0, 30.0]));
    scores.empty_rows_are_zero = s.flag();
}

fn of_heads(reports: &[HeadReport]) -> Result<(), Find> {
    for report in reports {
        let e = &report.errors;
        [e.out, e.dq, e.dk, e.dv, e.dkey_bias].iter().flatten().try_for_each(proper)?;
    }
    Ok(())
}

fn measure<T: Real>(s: &mut Source<'_>) -> Result<(), Find> {
    let arrays = Arrays::<T>::new(s);
    let [h, _, n, _, _, dv] = arrays.sizes;
    let out: Vec<Matrix<T>> = (0..s.near(h)).map(|_| s.matrix(n, dv)).collect();
    let out: Vec<_> = out.iter().map(Matrix::view).collect();
    let (scale, samples) = (s.number(&[0.5, 1.0, -1.0]), s.size(&[1, 2, 8, 256]));
    let scores = Scores::new(scale, Mask::causal(arrays.causal));
    match measure_error(&context(s), &arrays.heads(), &scores, &out, samples, s.bits()) {
        Ok(estimate) => proper(&estimate),
        Err(_) => Ok(()),
    }
}

fn of_samples<T: Real>(s: &mut Source<'_>) -> Result<(), Find> {
    let (n, m, d) = (s.tokens().min(200), s.tokens().min(200), s.size(&[1, 2, 3, 5]).min(70));
    let (q, k, v, bias) = (s.matrix::<T>(n, d), s.matrix(m, d), s.matrix(m, 2), s.column(m, true));
    let arrays = HeadArrays {
        q: q.view(),
        k: k.view(),
        v: s.flag().then(|| v.view()),
        key_bias: s.flag().then(|| bias.view()),
        scores: Scores::new(s.number(&[0.5, 1.0]), Mask::causal(s.flag())),
        head: 0,
    };
    let ends = |s: &mut Source<'_>| {
        let count = if s.flag() { 0 } else { s.near(d) };
        s.numbers::<f64>(count)
    };
    let ctx = context(s);
    match s.below(7) {
        0 => {
            let guides: Vec<Vec<f64>> = (0..s.below(4)).map(|_| s.near(n)).map(|count| vec![0.0; count]).collect();
            let guides: Vec<_> = guides.into_iter().map(|guide| s.numbers::<f64>(guide.len())).collect();
            let samples = s.size(&[1, 2, 8, 64]);
            if let Ok((rows, weights)) = sampled::draw_rows(n, &guides, samples, s.bits())
                && (rows.len() != weights.len() || rows.iter().any(|row| *row >= n))
            {
                return Err("rows that are not there are drawn".into());
            }
        }
        1 => {
            let count = s.below(20);
            let numbers = s.numbers::<f64>(3 * count);
            let row = |x: &[f64]| Squares { error: x[0].abs(), exact: x[1].abs(), given: x[2].abs(), unseen: 0.0 };
            let squares: Vec<_> = numbers.chunks_exact(3).map(row).collect();
            let count = s.near(count);
            let weights: Vec<f64> = s.numbers::<f64>(count).iter().map(|x| 1.0 + x.abs()).collect();
            let given = s.flag().then(|| s.number(&[1.0, 100.0]));
            if let Ok(e) = sampled::estimate_error(&squares, &weights, s.size(&[20, 100]), given)
                && numbers.iter().chain(&weights).chain(&given).all(|x| x.abs() < 1e100)
            {
                proper(&e)?;
            }
        }
        2 => {
            let rows = sampled::stratified(s.size(&[0, 1, 5, 100]), s.size(&[0, 1, 3, 8]).min(1000), s.bits());
            if !rows.is_sorted() {
                return Err("rows are out of order".into());
            }
        }
        3 => {
            let degree = s.size(&[1, 2, 3]).min(40);
            if let Ok(a) = sampled::fitted_coefficients(&arrays, degree, [ends(s), ends(s)]) {
                finite("coefficients", &a)?;
            }
        }
        4 => {
            let degree = s.size(&[1, 2, 3]).min(40);
            let (queries, keys): (Vec<usize>, Vec<usize>) = ((0..s.near(n)).collect(), (0..s.near(m)).collect());
            let positions = s.flag().then_some([&queries[..], &keys[..]]);
            if let Ok(fits) = sampled::fitted_polynomials(&arrays, degree, [ends(s), ends(s)], positions) {
                fits.coefficients.iter().flatten().try_for_each(|a| finite("coefficients", a))?;
            }
        }
        5 => {
            if let Ok(found) = sampled::landmark_constants(&ctx, &arrays, s.size(&[1, 4, 32]), s.bits()) {
                finite("matrix", &found.matrix)?;
            }
        }
        _ => {
            let (auto, cheap) = (auto(s), s.number(&[0.0, 0.01, 0.5]));
            let costs = |count: usize| vec![cheap; count];
            let ranks = RANKS.len();
            let costs = Costs {
                exact: 1.0,
                polynomials: costs(DEGREES),
                landmarks: costs(ranks),
                drawing: costs(ranks),
                moments: costs(DEGREES + 1),
            };
            let mut planner = Planner::new(&auto, s.flag(), costs);
            let _ = planner.look_at_tokens(&arrays, None, s.number(&[0.1, 1.0]));
            let _ = planner.look_for_landmarks(&ctx, &arrays, auto.gradients, auto.seed);
            planner.finish();
        }
    }
    Ok(())
}

/// A larger one takes long by its size alone.
const LARGEST_D_FF: usize = 1 << 20;
const KINDS: [ActivationKind; 3] = [ActivationKind::Relu, ActivationKind::Silu, ActivationKind::GeluTanh];

/// Sequences of `d` numbers a token.
struct Batch<T>(Vec<Matrix<T>>, usize, usize);

impl<T: Real> Batch<T> {
    fn new(s: &mut Source<'_>, batch: usize, n: usize, d: usize) -> Self {
        Self((0..s.near(batch)).map(|_| s.matrix(n, d)).collect(), n, d)
    }

    /// None where sequences are not alike.
    fn rows(&self) -> Option<Rows<'_, T>> {
        Rows::new(self.0.iter().map(Matrix::view).collect(), self.1, self.2).ok()
    }
}

fn layer<T: Real>(s: &mut Source<'_>) -> Result<(), Find> {
    let (batch, n) = (s.pick(&[1, 1, 2]), s.tokens());
    let (d, e, f) = (s.size(&[1, 2, 5]).min(70), s.size(&[1, 2, 5]).min(70), s.size(&[1, 3, 9]).min(70));
    let (x, dy) = (Batch::<T>::new(s, batch, n, d), Batch::<T>::new(s, batch, n, e));
    let (Some(x), Some(dy)) = (x.rows(), dy.rows()) else { return Ok(()) };
    let (w, w_in, w_out) = (s.matrix::<T>(d, e), s.matrix::<T>(d, f), s.matrix::<T>(f, e));
    let (w, w_in, w_out) = (w.view(), w_in.view(), w_out.view());
    let rows = batch * n;
    s.tell(&[batch, n, d, e, f]);
    let (mut y, mut dx) = (buffer::<T>(s, rows * e), buffer::<T>(s, rows * d));
    let (mut dw, mut db) = (buffer::<T>(s, d * e), buffer::<T>(s, e));
    let kind = s.pick(&KINDS);
    let (eps, ctx) = (s.number(&[1e-5, 1.0]), context(s));
    let vector = |s: &mut Source<'_>, count: usize| {
        let count = s.near(count);
        s.numbers::<T>(count)
    };
    let tokens = |s: &mut Source<'_>, count: usize, below: usize| -> Vec<u32> {
        let count = s.near(count);
        (0..count).map(|_| if s.oddly() { s.bits() as u32 } else { s.below(below.max(1)) as u32 }).collect()
    };
    match s.below(7) {
        0 => {
            let b = vector(s, e);
            let done = linear::forward(&ctx, &x, w, s.flag().then_some(&b[..]), &mut y);
            written(s, "linear", done, &[&y])?;
            let with_bias = s.flag();
            let done = linear::backward(&ctx, &x, w, &dy, &mut dx, &mut dw, with_bias.then_some(&mut db[..]));
            written(s, "a gradient of linear", done, &[&dx, &dw, if with_bias { &db } else { &[] }])
        }
        1 => {
            written(s, "activation", activation::forward(&ctx, kind, &x, &mut dx), &[&dx])?;
            let done = activation::backward(&ctx, kind, &dy, &dy, &mut y);
            written(s, "the gradient of activation", done, &[&y])
        }
        2 => {
            let (gain, bias) = (vector(s, d), vector(s, d));
            let (mut dgain, mut dbias) = (buffer::<T>(s, d), buffer::<T>(s, d));
            let mut y = buffer::<T>(s, rows * d);
            if s.flag() {
                written(s, "rms", norm::rms_forward(&ctx, &x, &gain, eps, &mut y), &[&y])?;
                let done = norm::rms_backward(&ctx, &x, &gain, eps, &x, &mut dx, &mut dgain);
                return written(s, "a gradient of rms", done, &[&dx, &dgain]);
            }
            written(s, "layer", norm::layer_forward(&ctx, &x, &gain, &bias, eps, &mut y), &[&y])?;
            let done = norm::layer_backward(&ctx, &x, &gain, eps, &x, &mut dx, &mut dgain, &mut dbias);
            written(s, "a gradient of layer", done, &[&dx, &dgain, &dbias])
        }
        3 => {
            let (mut dw_in, mut dw_out) = (buffer::<T>(s, d * f), buffer::<T>(s, f * e));
            written(s, "feed_forward", feed_forward::forward(&ctx, &x, w_in, w_out, kind, &mut y), &[&y])?;
            let done = feed_forward::backward(&ctx, &x, w_in, w_out, kind, &dy, &mut dx, &mut dw_in, &mut dw_out);
            written(s, "a gradient of feed_forward", done, &[&dx, &dw_in, &dw_out])
        }
        4 => {
            let tokens = tokens(s, rows, d);
            let vocab = s.near(d);
            written(s, "embedding", embedding::forward(&ctx, &tokens, w, &mut y), &[&y])?;
            let done = embedding::backward(&ctx, &tokens, &dy, vocab, &mut dw);
            written(s, "the gradient of embedding", done, &[&dw])
        }
        5 => {
            let targets = tokens(s, rows, e);
            let done = cross_entropy::mean(&ctx, &dy, &targets, &mut y);
            written(s, "the gradient of cross_entropy", done, &[&y])
        }
        _ => {
            let targets = tokens(s, rows, e);
            let done = cross_entropy::linear_mean(&ctx, &x, w, &targets, &mut dx, &mut dw);
            written(s, "a gradient of cross_entropy", done, &[&dx, &dw])
        }
    }
}

fn self_attention<T: Real>(s: &mut Source<'_>) -> Result<(), Find> {
    let (batch, n, d) = (s.pick(&[1, 1, 2]), s.tokens().min(200), s.size(&[1, 2, 5]).min(70));
    let (h_kv, group, e) = (s.size(&[1, 1, 2]).min(9), s.size(&[1, 2]).min(9), s.size(&[1, 2, 5]).min(70));
    let (width, value_width) = (s.size(&[2, 4]).min(9), s.size(&[1, 2, 3]).min(9));
    let h = h_kv * group;
    let x = Batch::<T>::new(s, batch, n, d);
    let Some(x) = x.rows() else { return Ok(()) };
    let (w, w_e) = (s.matrix::<T>(d, d), s.matrix::<T>(d, e));
    let (w_q, w_k) = (s.matrix::<T>(d, h * width), s.matrix::<T>(d, h_kv * width));
    let (w_v, w_o) = (s.matrix::<T>(d, h_kv * value_width), s.matrix::<T>(h * value_width, e));
    let weights = match s.one_in(3) {
        true => Weights::Combined { w: w.view(), w_v: w_e.view() },
        false => Weights::Heads {
            w_q: w_q.view(),
            w_k: w_k.view(),
            w_v: w_v.view(),
            w_o: w_o.view(),
            n_heads: s.near(h),
            n_kv_heads: s.near(h_kv),
            rope: s.flag(),
            score_bound: s.flag().then(|| s.number(&[1.0, 5.0])),
        },
    };
    let scale = if s.flag() { SelfAttention::default_scale(&weights) } else { s.number(&[0.5, 1.0]) };
    let attention = Attention::new(engine(s, width, batch * h), Mask::causal(s.flag()), scale);
    let layer = SelfAttention { weights, attention };
    s.tell(&([batch, n, d, h, h_kv, e], &layer.attention));
    let (ctx, e) = (context(s), layer.output_width());
    let (mut y, mut dx) = (buffer::<T>(s, batch * n * e), buffer::<T>(s, batch * n * d));
    let done = layer.forward(&ctx, &x, &mut y);
    written(s, "y", done, &[&y])?;
    let dy = Batch::<T>::new(s, batch, n, e);
    let Some(dy) = dy.rows() else { return Ok(()) };
    let Ok(grads) = layer.backward(&ctx, &x, &dy, &mut dx) else { return Ok(()) };
    let mut grads = grads.iter().map(|(name, grad)| (*name, grad)).chain([("x", &dx)]);
    grads.try_for_each(|(name, grad)| written(s, &format!("the gradient of {name}"), Ok(()), &[grad]))
}

fn whole<T: Real>(s: &mut Source<'_>) -> Result<(), Find> {
    let (h_kv, group, width) = (s.pick(&[1, 1, 2]), s.pick(&[1, 2]), s.pick(&[2, 4, 1]));
    let config = Config {
        n_layers: s.size(&[1, 1, 2]),
        d_model: s.size(&[h_kv * group * width]),
        n_heads: s.size(&[h_kv * group]),
        n_kv_heads: s.size(&[h_kv]),
        d_ff: s.size(&[1, 3, 8]).min(LARGEST_D_FF),
        vocab_size: s.size(&[1, 2, 5]),
        causal: s.flag(),
        norm: s.pick(&[Norm::Rms, Norm::Layer]),
        activation: s.pick(&KINDS),
        rope: width > 1 && s.flag(),
        score_bound: s.one_in(4).then(|| s.number(&[1.0, 5.0])),
        engine: engine(s, width, h_kv * group),
    };
    if config.n_layers > 100 {
        return Ok(()); // names without end are for the caller to see to
    }
    s.tell(&config);
    let valid = config.validate().is_ok();
    let shapes = config.param_shapes();
    if config.d_model.max(config.vocab_size) > 1000
        || shapes.iter().any(|(_, shape)| shape.iter().map(|n| *n as f64).product::<f64>() > 1e5)
    {
        return Ok(());
    }
    let mut arrays = BTreeMap::new();
    for (name, shape) in &shapes {
        if s.oddly() && s.one_in(8) {
            continue;
        }
        let array = match shape[..] {
            [rows, columns] => s.matrix::<T>(rows, columns),
            _ => s.matrix::<T>(1, shape[0]),
        };
        arrays.insert(name.clone(), array);
    }
    if s.oddly() {
        arrays.insert("another".into(), s.matrix(1, 1));
    }
    let params: Params<'_, T> = arrays.iter().map(|(name, x)| (name.clone(), x.view())).collect();
    let (batch, n) = (s.pick(&[1, 1, 2]), s.tokens().min(70));
    s.tell(&(batch, n));
    let (vocab, d) = (config.vocab_size, config.d_model);
    let tokens = |s: &mut Source<'_>| -> Vec<u32> {
        let count = s.near(batch * n);
        (0..count).map(|_| if s.oddly() { s.bits() as u32 } else { s.below(vocab.clamp(1, 1 << 20)) as u32 }).collect()
    };
    let (inputs, targets, ctx) = (tokens(s), tokens(s), context(s));
    if s.flag() {
        let samples = s.size(&[0, 1, 8, 100]);
        let done = transformer::value_and_grad(&ctx, &config, &params, &inputs, &targets, batch, n, samples);
        if let Ok((loss, done)) = done {
            finite("the loss", &[loss])?;
            done.grads.values().try_for_each(|grad| finite("a gradient", grad))?;
            if !valid {
                return Err("a model that is not valid has gradients".into());
            }
        }
        return Ok(());
    }
    let x = Batch::<T>::new(s, batch, n, d);
    let Some(x) = x.rows() else { return Ok(()) };
    let input = if s.flag() { Input::Embeddings(&x) } else { Input::Tokens { tokens: &inputs, batch, n } };
    let mut y = buffer::<T>(s, batch * n * vocab);
    let Ok(trace) = transformer::forward(&ctx, &config, &params, &input, &mut y) else { return Ok(()) };
    written(s, "y", Ok(()), &[&y])?;
    let dy = Batch::<T>::new(s, batch, n, vocab);
    let Some(dy) = dy.rows() else { return Ok(()) };
    let Ok(done) = transformer::backward(&ctx, &config, &params, &input, &trace, &dy) else { return Ok(()) };
    written(s, "dx", Ok(()), &[&done.dx])?;
    done.grads.values().try_for_each(|grad| written(s, "a gradient", Ok(()), &[grad]))
}

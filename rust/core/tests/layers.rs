//! Every layer's gradients against central differences in float64, and what its outputs must keep to.

mod support;

use std::collections::BTreeMap;

use lingrad_core::layers::activation::{self, ActivationKind};
use lingrad_core::layers::attention_block::{SelfAttention, Weights};
use lingrad_core::layers::{cross_entropy, embedding, feed_forward, linear, norm};
use lingrad_core::{Attention, Context, Engine, Error, Mask, MatRef, Rows};
use proptest::prelude::*;
use support::*;

const KINDS: [ActivationKind; 3] = [ActivationKind::Relu, ActivationKind::Silu, ActivationKind::GeluTanh];
const EPS: f64 = 1e-5;

/// Two sequences whose 260 tokens make a whole tile, across their border, and a part of one.
const BATCH: usize = 2;
const N: usize = 130;

fn matrix<T>(data: &[T], rows: usize, cols: usize) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(data, rows, cols)
}

#[test]
fn linear_gradients_match_central_differences() {
    let ctx = Context::new();
    let (d, e) = (3, 4);
    let (x, w, b) = (numbers(1, BATCH * N * d), numbers(2, d * e), numbers(3, e));
    let dy = numbers(4, BATCH * N * e);
    let forward = |x: &[f64], w: &[f64], b: &[f64]| {
        let mut y = nan(BATCH * N * e);
        linear::forward(&ctx, &rows(x, BATCH, N, d), matrix(w, d, e), Some(b), &mut y).unwrap();
        y
    };
    let (mut dx, mut dw, mut db) = (nan(x.len()), nan(w.len()), nan(b.len()));
    let (x_rows, dy_rows) = (rows(&x, BATCH, N, d), rows(&dy, BATCH, N, e));
    linear::backward(&ctx, &x_rows, matrix(&w, d, e), &dy_rows, &mut dx, &mut dw, Some(&mut db)).unwrap();
    assert_pullback("dx", |x| forward(x, &w, &b), &x, &dy, &dx);
    assert_pullback("dw", |w| forward(&x, w, &b), &w, &dy, &dw);
    assert_pullback("db", |b| forward(&x, &w, b), &b, &dy, &db);
}

#[test]
fn activation_gradients_match_central_differences() {
    let ctx = Context::new();
    let d = 5;
    // None nearer to the corner of relu than the step of the differences.
    let x: Vec<f64> = numbers(1, BATCH * N * d).iter().map(|x| 3.0 * x + 1e-3 * x.signum()).collect();
    let dy = numbers(2, x.len());
    for kind in KINDS {
        let forward = |x: &[f64]| {
            let mut y = nan(x.len());
            activation::forward(&ctx, kind, &rows(x, BATCH, N, d), &mut y).unwrap();
            y
        };
        let mut dx = nan(x.len());
        activation::backward(&ctx, kind, &rows(&x, BATCH, N, d), &rows(&dy, BATCH, N, d), &mut dx).unwrap();
        assert_pullback(&format!("{kind:?}"), forward, &x, &dy, &dx);
    }
}

#[test]
fn activations_match_their_formulas_far_out_too() {
    let ctx = Context::new();
    let reference = |kind, x: f64| match kind {
        ActivationKind::Relu => x.max(0.0),
        ActivationKind::Silu => x / (1.0 + (-x).exp()),
        ActivationKind::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + u.tanh())
        }
    };
    let x = [0.0, 1e-8, 0.5, 3.0, 20.0, 70.0, 1e4, 1e30];
    let x: Vec<f64> = x.into_iter().chain(x.map(|x| -x)).collect();
    for kind in KINDS {
        let mut y = nan(x.len());
        activation::forward(&ctx, kind, &rows(&x, 1, 1, x.len()), &mut y).unwrap();
        for (x, y) in x.iter().zip(&y) {
            let expected = reference(kind, *x);
            assert!((y - expected).abs() <= SAME * (1.0 + expected.abs()), "{kind:?}({x}) = {y}, not {expected}");
        }
        let x32: Vec<f32> = x.iter().map(|x| *x as f32).collect();
        let (ones, mut dx) = (vec![1.0f32; x.len()], vec![f32::NAN; x.len()]);
        activation::backward(&ctx, kind, &rows(&x32, 1, 1, x.len()), &rows(&ones, 1, 1, x.len()), &mut dx).unwrap();
        for (x, slope) in x.iter().zip(&dx) {
            assert!(slope.abs() <= 1.2, "the slope of {kind:?} at {x} is {slope}");
            if x.abs() > 60.0 {
                let limit = if *x > 0.0 { 1.0 } else { 0.0 };
                assert!((slope - limit).abs() <= 1e-20, "the slope of {kind:?} at {x} is {slope}");
            }
        }
        let mut y = [0.0f32];
        activation::forward(&ctx, kind, &rows(&[f32::NAN], 1, 1, 1), &mut y).unwrap();
        assert!(y[0].is_nan(), "{kind:?} hides a NaN");
    }
}

#[test]
fn norm_gradients_match_central_differences() {
    let ctx = Context::new();
    let d = 11;
    let (x, gain, bias) = (numbers(1, BATCH * N * d), numbers(2, d), numbers(3, d));
    let dy = numbers(4, x.len());
    let (x_rows, dy_rows) = (rows(&x, BATCH, N, d), rows(&dy, BATCH, N, d));

    let rms = |x: &[f64], gain: &[f64]| {
        let mut y = nan(x.len());
        norm::rms_forward(&ctx, &rows(x, BATCH, N, d), gain, EPS, &mut y).unwrap();
        y
    };
    let (mut dx, mut dgain, mut dbias) = (nan(x.len()), nan(d), nan(d));
    norm::rms_backward(&ctx, &x_rows, &gain, EPS, &dy_rows, &mut dx, &mut dgain).unwrap();
    assert_pullback("rms dx", |x| rms(x, &gain), &x, &dy, &dx);
    assert_pullback("rms dgain", |gain| rms(&x, gain), &gain, &dy, &dgain);

    let layer = |x: &[f64], gain: &[f64], bias: &[f64]| {
        let mut y = nan(x.len());
        norm::layer_forward(&ctx, &rows(x, BATCH, N, d), gain, bias, EPS, &mut y).unwrap();
        y
    };
    dx.fill(f64::NAN);
    dgain.fill(f64::NAN);
    norm::layer_backward(&ctx, &x_rows, &gain, EPS, &dy_rows, &mut dx, &mut dgain, &mut dbias).unwrap();
    assert_pullback("layer dx", |x| layer(x, &gain, &bias), &x, &dy, &dx);
    assert_pullback("layer dgain", |gain| layer(&x, gain, &bias), &gain, &dy, &dgain);
    assert_pullback("layer dbias", |bias| layer(&x, &gain, bias), &bias, &dy, &dbias);
}

#[test]
fn norms_refuse_what_they_cannot_scale() {
    let ctx = Context::new();
    let gain = [1.0f32; 2];
    let mut y = [0.0f32; 4];
    for x in [[f32::NAN, 1.0, 1.0, 1.0], [1.0, 1.0, f32::INFINITY, 1.0]] {
        let result = norm::rms_forward(&ctx, &rows(&x, 1, 2, 2), &gain, EPS, &mut y);
        assert!(matches!(assert_message(result, &["x holds NaN or infinity"]), Error::NonFinite(_)));
    }
    let zeros = [0.0f32; 4];
    assert_message(norm::rms_forward(&ctx, &rows(&zeros, 1, 2, 2), &gain, 0.0, &mut y), &["is 0;", "eps"]);
    assert_message(norm::rms_forward(&ctx, &rows(&zeros, 1, 2, 2), &gain, -1.0, &mut y), &["eps is -1"]);
    assert_message(
        norm::rms_forward(&ctx, &rows(&zeros, 1, 2, 2), &[1.0; 3], EPS, &mut y),
        &["gain holds 3", "expected 2"],
    );
    // Squares beyond float32 are no obstacle.
    norm::rms_forward(&ctx, &rows(&[3e30f32, 4e30, 0.0, 0.0], 1, 2, 2), &gain, EPS, &mut y).unwrap();
    let expected = [3.0 / 12.5f64.sqrt(), 4.0 / 12.5f64.sqrt(), 0.0, 0.0];
    assert_close("y", &y.map(f64::from), &expected, FLOAT32);
}

#[test]
fn feed_forward_gradients_match_central_differences() {
    let ctx = Context::new();
    let (d, f, e) = (3, 7, 4);
    let (x, w_in, w_out) = (numbers(1, BATCH * N * d), numbers(2, d * f), numbers(3, f * e));
    let dy = numbers(4, BATCH * N * e);
    // relu's corners would spoil the differences.
    for kind in [ActivationKind::Silu, ActivationKind::GeluTanh] {
        let forward = |x: &[f64], w_in: &[f64], w_out: &[f64]| {
            let mut y = nan(BATCH * N * e);
            feed_forward::forward(&ctx, &rows(x, BATCH, N, d), matrix(w_in, d, f), matrix(w_out, f, e), kind, &mut y)
                .unwrap();
            y
        };
        let (mut dx, mut dw_in, mut dw_out) = (nan(x.len()), nan(w_in.len()), nan(w_out.len()));
        feed_forward::backward(
            &ctx,
            &rows(&x, BATCH, N, d),
            matrix(&w_in, d, f),
            matrix(&w_out, f, e),
            kind,
            &rows(&dy, BATCH, N, e),
            &mut dx,
            &mut dw_in,
            &mut dw_out,
        )
        .unwrap();
        assert_pullback("dx", |x| forward(x, &w_in, &w_out), &x, &dy, &dx);
        assert_pullback("dw_in", |w_in| forward(&x, w_in, &w_out), &w_in, &dy, &dw_in);
        assert_pullback("dw_out", |w_out| forward(&x, &w_in, w_out), &w_out, &dy, &dw_out);
    }
}

#[test]
fn feed_forward_is_its_parts_one_after_the_other() {
    let ctx = Context::new();
    let (n, d, f, e) = (300, 3, 7, 4);
    let (x, w_in, w_out, dy) = (numbers(1, n * d), numbers(2, d * f), numbers(3, f * e), numbers(4, n * e));
    let (w_in, w_out) = (matrix(&w_in, d, f), matrix(&w_out, f, e));
    let (x, dy) = (rows(&x, 1, n, d), rows(&dy, 1, n, e));
    for kind in KINDS {
        let (mut h, mut a, mut y, mut fused) = (nan(n * f), nan(n * f), nan(n * e), nan(n * e));
        linear::forward(&ctx, &x, w_in, None, &mut h).unwrap();
        activation::forward(&ctx, kind, &rows(&h, 1, n, f), &mut a).unwrap();
        linear::forward(&ctx, &rows(&a, 1, n, f), w_out, None, &mut y).unwrap();
        feed_forward::forward(&ctx, &x, w_in, w_out, kind, &mut fused).unwrap();
        assert_close("y", &fused, &y, SAME);

        let (mut da, mut dh, mut dx) = (nan(n * f), nan(n * f), nan(n * d));
        let (mut dw_in, mut dw_out) = (nan(d * f), nan(f * e));
        linear::backward(&ctx, &rows(&a, 1, n, f), w_out, &dy, &mut da, &mut dw_out, None).unwrap();
        activation::backward(&ctx, kind, &rows(&h, 1, n, f), &rows(&da, 1, n, f), &mut dh).unwrap();
        linear::backward(&ctx, &x, w_in, &rows(&dh, 1, n, f), &mut dx, &mut dw_in, None).unwrap();
        let (mut dx2, mut dw_in2, mut dw_out2) = (nan(n * d), nan(d * f), nan(f * e));
        feed_forward::backward(&ctx, &x, w_in, w_out, kind, &dy, &mut dx2, &mut dw_in2, &mut dw_out2).unwrap();
        assert_close("dx", &dx2, &dx, SAME);
        assert_close("dw_in", &dw_in2, &dw_in, SAME);
        assert_close("dw_out", &dw_out2, &dw_out, SAME);
    }
}

#[test]
fn embedding_gradients_match_central_differences() {
    let ctx = Context::new();
    let (vocab, d) = (7, 3);
    let embed = numbers(1, vocab * d);
    // Token 4 never occurs.
    let tokens: Vec<u32> = (0..BATCH * N).map(|i| [0, 6, 2, 0, 1, 3, 5][i * i % 7]).collect();
    let dy = numbers(2, tokens.len() * d);
    let forward = |embed: &[f64]| {
        let mut y = nan(tokens.len() * d);
        embedding::forward(&ctx, &tokens, matrix(embed, vocab, d), &mut y).unwrap();
        y
    };
    let mut dembed = nan(embed.len());
    embedding::backward(&ctx, &tokens, &rows(&dy, BATCH, N, d), vocab, &mut dembed).unwrap();
    assert_pullback("dembed", forward, &embed, &dy, &dembed);
    assert_eq!(dembed[4 * d..5 * d], [0.0; 3]);
    let left = dot(&dy, &forward(&embed));
    assert!((left - dot(&dembed, &embed)).abs() <= SAME * norm(&dy) * norm(&forward(&embed)));

    let mut y = nan(2 * d);
    let result = embedding::forward(&ctx, &[0, 7], matrix(&embed, vocab, d), &mut y);
    assert_message(result, &["tokens holds 7 at position 1", "less than 7"]);
    let result = embedding::backward(&ctx, &[9], &rows(&dy[..d], 1, 1, d), vocab, &mut dembed);
    assert_message(result, &["tokens holds 9 at position 0", "less than 7"]);
}

/// One form of attention to test: weights by name with their shapes, and how they are put together.
struct Block {
    shapes: Vec<(&'static str, usize, usize)>,
    n_heads: usize,
    n_kv_heads: usize,
    rope: bool,
    score_bound: Option<f64>,
    causal: bool,
}

impl Block {
    fn with<R>(&self, w: &BTreeMap<&'static str, Vec<f64>>, f: impl FnOnce(SelfAttention<'_, f64>) -> R) -> R {
        let get = |name: &str| {
            let (name, rows, cols) = self.shapes.iter().find(|(other, ..)| *other == name).unwrap();
            matrix(&w[name], *rows, *cols)
        };
        let weights = if self.shapes.len() == 2 {
            Weights::Combined { w: get("w"), w_v: get("w_v") }
        } else {
            Weights::Heads {
                w_q: get("w_q"),
                w_k: get("w_k"),
                w_v: get("w_v"),
                w_o: get("w_o"),
                n_heads: self.n_heads,
                n_kv_heads: self.n_kv_heads,
                rope: self.rope,
                score_bound: self.score_bound,
            }
        };
        let scale = SelfAttention::default_scale(&weights);
        f(SelfAttention { weights, attention: Attention::new(Engine::Exact, Mask::causal(self.causal), scale) })
    }
}

#[test]
fn self_attention_gradients_match_central_differences() {
    let ctx = Context::new();
    let (batch, n, d) = (2, 9, 5);
    let heads = vec![("w_q", d, 16), ("w_k", d, 8), ("w_v", d, 6), ("w_o", 12, 7)];
    let block = |rope, score_bound, causal| Block {
        shapes: heads.clone(),
        n_heads: 4,
        n_kv_heads: 2,
        rope,
        score_bound,
        causal,
    };
    let combined = |causal| Block {
        shapes: vec![("w", d, d), ("w_v", d, 3)],
        n_heads: 1,
        n_kv_heads: 1,
        rope: false,
        score_bound: None,
        causal,
    };
    let x = numbers(1, batch * n * d);
    for (i, block) in [
        block(false, None, false),
        block(true, None, true),
        block(false, Some(2.0), true),
        block(true, Some(2.0), false),
        combined(true),
        combined(false),
    ]
    .iter()
    .enumerate()
    {
        let weights: BTreeMap<_, _> = (block.shapes.iter())
            .map(|(name, rows, cols)| {
                (*name, numbers((rows * 31 + cols) as u64, rows * cols).iter().map(|w| 0.5 * w).collect::<Vec<_>>())
            })
            .collect();
        let e = block.shapes.last().unwrap().2;
        let dy = numbers(3, batch * n * e);
        let forward = |x: &[f64], weights: &BTreeMap<_, _>| {
            block.with(weights, |attention| {
                assert_eq!(attention.output_width(), e);
                let mut y = nan(batch * n * e);
                attention.forward(&ctx, &rows(x, batch, n, d), &mut y).unwrap();
                y
            })
        };
        let mut dx = nan(x.len());
        let grads = block.with(&weights, |attention| {
            attention.backward(&ctx, &rows(&x, batch, n, d), &rows(&dy, batch, n, e), &mut dx).unwrap()
        });
        assert_eq!(grads.keys().collect::<Vec<_>>(), weights.keys().collect::<Vec<_>>());
        assert_pullback(&format!("{i}: dx"), |x| forward(x, &weights), &x, &dy, &dx);
        for (name, grad) in &grads {
            let with = |w: &[f64]| {
                let mut weights = weights.clone();
                weights.insert(name, w.to_vec());
                forward(&x, &weights)
            };
            assert_pullback(&format!("{i}: d{name}"), with, &weights[name], &dy, grad);
        }
    }
}

#[test]
fn self_attention_in_the_papers_form_is_the_other_with_w_q_times_w_k() {
    let ctx = Context::new();
    let (n, d) = (300, 4);
    let (x, w_q, w_k, w_v) = (numbers(1, n * d), numbers(2, d * d), numbers(3, d * d), numbers(4, d * d));
    let identity: Vec<f64> = (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let mut w = nan(d * d);
    linear::forward(&ctx, &rows(&w_q, 1, d, d), matrix(&w_k, d, d).transpose(), None, &mut w).unwrap();
    let attention = Attention::new(Engine::Exact, Mask::causal(true), 0.3);
    let combined = Weights::Combined { w: matrix(&w, d, d), w_v: matrix(&w_v, d, d) };
    let heads = Weights::Heads {
        w_q: matrix(&w_q, d, d),
        w_k: matrix(&w_k, d, d),
        w_v: matrix(&w_v, d, d),
        w_o: matrix(&identity, d, d),
        n_heads: 1,
        n_kv_heads: 1,
        rope: false,
        score_bound: None,
    };
    let [a, b] = [combined, heads].map(|weights| {
        let mut y = nan(n * d);
        SelfAttention { weights, attention: attention.clone() }.forward(&ctx, &rows(&x, 1, n, d), &mut y).unwrap();
        y
    });
    assert_close("y", &a, &b, SAME);
}

/// Weights of one head of width 2 that pass x through.
fn identity_heads(
    eye: &[f64],
    n_heads: usize,
    n_kv_heads: usize,
    rope: bool,
    score_bound: Option<f64>,
) -> SelfAttention<'_, f64> {
    let w = matrix(eye, 2, 2);
    let weights = Weights::Heads { w_q: w, w_k: w, w_v: w, w_o: w, n_heads, n_kv_heads, rope, score_bound };
    SelfAttention { weights, attention: Attention::new(Engine::Exact, Mask::causal(false), 1.0) }
}

const EYE: [f64; 4] = [1.0, 0.0, 0.0, 1.0];

#[test]
fn a_row_of_zeros_stays_zero_under_a_score_bound() {
    let ctx = Context::new();
    let attention = identity_heads(&EYE, 1, 1, true, Some(2.0));
    let (x, dy) = ([0.0, 0.0, 3.0, 4.0], numbers(1, 4));
    let (mut y, mut dx) = (nan(4), nan(4));
    attention.forward(&ctx, &rows(&x, 1, 2, 2), &mut y).unwrap();
    // The query of zeros has equal scores: the mean of the values.
    assert_close("y", &y[..2], &[1.5, 2.0], SAME);
    let grads = attention.backward(&ctx, &rows(&x, 1, 2, 2), &rows(&dy, 1, 2, 2), &mut dx).unwrap();
    assert!(dx.iter().chain(grads.values().flatten()).all(|x| x.is_finite()));
    // Only through its value does it reach the loss.
    let f = [0.5, 1.0 / (1.0 + 1f64.exp())];
    assert_close("dx", &dx[..2], &[f[0] * dy[0] + f[1] * dy[2], f[0] * dy[1] + f[1] * dy[3]], SAME);
}

#[test]
fn self_attention_names_what_does_not_fit() {
    let ctx = Context::new();
    let x = numbers(1, 6);
    let x = rows(&x, 1, 3, 2);
    let mut y = nan(6);
    let mut refused = |heads, kv, rope, bound, parts: &[&str]| {
        assert_message(identity_heads(&EYE, heads, kv, rope, bound).forward(&ctx, &x, &mut y), parts);
    };
    refused(0, 1, false, None, &["n_heads is 0"]);
    refused(2, 0, false, None, &["n_kv_heads is 0", "n_heads = 2"]);
    refused(1, 2, false, None, &["n_kv_heads is 2", "n_heads = 1"]);
    refused(3, 3, false, None, &["w_q has 2 columns", "n_heads = 3"]);
    refused(2, 1, false, None, &["w_k has shape (2, 2)", "(2, 1)"]);
    refused(2, 2, true, None, &["rope", "width 1", "even"]);
    refused(1, 1, false, Some(0.0), &["score_bound is 0"]);
    refused(1, 1, false, Some(f64::NAN), &["score_bound is NaN"]);
    refused(1, 1, false, Some(f64::INFINITY), &["score_bound is inf"]);
    let weights = Weights::Combined { w: matrix(&EYE[..2], 2, 1), w_v: matrix(&EYE, 2, 2) };
    let attention = Attention::new(Engine::Exact, Mask::causal(false), 1.0);
    let combined = SelfAttention { weights, attention };
    assert_message(combined.forward(&ctx, &x, &mut y), &["w has shape (2, 1)", "(2, 2)", "x of width 2"]);
    let infinite = [f64::INFINITY, 0.0];
    let result = identity_heads(&EYE, 1, 1, false, Some(1.0)).forward(&ctx, &rows(&infinite, 1, 1, 2), &mut y[..2]);
    assert!(matches!(result, Err(Error::NonFinite(_))));
}

#[test]
fn cross_entropy_gradients_match_central_differences() {
    let ctx = Context::new();
    let (n, d, vocab) = (8, 3, 13);
    let targets: Vec<u32> = (0..n).map(|i| (i * i % vocab) as u32).collect();
    let logits: Vec<f64> = numbers(1, n * vocab).iter().map(|x| 3.0 * x).collect();
    let by_formula = |logits: &[f64]| {
        let losses = logits
            .chunks(vocab)
            .zip(&targets)
            .map(|(row, target)| row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[*target as usize]);
        losses.sum::<f64>() / n as f64
    };
    let mut dlogits = nan(logits.len());
    let loss = cross_entropy::mean(&ctx, &rows(&logits, 1, n, vocab), &targets, &mut dlogits).unwrap();
    assert_close("loss", &[loss], &[by_formula(&logits)], SAME);
    assert_gradient("dlogits", by_formula, &logits, &dlogits);

    let (x, w) = (numbers(2, n * d), numbers(3, d * vocab));
    let fused = |x: &[f64], w: &[f64]| {
        let (mut dx, mut dw) = (nan(n * d), nan(d * vocab));
        let x = rows(x, 1, n, d);
        let loss = cross_entropy::linear_mean(&ctx, &x, matrix(w, d, vocab), &targets, &mut dx, &mut dw).unwrap();
        (loss, dx, dw)
    };
    let (_, dx, dw) = fused(&x, &w);
    assert_gradient("fused dx", |x| fused(x, &w).0, &x, &dx);
    assert_gradient("fused dw", |w| fused(&x, w).0, &w, &dw);
}

#[test]
fn cross_entropy_fused_with_its_linear_layer_is_the_two_one_after_the_other() {
    let ctx = Context::new();
    let (d, vocab) = (3, 13);
    let (x, w) = (numbers(2, BATCH * N * d), numbers(3, d * vocab));
    let (x, w) = (rows(&x, BATCH, N, d), matrix(&w, d, vocab));
    let targets: Vec<u32> = (0..BATCH * N).map(|i| (i * i % vocab) as u32).collect();
    let mut logits = nan(BATCH * N * vocab);
    linear::forward(&ctx, &x, w, None, &mut logits).unwrap();
    let logits = rows(&logits, BATCH, N, vocab);
    let (mut dlogits, mut dx, mut dw) = (nan(BATCH * N * vocab), nan(BATCH * N * d), nan(d * vocab));
    let loss = cross_entropy::mean(&ctx, &logits, &targets, &mut dlogits).unwrap();
    linear::backward(&ctx, &x, w, &rows(&dlogits, BATCH, N, vocab), &mut dx, &mut dw, None).unwrap();
    let (mut dx2, mut dw2) = (nan(dx.len()), nan(dw.len()));
    let fused = cross_entropy::linear_mean(&ctx, &x, w, &targets, &mut dx2, &mut dw2).unwrap();
    assert_close("loss", &[fused], &[loss], SAME);
    assert_close("dx", &dx2, &dx, SAME);
    assert_close("dw", &dw2, &dw, SAME);
}

#[test]
fn losses_that_are_finite_but_have_no_sum_are_an_error() {
    let logits = [0.0, 1.5e308, 0.0, 1.5e308];
    let mut dlogits = vec![0.0; 4];
    let result = cross_entropy::mean(&Context::new(), &rows(&logits, 1, 2, 2), &[0, 0], &mut dlogits);
    assert!(matches!(result, Err(Error::NonFinite(_))), "{result:?}");
}

#[test]
fn cross_entropy_stands_large_logits_and_refuses_the_rest() {
    let ctx = Context::new();
    let mut dlogits = nan(3);
    let loss = cross_entropy::mean(&ctx, &rows(&[1e4, 0.0, f64::NEG_INFINITY], 1, 1, 3), &[1], &mut dlogits).unwrap();
    assert_close("loss", &[loss], &[1e4], SAME);
    assert_close("dlogits", &dlogits, &[1.0, -1.0, 0.0], SAME);
    for bad in [[f64::NAN, 0.0, 1.0], [0.0, f64::INFINITY, 1.0], [0.0, f64::NEG_INFINITY, 1.0]] {
        let result = cross_entropy::mean(&ctx, &rows(&bad, 1, 1, 3), &[1], &mut dlogits);
        assert!(matches!(result, Err(Error::NonFinite(_))), "{bad:?}: {result:?}");
    }
    let logits = [0.0; 3];
    let result = cross_entropy::mean(&ctx, &rows(&logits, 1, 1, 3), &[3], &mut dlogits);
    assert_message(result, &["targets holds 3 at position 0", "less than 3"]);
    let result = cross_entropy::mean(&ctx, &rows(&logits, 1, 1, 3), &[0, 1], &mut dlogits);
    assert_message(result, &["targets holds 2 numbers", "expected 1"]);
    let result = cross_entropy::mean::<f64>(&ctx, &rows(&[], 0, 4, 3), &[], &mut []);
    assert!(matches!(assert_message(result, &["no tokens"]), Error::Argument(_)));
}

#[test]
fn strided_inputs_give_what_contiguous_ones_give() {
    let ctx = Context::new();
    let (n, d, e) = (300, 5, 3);
    let (x, w) = (numbers(1, n * d), numbers(2, d * e));
    let transposed: Vec<f64> = (0..d * n).map(|i| x[i % n * d + i / n]).collect();
    let backwards: Vec<f64> = x.chunks(d).rev().flatten().copied().collect();
    let views = [matrix(&transposed, d, n).transpose(), matrix(&backwards, n, d).reverse_rows()];
    let (mut y, mut h) = (nan(n * e), nan(n * d));
    linear::forward(&ctx, &rows(&x, 1, n, d), matrix(&w, d, e), None, &mut y).unwrap();
    norm::rms_forward(&ctx, &rows(&x, 1, n, d), &[1.0; 5], EPS, &mut h).unwrap();
    for view in views {
        let x = Rows::new(vec![view], n, d).unwrap();
        let (mut y2, mut h2) = (nan(n * e), nan(n * d));
        linear::forward(&ctx, &x, matrix(&w, d, e), None, &mut y2).unwrap();
        norm::rms_forward(&ctx, &x, &[1.0; 5], EPS, &mut h2).unwrap();
        assert!(y == y2 && h == h2);
    }
}

#[test]
fn empty_inputs_give_empty_results_and_zero_gradients() {
    let ctx = Context::new();
    for (batch, n) in [(0, 4), (3, 0)] {
        let x = rows::<f64>(&[], batch, n, 2);
        let w = matrix(&EYE, 2, 2);
        let (mut dw, mut dw2, mut db) = (nan(4), nan(4), nan(2));
        linear::forward(&ctx, &x, w, None, &mut []).unwrap();
        linear::backward(&ctx, &x, w, &x, &mut [], &mut dw, Some(&mut db)).unwrap();
        assert!(dw == [0.0; 4] && db == [0.0; 2]);
        feed_forward::forward(&ctx, &x, w, w, ActivationKind::Silu, &mut []).unwrap();
        feed_forward::backward(&ctx, &x, w, w, ActivationKind::Silu, &x, &mut [], &mut dw, &mut dw2).unwrap();
        assert!(dw == [0.0; 4] && dw2 == [0.0; 4]);
        activation::forward(&ctx, ActivationKind::Relu, &x, &mut []).unwrap();
        norm::rms_forward(&ctx, &x, &[1.0; 2], EPS, &mut []).unwrap();
        norm::rms_backward(&ctx, &x, &[1.0; 2], EPS, &x, &mut [], &mut db).unwrap();
        embedding::forward(&ctx, &[], w, &mut []).unwrap();
        embedding::backward(&ctx, &[], &x, 2, &mut dw).unwrap();
        assert!(dw == [0.0; 4]);
        for attention in [
            identity_heads(&EYE, 1, 1, true, Some(1.0)),
            SelfAttention {
                weights: Weights::Combined { w, w_v: w },
                attention: Attention::new(Engine::Exact, Mask::causal(true), 1.0),
            },
        ] {
            attention.forward(&ctx, &x, &mut []).unwrap();
            let grads = attention.backward(&ctx, &x, &x, &mut []).unwrap();
            assert!(grads.values().all(|grad| *grad == [0.0; 4]));
        }
    }
}

#[test]
fn one_thread_equals_many_bitwise() {
    let (n, d, f) = (3000, 8, 12);
    let (x, w_in, w_out) = (numbers_f32(1, n * d), numbers_f32(2, d * f), numbers_f32(3, f * d));
    let dy = numbers_f32(4, n * d);
    let (w_in, w_out) = (matrix(&w_in, d, f), matrix(&w_out, f, d));
    let targets: Vec<u32> = (0..n).map(|i| (i % f) as u32).collect();
    assert_same_on_any_threads("layers", || {
        let ctx = Context::new();
        let (x, dy) = (rows(&x, 1, n, d), rows(&dy, 1, n, d));
        let mut all: Vec<Vec<f32>> =
            [n * d, d * f, f * d, n * d, d, d, n * d, d * f, f * d].map(|len| vec![f32::NAN; len]).into();
        let [dx, dw_in, dw_out, dx2, dgain, dbias, dx3, dhead, dembed] = &mut all[..] else { unreachable!() };
        feed_forward::backward(&ctx, &x, w_in, w_out, ActivationKind::Silu, &dy, dx, dw_in, dw_out).unwrap();
        norm::layer_backward(&ctx, &x, &[1.0; 8], EPS, &dy, dx2, dgain, dbias).unwrap();
        let loss = cross_entropy::linear_mean(&ctx, &x, w_in, &targets, dx3, dhead).unwrap();
        embedding::backward(&ctx, &targets, &dy, f, dembed).unwrap();
        (all, loss)
    });
}

#[test]
fn float32_error_of_weight_gradients_does_not_grow_with_n() {
    let ctx = Context::new();
    let (n, d) = (300_000, 2);
    let (x, dy) = (vec![0.1f32; n * d], vec![0.1f32; n * d]);
    let w = [1.0f32, 0.0, 0.0, 1.0];
    let (mut dx, mut dw, mut db) = (vec![0.0; n * d], [0.0f32; 4], [0.0f32; 2]);
    let (x, dy) = (rows(&x, 1, n, d), rows(&dy, 1, n, d));
    linear::backward(&ctx, &x, matrix(&w, d, d), &dy, &mut dx, &mut dw, Some(&mut db)).unwrap();
    let tenth = 0.1f32 as f64;
    assert_close("dw", &dw.map(f64::from), &[n as f64 * tenth * tenth; 4], FLOAT32);
    assert_close("db", &db.map(f64::from), &[n as f64 * tenth; 2], FLOAT32);
}

#[test]
fn a_cancelled_call_says_so() {
    let ctx = Context::new();
    ctx.cancel();
    let x = numbers(1, 4);
    let mut y = nan(4);
    let result = linear::forward(&ctx, &rows(&x, 1, 2, 2), matrix(&EYE, 2, 2), None, &mut y);
    assert_eq!(result, Err(Error::Cancelled));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// `dy . (x w) = dx . x = dw . w`, both maps being linear.
    #[test]
    fn linear_is_the_adjoint_of_its_backward(batch in 0usize..4, n in 0usize..400, d in 0usize..9, e in 0usize..9, seed in 0u64..1000) {
        let ctx = Context::new();
        let (x, w, dy) = (numbers(seed, batch * n * d), numbers(seed + 1, d * e), numbers(seed + 2, batch * n * e));
        let (mut y, mut dx, mut dw) = (nan(batch * n * e), nan(x.len()), nan(w.len()));
        let (x_rows, dy_rows) = (rows(&x, batch, n, d), rows(&dy, batch, n, e));
        linear::forward(&ctx, &x_rows, matrix(&w, d, e), None, &mut y).unwrap();
        linear::backward(&ctx, &x_rows, matrix(&w, d, e), &dy_rows, &mut dx, &mut dw, None).unwrap();
        let (a, b, c) = (dot(&dy, &y), dot(&dx, &x), dot(&dw, &w));
        let limit = SAME * (norm(&dy) * norm(&y) + norm(&x) * norm(&dx));
        prop_assert!((a - b).abs() <= limit && (a - c).abs() <= limit, "{a} {b} {c}");
    }
}

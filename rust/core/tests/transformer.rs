//! The transformer's gradients against central differences in float64, and what it must keep to.

mod support;

use std::collections::BTreeMap;

use lingrad_core::layers::activation::ActivationKind;
use lingrad_core::layers::{cross_entropy, linear, norm};
use lingrad_core::model::{Config, Input, Norm, Params, backward, forward, value_and_grad};
use lingrad_core::spec::{Gradient, Polynomial};
use lingrad_core::{Context, Engine, Error, MatRef, Real};
use support::*;

fn tiny() -> Config {
    Config {
        n_layers: 2,
        d_model: 8,
        n_heads: 2,
        n_kv_heads: 2,
        d_ff: 6,
        vocab_size: 5,
        causal: true,
        norm: Norm::Rms,
        activation: ActivationKind::Silu,
        rope: true,
        score_bound: None,
        engine: Engine::Exact.into(),
    }
}

fn variants() -> Vec<(&'static str, Config)> {
    vec![
        ("causal with rope", tiny()),
        ("grouped queries, bounded scores", Config { n_kv_heads: 1, score_bound: Some(3.0), ..tiny() }),
        (
            "LayerNorm, gelu, not causal, no rope",
            Config { norm: Norm::Layer, activation: ActivationKind::GeluTanh, causal: false, rope: false, ..tiny() },
        ),
        (
            "consistent polynomial, not causal",
            Config {
                causal: false,
                engine: Engine::Polynomial(Polynomial { gradient: Gradient::Consistent, ..Polynomial::default() })
                    .into(),
                ..tiny()
            },
        ),
    ]
}

/// A parameter's data and its shape as a matrix.
type Owned<T> = BTreeMap<String, (Vec<T>, usize, usize)>;

fn random_params<T: Real>(config: &Config) -> Owned<T> {
    let mut params = Owned::new();
    for (seed, (name, shape)) in config.param_shapes().into_iter().enumerate() {
        let (rows, cols) = if shape.len() == 2 { (shape[0], shape[1]) } else { (1, shape[0]) };
        let offset = if name.ends_with("gain") { 1.0 } else { 0.0 };
        let data = numbers(seed as u64, rows * cols).iter().map(|x| T::of(offset + 0.4 * x)).collect();
        params.insert(name, (data, rows, cols));
    }
    params
}

fn views<T>(params: &Owned<T>) -> Params<'_, T> {
    (params.iter())
        .map(|(name, (data, rows, cols))| (name.clone(), MatRef::from_row_major_slice(data, *rows, *cols)))
        .collect()
}

fn tokens(count: usize, vocab: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i + seed * i + seed) % vocab) as u32).collect()
}

#[test]
fn gradients_of_the_loss_match_central_differences() {
    let (batch, n) = (2, 5);
    for (what, config) in variants() {
        let ctx = Context::new();
        let params = random_params::<f64>(&config);
        let (x, targets) = (tokens(batch * n, 5, 1), tokens(batch * n, 5, 2));
        let value =
            |params: &Owned<f64>| value_and_grad(&ctx, &config, &views(params), &x, &targets, batch, n, 0).unwrap();
        let (loss, result) = value(&params);
        assert!(loss > 0.0 && loss <= 10.0, "{what}: loss {loss}");
        assert_eq!(ctx.progress(), 1.0);
        assert_eq!(result.grads.keys().collect::<Vec<_>>(), params.keys().collect::<Vec<_>>());
        for (name, grad) in &result.grads {
            let mut at = params.clone();
            let data = params[name].0.clone();
            let with = std::cell::RefCell::new(&mut at);
            let loss = |x: &[f64]| {
                let mut at = with.borrow_mut();
                at.get_mut(name).unwrap().0.copy_from_slice(x);
                value(&at).0
            };
            assert_gradient(&format!("{what}: {name}"), loss, &data, grad);
        }
    }
}

#[test]
fn pullback_of_embeddings_matches_central_differences() {
    let (batch, n) = (2, 6);
    for (what, config) in variants() {
        let ctx = Context::new();
        let params = random_params::<f64>(&config);
        let params = views(&params);
        let (d, vocab) = (config.d_model, config.vocab_size);
        let (x, dy) = (numbers(1, batch * n * d), numbers(2, batch * n * vocab));
        let model = |x: &[f64]| {
            let mut y = nan(batch * n * vocab);
            let rows = rows(x, batch, n, d);
            let trace = forward(&ctx, &config, &params, &Input::Embeddings(&rows), &mut y).unwrap();
            (y, trace)
        };
        let (_, trace) = model(&x);
        let x_rows = rows(&x, batch, n, d);
        let dy_rows = rows(&dy, batch, n, vocab);
        let result = backward(&ctx, &config, &params, &Input::Embeddings(&x_rows), &trace, &dy_rows).unwrap();
        assert_pullback(what, |x| model(x).0, &x, &dy, &result.dx);
        assert!(result.grads["embed"].iter().all(|x| *x == 0.0));
    }
}

#[test]
fn value_and_grad_is_forward_then_the_loss_then_backward() {
    let (batch, n) = (2, 150);
    for (what, config) in variants() {
        let ctx = Context::new();
        let params = random_params::<f64>(&config);
        let params = views(&params);
        let vocab = config.vocab_size;
        let (x, targets) = (tokens(batch * n, vocab, 1), tokens(batch * n, vocab, 2));
        let input = Input::Tokens { tokens: &x, batch, n };
        let mut logits = nan(batch * n * vocab);
        let trace = forward(&ctx, &config, &params, &input, &mut logits).unwrap();
        assert_eq!(ctx.progress(), 1.0);
        let mut dlogits = nan(logits.len());
        let loss = cross_entropy::mean(&ctx, &rows(&logits, batch, n, vocab), &targets, &mut dlogits).unwrap();
        let dlogits = rows(&dlogits, batch, n, vocab);
        let apart = backward(&ctx, &config, &params, &input, &trace, &dlogits).unwrap();
        let (fused_loss, fused) = value_and_grad(&ctx, &config, &params, &x, &targets, batch, n, 0).unwrap();
        assert_close("loss", &[fused_loss], &[loss], SAME);
        assert_close("dx", &fused.dx, &apart.dx, SAME);
        for (name, grad) in &apart.grads {
            assert_close(&format!("{what}: {name}"), &fused.grads[name], grad, SAME);
        }
        assert!(fused.reports.len() == 2 && fused.reports.iter().all(|report| report.error.is_none()));
    }
}

#[test]
fn residuals_pass_everything_on_where_the_blocks_give_nothing() {
    let ctx = Context::new();
    let config = tiny();
    let (batch, n, d, vocab) = (1, 7, config.d_model, config.vocab_size);
    let mut params = random_params::<f64>(&config);
    for (name, (data, ..)) in &mut params {
        if name.ends_with("w_o") || name.ends_with("w_out") {
            data.fill(0.0);
        }
    }
    let x = numbers(1, n * d);
    let x = rows(&x, batch, n, d);
    let dy = numbers(2, n * vocab);
    let dy = rows(&dy, batch, n, vocab);
    let mut y = nan(n * vocab);
    let trace = forward(&ctx, &config, &views(&params), &Input::Embeddings(&x), &mut y).unwrap();
    let result = backward(&ctx, &config, &views(&params), &Input::Embeddings(&x), &trace, &dy).unwrap();

    let gain = &params["norm.gain"].0;
    let head = views(&params)["head"];
    let (mut last, mut expected) = (nan(n * d), nan(n * vocab));
    norm::rms_forward(&ctx, &x, gain, 1e-5, &mut last).unwrap();
    linear::forward(&ctx, &rows(&last, batch, n, d), head, None, &mut expected).unwrap();
    assert_close("y", &y, &expected, SAME);
    let (mut dlast, mut dhead, mut dx, mut dgain) = (nan(n * d), nan(d * vocab), nan(n * d), nan(d));
    linear::backward(&ctx, &rows(&last, batch, n, d), head, &dy, &mut dlast, &mut dhead, None).unwrap();
    norm::rms_backward(&ctx, &x, gain, 1e-5, &rows(&dlast, batch, n, d), &mut dx, &mut dgain).unwrap();
    assert_close("dx", &result.dx, &dx, SAME);
    for i in 0..2 {
        assert!(support::norm(&result.grads[&format!("layers.{i}.attn.w_o")]) > 0.0);
        assert_eq!(support::norm(&result.grads[&format!("layers.{i}.attn.w_v")]), 0.0);
        assert!(support::norm(&result.grads[&format!("layers.{i}.ffn.w_out")]) > 0.0);
        assert_eq!(support::norm(&result.grads[&format!("layers.{i}.ffn.w_in")]), 0.0);
    }
}

#[test]
fn one_thread_equals_many_bitwise() {
    let (batch, n) = (2, 700);
    for (what, config) in variants() {
        let params = random_params::<f32>(&config);
        let (x, targets) = (tokens(batch * n, 5, 1), tokens(batch * n, 5, 2));
        assert_same_on_any_threads(what, || {
            let (loss, result) =
                value_and_grad(&Context::new(), &config, &views(&params), &x, &targets, batch, n, 0).unwrap();
            (loss, result.dx, result.grads)
        });
    }
}

#[test]
fn float32_agrees_with_float64() {
    let (batch, n) = (1, 300);
    for (what, config) in variants() {
        let (params, params32) = (random_params::<f64>(&config), random_params::<f32>(&config));
        let (x, targets) = (tokens(n, 5, 1), tokens(n, 5, 2));
        let ctx = Context::new();
        let (loss, result) = value_and_grad(&ctx, &config, &views(&params), &x, &targets, batch, n, 0).unwrap();
        let (loss32, result32) = value_and_grad(&ctx, &config, &views(&params32), &x, &targets, batch, n, 0).unwrap();
        assert_close("loss", &[loss32], &[loss], FLOAT32);
        for (name, grad) in &result.grads {
            let grad32: Vec<f64> = result32.grads[name].iter().map(|x| *x as f64).collect();
            // Roundings of the whole depth, relative to gradients that partly cancel.
            assert_close(&format!("{what}: {name}"), &grad32, grad, 20.0 * FLOAT32);
        }
    }
}

#[test]
fn layers_report_the_measured_error_where_it_is_asked_for() {
    let config = tiny();
    let params = random_params::<f64>(&config);
    let x = tokens(40, 5, 1);
    let (_, result) = value_and_grad(&Context::new(), &config, &views(&params), &x, &x, 1, 40, 16).unwrap();
    assert_eq!(result.reports.len(), 2);
    for report in result.reports {
        let error = report.error.expect("an estimate");
        assert!(error.relative <= SAME, "{error:?}");
    }
}

#[test]
fn an_empty_input_gives_empty_results() {
    let ctx = Context::new();
    let config = tiny();
    let params = random_params::<f64>(&config);
    let params = views(&params);
    for (batch, n) in [(0, 3), (2, 0)] {
        let input = Input::Tokens { tokens: &[], batch, n };
        let trace = forward(&ctx, &config, &params, &input, &mut []).unwrap();
        let dy = rows(&[], batch, n, 5);
        let result = backward(&ctx, &config, &params, &input, &trace, &dy).unwrap();
        assert!(result.dx.is_empty());
        assert!(result.grads.values().flatten().all(|x| *x == 0.0));
        let result = value_and_grad(&ctx, &config, &params, &[], &[], batch, n, 0);
        assert!(matches!(assert_message(result, &["no tokens"]), Error::Argument(_)));
    }
}

#[test]
fn config_names_what_does_not_fit() {
    for (config, parts) in [
        (Config { n_layers: 0, ..tiny() }, &["n_layers is 0"][..]),
        (Config { d_model: 0, ..tiny() }, &["d_model is 0"]),
        (Config { d_ff: 0, ..tiny() }, &["d_ff is 0"]),
        (Config { vocab_size: 0, ..tiny() }, &["vocab_size is 0"]),
        (Config { n_heads: 0, ..tiny() }, &["n_heads is 0"]),
        (Config { n_heads: 3, ..tiny() }, &["n_heads is 3", "d_model = 8"]),
        (Config { n_kv_heads: 0, ..tiny() }, &["n_kv_heads is 0", "n_heads = 2"]),
        (Config { n_kv_heads: 3, ..tiny() }, &["n_kv_heads is 3", "n_heads = 2"]),
        (Config { n_heads: 8, n_kv_heads: 8, ..tiny() }, &["rope", "width 1", "even"]),
        (Config { score_bound: Some(-1.0), ..tiny() }, &["score_bound is -1", "> 0"]),
        (Config { score_bound: Some(f64::INFINITY), ..tiny() }, &["score_bound is inf"]),
    ] {
        assert!(matches!(assert_message(config.validate(), parts), Error::Argument(_)));
    }
    assert_message("batch".parse::<Norm>(), &["norm is \"batch\"", "\"rms\" or \"layer\""]);
    assert_message(
        "tanh".parse::<ActivationKind>(),
        &["activation is \"tanh\"", "\"relu\", \"silu\" or \"gelu_tanh\""],
    );
}

#[test]
fn arguments_are_named_where_they_do_not_fit() {
    let ctx = Context::new();
    let config = tiny();
    let good = random_params::<f64>(&config);
    let grad = |params: &Owned<f64>, x: &[u32], targets: &[u32]| {
        value_and_grad(&ctx, &config, &views(params), x, targets, 1, 3, 0)
    };
    let x = [0, 1, 2];
    grad(&good, &x, &x).unwrap();
    assert_message(grad(&good, &[0, 1, 5], &x), &["tokens holds 5 at position 2", "less than 5"]);
    assert_message(grad(&good, &x, &[7, 1, 2]), &["targets holds 7 at position 0", "less than 5"]);
    assert_message(grad(&good, &x, &[1, 2]), &["targets holds 2", "expected 3"]);
    assert_message(grad(&good, &[1, 2], &x), &["tokens holds 2", "expected 3"]);

    let changed = |change: &dyn Fn(&mut Owned<f64>)| {
        let mut params = good.clone();
        change(&mut params);
        grad(&params, &x, &x)
    };
    let missing = changed(&|params| drop(params.remove("layers.1.ffn.w_in")));
    assert_message(missing, &["layers.1.ffn.w_in is missing", "[8, 6]"]);
    let unexpected = changed(&|params| drop(params.insert("layers.2.attn.w_q".into(), (vec![0.0], 1, 1))));
    assert_message(unexpected, &["no parameter layers.2.attn.w_q"]);
    let shape = changed(&|params| drop(params.insert("head".into(), (vec![0.0; 10], 2, 5))));
    assert!(matches!(assert_message(shape, &["head has shape (2, 5)", "(8, 5)"]), Error::Shape(_)));
    let infinite = changed(&|params| params.get_mut("norm.gain").unwrap().0[3] = f64::INFINITY);
    assert!(matches!(assert_message(infinite, &["norm.gain holds NaN or infinity"]), Error::NonFinite(_)));

    let params = views(&good);
    let input = Input::Tokens { tokens: &x, batch: 1, n: 3 };
    let mut y = nan(15);
    assert_message(forward(&ctx, &config, &params, &input, &mut y[..14]), &["y holds 14", "expected 15"]);
    let trace = forward(&ctx, &config, &params, &input, &mut y).unwrap();
    let dy = numbers(1, 12);
    let result = backward(&ctx, &config, &params, &input, &trace, &rows(&dy, 1, 3, 4));
    assert_message(result, &["dy has shape (1, 3, 4)", "(1, 3, 5)"]);
    let other = Input::Tokens { tokens: &x[..2], batch: 1, n: 2 };
    assert_message(backward(&ctx, &config, &params, &other, &trace, &rows(&dy[..10], 1, 2, 5)), &["trace"]);
    let narrow = rows(&dy, 1, 3, 4);
    let result = forward(&ctx, &config, &params, &Input::Embeddings(&narrow), &mut y);
    assert_message(result, &["x has shape (1, 3, 4)", "(1, 3, 8)"]);
    let unknown = vec![f64::NAN; 24];
    let unknown = rows(&unknown, 1, 3, 8);
    let result = forward(&ctx, &config, &params, &Input::Embeddings(&unknown), &mut y);
    assert!(matches!(assert_message(result, &["x holds NaN"]), Error::NonFinite(_)));

    ctx.cancel();
    assert!(matches!(grad(&good, &x, &x), Err(Error::Cancelled)));
}

#[test]
fn a_model_of_any_sizes_has_shapes_and_is_refused() {
    let config = Config { d_model: usize::MAX - 1, n_heads: 2, n_kv_heads: usize::MAX, ..tiny() };
    assert_eq!(config.param_shapes()[3].1, [usize::MAX - 1, usize::MAX]);
    assert!(config.validate().is_err());
}

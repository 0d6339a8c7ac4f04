//! A transformer, and the gradient of every one of its parameters.
//!
//! ```text
//! x_0 = embed[tokens]
//! z_i = x_i + Attn_i(norm(x_i))        x_{i+1} = z_i + FFN_i(norm(z_i))        i = 0 .. n_layers - 1
//! logits = norm(x_last) head
//! ```
//!
//! A residual passes its gradient on beside that of what it bypasses: `dz = dx_{i+1} + (d norm)^T (d FFN)^T dx_{i+1}`,
//! then `dx_i = dz + (d norm)^T (d Attn)^T dz`. The forward pass keeps `x_0 .. x_last` and nothing else; the backward
//! pass computes the inside of each layer again.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use faer::{MatMut, MatRef};

use crate::attention::{Attention, Method};
use crate::context::Context;
use crate::error::{Error, Result, expect_len};
use crate::layers::activation::ActivationKind;
use crate::layers::attention_block::{self, Inside, SelfAttention, Weights};
use crate::layers::tiles::add_into;
use crate::layers::{cross_entropy, embedding, expect_rows, feed_forward, linear, norm};
use crate::measure::{ErrorEstimate, measure_error};
use crate::memory::{room, zeroed};
use crate::numerics::real::Real;
use crate::plan::report::HeadReport;
use crate::problem::finite::check_finite;
use crate::problem::rows::Rows;
use crate::problem::scores::{Mask, Scores};
use crate::tolerance::SAMPLES;

/// The eps of every norm.
const EPS: f64 = 1e-5;

/// Which norm stands before attention, before the feed-forward block and before the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// RMSNorm, with a gain.
    Rms,
    /// LayerNorm, with a gain and a bias.
    Layer,
}

impl FromStr for Norm {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "rms" => Ok(Self::Rms),
            "layer" => Ok(Self::Layer),
            _ => Err(Error::Argument(format!("norm is \"{name}\"; expected \"rms\" or \"layer\""))),
        }
    }
}

/// What model to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Layers, each of attention and a feed-forward block.
    pub n_layers: usize,
    /// Width of a token.
    pub d_model: usize,
    /// Query heads, a divisor of `d_model`.
    pub n_heads: usize,
    /// Key heads, a divisor of `n_heads`.
    pub n_kv_heads: usize,
    /// Hidden units of a feed-forward block.
    pub d_ff: usize,
    /// Different tokens.
    pub vocab_size: usize,
    /// Whether a token sees only itself and those before it.
    pub causal: bool,
    /// The norms.
    pub norm: Norm,
    /// The nonlinearity of the feed-forward blocks.
    pub activation: ActivationKind,
    /// Whether queries and keys are turned by their positions.
    pub rope: bool,
    /// Normalises queries and keys so that no score exceeds this number.
    pub score_bound: Option<f64>,
    /// How attention is computed.
    pub engine: Method,
}

/// Parameters by name; those with one dimension as one row. See [`Config::param_shapes`].
pub type Params<'a, T> = BTreeMap<String, MatRef<'a, T>>;

/// What the model is applied to.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a, T> {
    /// Tokens, embedded by the model.
    Tokens {
        /// `(batch, n)`.
        tokens: &'a [u32],
        /// Sequences.
        batch: usize,
        /// Tokens a sequence.
        n: usize,
    },
    /// `x_0` itself, `(batch, n, d_model)`. The gradient of `embed` is then 0.
    Embeddings(&'a Rows<'a, T>),
}

/// What the forward pass keeps: the input of every layer and of the final norm, each `(batch, n, d_model)`.
#[derive(Debug, Clone)]
pub struct Trace<T> {
    inputs: Vec<Vec<T>>,
    /// The engines of each layer, where there is a tolerance: the backward pass uses them again.
    plans: Vec<Option<Method>>,
    batch: usize,
    n: usize,
    d: usize,
}

/// What the backward pass returns.
#[derive(Debug, Clone)]
pub struct Backward<T> {
    /// The gradient with respect to `x_0`, `(batch, n, d_model)`.
    pub dx: Vec<T>,
    /// The gradient with respect to every parameter, by name, row-major.
    pub grads: BTreeMap<String, Vec<T>>,
    /// What is known of each layer.
    pub reports: Vec<LayerReport>,
}

/// What is known of a layer after a backward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReport {
    /// The measured error of its attention's output, where it was asked for.
    pub error: Option<ErrorEstimate>,
    /// Each head of each sequence, where that was asked for or there is a tolerance.
    pub heads: Vec<HeadReport>,
}

impl Config {
    /// An error naming the first field that does not fit.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("n_layers", self.n_layers),
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("d_ff", self.d_ff),
            ("vocab_size", self.vocab_size),
        ] {
            if value == 0 {
                return Err(Error::Argument(format!("{name} is 0; expected at least 1")));
            }
        }
        if !self.d_model.is_multiple_of(self.n_heads) {
            return Err(Error::Argument(format!(
                "n_heads is {}; expected a divisor of d_model = {}",
                self.n_heads, self.d_model
            )));
        }
        attention_block::check_heads(self.n_heads, self.n_kv_heads)?;
        if self.rope {
            attention_block::check_rope(self.d_model / self.n_heads)?;
        }
        attention_block::check_score_bound(self.score_bound)?;
        self.engine.check(&Scores::new(1.0, Mask::causal(self.causal)), size_of::<f64>())
    }

    /// The name and shape of every parameter, in the model's order.
    pub fn param_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (d, f) = (self.d_model, self.d_ff);
        let d_kv = (self.d_model / self.n_heads.max(1)).saturating_mul(self.n_kv_heads);
        let mut shapes = vec![("embed".to_string(), vec![self.vocab_size, d])];
        let norm = |name: String, shapes: &mut Vec<_>| {
            shapes.push((format!("{name}.gain"), vec![d]));
            if self.norm == Norm::Layer {
                shapes.push((format!("{name}.bias"), vec![d]));
            }
        };
        for i in 0..self.n_layers {
            norm(format!("layers.{i}.attn_norm"), &mut shapes);
            for (name, shape) in [("w_q", [d, d]), ("w_k", [d, d_kv]), ("w_v", [d, d_kv]), ("w_o", [d, d])] {
                shapes.push((format!("layers.{i}.attn.{name}"), shape.to_vec()));
            }
            norm(format!("layers.{i}.ffn_norm"), &mut shapes);
            shapes.push((format!("layers.{i}.ffn.w_in"), vec![d, f]));
            shapes.push((format!("layers.{i}.ffn.w_out"), vec![f, d]));
        }
        norm("norm".to_string(), &mut shapes);
        shapes.push(("head".to_string(), vec![d, self.vocab_size]));
        shapes
    }
}

/// Writes the logits, `(batch, n, vocab_size)`, and returns what [`backward`] needs.
///
/// Memory beyond the output: one `(batch, n, d_model)` array a layer, and about seven more while a layer is computed.
pub fn forward<T: Real>(
    ctx: &Context,
    config: &Config,
    params: &Params<'_, T>,
    input: &Input<'_, T>,
    y: &mut [T],
) -> Result<Trace<T>> {
    let model = Model::new(ctx, config, params, 2 * config.n_layers + 1)?;
    let trace = model.layers_forward(input)?;
    let last = model.norm.forward(ctx, &trace.rows(config.n_layers)?)?;
    linear::forward(ctx, &Rows::from_slice(&last, trace.batch, trace.n, config.d_model)?, model.head, None, y)?;
    model.stage_done();
    Ok(trace)
}

/// The gradients of any loss whose gradient with respect to the logits is `dy`, `(batch, n, vocab_size)`.
///
/// `trace` is that of [`forward`] on the same parameters and input. Memory beyond the results: about eleven
/// `(batch, n, d_model)` arrays, for any number of layers.
pub fn backward<T: Real>(
    ctx: &Context,
    config: &Config,
    params: &Params<'_, T>,
    input: &Input<'_, T>,
    trace: &Trace<T>,
    dy: &Rows<'_, T>,
) -> Result<Backward<T>> {
    let model = Model::new(ctx, config, params, 3 * config.n_layers + 1)?;
    let (batch, n) = input.sizes();
    if (trace.batch, trace.n, trace.inputs.len()) != (batch, n, config.n_layers + 1) {
        return Err(Error::Argument("the trace comes from the forward pass of another model or input".into()));
    }
    expect_rows("dy", dy, batch, n, config.vocab_size)?;
    let mut grads = Grads::new();
    let ((), mut dx) = model.head_backward(trace, &mut grads, |last, dlast, dhead| {
        linear::backward(ctx, last, model.head, dy, dlast, dhead, None)
    })?;
    let reports = model.layers_backward(trace, &mut dx, 0, &mut grads)?;
    model.embedding_backward(input, &dx, &mut grads)?;
    Ok(Backward { dx, grads, reports })
}

/// The mean cross-entropy of predicting `targets` from `tokens`, both `(batch, n)`, and its gradients.
///
/// The head and the loss are computed tile by tile: there is never a logit for every token. With `samples > 0` the
/// error of each layer's attention is measured on so many rows. Memory as for [`forward`] and [`backward`], without
/// logits.
pub fn value_and_grad<T: Real>(
    ctx: &Context,
    config: &Config,
    params: &Params<'_, T>,
    tokens: &[u32],
    targets: &[u32],
    batch: usize,
    n: usize,
    samples: usize,
) -> Result<(f64, Backward<T>)> {
    let model = Model::new(ctx, config, params, 5 * config.n_layers + 1)?;
    // Before the long part: the layers would otherwise be computed in vain.
    cross_entropy::check(batch.saturating_mul(n), targets, config.vocab_size)?;
    let input = Input::Tokens { tokens, batch, n };
    let trace = model.layers_forward(&input)?;
    let mut grads = Grads::new();
    let (loss, mut dx) = model.head_backward(&trace, &mut grads, |last, dlast, dhead| {
        cross_entropy::linear_mean(ctx, last, model.head, targets, dlast, dhead)
    })?;
    let reports = model.layers_backward(&trace, &mut dx, samples, &mut grads)?;
    model.embedding_backward(&input, &dx, &mut grads)?;
    Ok((loss, Backward { dx, grads, reports }))
}

impl<T> Input<'_, T> {
    fn sizes(&self) -> (usize, usize) {
        match self {
            Input::Tokens { batch, n, .. } => (*batch, *n),
            Input::Embeddings(x) => (x.batch(), x.n()),
        }
    }
}

impl<T> Trace<T> {
    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens a sequence.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The input of layer `i`, or of the final norm.
    fn rows(&self, i: usize) -> Result<Rows<'_, T>> {
        self.like(&self.inputs[i])
    }

    /// Another array of the same shape.
    fn like<'b>(&self, x: &'b [T]) -> Result<Rows<'b, T>> {
        Rows::from_slice(x, self.batch, self.n, self.d)
    }
}

/// The parameters, checked and in their places, and what has been done so far.
struct Model<'a, T> {
    ctx: &'a Context,
    embed: MatRef<'a, T>,
    layers: Vec<Layer<'a, T>>,
    norm: NormParams<T>,
    head: MatRef<'a, T>,
    d_model: usize,
    activation: ActivationKind,
    stages: usize,
    stages_done: Cell<usize>,
}

struct Layer<'a, T> {
    name: String,
    attn_norm: NormParams<T>,
    attn: SelfAttention<'a, T>,
    ffn_norm: NormParams<T>,
    w_in: MatRef<'a, T>,
    w_out: MatRef<'a, T>,
}

/// RMSNorm, or with a bias LayerNorm.
struct NormParams<T> {
    name: String,
    gain: Vec<T>,
    bias: Option<Vec<T>>,
}

/// What errors call an array like a layer's input, or the gradient with respect to one.
const ACTIVATIONS: &str = "what a layer takes or gives, or its gradient";

type Grads<T> = BTreeMap<String, Vec<T>>;

impl<'a, T: Real> Model<'a, T> {
    fn new(ctx: &'a Context, config: &Config, params: &Params<'a, T>, stages: usize) -> Result<Self> {
        config.validate()?;
        check_params(config, params)?;
        let matrix = |name: &str| params[name];
        let norm = |name: String| NormParams {
            gain: matrix(&format!("{name}.gain")).row(0).iter().copied().collect(),
            bias: (config.norm == Norm::Layer)
                .then(|| matrix(&format!("{name}.bias")).row(0).iter().copied().collect()),
            name,
        };
        let layers = (0..config.n_layers)
            .map(|i| {
                let name = format!("layers.{i}");
                let weight = |part: &str| matrix(&format!("{name}.{part}"));
                let weights = Weights::Heads {
                    w_q: weight("attn.w_q"),
                    w_k: weight("attn.w_k"),
                    w_v: weight("attn.w_v"),
                    w_o: weight("attn.w_o"),
                    n_heads: config.n_heads,
                    n_kv_heads: config.n_kv_heads,
                    rope: config.rope,
                    score_bound: config.score_bound,
                };
                let scale = SelfAttention::default_scale(&weights);
                Layer {
                    attn_norm: norm(format!("{name}.attn_norm")),
                    attn: SelfAttention {
                        weights,
                        attention: Attention::new(config.engine.clone(), Mask::causal(config.causal), scale),
                    },
                    ffn_norm: norm(format!("{name}.ffn_norm")),
                    w_in: weight("ffn.w_in"),
                    w_out: weight("ffn.w_out"),
                    name,
                }
            })
            .collect();
        Ok(Self {
            ctx,
            embed: matrix("embed"),
            layers,
            norm: norm("norm".to_string()),
            head: matrix("head"),
            d_model: config.d_model,
            activation: config.activation,
            stages,
            stages_done: Cell::new(0),
        })
    }

    fn stage_done(&self) {
        self.stages_done.set(self.stages_done.get() + 1);
        self.ctx.set_progress(self.stages_done.get() as f64 / self.stages as f64);
    }

    fn layers_forward(&self, input: &Input<'_, T>) -> Result<Trace<T>> {
        let ((batch, n), d) = (input.sizes(), self.d_model);
        if let Input::Tokens { tokens, .. } = input {
            expect_len("tokens", tokens.len(), batch.saturating_mul(n))?;
        }
        let mut x = zeroed(batch * n * d, ACTIVATIONS)?;
        match input {
            Input::Tokens { tokens, .. } => embedding::forward(self.ctx, tokens, self.embed, &mut x)?,
            Input::Embeddings(rows) => {
                expect_rows("x", rows, batch, n, d)?;
                check_finite("x", rows.blocks())?;
                for (x, block) in x.chunks_exact_mut((n * d).max(1)).zip(rows.blocks()) {
                    MatMut::from_row_major_slice_mut(x, n, d).copy_from(block);
                }
            }
        }
        let mut trace =
            Trace { inputs: room(self.layers.len() + 1, "a list of layers")?, plans: Vec::new(), batch, n, d };
        trace.inputs.push(x);
        for (i, layer) in self.layers.iter().enumerate() {
            let (next, plan) = self.layer_forward(layer, &trace, i)?;
            trace.inputs.push(next);
            trace.plans.push(plan);
        }
        Ok(trace)
    }

    /// `x_{i+1}` from `x_i`, and the engines that were used.
    fn layer_forward(&self, layer: &Layer<'_, T>, trace: &Trace<T>, i: usize) -> Result<(Vec<T>, Option<Method>)> {
        let Attended { z, inside, .. } = self.attend(layer, &layer.attn, trace, i)?;
        let plan = inside.planned(&layer.attn.attention);
        drop(inside);
        self.stage_done();
        let normed = layer.ffn_norm.forward(self.ctx, &trace.like(&z)?)?;
        let mut next = zeroed(z.len(), ACTIVATIONS)?;
        feed_forward::forward(self.ctx, &trace.like(&normed)?, layer.w_in, layer.w_out, self.activation, &mut next)?;
        add_into(&mut next, &z);
        self.stage_done();
        Ok((next, plan))
    }

    /// The first half of a layer.
    fn attend(
        &self,
        layer: &Layer<'_, T>,
        attn: &SelfAttention<'_, T>,
        trace: &Trace<T>,
        i: usize,
    ) -> Result<Attended<T>> {
        let normed = layer.attn_norm.forward(self.ctx, &trace.rows(i)?)?;
        let rows = trace.like(&normed)?;
        let inside = attn.inside(self.ctx, &rows)?;
        let mut z = zeroed(normed.len(), ACTIVATIONS)?;
        attn.finish(self.ctx, &rows, &inside, &mut z)?;
        add_into(&mut z, &trace.inputs[i]);
        Ok(Attended { normed, inside, z })
    }

    /// The gradient with respect to the last layer's output, and what `head(last, dlast, dhead)` returns: it is given
    /// the final norm's output, and writes the gradients with respect to that and to the head.
    fn head_backward<R>(
        &self,
        trace: &Trace<T>,
        grads: &mut Grads<T>,
        head: impl FnOnce(&Rows<'_, T>, &mut [T], &mut [T]) -> Result<R>,
    ) -> Result<(R, Vec<T>)> {
        let x = trace.rows(self.layers.len())?;
        let last = self.norm.forward(self.ctx, &x)?;
        let (mut dlast, mut dhead) = (zeroed(last.len(), ACTIVATIONS)?, zeros(self.head)?);
        let result = head(&trace.like(&last)?, &mut dlast, &mut dhead)?;
        drop(last);
        grads.insert("head".to_string(), dhead);
        let dx = self.norm.backward(self.ctx, &x, &dlast, grads)?;
        self.stage_done();
        Ok((result, dx))
    }

    /// Replaces the gradient with respect to the last layer's output by that with respect to `x_0`.
    fn layers_backward(
        &self,
        trace: &Trace<T>,
        dx: &mut [T],
        samples: usize,
        grads: &mut Grads<T>,
    ) -> Result<Vec<LayerReport>> {
        let mut reports = room(self.layers.len(), "a list of layers")?;
        for (i, layer) in self.layers.iter().enumerate().rev() {
            reports.push(self.layer_backward(layer, trace, i, dx, samples, grads)?);
        }
        reports.reverse();
        Ok(reports)
    }

    /// Replaces `dx_{i+1}` by `dx_i`.
    fn layer_backward(
        &self,
        layer: &Layer<'_, T>,
        trace: &Trace<T>,
        i: usize,
        dx: &mut [T],
        samples: usize,
        grads: &mut Grads<T>,
    ) -> Result<LayerReport> {
        let mut attn = layer.attn.clone();
        if let Some(plan) = trace.plans.get(i).and_then(Option::as_ref) {
            attn.attention.method = plan.clone();
        }
        let Attended { normed, inside, z } = self.attend(layer, &attn, trace, i)?;
        let error = if samples > 0 {
            let heads = inside.heads(&trace.like(&normed)?)?;
            Some(measure_error(
                self.ctx,
                &heads,
                &layer.attn.attention.scores,
                &inside.out(trace.n)?,
                samples,
                i as u64,
            )?)
        } else {
            None
        };
        self.stage_done();

        let mut through = zeroed(dx.len(), ACTIVATIONS)?;
        {
            let z_rows = trace.like(&z)?;
            let normed = layer.ffn_norm.forward(self.ctx, &z_rows)?;
            let (mut dw_in, mut dw_out) = (zeros(layer.w_in)?, zeros(layer.w_out)?);
            feed_forward::backward(
                self.ctx,
                &trace.like(&normed)?,
                layer.w_in,
                layer.w_out,
                self.activation,
                &trace.like(dx)?,
                &mut through,
                &mut dw_in,
                &mut dw_out,
            )?;
            drop(normed);
            grads.insert(format!("{}.ffn.w_in", layer.name), dw_in);
            grads.insert(format!("{}.ffn.w_out", layer.name), dw_out);
            add_into(dx, &layer.ffn_norm.backward(self.ctx, &z_rows, &through, grads)?);
        }
        drop(z);
        self.stage_done();

        let per_head = samples.min(SAMPLES[0]);
        let (rows, dy) = (trace.like(&normed)?, trace.like(dx)?);
        let (weights, heads) = attn.pull_back(self.ctx, &rows, &inside, &dy, per_head, &mut through)?;
        drop((normed, inside));
        grads.extend(weights.into_iter().map(|(name, grad)| (format!("{}.attn.{name}", layer.name), grad)));
        add_into(dx, &layer.attn_norm.backward(self.ctx, &trace.rows(i)?, &through, grads)?);
        self.stage_done();
        Ok(LayerReport { error, heads })
    }

    fn embedding_backward(&self, input: &Input<'_, T>, dx: &[T], grads: &mut Grads<T>) -> Result<()> {
        let mut dembed = zeros(self.embed)?;
        if let Input::Tokens { tokens, batch, n } = input {
            let dx = Rows::from_slice(dx, *batch, *n, self.d_model)?;
            embedding::backward(self.ctx, tokens, &dx, self.embed.nrows(), &mut dembed)?;
        }
        grads.insert("embed".to_string(), dembed);
        Ok(())
    }
}

/// The first half of a layer: the normed input, what attention computed of it, and `z`.
struct Attended<T> {
    normed: Vec<T>,
    inside: Inside<T>,
    z: Vec<T>,
}

impl<T: Real> NormParams<T> {
    fn forward(&self, ctx: &Context, x: &Rows<'_, T>) -> Result<Vec<T>> {
        let mut y = zeroed(x.batch() * x.n() * x.d(), ACTIVATIONS)?;
        match &self.bias {
            None => norm::rms_forward(ctx, x, &self.gain, EPS, &mut y)?,
            Some(bias) => norm::layer_forward(ctx, x, &self.gain, bias, EPS, &mut y)?,
        }
        Ok(y)
    }

    /// The gradient with respect to `x`; those of the parameters go to `grads`.
    fn backward(&self, ctx: &Context, x: &Rows<'_, T>, dy: &[T], grads: &mut Grads<T>) -> Result<Vec<T>> {
        let dy = Rows::from_slice(dy, x.batch(), x.n(), x.d())?;
        let mut dx = zeroed(x.batch() * x.n() * x.d(), ACTIVATIONS)?;
        let mut dgain = zeroed(x.d(), "the gradient of a norm")?;
        if self.bias.is_none() {
            norm::rms_backward(ctx, x, &self.gain, EPS, &dy, &mut dx, &mut dgain)?;
        } else {
            let mut dbias = zeroed(x.d(), "the gradient of a norm")?;
            norm::layer_backward(ctx, x, &self.gain, EPS, &dy, &mut dx, &mut dgain, &mut dbias)?;
            grads.insert(format!("{}.bias", self.name), dbias);
        }
        grads.insert(format!("{}.gain", self.name), dgain);
        Ok(dx)
    }
}

fn zeros<T: Real>(like: MatRef<'_, T>) -> Result<Vec<T>> {
    zeroed(like.nrows() * like.ncols(), "the gradient of a parameter")
}

/// An error naming the first parameter that is missing, unexpected, misshapen or not finite.
fn check_params<T: Real>(config: &Config, params: &Params<'_, T>) -> Result<()> {
    let shapes = config.param_shapes();
    for (name, shape) in &shapes {
        let Some(param) = params.get(name) else {
            return Err(Error::Argument(format!("the parameter {name} is missing; expected shape {shape:?}")));
        };
        let expected = if let [rows, cols] = shape[..] { (rows, cols) } else { (1, shape[0]) };
        if param.shape() != expected {
            return Err(Error::Shape(format!(
                "the parameter {name} has shape {:?}; expected {expected:?}",
                param.shape()
            )));
        }
        if check_finite(name, &[*param]).is_err() {
            return Err(Error::NonFinite(format!(
                "the parameter {name} holds NaN or infinity; expected finite numbers"
            )));
        }
    }
    if params.len() > shapes.len() {
        let known: BTreeSet<_> = shapes.iter().map(|(name, _)| name).collect();
        if let Some(name) = params.keys().find(|name| !known.contains(name)) {
            return Err(Error::Argument(format!("the model has no parameter {name}; see Config::param_shapes")));
        }
    }
    Ok(())
}

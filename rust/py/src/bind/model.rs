//! The model: logits, loss, and the gradient of every parameter.

use std::collections::BTreeMap;

use lingrad_core::model::{self, Backward, Config, Input, Params, Trace};
use lingrad_core::{Error, Rows};
use numpy::prelude::*;
use numpy::{PyArrayDyn, PyReadonlyArrayDyn, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::layers::{check_finite, check_grads, check_result, slice};
use crate::arrays::{Any, Output, Scalar, View, by_dtype, from_vec, joined};
use crate::convert::{self, AnyMethod, Estimate, estimate};
use crate::entry::{Later, Outcome, entry};
use crate::error::{Result, ShapeError};
use crate::run::run;

/// The fields of `lingrad_rs.TransformerConfig`.
#[derive(FromPyObject)]
pub struct ConfigFields {
    n_layers: usize,
    d_model: usize,
    n_heads: usize,
    n_kv_heads: Option<usize>,
    d_ff: usize,
    vocab_size: usize,
    causal: bool,
    norm: String,
    activation: String,
    rope: bool,
    score_bound: Option<f64>,
    engine: AnyMethod,
}

impl ConfigFields {
    fn config(self) -> lingrad_core::Result<Config> {
        let config = Config {
            n_layers: self.n_layers,
            d_model: self.d_model,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads.unwrap_or(self.n_heads),
            d_ff: self.d_ff,
            vocab_size: self.vocab_size,
            causal: self.causal,
            norm: self.norm.parse()?,
            activation: self.activation.parse()?,
            rope: self.rope,
            score_bound: self.score_bound,
            engine: self.engine.0,
        };
        config.validate()?;
        Ok(config)
    }
}

/// The name and shape of every parameter, in the model's order; an error where the configuration does not fit.
#[pyfunction]
pub fn transformer_param_shapes(config: Later<'_, ConfigFields>) -> Outcome<Vec<(String, Vec<usize>)>> {
    entry(|| Ok(config.read()?.config()?.param_shapes()))
}

/// Parameters as Python hands them over.
type Named<'py> = Vec<(String, Bound<'py, PyUntypedArray>)>;

struct ParamViews<'py, T: Scalar>(Vec<(String, View<'py, T>)>);

impl<'py, T: Scalar> ParamViews<'py, T> {
    fn new(params: &Named<'py>) -> Result<Self> {
        let views = params.iter().map(|(name, array)| Ok((name.clone(), View::new("a parameter", array)?)));
        Ok(Self(views.collect::<Result<_>>()?))
    }

    fn params(&self) -> Result<Params<'_, T>> {
        self.0.iter().map(|(name, view)| Ok((name.clone(), view.matrix_or_row()?))).collect()
    }
}

fn first<'a, 'py>(params: &'a Named<'py>) -> Result<&'a Bound<'py, PyUntypedArray>> {
    Ok(params.first().map(|(_, array)| array).ok_or_else(|| ShapeError::new_err("params is empty"))?)
}

/// What a model is applied to: C-contiguous `uint32` tokens `(..., n)`, or embeddings `(..., n, d_model)`.
enum Source<'py, T: Scalar> {
    Tokens(PyReadonlyArrayDyn<'py, u32>),
    Embeddings(View<'py, T>),
}

impl<'py, T: Scalar> Source<'py, T> {
    fn new(input: Any<'_, 'py>) -> Result<Self> {
        Ok(match input.cast::<PyArrayDyn<u32>>() {
            Ok(tokens) => Self::Tokens(tokens.try_readonly().map_err(PyErr::from)?),
            Err(_) => Self::Embeddings(View::new("x", input)?),
        })
    }

    /// All axes but that of width, the last of them n.
    fn positions(&self) -> &[usize] {
        match self {
            Self::Tokens(tokens) => tokens.shape(),
            Self::Embeddings(x) => &x.shape()[..x.shape().len().saturating_sub(1)],
        }
    }

    fn rows(&self) -> Result<Option<Rows<'_, T>>> {
        match self {
            Self::Tokens(_) => Ok(None),
            Self::Embeddings(x) => Ok(Some(x.rows()?)),
        }
    }

    fn input<'a>(&'a self, rows: &'a Option<Rows<'a, T>>) -> Result<Input<'a, T>> {
        match (self, rows) {
            (_, Some(rows)) => Ok(Input::Embeddings(rows)),
            (Self::Tokens(tokens), None) => {
                let (batch, n) = batch_and_n(tokens.shape());
                Ok(Input::Tokens { tokens: slice(tokens)?, batch, n })
            }
            (Self::Embeddings(_), None) => Err(ShapeError::new_err("x has no rows").into()),
        }
    }
}

fn batch_and_n(positions: &[usize]) -> (usize, usize) {
    let (n, leading) = positions.split_last().map_or((0, positions), |(n, leading)| (*n, leading));
    (leading.iter().product(), n)
}

fn check_input<T: Scalar>(input: &Input<'_, T>) -> lingrad_core::Result<()> {
    match input {
        Input::Embeddings(x) => check_finite("x", x.blocks()),
        Input::Tokens { .. } => Ok(()),
    }
}

enum Kept {
    F32(Trace<f32>),
    F64(Trace<f64>),
}

/// The forward pass of a model, as its backward pass needs it: one `(..., n, d_model)` array a layer.
#[pyclass(frozen, module = "lingrad_rs._lingrad_rs")]
pub struct TransformerTrace(Kept);

/// A `Scalar` that finds itself in [`Kept`].
trait Keep: Scalar {
    fn keep(trace: Trace<Self>) -> TransformerTrace;
    fn kept(trace: &TransformerTrace) -> Option<&Trace<Self>>;
}

macro_rules! keep {
    ($t:ty, $variant:ident) => {
        impl Keep for $t {
            fn keep(trace: Trace<Self>) -> TransformerTrace {
                TransformerTrace(Kept::$variant(trace))
            }
            fn kept(trace: &TransformerTrace) -> Option<&Trace<Self>> {
                match &trace.0 {
                    Kept::$variant(trace) => Some(trace),
                    _ => None,
                }
            }
        }
    };
}
keep!(f32, F32);
keep!(f64, F64);

/// Logits `(..., n, vocab_size)`, and the trace for the backward pass.
#[pyfunction]
pub fn transformer_forward<'py>(
    py: Python<'py>,
    config: Later<'py, ConfigFields>,
    params: Later<'py, Named<'py>>,
    input: Any<'_, 'py>,
) -> Outcome<(Bound<'py, PyAny>, TransformerTrace)> {
    entry(|| {
        let (config, params) = (config.read()?.config()?, params.read()?);
        by_dtype!(first(&params)?, T => {
            let (views, source) = (ParamViews::<T>::new(&params)?, Source::new(input)?);
            let (params, rows) = (views.params()?, source.rows()?);
            let input = source.input(&rows)?;
            let mut y = Output::new(py, &joined(source.positions(), &[config.vocab_size]))?;
            let entries = y.entries();
            let trace = run(py, None, |ctx| {
                check_input(&input)?;
                let trace = model::forward(ctx, &config, &params, &input, entries)?;
                check_result("y", entries)?;
                Ok(trace)
            })?;
            Ok((y.into_array(), T::keep(trace)))
        })
    })
}

/// `(dx, grads)`, where `dx (..., n, d_model)` is the gradient with respect to the embedded input.
#[pyfunction]
pub fn transformer_backward<'py>(
    py: Python<'py>,
    config: Later<'py, ConfigFields>,
    params: Later<'py, Named<'py>>,
    input: Any<'_, 'py>,
    trace: &TransformerTrace,
    dy: Any<'_, 'py>,
) -> Outcome<(Bound<'py, PyAny>, Bound<'py, PyDict>)> {
    entry(|| {
        let (config, params) = (config.read()?.config()?, params.read()?);
        by_dtype!(first(&params)?, T => {
            let (views, source) = (ParamViews::<T>::new(&params)?, Source::new(input)?);
            let (params, rows) = (views.params()?, source.rows()?);
            let input = source.input(&rows)?;
            let trace = T::kept(trace).ok_or_else(|| Error::Argument("trace is of another dtype than params".into()))?;
            let dy = View::new("dy", dy)?;
            let dy = dy.rows()?;
            let Backward { dx, grads, .. } = run(py, None, |ctx| {
                check_input(&input)?;
                check_finite("dy", dy.blocks())?;
                let result = model::backward(ctx, &config, &params, &input, trace, &dy)?;
                check_result("dx", &result.dx)?;
                check_grads(&result.grads)?;
                Ok(result)
            })?;
            let dx = from_vec(py, dx, &joined(source.positions(), &[config.d_model]))?;
            Ok((dx, named(py, &config, grads)?))
        })
    })
}

/// The measured error of a layer's attention, and its heads.
type LayerReport<'py> = (Option<Estimate>, Vec<Bound<'py, PyDict>>);

/// `(loss, grads, layers)`: the mean cross-entropy, its gradients, and of each layer the measured error of its attention
/// where `samples > 0`, and what is known of each of its heads.
#[pyfunction]
#[pyo3(signature = (config, params, tokens, targets, *, samples, progress))]
pub fn transformer_value_and_grad<'py>(
    py: Python<'py>,
    config: Later<'py, ConfigFields>,
    params: Later<'py, Named<'py>>,
    tokens: PyReadonlyArrayDyn<'py, u32>,
    targets: PyReadonlyArrayDyn<'py, u32>,
    samples: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> Outcome<(f64, Bound<'py, PyDict>, Vec<LayerReport<'py>>)> {
    entry(|| {
        let (config, params) = (config.read()?.config()?, params.read()?);
        by_dtype!(first(&params)?, T => {
            let views = ParamViews::<T>::new(&params)?;
            let params = views.params()?;
            let (batch, n) = batch_and_n(tokens.shape());
            let (tokens, targets) = (slice(&tokens)?, slice(&targets)?);
            let (loss, Backward { grads, reports, .. }) = run(py, progress, |ctx| {
                let result =
                    model::value_and_grad(ctx, &config, &params, tokens, targets, batch, n, samples)?;
                check_grads(&result.1.grads)?;
                Ok(result)
            })?;
            let layers = (reports.iter())
                .map(|report| Ok((report.error.map(estimate), convert::reports(py, &report.heads)?)))
                .collect::<Result<_>>()?;
            Ok((loss, named(py, &config, grads)?, layers))
        })
    })
}

/// The gradients by name, in the model's order.
fn named<'py, T: Scalar>(
    py: Python<'py>,
    config: &Config,
    mut grads: BTreeMap<String, Vec<T>>,
) -> Result<Bound<'py, PyDict>> {
    let named = PyDict::new(py);
    for (name, shape) in config.param_shapes() {
        if let Some(grad) = grads.remove(&name) {
            named.set_item(name, from_vec(py, grad, &shape)?)?;
        }
    }
    Ok(named)
}

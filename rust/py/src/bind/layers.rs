//! The modules: forward beside backward. Their parameters are small, so they are copied where the core wants slices.

use std::fmt::Display;

use lingrad_core::layers::activation::{self, ActivationKind};
use lingrad_core::layers::attention_block::{SelfAttention, Weights};
use lingrad_core::layers::{embedding, feed_forward, linear, norm};
use lingrad_core::problem::finite;
use lingrad_core::{Attention, Context, Error, Mask, MatRef, Rows};
use numpy::PyReadonlyArrayDyn;
use numpy::prelude::*;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rayon::prelude::*;

use crate::arrays::{Any, Output, Scalar, View, by_dtype, from_vec, joined};
use crate::convert::AnyMethod;
use crate::entry::{Later, Outcome, entry};
use crate::error::{Result, ShapeError};
use crate::run::run;

type Array<'py> = Bound<'py, PyAny>;
/// Token ids, C-contiguous.
type Tokens<'py> = PyReadonlyArrayDyn<'py, u32>;

/// An error where an argument holds NaN or infinity. (Arguments of modules have no heads to tell of.)
pub fn check_finite<T: Scalar>(name: &str, views: &[MatRef<'_, T>]) -> lingrad_core::Result<()> {
    finite::check_finite(name, views)
        .map_err(|_| Error::NonFinite(format!("{name} holds NaN or infinity; expected finite numbers")))
}

/// An error where a result is not finite: the arguments are, so something overflowed.
pub fn check_result<T: Scalar>(name: &str, result: &[T]) -> lingrad_core::Result<()> {
    if result.par_chunks(NUMBERS_A_CHECK).all(finite::all_finite) {
        return Ok(());
    }
    Err(Error::NonFinite(format!(
        "{name} overflows: the arguments are too large for their dtype; scale them down, or use float64"
    )))
}

const NUMBERS_A_CHECK: usize = 1 << 16;

/// Of gradients by the names of their parameters.
pub fn check_grads<T: Scalar>(
    grads: impl IntoIterator<Item = (impl Display, impl AsRef<[T]>)>,
) -> lingrad_core::Result<()> {
    grads.into_iter().try_for_each(|(name, grad)| check_result(&format!("the gradient of {name}"), grad.as_ref()))
}

fn check_params<T: Scalar>(params: &[(&str, MatRef<'_, T>)]) -> lingrad_core::Result<()> {
    params.iter().try_for_each(|(name, param)| check_finite(name, &[*param]))
}

/// `y (..., n, width)` of a module, by `work(ctx, x, y)`.
fn forward<'py, T: Scalar>(
    py: Python<'py>,
    x: &View<'py, T>,
    width: usize,
    params: &[(&str, MatRef<'_, T>)],
    work: impl FnOnce(&Context, &Rows<'_, T>, &mut [T]) -> lingrad_core::Result<()> + Send,
) -> Result<Array<'py>> {
    let rows = x.rows()?;
    let mut y = Output::new(py, &joined(x.leading(), &[rows.n(), width]))?;
    let entries = y.entries();
    run(py, None, |ctx| {
        check_finite("x", rows.blocks())?;
        check_params(params)?;
        work(ctx, &rows, entries)?;
        check_result("y", entries)
    })?;
    Ok(y.into_array())
}

/// `dx` of a module, by `work(ctx, x, dy, dx)`, and what that returns.
fn backward<'py, T: Scalar, R: Send>(
    py: Python<'py>,
    x: &View<'py, T>,
    dy: Any<'_, 'py>,
    params: &[(&str, MatRef<'_, T>)],
    work: impl FnOnce(&Context, &Rows<'_, T>, &Rows<'_, T>, &mut [T]) -> lingrad_core::Result<R> + Send,
) -> Result<(Array<'py>, R)> {
    let dy = View::new("dy", dy)?;
    let (rows, dy) = (x.rows()?, dy.rows()?);
    let mut dx = Output::new(py, x.shape())?;
    let entries = dx.entries();
    let result = run(py, None, |ctx| {
        check_finite("x", rows.blocks())?;
        check_finite("dy", dy.blocks())?;
        check_params(params)?;
        let result = work(ctx, &rows, &dy, entries)?;
        check_result("dx", entries)?;
        Ok(result)
    })?;
    Ok((dx.into_array(), result))
}

fn row<T>(entries: &[T]) -> MatRef<'_, T> {
    MatRef::from_row_major_slice(entries, 1, entries.len())
}

/// `y = x w + b`.
#[pyfunction]
pub fn linear_forward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    w: Any<'_, 'py>,
    b: Option<Any<'_, 'py>>,
) -> Outcome<Array<'py>> {
    entry(|| {
        by_dtype!(x, T => {
            let (x, w) = (View::<T>::new("x", x)?, View::new("w", w)?);
            let b = b.map(|b| View::new("b", b)?.vector()).transpose()?;
            let (w, b) = (w.matrix()?, b.as_deref());
            let params = [("w", w), ("b", row(b.unwrap_or_default()))];
            forward(py, &x, w.ncols(), &params, |ctx, x, y| linear::forward(ctx, x, w, b, y))
        })
    })
}

/// `(dx, dw, db)`; the last where the module has a bias.
#[pyfunction]
pub fn linear_backward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    w: Any<'_, 'py>,
    has_bias: bool,
    dy: Any<'_, 'py>,
) -> Outcome<(Array<'py>, Array<'py>, Option<Array<'py>>)> {
    entry(|| {
        by_dtype!(x, T => {
            let (x, w_view) = (View::<T>::new("x", x)?, View::new("w", w)?);
            let w = w_view.matrix()?;
            let mut dw = Output::new(py, w_view.shape())?;
            let mut db = has_bias.then(|| Output::new(py, &[w.ncols()])).transpose()?;
            let (dw_out, mut db_out) = (dw.entries(), db.as_mut().map(Output::entries));
            let (dx, ()) = backward(py, &x, dy, &[("w", w)], |ctx, x, dy, dx| {
                linear::backward(ctx, x, w, dy, dx, dw_out, db_out.as_deref_mut())?;
                check_grads([("w", &*dw_out), ("b", db_out.as_deref().unwrap_or_default())])
            })?;
            Ok((dx, dw.into_array(), db.map(Output::into_array)))
        })
    })
}

/// The activation, entry by entry.
#[pyfunction]
pub fn activation_forward<'py>(py: Python<'py>, x: Any<'_, 'py>, kind: &str) -> Outcome<Array<'py>> {
    entry(|| {
        let kind: ActivationKind = kind.parse()?;
        by_dtype!(x, T => {
            let x = View::<T>::new("x", x)?;
            forward(py, &x, x.rows_and_columns()?.1, &[], |ctx, x, y| activation::forward(ctx, kind, x, y))
        })
    })
}

/// `dx`.
#[pyfunction]
pub fn activation_backward<'py>(py: Python<'py>, x: Any<'_, 'py>, kind: &str, dy: Any<'_, 'py>) -> Outcome<Array<'py>> {
    entry(|| {
        let kind: ActivationKind = kind.parse()?;
        by_dtype!(x, T => {
            let x = View::<T>::new("x", x)?;
            Ok(backward(py, &x, dy, &[], |ctx, x, dy, dx| activation::backward(ctx, kind, x, dy, dx))?.0)
        })
    })
}

/// RMSNorm, or LayerNorm where there is a bias.
#[pyfunction]
pub fn norm_forward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    gain: Any<'_, 'py>,
    bias: Option<Any<'_, 'py>>,
    eps: f64,
) -> Outcome<Array<'py>> {
    entry(|| {
        by_dtype!(x, T => {
            let (x, gain) = (View::<T>::new("x", x)?, View::new("gain", gain)?.vector()?);
            let bias = bias.map(|b| View::new("bias", b)?.vector()).transpose()?;
            let params = [("gain", row(&gain)), ("bias", row(bias.as_deref().unwrap_or_default()))];
            forward(py, &x, x.rows_and_columns()?.1, &params, |ctx, x, y| match &bias {
                None => norm::rms_forward(ctx, x, &gain, eps, y),
                Some(bias) => norm::layer_forward(ctx, x, &gain, bias, eps, y),
            })
        })
    })
}

/// `(dx, dgain, dbias)`; the last where the module has a bias.
#[pyfunction]
pub fn norm_backward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    gain: Any<'_, 'py>,
    has_bias: bool,
    eps: f64,
    dy: Any<'_, 'py>,
) -> Outcome<(Array<'py>, Array<'py>, Option<Array<'py>>)> {
    entry(|| {
        by_dtype!(x, T => {
            let (x, gain) = (View::<T>::new("x", x)?, View::new("gain", gain)?.vector()?);
            let mut dgain = Output::new(py, &[gain.len()])?;
            let mut dbias = has_bias.then(|| Output::new(py, &[gain.len()])).transpose()?;
            let (dgain_out, mut dbias_out) = (dgain.entries(), dbias.as_mut().map(Output::entries));
            let (dx, ()) = backward(py, &x, dy, &[("gain", row(&gain))], |ctx, x, dy, dx| {
                match &mut dbias_out {
                    None => norm::rms_backward(ctx, x, &gain, eps, dy, dx, dgain_out)?,
                    Some(dbias) => norm::layer_backward(ctx, x, &gain, eps, dy, dx, dgain_out, dbias)?,
                }
                check_grads([("gain", &*dgain_out), ("bias", dbias_out.as_deref().unwrap_or_default())])
            })?;
            Ok((dx, dgain.into_array(), dbias.map(Output::into_array)))
        })
    })
}

/// `act(x w_in) w_out`.
#[pyfunction]
pub fn feed_forward_forward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    w_in: Any<'_, 'py>,
    w_out: Any<'_, 'py>,
    kind: &str,
) -> Outcome<Array<'py>> {
    entry(|| {
        let kind: ActivationKind = kind.parse()?;
        by_dtype!(x, T => {
            let (x, w_in, w_out) = (View::<T>::new("x", x)?, View::new("w_in", w_in)?, View::new("w_out", w_out)?);
            let (w_in, w_out) = (w_in.matrix()?, w_out.matrix()?);
            forward(py, &x, w_out.ncols(), &[("w_in", w_in), ("w_out", w_out)], |ctx, x, y| {
                feed_forward::forward(ctx, x, w_in, w_out, kind, y)
            })
        })
    })
}

/// `(dx, dw_in, dw_out)`.
#[pyfunction]
pub fn feed_forward_backward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    w_in: Any<'_, 'py>,
    w_out: Any<'_, 'py>,
    kind: &str,
    dy: Any<'_, 'py>,
) -> Outcome<(Array<'py>, Array<'py>, Array<'py>)> {
    entry(|| {
        let kind: ActivationKind = kind.parse()?;
        by_dtype!(x, T => {
            let (x, in_view, out_view) = (View::<T>::new("x", x)?, View::new("w_in", w_in)?, View::new("w_out", w_out)?);
            let (w_in, w_out) = (in_view.matrix()?, out_view.matrix()?);
            let mut dw_in = Output::new(py, in_view.shape())?;
            let mut dw_out = Output::new(py, out_view.shape())?;
            let (din, dout) = (dw_in.entries(), dw_out.entries());
            let (dx, ()) = backward(py, &x, dy, &[("w_in", w_in), ("w_out", w_out)], |ctx, x, dy, dx| {
                feed_forward::backward(ctx, x, w_in, w_out, kind, dy, dx, din, dout)?;
                check_grads([("w_in", &*din), ("w_out", &*dout)])
            })?;
            Ok((dx, dw_in.into_array(), dw_out.into_array()))
        })
    })
}

/// `embed[tokens]`.
#[pyfunction]
pub fn embedding_forward<'py>(py: Python<'py>, tokens: Tokens<'py>, embed: Any<'_, 'py>) -> Outcome<Array<'py>> {
    entry(|| {
        by_dtype!(embed, T => {
            let embed = View::<T>::new("embed", embed)?;
            let embed = embed.matrix()?;
            let mut y = Output::new(py, &joined(tokens.shape(), &[embed.ncols()]))?;
            let (tokens, entries) = (slice(&tokens)?, y.entries());
            run(py, None, |ctx| {
                check_finite("embed", &[embed])?;
                embedding::forward(ctx, tokens, embed, entries)
            })?;
            Ok(y.into_array())
        })
    })
}

/// `dembed`.
#[pyfunction]
pub fn embedding_backward<'py>(
    py: Python<'py>,
    tokens: Tokens<'py>,
    vocab: usize,
    dy: Any<'_, 'py>,
) -> Outcome<Array<'py>> {
    entry(|| {
        by_dtype!(dy, T => {
            let dy = View::<T>::new("dy", dy)?;
            let dy = dy.rows()?;
            let mut dembed = Output::new(py, &[vocab, dy.d()])?;
            let (tokens, entries) = (slice(&tokens)?, dembed.entries());
            run(py, None, |ctx| {
                check_finite("dy", dy.blocks())?;
                embedding::backward(ctx, tokens, &dy, vocab, entries)?;
                check_grads([("embed", &*entries)])
            })?;
            Ok(dembed.into_array())
        })
    })
}

/// The entries of token ids.
pub fn slice<'a>(tokens: &'a Tokens<'_>) -> Result<&'a [u32]> {
    Ok(tokens.as_slice().map_err(|_| ShapeError::new_err("tokens are not contiguous"))?)
}

/// The fields of a `lingrad_rs.SelfAttention` beside its weights; the paper's form uses only the last three.
#[derive(FromPyObject)]
pub struct AttentionOptions {
    n_heads: usize,
    n_kv_heads: usize,
    rope: bool,
    score_bound: Option<f64>,
    causal: bool,
    scale: Option<f64>,
    engine: AnyMethod,
}

/// Views of `(w, w_v)` or `(w_q, w_k, w_v, w_o)`.
struct WeightViews<'py, T: Scalar>(Vec<(&'static str, View<'py, T>)>);

impl<'py, T: Scalar> WeightViews<'py, T> {
    fn new(weights: &[Bound<'py, numpy::PyUntypedArray>]) -> Result<Self> {
        let names: &[&str] = match weights.len() {
            2 => &["w", "w_v"],
            4 => &["w_q", "w_k", "w_v", "w_o"],
            n => return Err(ShapeError::new_err(format!("{n} weights; expected 2 or 4")).into()),
        };
        let views = names.iter().zip(weights).map(|(name, w)| Ok((*name, View::new(name, w)?)));
        Ok(Self(views.collect::<Result<_>>()?))
    }

    fn matrices(&self) -> Result<Vec<(&'static str, MatRef<'_, T>)>> {
        self.0.iter().map(|(name, view)| Ok((*name, view.matrix()?))).collect()
    }
}

fn self_attention<'a, T: Scalar>(
    weights: &[(&str, MatRef<'a, T>)],
    options: AttentionOptions,
) -> lingrad_core::Result<SelfAttention<'a, T>> {
    let weights = match *weights {
        [(_, w_q), (_, w_k), (_, w_v), (_, w_o)] => Weights::Heads {
            w_q,
            w_k,
            w_v,
            w_o,
            n_heads: options.n_heads,
            n_kv_heads: options.n_kv_heads,
            rope: options.rope,
            score_bound: options.score_bound,
        },
        [(_, w), (_, w_v)] => Weights::Combined { w, w_v },
        _ => return Err(Error::Shape("expected 2 or 4 weights".into())),
    };
    let scale = options.scale.unwrap_or_else(|| SelfAttention::default_scale(&weights));
    let attention = Attention::new(options.engine.0, Mask::causal(options.causal), scale);
    Ok(SelfAttention { weights, attention })
}

/// `y` of a `SelfAttention` module.
#[pyfunction]
pub fn self_attention_forward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    weights: Later<'py, Vec<Bound<'py, numpy::PyUntypedArray>>>,
    options: Later<'py, AttentionOptions>,
) -> Outcome<Array<'py>> {
    entry(|| {
        by_dtype!(x, T => {
            let (x, weights) = (View::<T>::new("x", x)?, WeightViews::new(&weights.read()?)?);
            let weights = weights.matrices()?;
            let module = self_attention(&weights, options.read()?)?;
            forward(py, &x, module.output_width(), &weights, |ctx, x, y| module.forward(ctx, x, y))
        })
    })
}

/// `(dx, grads)` of a `SelfAttention` module.
#[pyfunction]
pub fn self_attention_backward<'py>(
    py: Python<'py>,
    x: Any<'_, 'py>,
    weights: Later<'py, Vec<Bound<'py, numpy::PyUntypedArray>>>,
    options: Later<'py, AttentionOptions>,
    dy: Any<'_, 'py>,
) -> Outcome<(Array<'py>, Bound<'py, PyDict>)> {
    entry(|| {
        by_dtype!(x, T => {
            let (x, views) = (View::<T>::new("x", x)?, WeightViews::new(&weights.read()?)?);
            let weights = views.matrices()?;
            let module = self_attention(&weights, options.read()?)?;
            let (dx, mut grads) =
                backward(py, &x, dy, &weights, |ctx, x, dy, dx| {
                    let grads = module.backward(ctx, x, dy, dx)?;
                    check_grads(&grads)?;
                    Ok(grads)
                })?;
            let named = PyDict::new(py);
            for (name, view) in &views.0 {
                if let Some(grad) = grads.remove(name) {
                    named.set_item(name, from_vec(py, grad, view.shape())?)?;
                }
            }
            Ok((dx, named))
        })
    })
}

//! Attention: forward, backward, measured error.

use lingrad_core::memory::copied;
use lingrad_core::{Attention, AttentionGrads, Error, Heads, Mask, Saved, Scores, measure};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{Any, Output, Scalar, View, by_dtype, joined};
use crate::convert::{self, AnyMethod, Estimate, estimate};
use crate::entry::{Later, Outcome, entry};
use crate::error::Result;
use crate::run::run;

/// The views of one call's inputs.
struct Inputs<'py, T: Scalar> {
    q: View<'py, T>,
    k: View<'py, T>,
    v: View<'py, T>,
    key_bias: Option<View<'py, T>>,
}

impl<'py, T: Scalar> Inputs<'py, T> {
    fn new(q: Any<'_, 'py>, k: Any<'_, 'py>, v: Any<'_, 'py>, key_bias: Option<Any<'_, 'py>>) -> Result<Self> {
        Ok(Self {
            q: View::new("q", q)?,
            k: View::new("k", k)?,
            v: View::new("v", v)?,
            key_bias: key_bias.map(|b| View::new("key_bias", b)).transpose()?,
        })
    }

    fn heads(&self) -> Result<Heads<'_, T>> {
        Ok(Heads {
            q: self.q.matrices()?,
            k: self.k.matrices()?,
            v: self.v.matrices()?,
            key_bias: self.key_bias.as_ref().map(View::columns).transpose()?,
        })
    }

    fn out_shape(&self) -> Result<Vec<usize>> {
        Ok(joined(self.q.leading(), &[self.q.rows_and_columns()?.0, self.v.rows_and_columns()?.1]))
    }
}

/// What a backward pass needs beside the inputs. It holds its own copy of `out`: the caller may change theirs.
enum Kept {
    F32(Saved<f32>, Vec<f32>),
    F64(Saved<f64>, Vec<f64>),
}

/// The forward pass of `lingrad_rs.attention_vjp`, as its backward pass needs it.
#[pyclass(frozen, module = "lingrad_rs._lingrad_rs")]
pub struct AttentionState {
    attention: Attention,
    kept: Kept,
}

#[pymethods]
impl AttentionState {
    /// What is known of each head after the forward pass, where there is a tolerance.
    fn reports<'py>(&self, py: Python<'py>) -> Outcome<Vec<Bound<'py, PyDict>>> {
        entry(|| {
            let reports = match &self.kept {
                Kept::F32(saved, _) => &saved.reports,
                Kept::F64(saved, _) => &saved.reports,
            };
            convert::reports(py, reports)
        })
    }
}

/// A `Scalar` that finds itself in [`Kept`].
trait Keep: Scalar {
    fn keep(saved: Saved<Self>, out: Vec<Self>) -> Kept;
    fn kept(kept: &Kept) -> Option<(&Saved<Self>, &[Self])>;
}

macro_rules! keep {
    ($t:ty, $variant:ident) => {
        impl Keep for $t {
            fn keep(saved: Saved<Self>, out: Vec<Self>) -> Kept {
                Kept::$variant(saved, out)
            }
            fn kept(kept: &Kept) -> Option<(&Saved<Self>, &[Self])> {
                match kept {
                    Kept::$variant(saved, out) => Some((saved, out)),
                    _ => None,
                }
            }
        }
    };
}
keep!(f32, F32);
keep!(f64, F64);

/// `out`, and the state of the backward pass where `keep` asks for it.
#[pyfunction]
#[pyo3(signature = (q, k, v, key_bias, *, engine, causal, scale, keep))]
pub fn attention_forward<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    key_bias: Option<Any<'_, 'py>>,
    engine: Later<'py, AnyMethod>,
    causal: bool,
    scale: f64,
    keep: bool,
) -> Outcome<(Bound<'py, PyAny>, Option<AttentionState>)> {
    entry(|| {
        let attention = Attention::new(engine.read()?.0, Mask::causal(causal), scale);
        by_dtype!(q, T => {
            let inputs = Inputs::<T>::new(q, k, v, key_bias)?;
            let heads = inputs.heads()?;
            let mut out = Output::new(py, &inputs.out_shape()?)?;
            let entries = out.entries();
            let kept = run(py, None, |ctx| {
                let saved = attention.forward(ctx, &heads, entries)?;
                keep.then(|| Ok(T::keep(saved, copied(entries, "a copy of out")?))).transpose()
            })?;
            Ok((out.into_array(), kept.map(|kept| AttentionState { attention, kept })))
        })
    })
}

/// `(dq, dk, dv, dkey_bias)`, the last `None` where there is no `key_bias`; and what is known of each head, where there
/// is a tolerance.
type Gradients<'py> =
    ((Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>), Vec<Bound<'py, PyDict>>);

/// The gradients, from the inputs and the state of their forward pass; without a tolerance and with `samples > 0` their
/// errors are measured on so many queries and keys of each head.
#[pyfunction]
#[pyo3(signature = (q, k, v, key_bias, state, dout, *, samples))]
pub fn attention_backward<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    key_bias: Option<Any<'_, 'py>>,
    state: &AttentionState,
    dout: Any<'_, 'py>,
    samples: usize,
) -> Outcome<Gradients<'py>> {
    entry(|| {
        by_dtype!(q, T => {
            let inputs = Inputs::<T>::new(q, k, v, key_bias)?;
            let (saved, out) = T::kept(&state.kept)
                .ok_or_else(|| Error::Argument("state is of another dtype than q".into()))?;
            let dout = View::new("dout", dout)?;
            let (heads, dout) = (inputs.heads()?, dout.matrices()?);
            let mut dq = Output::new(py, inputs.q.shape())?;
            let mut dk = Output::new(py, inputs.k.shape())?;
            let mut dv = Output::new(py, inputs.v.shape())?;
            let mut dkey_bias = inputs.key_bias.as_ref().map(|b| Output::new(py, b.shape())).transpose()?;
            let grads = AttentionGrads {
                dq: dq.entries(),
                dk: dk.entries(),
                dv: dv.entries(),
                dkey_bias: dkey_bias.as_mut().map(Output::entries),
            };
            let reports = run(py, None, |ctx| state.attention.backward(ctx, &heads, saved, out, &dout, samples, grads))?;
            let grads = (dq.into_array(), dk.into_array(), dv.into_array(), dkey_bias.map(Output::into_array));
            Ok((grads, convert::reports(py, &reports)?))
        })
    })
}

/// The error of `out`, from `samples` rows computed exactly.
#[pyfunction]
#[pyo3(signature = (q, k, v, key_bias, out, *, causal, scale, samples, seed))]
pub fn measure_error<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    key_bias: Option<Any<'_, 'py>>,
    out: Any<'_, 'py>,
    causal: bool,
    scale: f64,
    samples: usize,
    seed: u64,
) -> Outcome<Estimate> {
    entry(|| {
        by_dtype!(q, T => {
            let inputs = Inputs::<T>::new(q, k, v, key_bias)?;
            let out = View::new("out", out)?;
            let (heads, out) = (inputs.heads()?, out.matrices()?);
            let scores = Scores { scale, mask: Mask::causal(causal) };
            Ok(estimate(run(py, None, |ctx| measure::measure_error(ctx, &heads, &scores, &out, samples, seed))?))
        })
    })
}

/// An error where an engine's options do not fit together, or not with a causal mask or numbers of so many bytes.
#[pyfunction]
pub fn check_engine(engine: Later<'_, AnyMethod>, causal: bool, itemsize: usize) -> Outcome<()> {
    entry(|| Ok(engine.read()?.0.check(&Mask::causal(causal), itemsize)?))
}

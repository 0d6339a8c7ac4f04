//! Attention: forward, backward, measured error.

use half::{bf16, f16};
use lingrad_core::memory::{copied, zeroed};
use lingrad_core::{
    Attention, AttentionGrads, BiasGrads, ColRef, Context, Engine, Error, HeadReport, Heads, Mask, MatRef, Method,
    Real, Saved, Scores, Stored, measure,
};
use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{Any, Half, Item, Output, Scalar, View, by_any_dtype, by_dtype, joined};
use crate::convert::{self, AnyMethod, Estimate, estimate};
use crate::crew;
use crate::entry::{Later, Outcome, entry};
use crate::error::{Failure, Result};
use crate::run::{num_threads, run};

/// `lingrad_rs.spec.scores.Scores`: how scores are made of queries and keys, checked, its arrays broadcast.
#[derive(FromPyObject)]
pub struct AnyScores<'py> {
    scale: f64,
    causal: bool,
    query_offset: isize,
    window: (Option<usize>, Option<usize>),
    starts: Option<Vec<Vec<usize>>>,
    softcap: Option<f64>,
    empty_rows_are_zero: bool,
    key_bias: Option<Bound<'py, PyUntypedArray>>,
    mask: Option<Bound<'py, PyUntypedArray>>,
    bias: Option<Bound<'py, PyUntypedArray>>,
    /// That of the bias as it was given, with as many axes as it is broadcast to.
    bias_shape: Option<Vec<usize>>,
    sinks: Option<Bound<'py, PyUntypedArray>>,
}

impl AnyScores<'_> {
    fn scores(&self) -> Scores {
        let (left, right) = self.window;
        let band = Mask::band(self.causal, self.query_offset, left, right);
        let masks = match &self.starts {
            None => vec![band],
            Some(all) => all.iter().map(|starts| band.clone().packed(starts.as_slice().into())).collect(),
        };
        let empty_rows_are_zero = self.empty_rows_are_zero;
        Scores { scale: self.scale, softcap: self.softcap, masks, empty_rows_are_zero }
    }
}

/// The views of one call's inputs, whose numbers are computed with as `T`.
struct Inputs<'py, T: Scalar, E: Item> {
    q: View<'py, E>,
    k: View<'py, E>,
    v: View<'py, E>,
    key_bias: Option<(Vec<usize>, Vec<Vec<T>>)>,
    mask: Option<View<'py, bool>>,
    bias: Option<View<'py, E>>,
    bias_shape: Option<Vec<usize>>,
    sinks: Option<(Vec<usize>, Vec<T>)>,
}

impl<'py, T: Scalar, E: Item + Stored<T>> Inputs<'py, T, E> {
    fn new(q: Any<'_, 'py>, k: Any<'_, 'py>, v: Any<'_, 'py>, scores: &AnyScores<'py>) -> Result<Self> {
        let view =
            |name, x: &Option<Bound<'py, PyUntypedArray>>| x.as_ref().map(|x| View::<E>::new(name, x)).transpose();
        let widened = |column: ColRef<'_, E>| column.iter().map(|x| x.widen()).collect();
        // Of a shape that no memory can list, q speaks first.
        let q = View::new("q", q)?;
        q.matrices()?;
        Ok(Self {
            q,
            k: View::new("k", k)?,
            v: View::new("v", v)?,
            key_bias: view("key_bias", &scores.key_bias)?
                .map(|x| Ok::<_, Failure>((x.shape().to_vec(), x.columns()?.into_iter().map(widened).collect())))
                .transpose()?,
            mask: scores.mask.as_ref().map(|x| View::new("mask", x)).transpose()?,
            bias: view("bias", &scores.bias)?,
            bias_shape: scores.bias_shape.clone(),
            sinks: view("sinks", &scores.sinks)?
                .map(|x| Ok::<_, Failure>((x.shape().to_vec(), x.numbers()?.into_iter().map(E::widen).collect())))
                .transpose()?,
        })
    }

    fn heads(&self) -> Result<Heads<'_, T, E>> {
        let heads = Heads::new(self.q.matrices()?, self.k.matrices()?, self.v.matrices()?);
        Ok(Heads {
            key_bias: self.key_bias.as_ref().map(|(_, x)| x.iter().map(|x| ColRef::from_slice(x)).collect()),
            allowed: self.mask.as_ref().map(View::matrices).transpose()?,
            bias: self.bias.as_ref().map(View::matrices).transpose()?,
            sinks: self.sinks.as_ref().map(|(_, x)| x.clone()),
            ..heads
        })
    }

    fn out_shape(&self) -> Result<Vec<usize>> {
        Ok(joined(self.q.leading(), &[self.q.rows_and_columns()?.0, self.v.rows_and_columns()?.1]))
    }

    /// Where each head's part of the bias's gradient begins, and its strides.
    fn bias_places(&self) -> Option<(Vec<usize>, usize, usize)> {
        let shape = self.bias_shape.as_ref()?;
        let mut strides = vec![0; shape.len()];
        let mut step = 1;
        for (stride, &len) in strides.iter_mut().zip(shape).rev() {
            *stride = if len == 1 { 0 } else { step };
            step *= len;
        }
        let heads = self.q.leading();
        let (of_heads, inner) = strides.split_at(heads.len());
        let offset = |mut index: usize| {
            let mut offset = 0;
            for (len, stride) in heads.iter().zip(of_heads).rev() {
                offset += index % len * stride;
                index /= len;
            }
            offset
        };
        Some(((0..heads.iter().product()).map(offset).collect(), inner[0], inner[1]))
    }
}

/// What a backward pass needs beside the inputs. It holds its own copy of `out`: the caller may change theirs.
enum Kept {
    F32(Saved<f32>, Vec<f32>),
    F64(Saved<f64>, Vec<f64>),
    F16(HalfState<f16>),
    Bf16(HalfState<bf16>),
}

/// The same in half precision: the forward pass leaves nothing else.
struct HalfState<E> {
    out: Vec<E>,
    lse: Vec<f64>,
    reports: Vec<HeadReport>,
}

/// A `Half` that finds itself in [`Kept`].
trait KeepHalf: Half {
    fn keep_half(state: HalfState<Self>) -> Kept;
    fn kept_half(kept: &Kept) -> Option<&HalfState<Self>>;
}

macro_rules! keep_half {
    ($t:ty, $variant:ident) => {
        impl KeepHalf for $t {
            fn keep_half(state: HalfState<Self>) -> Kept {
                Kept::$variant(state)
            }
            fn kept_half(kept: &Kept) -> Option<&HalfState<Self>> {
                match kept {
                    Kept::$variant(state) => Some(state),
                    _ => None,
                }
            }
        }
    };
}
keep_half!(f16, F16);
keep_half!(bf16, Bf16);

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
                Kept::F16(state) => &state.reports,
                Kept::Bf16(state) => &state.reports,
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

/// More pairs than that are worth waits in which Ctrl-C is heard.
const MOST_PAIRS_HERE: usize = 1 << 22;

/// Whether a call was so little work that it has been computed at once.
fn forward_here<T: Real, E: Stored<T>>(
    py: Python<'_>,
    attention: &Attention,
    heads: &Heads<'_, T, E>,
    out: &mut [E],
    lse: Option<&mut [f64]>,
) -> bool {
    let rows = |x: Option<&MatRef<'_, E>>| x.map_or(0, |x| x.nrows());
    let pairs = rows(heads.k.first()).saturating_mul(rows(heads.q.first())).saturating_mul(heads.q.len());
    if pairs == 0 || pairs > MOST_PAIRS_HERE {
        return false;
    }
    let lse = lse.unwrap_or_default();
    let threads = num_threads(py);
    py.detach(|| attention.forward_here(threads, crew::run, heads, out, lse)).is_some()
}

/// `out`, `lse`, and the state of the backward pass.
type Forward<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Option<AttentionState>);

/// `out`, the logarithms of the rows' denominators where `wants_lse` asks for them, and the state of the backward pass where
/// `keep` does.
#[pyfunction]
#[pyo3(signature = (q, k, v, scores, *, engine, keep, wants_lse))]
pub fn attention_forward<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    scores: Later<'py, AnyScores<'py>>,
    engine: Later<'py, AnyMethod>,
    keep: bool,
    wants_lse: bool,
) -> Outcome<Forward<'py>> {
    entry(|| {
        let scores = scores.read()?;
        let attention = Attention { scores: scores.scores(), ..Attention::new(engine.read()?.0, Mask::NONE, 1.0) };
        by_any_dtype!(q, T => {
            let inputs = Inputs::<T, T>::new(q, k, v, &scores)?;
            let heads = inputs.heads()?;
            let shape = inputs.out_shape()?;
            let mut out = Output::new(py, &shape)?;
            let mut lse = wants_lse.then(|| Output::<f64>::new(py, &shape[..shape.len() - 1])).transpose()?;
            let (entries, lse_entries) = (out.entries(), lse.as_mut().map(Output::entries));
            if !keep && forward_here(py, &attention, &heads, entries, lse_entries) {
                return Ok((out.into_array(), lse.map(Output::into_array), None));
            }
            let (entries, lse_entries) = (out.entries(), lse.as_mut().map(Output::entries));
            let kept = run(py, None, |ctx| {
                let saved = attention.forward_with(ctx, &heads, entries, wants_lse)?;
                if let Some(lse) = lse_entries {
                    lse.copy_from_slice(&saved.lse);
                }
                keep.then(|| Ok(T::keep(saved, copied(entries, "a copy of out")?))).transpose()
            })?;
            let state = kept.map(|kept| AttentionState { attention, kept });
            Ok((out.into_array(), lse.map(Output::into_array), state))
        }, half H => {
            let inputs = Inputs::<f32, H>::new(q, k, v, &scores)?;
            let heads = inputs.heads()?;
            let shape = inputs.out_shape()?;
            let mut out = Output::<H>::new(py, &shape)?;
            let mut lse =
                (wants_lse || keep).then(|| Output::<f64>::new(py, &shape[..shape.len() - 1])).transpose()?;
            if !keep && forward_here(py, &attention, &heads, out.entries(), lse.as_mut().map(Output::entries)) {
                return Ok((out.into_array(), lse.map(Output::into_array), None));
            }
            let (entries, lse_entries) = (out.entries(), lse.as_mut().map_or(&mut [][..], Output::entries));
            let kept = run(py, None, |ctx| {
                let reports = attention.forward_half(ctx, &heads, entries, lse_entries)?;
                let half = || Ok(HalfState { out: copied(entries, "a copy of out")?, lse: copied(lse_entries, "row sums")?, reports });
                keep.then(half).transpose()
            })?;
            let state = kept.map(|kept| AttentionState { attention, kept: H::keep_half(kept) });
            Ok((out.into_array(), lse.filter(|_| wants_lse).map(Output::into_array), state))
        })
    })
}

/// `dq, dk, dv, dkey_bias, dbias, dsinks`, `None` in place of those of what was not given; and what is known of each head,
/// where there is a tolerance.
type Gradients<'py> = (Vec<Option<Bound<'py, PyAny>>>, Vec<Bound<'py, PyDict>>);

/// The gradients that `backward` writes.
fn gradients<'py, T: Scalar, E: Item + Stored<T>>(
    py: Python<'py>,
    inputs: &Inputs<'py, T, E>,
    backward: impl FnOnce(&Context, &Heads<'_, T, E>, AttentionGrads<'_, E>) -> lingrad_core::Result<Vec<HeadReport>> + Send,
) -> Result<Gradients<'py>> {
    let heads = inputs.heads()?;
    let mut dq = Output::new(py, inputs.q.shape())?;
    let mut dk = Output::new(py, inputs.k.shape())?;
    let mut dv = Output::new(py, inputs.v.shape())?;
    let mut dkey_bias = inputs.key_bias.as_ref().map(|(shape, _)| Output::new(py, shape)).transpose()?;
    let places = inputs.bias_places();
    let mut dbias = inputs.bias_shape.as_ref().map(|shape| Output::new(py, shape)).transpose()?;
    let mut dsinks = inputs.sinks.as_ref().map(|(shape, _)| Output::new(py, shape)).transpose()?;
    let grads = AttentionGrads {
        dkey_bias: dkey_bias.as_mut().map(Output::entries),
        dbias: dbias.as_mut().zip(places.as_ref()).map(|(dbias, (offsets, row_stride, col_stride))| BiasGrads {
            data: dbias.entries(),
            offsets,
            row_stride: *row_stride,
            col_stride: *col_stride,
        }),
        dsinks: dsinks.as_mut().map(Output::entries),
        ..AttentionGrads::new(dq.entries(), dk.entries(), dv.entries())
    };
    let reports = run(py, None, |ctx| backward(ctx, &heads, grads))?;
    let all = [Some(dq), Some(dk), Some(dv), dkey_bias, dbias, dsinks];
    Ok((all.map(|x| x.map(Output::into_array)).into(), convert::reports(py, &reports)?))
}

/// The gradients, from the inputs and the state of their forward pass; without a tolerance and with `samples > 0` their
/// errors are measured on so many queries and keys of each head.
#[pyfunction]
#[pyo3(signature = (q, k, v, scores, state, dout, *, samples))]
pub fn attention_backward<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    scores: Later<'py, AnyScores<'py>>,
    state: &AttentionState,
    dout: Any<'_, 'py>,
    samples: usize,
) -> Outcome<Gradients<'py>> {
    entry(|| {
        let other = || Error::Argument("state is of another dtype than q".into());
        by_any_dtype!(q, T => {
            let inputs = Inputs::<T, T>::new(q, k, v, &scores.read()?)?;
            let (saved, out) = T::kept(&state.kept).ok_or_else(other)?;
            let dout = View::new("dout", dout)?;
            let dout = dout.matrices()?;
            gradients(py, &inputs, |ctx, heads, grads| {
                state.attention.backward(ctx, heads, saved, out, &dout, samples, grads)
            })
        }, half H => {
            let inputs = Inputs::<f32, H>::new(q, k, v, &scores.read()?)?;
            let HalfState { out, lse, .. } = H::kept_half(&state.kept).ok_or_else(other)?;
            let dout = View::new("dout", dout)?;
            let dout = dout.matrices()?;
            gradients(py, &inputs, |ctx, heads, grads| {
                state.attention.backward_half(ctx, heads, (out, lse), &dout, samples, grads)
            })
        })
    })
}

/// The gradients, from the inputs and the results of a forward pass that kept nothing else. Exact attention needs nothing
/// else; any other engine runs its forward pass again.
#[pyfunction]
#[pyo3(signature = (dout, q, k, v, out, lse, scores, *, engine, check_finite))]
pub fn attention_backward_again<'py>(
    py: Python<'py>,
    dout: Any<'_, 'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    out: Any<'_, 'py>,
    lse: Any<'_, 'py>,
    scores: Later<'py, AnyScores<'py>>,
    engine: Later<'py, AnyMethod>,
    check_finite: bool,
) -> Outcome<Gradients<'py>> {
    entry(|| {
        let scores = scores.read()?;
        let attention = Attention {
            scores: scores.scores(),
            infinite_gradients_pass: !check_finite,
            ..Attention::new(engine.read()?.0, Mask::NONE, 1.0)
        };
        by_any_dtype!(q, T => {
            let inputs = Inputs::<T, T>::new(q, k, v, &scores)?;
            let (dout, out, lse) = (View::new("dout", dout)?, View::new("out", out)?, View::<f64>::new("lse", lse)?);
            let (dout, out, lse) = (dout.matrices()?, out.contiguous()?, lse.contiguous()?);
            gradients(py, &inputs, |ctx, heads, grads| {
                let (saved, out) = if attention.method == Method::Engine(Engine::Exact) {
                    (attention.restore(heads, &lse)?, out)
                } else {
                    let mut again = zeroed(out.len(), "out")?;
                    (attention.forward(ctx, heads, &mut again)?, again.into())
                };
                attention.backward(ctx, heads, &saved, &out, &dout, 0, grads)
            })
        }, half H => {
            let inputs = Inputs::<f32, H>::new(q, k, v, &scores)?;
            let (dout, out, lse) = (View::new("dout", dout)?, View::new("out", out)?, View::<f64>::new("lse", lse)?);
            let (dout, out, lse) = (dout.matrices()?, out.contiguous()?, lse.contiguous()?);
            gradients(py, &inputs, |ctx, heads, grads| {
                attention.backward_half(ctx, heads, (&out, &lse), &dout, 0, grads)
            })
        })
    })
}

/// The error of `out`, from `samples` rows computed exactly.
#[pyfunction]
#[pyo3(signature = (q, k, v, scores, out, *, samples, seed))]
pub fn measure_error<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    scores: Later<'py, AnyScores<'py>>,
    out: Any<'_, 'py>,
    samples: usize,
    seed: u64,
) -> Outcome<Estimate> {
    entry(|| {
        let scores = scores.read()?;
        by_dtype!(q, T => {
            let inputs = Inputs::<T, T>::new(q, k, v, &scores)?;
            let out = View::new("out", out)?;
            let (heads, out) = (inputs.heads()?, out.matrices()?);
            let scores = scores.scores();
            Ok(estimate(run(py, None, |ctx| measure::measure_error(ctx, &heads, &scores, &out, samples, seed))?))
        })
    })
}

/// An error where an engine's options do not fit together, or not with the scores or numbers of so many bytes.
#[pyfunction]
pub fn check_engine<'py>(
    engine: Later<'py, AnyMethod>,
    scores: Later<'py, AnyScores<'py>>,
    itemsize: usize,
) -> Outcome<()> {
    entry(|| {
        let scores = scores.read()?;
        let method = engine.read()?.0;
        method.check(&scores.scores(), itemsize)?;
        method.check_arrays(scores.mask.is_some(), scores.bias.is_some())?;
        Ok(())
    })
}

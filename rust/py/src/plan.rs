//! Plans and reports: what was chosen for each head, and how well it did.

use std::sync::Arc;

use lingrad_core::plan::HeadPlan;
use lingrad_core::spec::{self as engine, Auto, Coefficients, Engine, LandmarkConstants, Planned, Shift};
use lingrad_core::tolerance::HeadReport;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::copy;
use crate::attention::estimate;
use crate::engine::AnyEngine;
use crate::error::Result;

/// The fields of `lingrad_rs.Auto`.
#[derive(FromPyObject)]
pub struct AutoFields {
    tol: f64,
    gradients: bool,
    strict_causal: bool,
    seed: u64,
}

impl From<AutoFields> for Auto {
    fn from(fields: AutoFields) -> Self {
        let AutoFields { tol, gradients, strict_causal, seed } = fields;
        Self { tol, gradients, strict_causal, seed }
    }
}

/// The fields of `lingrad_rs.Plan`.
#[derive(FromPyObject)]
pub struct PlanFields {
    auto: AutoFields,
    heads: Vec<HeadFields>,
}

/// The fields of `lingrad_rs.HeadPlan` that are used again.
#[derive(FromPyObject)]
struct HeadFields {
    engine: AnyEngine,
    predicted_error: Option<f64>,
    cost: f64,
    exact_cost: f64,
    whole_sequence: Vec<String>,
    reason: String,
}

impl From<PlanFields> for Engine {
    fn from(plan: PlanFields) -> Self {
        let heads = plan.heads.into_iter().map(|head| HeadPlan {
            engine: head.engine.0,
            predicted_error: head.predicted_error,
            cost: head.cost,
            exact_cost: head.exact_cost,
            whole_sequence: head.whole_sequence.into_iter().map(Into::into).collect(),
            reason: head.reason,
        });
        Self::Planned(Planned { heads: Arc::new(heads.collect()), auto: plan.auto.into(), known: None })
    }
}

/// Reports as dicts with the fields of `lingrad_rs.HeadPlan`, the engine as a dict too.
pub fn reports<'py>(py: Python<'py>, reports: &[HeadReport]) -> Result<Vec<Bound<'py, PyDict>>> {
    reports.iter().map(|report| report_dict(py, report)).collect()
}

fn report_dict<'py>(py: Python<'py>, report: &HeadReport) -> Result<Bound<'py, PyDict>> {
    let HeadReport { plan, error_bound, errors, missed } = report;
    let dict = PyDict::new(py);
    dict.set_item("engine", engine_dict(py, &plan.engine)?)?;
    dict.set_item("predicted_error", plan.predicted_error)?;
    dict.set_item("error_bound", error_bound)?;
    dict.set_item("cost", plan.cost)?;
    dict.set_item("exact_cost", plan.exact_cost)?;
    dict.set_item("whole_sequence", plan.whole_sequence.iter().map(AsRef::as_ref).collect::<Vec<&str>>())?;
    dict.set_item("reason", &plan.reason)?;
    dict.set_item("missed", missed)?;
    let measured =
        [("out", errors.out), ("dq", errors.dq), ("dk", errors.dk), ("dv", errors.dv), ("dkey_bias", errors.dkey_bias)];
    let measured = measured.into_iter().filter_map(|(name, e)| Some((name, estimate(e?))));
    dict.set_item("errors", measured.collect::<Vec<_>>())?;
    Ok(dict)
}

fn engine_dict<'py>(py: Python<'py>, engine: &Engine) -> Result<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    match engine {
        Engine::Polynomial(p) => {
            dict.set_item("kind", "Polynomial")?;
            dict.set_item("degree", p.degree)?;
            match &p.coefficients {
                Coefficients::Taylor => dict.set_item("coefficients", "taylor")?,
                Coefficients::Fitted => dict.set_item("coefficients", "fitted")?,
                Coefficients::Given(a) => dict.set_item("coefficients", a)?,
            }
            let gradient = match p.gradient {
                engine::Gradient::ClosedForm => "closed_form",
                engine::Gradient::Consistent => "consistent",
            };
            dict.set_item("gradient", gradient)?;
            match &p.shift {
                Shift::None => dict.set_item("shift", "none")?,
                Shift::Mean => dict.set_item("shift", "mean")?,
                Shift::Given { query, key } => dict.set_item("shift", (query, key))?,
            }
            let diagonal = match p.diagonal {
                engine::Diagonal::Exact => "exact",
                engine::Diagonal::Polynomial => "polynomial",
            };
            dict.set_item("diagonal", diagonal)?;
            dict.set_item("window", p.window)?;
        }
        Engine::Landmark(l) => {
            dict.set_item("kind", "Landmark")?;
            dict.set_item("rank", l.rank)?;
            dict.set_item("seed", l.seed)?;
            if let Some(given) = &l.constants {
                dict.set_item("constants", constants_dict(py, given)?)?;
            }
        }
        _ => dict.set_item("kind", "Exact")?,
    }
    Ok(dict)
}

/// The fields of `lingrad_rs.LandmarkConstants`.
pub fn constants_dict<'py>(py: Python<'py>, given: &LandmarkConstants) -> Result<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let (r, d) = (given.rank(), given.query_shift.len());
    dict.set_item("scale", given.scale)?;
    dict.set_item("query_shift", copy(py, &given.query_shift, &[d])?)?;
    dict.set_item("key_shift", copy(py, &given.key_shift, &[d])?)?;
    dict.set_item("balance", given.balance)?;
    dict.set_item("landmarks", copy(py, &given.landmarks, &[r, d])?)?;
    dict.set_item("matrix", copy(py, &given.matrix, &[r, r])?)?;
    Ok(dict)
}

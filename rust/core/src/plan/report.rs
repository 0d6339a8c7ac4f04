//! What a plan says of a head, and what is known once it has run.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::measure::ErrorEstimate;
use crate::spec::Engine;

/// What an engine is expected to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadPlan {
    /// The engine; all of its constants are given, but where they come from the first tokens of each call.
    pub engine: Engine,
    /// The largest relative error that is expected of out (and, where gradients are planned for, dq).
    pub predicted_error: Option<f64>,
    /// The expected time of one thread, in seconds.
    pub cost: f64,
    /// That of exact attention.
    pub exact_cost: f64,
    /// Which constants of the engine were taken from the whole sequence, under a causal mask too.
    pub whole_sequence: Vec<Cow<'static, str>>,
    /// Why this engine.
    pub reason: String,
}

/// Relative errors of a head's results, as far as they were measured. Those of dk, dv and the bias are of all query heads
/// that share the keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Errors {
    /// Of out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<ErrorEstimate>,
    /// Of dq.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dq: Option<ErrorEstimate>,
    /// Of dk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dk: Option<ErrorEstimate>,
    /// Of dv.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dv: Option<ErrorEstimate>,
    /// Of the gradient of the key bias, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dkey_bias: Option<ErrorEstimate>,
}

/// What computed a head, and how well.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadReport {
    /// The engine that computed it, and what was expected of it.
    #[serde(flatten)]
    pub plan: HeadPlan,
    /// The a-priori bound of the relative error of out, where there is one.
    pub error_bound: Option<f64>,
    /// What was measured.
    pub errors: Errors,
    /// What was tried and was not good enough, so that the head, or its gradients alone, were computed exactly.
    pub missed: Option<String>,
}

impl HeadPlan {
    /// Of the exact engine, at this cost.
    pub fn exact(cost: f64) -> Self {
        Self {
            engine: Engine::Exact,
            predicted_error: None,
            cost,
            exact_cost: cost,
            whole_sequence: Vec::new(),
            reason: String::new(),
        }
    }
}

impl HeadReport {
    /// Of a plan that has not run yet.
    pub fn new(plan: HeadPlan) -> Self {
        Self { plan, error_bound: None, errors: Errors::default(), missed: None }
    }

    /// Of an engine that no plan chose.
    pub fn given(engine: Engine) -> Self {
        Self::new(HeadPlan { engine, reason: "given".into(), ..HeadPlan::exact(f64::NAN) })
    }

    /// The same head, computed exactly.
    pub fn fall_back(&mut self, missed: String) {
        let HeadPlan { exact_cost, reason, .. } = &mut self.plan;
        let plan = HeadPlan { reason: std::mem::take(reason), ..HeadPlan::exact(*exact_cost) };
        *self = Self { missed: Some(missed), ..Self::new(plan) };
    }
}

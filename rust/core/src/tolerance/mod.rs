//! Attention within a tolerance: what a plan chose is run, held against rows that are computed exactly, and computed
//! exactly where it misses.
//!
//! Exact gradients of some keys need the row sums `D_i` and `delta_i` of all queries, which are exact for the sampled queries
//! alone. The others have those of the forward pass, whose output has been held against exact rows: a relative error `eps`
//! of theirs enters `dk` and `dv` as `eps` times numbers that average out over the queries, and `check` allows for what is
//! left.

use std::sync::Arc;

pub(crate) use self::group::Group;
use crate::context::Context;
use crate::engines::{self, Prepared, exact};
use crate::error::{Error, Result};
use crate::measure::Draw;
use crate::measure::exact_rows::exact_rows;
use crate::measure::guides::{self, Known};
use crate::numerics::real::Real;
use crate::plan::plan_head;
use crate::plan::report::{HeadPlan, HeadReport};
use crate::problem::finite::all_finite;
use crate::problem::grads::RowFactors;
use crate::problem::heads::{Head, Sizes};
use crate::spec::{Auto, Engine};

mod check;
mod gradients;
mod group;

/// Results are held against one of so many queries of each head, and keys, within limits. Computed exactly in float64, these
/// cost about three times their share of exact attention.
const ONE_OF: usize = 64;
pub(crate) const SAMPLES: [usize; 2] = [64, 256];

/// How many of `n` queries, or keys, results within a tolerance are held against.
pub fn samples(n: usize) -> usize {
    (n / ONE_OF).clamp(SAMPLES[0], SAMPLES[1])
}

/// A plan, with a head plan for every head.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// What it was made for.
    pub auto: Auto,
    /// The engines.
    pub heads: Arc<Vec<HeadPlan>>,
    /// What is known of them already, on the same data: they are not verified again then.
    pub known: Option<Arc<Vec<HeadReport>>>,
}

/// What the backward pass needs beside the inputs and `out`: two numbers a row, and what each head's engine has taken from
/// its data (with the consistent gradient and no mask also its state of the keys, where that is smaller than they are).
#[derive(Debug, Clone)]
pub struct Saved<T> {
    pub(crate) row_max: Vec<T>,
    pub(crate) row_scale: Vec<T>,
    /// The logarithm of each row's denominator, sinks included, minus infinity where there is no key; empty where neither
    /// they nor sinks were asked for.
    pub lse: Vec<f64>,
    pub(crate) heads: Vec<Arc<dyn Prepared<T>>>,
    /// What is known of each head, where there is a tolerance.
    pub reports: Vec<HeadReport>,
}

impl<T: Real> Saved<T> {
    /// The engines that were used within this tolerance, to be used again on the same data.
    pub(crate) fn planned(&self, auto: &Auto) -> Planned {
        let heads = self.reports.iter().map(|report| report.plan.clone()).collect();
        Planned { auto: auto.clone(), heads: Arc::new(heads), known: Some(Arc::new(self.reports.clone())) }
    }

    /// A head's row factors.
    pub(crate) fn rows(&self, head: usize) -> RowFactors<'_, T> {
        let n = self.row_max.len() / self.heads.len();
        let rows = head * n..(head + 1) * n;
        RowFactors { max: &self.row_max[rows.clone()], scale: &self.row_scale[rows] }
    }
}

/// An error that another engine may not make: anything else is passed on.
fn of_the_engine<R>(result: Result<R>) -> Result<std::result::Result<R, String>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(Error::Denominator(text) | Error::NonFinite(text)) => Ok(Err(text)),
        Err(other) => Err(other),
    }
}

/// What is to be run: what was planned before, with what is known of it, or nothing yet.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Given<'a> {
    Nothing,
    Plan(&'a HeadPlan),
    /// Verified before, on the same data.
    Report(&'a HeadReport),
}

/// One head's forward pass within a tolerance, by the engine of a plan, or by one that is planned now.
pub(crate) fn forward<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    auto: &Auto,
    given: Given<'_>,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<(Box<dyn Prepared<T>>, HeadReport)> {
    let (plan, known, stale) = match given {
        Given::Report(report) => {
            return Ok((run(ctx, head, &report.plan.engine, out, row_max, row_scale)?, report.clone()));
        }
        Given::Plan(plan) => (plan.clone(), None, "the plan is stale: "),
        Given::Nothing => {
            let (plan, known) = plan_head(ctx, head, auto)?;
            (plan, known, "")
        }
    };
    let mut report = HeadReport::new(plan);
    if report.plan.engine != Engine::Exact {
        let missed = match of_the_engine(run(ctx, head, &report.plan.engine, out, row_max, row_scale))? {
            Ok(prepared) => {
                // Not the rows that the engine was chosen by.
                let known = known.map_or_else(|| Known::new(head), Ok)?;
                let mut guides = known.query_guides(head, None)?;
                guides.push(guides::squares_of(out, head.d_v())?);
                let draw = Draw::new(head.n(), samples(head.n()), auto.seed ^ 0xF0, &guides)?;
                let exact = exact_rows(ctx, head, &draw.rows, None)?.out;
                let error = draw.compare(&exact, out, head.d_v())?;
                if error.high <= auto.tol && all_finite(out) {
                    report.errors.out = Some(error);
                    report.error_bound = prepared.error_bound(head, out);
                    return Ok((prepared, report));
                }
                format!("{stale}{} errs by up to {:.1e} in out", prepared.name(), error.high)
            }
            Err(text) => format!("{stale}{text}"),
        };
        report.fall_back(missed);
    }
    exact::forward(ctx, head, out, row_max, row_scale)?;
    Ok((Box::new(exact::Exact), report))
}

/// One head's forward pass by one engine.
fn run<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    engine: &Engine,
    out: &mut [T],
    row_max: &mut [T],
    row_scale: &mut [T],
) -> Result<Box<dyn Prepared<T>>> {
    let sizes = Sizes { h: 1, h_kv: 1, n: head.n(), m: head.m(), d: head.d(), d_v: head.d_v() };
    let mut prepared = engines::of(engine, &sizes, head.scores, false)?.prepare(ctx, head)?;
    prepared.forward(ctx, head, out, row_max, row_scale)?;
    Ok(prepared)
}

//! From a tolerance to an engine, head by head.
//!
//! A plan is made in steps, each cheaper than what it may save. Engines that would not be clearly faster than exact
//! attention at this size are discarded by a cost model. Some rows are drawn and computed exactly, over all their
//! keys; with their [moments] the errors of polynomials of all degrees are measured, not guessed, before any of them is run.
//! Landmarks are judged on a sample. The cheapest engine within the tolerance is [chosen](choice), or the exact one;
//! [`tolerance`](crate::tolerance) runs it and verifies what comes out.

use faer::Mat;

use self::choice::{ColumnSums, Planner, Probe};
use self::moments::Moments;
use self::report::HeadPlan;
use crate::context::Context;
use crate::engines::{landmark, polynomial};
use crate::error::{Error, Result};
use crate::linear::shifts::{live_keys, sums_and_square};
use crate::measure::Draw;
use crate::measure::guides::Known;
use crate::numerics::draws::uniform;
use crate::numerics::real::Real;
use crate::problem::heads::Head;
use crate::spec::{self, Auto};

pub mod choice;
mod cost;
pub mod moments;
pub mod rates;
pub mod report;
pub mod sampled;

/// Rows that a plan is made from: one of so many, within limits. Fewer tell too little of an error that sits in some rows;
/// more cost more than a tenth of exact attention at some thousand tokens.
const ONE_ROW_OF: usize = 256;
const ROWS: [usize; 2] = [16, 32];

/// Rows that a plan for `n` queries is made from.
pub fn rows(n: usize) -> usize {
    (n / ONE_ROW_OF).clamp(ROWS[0], ROWS[1])
}

/// A random gradient of those rows' outputs, `(rows, d_v)`, to plan for gradients with.
pub(crate) fn random_dout(rows: usize, d_v: usize, seed: u64) -> Mat<f64> {
    Mat::from_fn(rows, d_v, |i, c| 2.0 * uniform(seed ^ 0x1D, (i * d_v + c) as u64) - 1.0)
}

/// An option that plans know only the exact engine for, if there is one.
fn needs_exact<T: Real>(head: &Head<'_, T>) -> Option<&'static str> {
    let option = spec::not_low_rank(head.scores);
    let arrays =
        [(head.pairs.allowed.is_some(), "mask"), (head.pairs.bias.is_some(), "bias"), (head.sink.is_some(), "sinks")];
    let given = arrays.into_iter().find_map(|(given, name)| given.then_some(name));
    let masks = match head.mask.starts {
        Some(_) => Some("segment_ids"),
        None => (!head.mask.is_plain(head.n(), head.m())).then_some("query_offset"),
    };
    option.or(given).or(masks)
}

/// Plans one head; and what was found out about its rows, where that was needed.
pub(crate) fn plan_head<T: Real>(ctx: &Context, head: &Head<'_, T>, auto: &Auto) -> Result<(HeadPlan, Option<Known>)> {
    if let Some(option) = needs_exact(head) {
        let reason = format!("no plan is made for {option}");
        return Ok((HeadPlan { reason, ..HeadPlan::exact(cost::exact(head, auto.gradients)) }, None));
    }
    let causal = !head.mask.is_none();
    let strict = causal && auto.strict_causal;
    let costs = cost::costs(head, auto.gradients, strict, |degree| Planner::polynomial(degree, strict));
    let mut planner = Planner::new(auto, causal, costs);
    if planner.is_settled() {
        return Ok((planner.finish(), None));
    }
    let keys = live_keys(head, head.m())?;
    if !strict {
        planner.shift(&column_sums(head.q, 0..head.n()), &column_sums(head.k, keys.iter().copied()));
    }
    let known = Known::new(head)?;
    if planner.degrees() > 0 {
        polynomials(ctx, head, auto, &known, &keys, &mut planner)?;
    }
    let ranks = planner.ranks();
    if let Some(&largest) = ranks.last() {
        let found = landmark::Sample::new(head, strict, largest, auto.seed)
            .and_then(|sample| sample.candidates(ctx, &ranks, auto.gradients, planner.hopes()));
        planner.try_landmarks(found)?;
    }
    Ok((planner.finish(), Some(known)))
}

/// Looks for a polynomial.
fn polynomials<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    auto: &Auto,
    known: &Known,
    keys: &[usize],
    planner: &mut Planner,
) -> Result<()> {
    let strict = planner.is_strict();
    let shifts = polynomial::shifts(head, &planner.given_shift())?;
    let causal = !head.mask.is_none();
    let sample = match polynomial::fit_sample(head, &shifts, strict, |i, j| !causal || j <= i) {
        Ok(sample) => sample,
        Err(error @ (Error::Cancelled | Error::Memory { .. })) => return Err(error),
        Err(_) => {
            planner.scores_are_too_large();
            return Ok(());
        }
    };
    let error = sample.fit(planner.degrees()).map_or(f64::INFINITY, |a| sample.error(&a));
    planner.look_at_weights(error, || Ok(column_sums(head.v, keys.iter().copied()).spread()))?;
    if planner.degrees() == 0 {
        return Ok(());
    }
    let draw = Draw::new(head.n(), rows(head.n()), auto.seed ^ 0x9A, &known.query_guides(head, None)?)?;
    let dout = auto.gradients.then(|| random_dout(draw.rows.len(), head.d_v(), auto.seed));
    let near = polynomial::near_keys(&Planner::polynomial(1, strict));
    let Some(moments) = Moments::new(ctx, head, &draw.rows, &shifts, near, planner.degrees(), dout.as_ref())? else {
        planner.scores_are_too_large();
        return Ok(());
    };
    let longest = |x| polynomial::longest_row(x, keys.iter().copied(), &[]);
    let natural = if dout.is_some() { head.scores.scale.abs() * longest(head.k) * longest(head.v) } else { 0.0 };
    let probe = Probe { draw: &draw, moments: &moments, natural, epsilon: epsilon::<T>() };
    planner.try_polynomials(&probe, |degree| sample.fit(degree).ok())
}

fn column_sums<T: Real>(x: faer::MatRef<'_, T>, rows: impl ExactSizeIterator<Item = usize>) -> ColumnSums {
    let count = rows.len() as f64;
    let (sums, squares) = sums_and_square(x, rows);
    ColumnSums { sums, squares, count }
}

/// A unit in the last place of 1.
fn epsilon<T>() -> f64 {
    if size_of::<T>() == 4 { f64::from(f32::EPSILON) } else { f64::EPSILON }
}

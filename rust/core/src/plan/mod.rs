//! From a tolerance to an engine, head by head.
//!
//! A plan is made in steps, each cheaper than what it may save. Engines that would not be clearly faster than exact
//! attention at this size are discarded by a cost model. Some rows are drawn and computed exactly, over all their keys;
//! with the moments
//!
//! ```text
//! U_l = sum_j w_j s'_ij^l [1, v_j, k'_j]        V_l = sum_j w_j s'_ij^l (dout_i.v_j) k'_j
//! ```
//!
//! of the same rows, every polynomial's output and dq are linear combinations, `N = sum_l a_l U_l`: so the errors of all
//! degrees are measured, not guessed, before any of them is run. Landmarks are judged on a sample. The cheapest engine
//! within the tolerance is taken, or the exact one; `tolerance.rs` runs it and verifies what comes out.

pub mod sampled;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use faer::Mat;
use rayon::prelude::*;

use crate::attention::{Attention, Head};
use crate::context::Context;
use crate::engines::landmark;
use crate::engines::polynomial;
use crate::error::{Error, Result};
use crate::linear::monomials;
use crate::linear::pass::{Biases, LARGEST_STATE, Settings, Shifts, biases, live_keys, sums_and_square};
use crate::linear::scan::near_start;
use crate::measure::guides::Known;
use crate::measure::{Draw, ErrorEstimate, Weights, gather, widened_keys};
use crate::memory::{collected, zeroed};
use crate::numerics::draws::uniform;
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{add_product, product, view, view_mut};
use crate::spec::{Auto, Coefficients, Engine, Gradient, Landmark, Polynomial, Shift};

/// Rows that a plan is made from: one of so many, within limits.
const ONE_ROW_OF: usize = 256;
const ROWS: [usize; 2] = [16, 32];
/// Degrees of polynomials, and landmarks, that are considered.
const DEGREES: usize = 6;
const RANKS: [usize; 4] = [32, 64, 128, 256];
/// What an engine may cost, relative to exact attention: a polynomial, whose error is known before it runs, and
/// landmarks.
const WORTH_IT: f64 = 0.6;
const LANDMARKS_WORTH_IT: f64 = 0.1;
/// What planning may cost, relative to exact attention, in all, and drawing landmarks.
const PLANNING: f64 = 0.1;
const DRAWING: f64 = 0.06;
/// How far below the tolerance landmarks must lie on their sample, which is not the whole head.
const LANDMARK_MARGIN: f64 = 0.5;
/// What a polynomial costs, relative to exact attention, where it is cheap, and how far below the tolerance it should
/// then lie for gradients.
const CHEAP: f64 = 0.1;
const ROOM: f64 = 0.4;
/// How far below the tolerance any polynomial lies for gradients.
const KEYS_ROOM: f64 = 0.8;
/// A gradient is nothing but rounding below so many units of that, relative to what its factors might give.
const ROUNDING: f64 = 32.0;
/// Means below this part of the root mean square are left where they are.
const SMALL_MEAN: f64 = 0.05;
/// Sampled weights that err so many times more than the tolerance are not looked at further, but where the spread of the
/// values is below this.
const HOPELESS: f64 = 4.0;
const SPREAD: f64 = 0.5;
/// Landmarks that leave more of the points unresolved than this times the fourth root of the tolerance (as the tests'
/// distributions have it) are not looked at further.
const UNRESOLVED: f64 = 1.6;
/// Beyond this bound of the scores no polynomial is considered.
const LARGEST_BOUND: f64 = 300.0;

/// What an engine is expected to do.
#[derive(Debug, Clone, PartialEq)]
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

/// The sizes that times depend on.
#[derive(Debug, Clone, Copy)]
struct Size {
    n: usize,
    m: usize,
    d: usize,
    dv: usize,
    causal: bool,
    gradients: bool,
}

/// What one thread does in a second, measured once and kept.
#[derive(Debug, Clone, Copy)]
struct Rates {
    /// Additions and multiplications in small matrix products.
    flops: f64,
    /// Exponentials.
    exps: f64,
}

impl Rates {
    /// Those of `T`.
    fn of<T: Real>() -> Self {
        static RATES: [OnceLock<Rates>; 2] = [OnceLock::new(), OnceLock::new()];
        *RATES[usize::from(size_of::<T>() == 8)].get_or_init(Self::measure::<T>)
    }

    /// The best of a few runs over tiles that stay in the cache.
    fn measure<T: Real>() -> Self {
        const SIDE: usize = 112;
        const TURNS: usize = 12;
        let (a, b) = (vec![T::ONE; SIDE * SIDE], vec![T::of(0.5); SIDE * SIDE]);
        let mut c = vec![T::ZERO; SIDE * SIDE];
        let best = |work: &mut dyn FnMut()| {
            (0..TURNS)
                .map(|_| {
                    let start = Instant::now();
                    work();
                    start.elapsed().as_secs_f64()
                })
                .fold(f64::INFINITY, f64::min)
                .max(1e-9)
        };
        let multiply = best(&mut || {
            product(view_mut(&mut c, SIDE, SIDE), view(&a, SIDE, SIDE), view(&b, SIDE, SIDE), T::ONE);
        });
        let exponentiate = best(&mut || {
            vectorised(
                #[inline(always)]
                || c.iter_mut().for_each(|x| *x = (-*x).exp_nonpositive()),
            );
        });
        let count = (SIDE * SIDE) as f64;
        Self { flops: 2.0 * count * SIDE as f64 / multiply, exps: count / exponentiate }
    }
}

impl Size {
    fn pairs(&self) -> f64 {
        let pairs = self.n as f64 * self.m as f64;
        if self.causal { pairs / 2.0 } else { pairs }
    }

    /// Seconds of one thread for so many operations.
    fn seconds<T: Real>(flops: f64, exps: f64) -> f64 {
        let rates = Rates::of::<T>();
        flops / rates.flops + exps / rates.exps
    }

    /// Exact attention.
    pub fn exact<T: Real>(&self) -> f64 {
        let (d, dv) = (self.d as f64, self.dv as f64);
        let (mut flops, mut exps) = (2.0 * (d + dv), 1.0);
        if self.gradients {
            flops += 2.0 * (3.0 * d + 2.0 * dv);
            exps += 1.0;
        }
        Self::seconds::<T>(flops * self.pairs(), exps * self.pairs())
    }

    /// The near pairs of a low-rank engine under a causal mask.
    fn near<T: Real>(&self, settings: &Settings) -> f64 {
        if !self.causal {
            return 0.0;
        }
        let pairs = self.n as f64 * (settings.window as f64 + near_start_span(settings, self.n));
        let whole = Self { n: 1, m: 1, causal: false, ..*self };
        pairs.min(self.pairs()) * whole.exact::<T>()
    }

    /// A polynomial; infinite where its monomials are too many. Features cost some operations each beside those of the
    /// states that they are added to or multiplied with (fitted to `cargo bench --bench flops`).
    pub fn polynomial<T: Real>(&self, settings: &Settings) -> f64 {
        let rank = |degree| monomials::rank(self.d, degree).filter(|r| r.saturating_mul(self.dv + 1) <= LARGEST_STATE);
        let (Some(r), Some(potential)) = (rank(settings.degree), rank(settings.potential_degree)) else {
            return f64::INFINITY;
        };
        let (r, potential, e) = (r as f64, potential as f64, self.dv as f64 + 1.0);
        let mut flops = r * (2.0 * e + 16.0);
        if self.gradients {
            flops += potential * (4.0 * e + 50.0) + r * e;
        }
        Self::seconds::<T>(flops * (self.n + self.m) as f64, 0.0) + self.near::<T>(settings)
    }

    /// Landmarks.
    pub fn landmarks<T: Real>(&self, rank: usize, settings: &Settings) -> f64 {
        let (r, d, e) = (rank as f64, self.d as f64, self.dv as f64 + 1.0);
        let (mut flops, mut exps) = (2.0 * (d + e), 1.5);
        if self.gradients {
            flops += 6.0 * d + 6.0 * e;
            exps += 3.0;
        }
        let tokens = (self.n + self.m) as f64 * r;
        Self::seconds::<T>(flops * tokens, exps * tokens) + self.near::<T>(settings)
    }

    /// Drawing landmarks up to some rank, in float64 on one thread.
    fn drawing(&self, rank: usize) -> f64 {
        let (r, s) = (rank as f64, landmark::fit_size(rank) as f64);
        let flops = 4.0 * s * s * (self.d as f64 + r) + 12.0 * s * r * r + 20.0 * r * r * r;
        // A general product, and gathering, do not reach the rate of the small one.
        3.0 * Self::seconds::<f64>(flops, 3.0 * s * s)
    }

    /// Moments of so many rows up to a degree, in float64.
    fn moments(&self, rows: usize, degree: usize) -> f64 {
        let (d, dv) = (self.d as f64, self.dv as f64);
        let one = 2.0 * (dv + 1.0) + if self.gradients { 4.0 * d } else { 0.0 };
        let flops = 2.0 * (d + dv) + one * (degree + 2) as f64;
        // Masks and powers cost as much again as the products, and more.
        2.5 * Self::seconds::<f64>(flops * (rows * self.m) as f64, (rows * self.m) as f64)
    }
}

/// Rows that a plan for `n` queries is made from.
fn rows(n: usize) -> usize {
    (n / ONE_ROW_OF).clamp(ROWS[0], ROWS[1])
}

/// The average length of the near keys beyond the window.
fn near_start_span(settings: &Settings, n: usize) -> f64 {
    let last = n.saturating_sub(1);
    let mean_block = (last - near_start(settings, last)) as f64 - settings.window as f64;
    mean_block.max(0.0) / 2.0 + if settings.from_prefix { 512.0 * (1024.0 / n.max(1) as f64).min(1.0) } else { 0.0 }
}

/// Plans one head.
pub(crate) fn plan_head<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    auto: &Auto,
) -> Result<(HeadPlan, Option<Known>)> {
    let size = Size {
        n: head.q.nrows(),
        m: head.k.nrows(),
        d: head.q.ncols(),
        dv: head.v.ncols(),
        causal: attention.causal,
        gradients: auto.gradients,
    };
    let exact_cost = size.exact::<T>();
    let mut plan = HeadPlan {
        engine: Engine::Exact,
        predicted_error: None,
        cost: exact_cost,
        exact_cost,
        whole_sequence: Vec::new(),
        reason: String::new(),
    };
    let strict = attention.causal && auto.strict_causal;
    let engine = |degree: usize| Polynomial {
        degree,
        coefficients: if strict { Coefficients::Fitted } else { Coefficients::Taylor },
        gradient: Gradient::ClosedForm,
        ..Polynomial::default()
    };
    let costs: Vec<f64> =
        (1..=DEGREES).map(|degree| size.polynomial::<T>(&polynomial::settings(&engine(degree)))).collect();
    let degrees = costs.iter().take_while(|&&cost| cost <= WORTH_IT * exact_cost).count();
    let ranks: Vec<usize> = RANKS
        .into_iter()
        .filter(|&rank| {
            size.landmarks::<T>(rank, &landmark::settings(strict)) <= LANDMARKS_WORTH_IT * exact_cost
                && size.drawing(rank) <= DRAWING * exact_cost
        })
        .collect();
    if degrees == 0 && ranks.is_empty() || size.moments(rows(size.n), degrees) > PLANNING * exact_cost {
        plan.reason = "no low-rank engine is clearly faster at this size".into();
        return Ok((plan, None));
    }
    let shift = if strict { None } else { shift(head)? };
    let known = Known::new(head, attention.scale)?;
    let guides = known.of_queries(head, (attention.causal, attention.scale), None)?;
    let polynomial = best_polynomial(
        &guides,
        ctx,
        head,
        attention,
        auto,
        shift.as_ref(),
        &costs[..degrees],
        CHEAP * exact_cost,
        engine,
    )?;
    if let Some((chosen, error)) = &polynomial.best {
        plan.cost = costs[chosen.degree - 1];
        plan.predicted_error = Some(*error);
        plan.reason = format!("the cheapest within {:.1e}", auto.tol);
        if attention.causal && !strict {
            plan.whole_sequence.push("coefficients".into());
            if chosen.shift != Shift::None {
                plan.whole_sequence.push("shift".into());
            }
        }
        plan.engine = Engine::Polynomial(chosen.clone());
    } else {
        plan.reason = polynomial.reason;
    }
    let cheaper = |rank: usize| size.landmarks::<T>(rank, &landmark::settings(strict)) < plan.cost;
    let ranks: Vec<usize> = ranks.into_iter().filter(|&rank| cheaper(rank)).collect();
    if !ranks.is_empty() {
        match landmarks(ctx, head, attention.scale, auto, strict, &ranks)? {
            Ok((chosen, error)) => {
                plan.cost = size.landmarks::<T>(chosen.rank, &landmark::settings(strict));
                plan.predicted_error = Some(error);
                plan.reason = format!("the cheapest within {:.1e}", auto.tol);
                plan.whole_sequence = if attention.causal && !strict { vec!["landmarks".into()] } else { Vec::new() };
                plan.engine = Engine::Landmark(chosen);
            }
            Err(reason) if plan.engine == Engine::Exact => plan.reason = format!("{}; {reason}", plan.reason),
            Err(_) => {}
        }
    }
    Ok((plan, Some(known)))
}

/// The means, where subtracting them makes scores smaller.
fn shift<T: Real>(head: &Head<'_, T>) -> Result<Option<[Vec<f64>; 2]>> {
    let large = |(mut by, square): (Vec<f64>, f64), count: usize| {
        by.iter_mut().for_each(|sum| *sum /= count as f64);
        let of_mean: f64 = by.iter().map(|b| b * b).sum();
        (of_mean > SMALL_MEAN * SMALL_MEAN * square / count as f64, by)
    };
    let keys = live_keys(head, head.k.nrows())?;
    let (q, alpha) = large(sums_and_square(head.q, 0..head.q.nrows()), head.q.nrows());
    let (k, beta) = large(sums_and_square(head.k, keys.iter().copied()), keys.len());
    Ok((q || k).then_some([alpha, beta]))
}

/// What a plan takes for an error of which it has seen few rows: between the estimate and the end of its interval, on a
/// logarithmic scale. An engine that is chosen too easily costs its time, as verification finds it.
fn expected(error: ErrorEstimate) -> f64 {
    (error.relative * error.high).sqrt()
}

struct BestPolynomial {
    best: Option<(Polynomial, f64)>,
    reason: String,
}

fn best_polynomial<T: Real>(
    guides: &[Vec<f64>],
    ctx: &Context,
    head: &Head<'_, T>,
    attention: &Attention,
    auto: &Auto,
    shift: Option<&[Vec<f64>; 2]>,
    costs: &[f64],
    cheap: f64,
    engine: impl Fn(usize) -> Polynomial,
) -> Result<BestPolynomial> {
    let none = |reason: String| BestPolynomial { best: None, reason };
    let degrees = costs.len();
    if degrees == 0 {
        return Ok(none("polynomials cost too much at this width".into()));
    }
    let given = shift.map_or(Shift::None, |[query, key]| Shift::Given { query: query.clone(), key: key.clone() });
    let shifts = polynomial::shifts(head, &given)?;
    let strict = engine(1).coefficients == Coefficients::Fitted;
    let sees = |i, j| !attention.causal || j <= i;
    let sample = match polynomial::fit_sample(head, attention.scale, &shifts, strict, sees) {
        Ok(sample) => sample,
        Err(error @ (Error::Cancelled | Error::Memory { .. })) => return Err(error),
        Err(_) => return Ok(none("scores too large for any polynomial".into())),
    };
    // A first look, at sampled scores alone: weights that far off give no gradient that is near, and no output either
    // but for values that hardly differ.
    let error = match sample.fit(degrees) {
        Ok(a) => sample.error(&a),
        Err(_) => f64::INFINITY,
    };
    if (error > HOPELESS * auto.tol || error.is_nan()) && (auto.gradients || spread(head)? >= SPREAD) {
        return Ok(none(format!("the weights by polynomials up to degree {degrees} err by {error:.1e}")));
    }
    let draw = Draw::new(head.q.nrows(), rows(head.q.nrows()), auto.seed ^ 0x9A, guides)?;
    let dv = head.v.ncols();
    let dout = auto
        .gradients
        .then(|| Mat::from_fn(draw.rows.len(), dv, |i, c| 2.0 * uniform(auto.seed ^ 0x1D, (i * dv + c) as u64) - 1.0));
    let settings = polynomial::settings(&engine(1));
    let options = (attention.causal, attention.scale);
    let Some(moments) = Moments::new(ctx, head, options, &draw.rows, &shifts, &settings, degrees, dout.as_ref())?
    else {
        return Ok(none("scores too large for any polynomial".into()));
    };
    let (out, dq) = moments.exact();
    if let Some(dq) = &dq {
        // Rounding is all that such a gradient has: no engine but the exact one errs as that does.
        let keys = live_keys(head, head.k.nrows())?;
        let longest = |x| longest_of(x, keys.iter().copied(), |_| 0.0);
        let natural =
            attention.scale.abs() * longest(head.k) * longest(head.v) * dout.as_ref().map_or(0.0, Mat::norm_l2);
        if dq.norm_l2() <= ROUNDING * epsilon::<T>() * natural {
            return Ok(none("the gradients of queries vanish".into()));
        }
    }
    let mut tried = Vec::new();
    let mut best = None;
    for degree in 1..=degrees {
        let mut candidate = Polynomial { shift: given.clone(), ..engine(degree) };
        let Ok(coefficients) = sample.fit(degree) else { continue };
        let Some((got, got_dq)) = moments.polynomial(&coefficients, false) else { continue };
        let mut error = expected(draw.compare_drawn(&out, &got)?);
        if let (Some(dq), Some(got)) = (&dq, &got_dq) {
            error = error.max(expected(draw.compare_drawn(dq, got)?));
        }
        tried.push(format!("{degree}: {error:.1e}"));
        // The gradients of keys are not known yet: they are given some room, and more where that costs little.
        let within = if auto.gradients { KEYS_ROOM * auto.tol } else { auto.tol };
        let room = auto.gradients && costs[degree - 1] <= cheap;
        let better = best.as_ref().is_none_or(|(_, least)| room && error < *least);
        if error <= within && better {
            if !strict {
                candidate.coefficients = Coefficients::Given(coefficients);
            }
            best = Some((candidate, error));
        }
        let next_is_cheap = costs.get(degree).is_some_and(|&cost| cost <= cheap);
        let enough = if auto.gradients && next_is_cheap { ROOM * auto.tol } else { within };
        if best.as_ref().is_some_and(|best| best.1 <= enough) {
            break;
        }
    }
    let reason = format!("errors of polynomials by degree are {}", tried.join(", "));
    Ok(BestPolynomial { best, reason })
}

/// The size of values less their mean, relative to their size, of keys that no bias removes.
fn spread<T: Real>(head: &Head<'_, T>) -> Result<f64> {
    let keys = live_keys(head, head.v.nrows())?;
    let (sums, square) = sums_and_square(head.v, keys.iter().copied());
    let of_mean = sums.iter().map(|sum| sum * sum).sum::<f64>() / keys.len() as f64;
    Ok(((square - of_mean).max(0.0) / square).sqrt())
}

/// The least of `ranks` whose landmarks are well within the tolerance on a sample, or what was found instead.
pub(crate) fn landmarks<T: Real>(
    ctx: &Context,
    head: &Head<'_, T>,
    scale: f64,
    auto: &Auto,
    strict: bool,
    ranks: &[usize],
) -> Result<std::result::Result<(Landmark, f64), String>> {
    let most = ranks.iter().copied().max().unwrap_or(1);
    let hopes = landmark::Hopes { unresolved: UNRESOLVED * auto.tol.powf(0.25), error: LANDMARK_MARGIN * auto.tol };
    let candidates = landmark::Sample::new(head, scale, strict, most, auto.seed)
        .and_then(|sample| sample.candidates(ctx, ranks, auto.gradients, hopes));
    let candidates = match candidates {
        Ok(candidates) => candidates,
        Err(error @ (Error::Cancelled | Error::Memory { .. })) => return Err(error),
        Err(error) => return Ok(Err(error.to_string())),
    };
    if candidates.is_empty() {
        return Ok(Err(format!("{most} landmarks leave too many points unresolved")));
    }
    let mut least = f64::INFINITY;
    for candidate in candidates {
        let error = candidate.worst();
        least = least.min(error);
        if error <= LANDMARK_MARGIN * auto.tol {
            let rank = candidate.constants.rank();
            let constants = (!strict).then(|| Arc::new(candidate.constants));
            return Ok(Ok((Landmark { rank, seed: auto.seed, constants }, error)));
        }
    }
    Ok(Err(format!("the error of up to {most} landmarks is {least:.1e}")))
}

/// Sums over the keys of some queries: see the top of this file. Rows are `[1, v, k', (dout.v) k']`, the last two where a
/// gradient is given; one column a query.
pub(crate) struct Moments<'a> {
    dv: usize,
    d: usize,
    scale: f64,
    dout: Option<&'a Mat<f64>>,
    near: Mat<f64>,
    far_exact: Mat<f64>,
    far: Vec<Mat<f64>>,
}

/// Tokens of a tile, and tiles that one task goes through.
const TILE: usize = 112;
const RANGE: usize = 16 * TILE;

impl<'a> Moments<'a> {
    /// Up to `degree`. `None` where scores are so large that sums may overflow.
    pub fn new<T: Real>(
        ctx: &Context,
        head: &Head<'_, T>,
        (causal, scale): (bool, f64),
        rows: &[usize],
        shifts: &Shifts<T>,
        settings: &Settings,
        degree: usize,
        dout: Option<&'a Mat<f64>>,
    ) -> Result<Option<Self>> {
        let (d, dv, count) = (head.q.ncols(), head.v.ncols(), rows.len());
        // Less the largest, whatever the mask: rows that see only much smaller ones have sums of 0, which no polynomial fits.
        let weights = match biases(head, (false, scale), shifts, 0.0)? {
            None => None,
            Some(Biases { of_keys, .. }) => {
                let level = of_keys.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                Some(collected(of_keys.iter().map(|b| (b - level).exp()), "weights of keys")?)
            }
        };
        let weight = |j: usize| weights.as_ref().map_or(1.0, |w| w[j]);
        let mut q = gather(head.q, rows)?;
        for i in 0..count {
            q.row_mut(i).iter_mut().zip(&shifts.query).for_each(|(q, by)| *q -= by.to_f64());
        }
        let norm = |x: faer::RowRef<'_, f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let longest = (0..count).map(|i| norm(q.row(i))).fold(0.0, f64::max);
        let by = |c: usize| shifts.key.get(c).map_or(0.0, |b| b.to_f64());
        let longest_key = longest_of(head.k, (0..head.k.nrows()).filter(|&j| weight(j) > 0.0), by);
        let bound = scale.abs() * longest * longest_key;
        if bound > LARGEST_BOUND || bound.is_nan() {
            return Ok(None);
        }
        let e = 1 + dv + if dout.is_some() { d } else { 0 };
        let width = e + if dout.is_some() { d } else { 0 };
        let kinds = degree + 3;
        let starts: Vec<usize> =
            rows.iter().map(|&i| if causal { near_start(settings, i) } else { usize::MAX }).collect();
        let end = if causal { rows[count - 1] + 1 } else { head.k.nrows() };
        let parts = (0..end.div_ceil(RANGE))
            .into_par_iter()
            .map(|range| {
                let mut sums = zeroed(kinds * width * count, "moments of rows")?;
                let tile = || zeroed(TILE * count, "a tile of moments");
                let (mut s, mut power, mut near, mut exact, mut upstream) =
                    (tile()?, tile()?, tile()?, tile()?, tile()?);
                for j0 in (range * RANGE..end.min((range + 1) * RANGE)).step_by(TILE) {
                    ctx.check()?;
                    let bk = TILE.min(end - j0);
                    let mut k = widened_keys(head, head.k, j0..j0 + bk);
                    let v = widened_keys(head, head.v, j0..j0 + bk);
                    for k in k.chunks_exact_mut(d) {
                        k.iter_mut().zip(&shifts.key).for_each(|(k, by)| *k -= by.to_f64());
                    }
                    let mut values = vec![1.0; bk * e];
                    for (t, values) in values.chunks_exact_mut(e).enumerate() {
                        values[1..=dv].copy_from_slice(&v[t * dv..(t + 1) * dv]);
                        if dout.is_some() {
                            values[1 + dv..].copy_from_slice(&k[t * d..(t + 1) * d]);
                        }
                    }
                    let (k, values) = (view(&k, bk, d), view(&values, bk, e));
                    product(view_mut(&mut s, bk, count), k, q.transpose(), scale);
                    if let Some(dout) = dout {
                        let v = values.subcols(1, dv);
                        product(view_mut(&mut upstream, bk, count), v, dout.transpose(), 1.0);
                    }
                    vectorised(
                        #[inline(always)]
                        || {
                            for j in 0..bk {
                                let w = weight(j0 + j);
                                if w == 0.0 {
                                    // Whatever a removed key holds.
                                    s[j * count..(j + 1) * count].fill(0.0);
                                }
                                for i in j * count..(j + 1) * count {
                                    exact[i] = w * (s[i] - bound).exp_nonpositive();
                                    power[i] = w;
                                }
                            }
                        },
                    );
                    // Of every key, and then of the near ones.
                    let some_near = causal && starts.iter().any(|&start| start < j0 + bk);
                    if some_near {
                        for j in 0..bk {
                            for i in 0..count {
                                let (seen, far) = (j0 + j <= rows[i], j0 + j < starts[i]);
                                let at = j * count + i;
                                near[at] = if seen && !far { exact[at] } else { 0.0 };
                                exact[at] = if seen && far { exact[at] } else { 0.0 };
                                power[at] = if seen && far { power[at] } else { 0.0 };
                            }
                        }
                    }
                    for (kind, sums) in sums.chunks_exact_mut(width * count).enumerate() {
                        if kind == 0 && !some_near {
                            continue;
                        }
                        let weights = match kind {
                            0 => &mut near,
                            1 => &mut exact,
                            2 => &mut power,
                            _ => {
                                power[..bk * count].iter_mut().zip(&s).for_each(|(power, s)| *power *= s);
                                &mut power
                            }
                        };
                        let (plain, scored) = sums.split_at_mut(e * count);
                        add_product(view_mut(plain, e, count), values.transpose(), view(weights, bk, count), 1.0);
                        if dout.is_some() {
                            let with = weights[..bk * count].iter().zip(&upstream).map(|(w, u)| w.times(*u));
                            let with: Vec<f64> = with.collect();
                            add_product(view_mut(scored, d, count), k.transpose(), view(&with, bk, count), 1.0);
                        }
                    }
                }
                Ok(sums)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut sums = zeroed::<f64>(kinds * width * count, "moments of rows")?;
        for part in parts {
            sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
        let mut all = sums.chunks_exact(width * count).enumerate().map(|(kind, sums)| {
            let by = if kind < 2 { bound.exp() } else { 1.0 };
            Mat::from_fn(width, count, |c, i| by * sums[c * count + i])
        });
        let (Some(near), Some(far_exact)) = (all.next(), all.next()) else { return Ok(None) };
        Ok(Some(Self { dv, d, scale, dout, near, far_exact, far: all.collect() }))
    }

    /// The exact rows of out, and of dq.
    pub fn exact(&self) -> (Mat<f64>, Option<Mat<f64>>) {
        let sums = &self.near + &self.far_exact;
        self.rows(&sums, &sums)
    }

    /// The same by a polynomial beyond the near keys; `None` where a denominator is not positive.
    pub fn polynomial(&self, a: &[f64], consistent: bool) -> Option<(Mat<f64>, Option<Mat<f64>>)> {
        let sums = self.combine(a);
        if (0..sums.ncols()).any(|i| sums[(0, i)] <= 0.0 || sums[(0, i)].is_nan()) {
            return None;
        }
        let slope: Vec<f64> = a.iter().enumerate().skip(1).map(|(l, a)| l as f64 * a).collect();
        let scored = if consistent { self.combine(&slope) } else { sums.clone() };
        Some(self.rows(&sums, &scored))
    }

    fn combine(&self, a: &[f64]) -> Mat<f64> {
        let mut sums = self.near.clone();
        for (a, far) in a.iter().zip(&self.far) {
            sums += faer::Scale(*a) * far;
        }
        sums
    }

    /// Rows of out from sums under weights, and of dq from sums under the weights' slopes.
    fn rows(&self, sums: &Mat<f64>, slopes: &Mat<f64>) -> (Mat<f64>, Option<Mat<f64>>) {
        let (dv, d, count) = (self.dv, self.d, sums.ncols());
        let out = Mat::from_fn(count, dv, |i, c| sums[(1 + c, i)] / sums[(0, i)]);
        let dq = self.dout.map(|dout| {
            Mat::from_fn(count, d, |i, c| {
                let delta: f64 = (0..dv).map(|c| dout[(i, c)] * out[(i, c)]).sum();
                self.scale * (slopes[(1 + dv + d + c, i)] - delta * slopes[(1 + dv + c, i)]) / sums[(0, i)]
            })
        });
        (out, dq)
    }
}

/// A unit in the last place of 1.
fn epsilon<T>() -> f64 {
    if size_of::<T>() == 4 { f64::from(f32::EPSILON) } else { f64::EPSILON }
}

/// The length of the longest of some rows, less `by`.
fn longest_of<T: Real>(x: faer::MatRef<'_, T>, rows: impl Iterator<Item = usize>, by: impl Fn(usize) -> f64) -> f64 {
    rows.map(|i| x.row(i).iter().enumerate().map(|(c, x)| (x.to_f64() - by(c)).powi(2)).sum::<f64>())
        .fold(0.0, f64::max)
        .sqrt()
}

/// The weights of a polynomial engine, pair by pair.
pub(crate) struct PolynomialWeights<'a, T> {
    head: &'a Head<'a, T>,
    causal: bool,
    scale: f64,
    settings: Settings,
    coefficients: &'a [f64],
    shifts: &'a Shifts<T>,
    log_sums: &'a [f64],
}

impl<'a, T: Real> PolynomialWeights<'a, T> {
    /// Of a pass with these constants, whose rows sum to `e^log_sums`.
    pub fn new(
        head: &'a Head<'a, T>,
        attention: &Attention,
        engine: &Polynomial,
        constants: &'a polynomial::Constants<T>,
        log_sums: &'a [f64],
    ) -> Self {
        Self {
            head,
            causal: attention.causal,
            scale: attention.scale,
            settings: polynomial::settings(engine),
            coefficients: &constants.coefficients,
            shifts: &constants.shifts,
            log_sums,
        }
    }
}

impl<T: Real> Weights for PolynomialWeights<'_, T> {
    fn weigh(&self, i: usize, keys: &[usize], scores: &mut [f64], f: &mut [f64]) {
        let dot = |x: faer::RowRef<'_, T>, y: &[T]| {
            self.scale * x.iter().zip(y).map(|(x, y)| x.to_f64() * y.to_f64()).sum::<f64>()
        };
        let start = if self.causal { near_start(&self.settings, i) } else { usize::MAX };
        let row = dot(self.head.q.row(i), &self.shifts.key);
        for ((&j, score), f) in keys.iter().zip(scores).zip(f) {
            if j >= start || (self.causal && j > i) || self.head.removed(j) {
                *score = *f;
                continue;
            }
            // c α.k'_j
            let own = dot(self.head.k.row(j), &self.shifts.query)
                - self.scale
                    * self.shifts.query.iter().zip(&self.shifts.key).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>();
            let s = *score - row - own;
            let bias = self.head.key_bias.map_or(0.0, |b| b[j].to_f64());
            let w = (bias + own + row - self.log_sums[i]).exp();
            let (mut p, mut slope) = (0.0, 0.0);
            for a in self.coefficients.iter().rev() {
                slope = slope * s + p;
                p = p * s + a;
            }
            *f = w.times(p);
            *score = w.times(if self.settings.consistent { slope } else { p });
        }
    }
}

/// Roots are found in a time that grows with the cube of the degree; those of higher ones are not looked for.
const MOST_COEFFICIENTS: usize = 65;

/// The largest relative error of `p` on `[-r, r]`, `max |p(s) e^-s - 1|`: at the ends, or where `p' = p`. Infinite, as
/// nothing is known, for degrees above 64.
pub(crate) fn largest_relative_error(a: &[f64], r: f64) -> f64 {
    if a.len() > MOST_COEFFICIENTS {
        return f64::INFINITY;
    }
    let p = |s: f64| a.iter().rev().fold(0.0, |p, a| p * s + a);
    let difference: Vec<f64> =
        (0..a.len()).map(|l| a.get(l + 1).map_or(0.0, |next| (l + 1) as f64 * next) - a[l]).collect();
    let mut points = roots(&difference, r);
    points.extend([-r, r]);
    points
        .into_iter()
        .map(|s| (p(s) * (-s).exp() - 1.0).abs())
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

/// The roots of a polynomial in `[-r, r]`: between those of its derivative it is monotone.
fn roots(a: &[f64], r: f64) -> Vec<f64> {
    if a.len() <= 1 {
        return Vec::new();
    }
    let p = |s: f64| a.iter().rev().fold(0.0, |p, a| p * s + a);
    let derivative: Vec<f64> = a.iter().enumerate().skip(1).map(|(l, a)| l as f64 * a).collect();
    let turns = roots(&derivative, r);
    let ends: Vec<f64> = std::iter::once(-r).chain(turns).chain([r]).collect();
    let mut found = Vec::new();
    for pair in ends.windows(2) {
        let (mut low, mut high) = (pair[0], pair[1]);
        if p(low).signum() == p(high).signum() {
            // No crossing; a double root lies at a turn, which is as good a point to look at.
            found.push(low);
            continue;
        }
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if p(middle).signum() == p(low).signum() { low = middle } else { high = middle }
        }
        found.push(low);
    }
    found
}

/// The a-priori bound of the relative Frobenius error of `out`, before rounding: with `eps = max |p(s) e^-s - 1|` over the scores that
/// norms allow, `|out - exact| <= 2 eps / (1 - eps) max|v|` entrywise. `None` where it says nothing.
pub(crate) fn error_bound<T: Real>(
    head: &Head<'_, T>,
    scale: f64,
    constants: &polynomial::Constants<T>,
    out: &[T],
) -> Option<f64> {
    let by = |shift: &[T], c: usize| shift.get(c).map_or(0.0, |b| b.to_f64());
    let longest_query = longest_of(head.q, 0..head.q.nrows(), |c| by(&constants.shifts.query, c));
    // Also those of a bias like -1e9, which rows may see that see no others.
    let keys = || (0..head.k.nrows()).filter(|&j| !head.removed(j));
    let longest_key = longest_of(head.k, keys(), |c| by(&constants.shifts.key, c));
    let eps = largest_relative_error(&constants.coefficients, scale.abs() * longest_query * longest_key);
    let largest = keys().flat_map(|j| head.v.row(j).iter()).map(|v| v.to_f64().abs()).fold(0.0, f64::max);
    let absolute = 2.0 * eps / (1.0 - eps) * largest * (out.len() as f64).sqrt();
    let size = out.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt();
    (eps < 1.0 && absolute < size).then(|| absolute / (size - absolute))
}

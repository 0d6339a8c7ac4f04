//! What a plan decides, step by step, from costs and errors that a backend has measured: the same for every backend.

use std::sync::Arc;

use faer::Mat;

use super::moments::Moments;
use super::report::HeadPlan;
use crate::engines::landmark;
use crate::error::{Error, Result, expect_len};
use crate::measure::ErrorEstimate;
use crate::measure::draw::Draw;
use crate::spec::{Auto, Coefficients, Engine, Landmark, LandmarkConstants, Polynomial, Shift};

/// Degrees of polynomials, and landmarks, that are considered.
pub const DEGREES: usize = 6;
/// See [`DEGREES`].
pub const RANKS: [usize; 4] = [32, 64, 128, 256];
/// What an engine may cost, relative to exact attention: a polynomial, whose error is known before it runs, and
/// landmarks, of which a sample alone is known and whose drawing is lost where they miss.
const WORTH_IT: f64 = 0.6;
const LANDMARKS_WORTH_IT: f64 = 0.1;
/// What planning may cost, relative to exact attention, in all, and drawing landmarks: a tolerance that ends in the exact
/// engine should cost little more than that (`benches/tolerance.py`: 6% in the median).
const PLANNING: f64 = 0.1;
const DRAWING: f64 = 0.06;
/// How far below the tolerance landmarks must lie on their sample, which is not the whole head: results err up to twice as
/// much as samples of [`landmark`](crate::engines::landmark)'s size say.
const LANDMARK_MARGIN: f64 = 0.5;
/// What a polynomial costs, relative to exact attention, where it is cheap, and how far below the tolerance it should
/// then lie for gradients: a higher degree that costs next to nothing spares a fallback.
const CHEAP: f64 = 0.1;
const ROOM: f64 = 0.4;
/// How far below the tolerance any polynomial lies for gradients: those of keys, not known yet, err up to a quarter more
/// than those of queries.
const KEYS_ROOM: f64 = 0.8;
/// A gradient is nothing but rounding below so many units of that, relative to what its factors might give.
const ROUNDING: f64 = 32.0;
/// Means below this part of the root mean square are left where they are: subtracting them would lower scores by no more
/// than a tenth.
const SMALL_MEAN: f64 = 0.05;
/// Sampled weights that err so many times more than the tolerance are not looked at further: errors average out over the
/// keys by no more, but where the spread of the values is below the second number.
const HOPELESS: f64 = 4.0;
const SPREAD: f64 = 0.5;
/// Landmarks that leave more of the points unresolved than this times the fourth root of the tolerance are not looked at
/// further: a remainder `ρ` of the kernel errs by `sqrt(ρ(q, q) ρ(k, k))` in a weight, and its square enters twice.
const UNRESOLVED: f64 = 1.6;

/// What engines cost a head, in seconds, as a backend measures or models it.
#[derive(Debug, Clone)]
pub struct Costs {
    /// Exact attention.
    pub exact: f64,
    /// Polynomials of the degrees 1 to [`DEGREES`].
    pub polynomials: Vec<f64>,
    /// As many landmarks as each of [`RANKS`].
    pub landmarks: Vec<f64>,
    /// Drawing so many.
    pub drawing: Vec<f64>,
    /// Moments of the rows that a plan is made from, up to the degrees 0 to [`DEGREES`].
    pub moments: Vec<f64>,
}

impl Costs {
    /// An error where there are not as many as there are engines.
    pub fn check(&self) -> Result<()> {
        expect_len("polynomials", self.polynomials.len(), DEGREES)?;
        expect_len("landmarks", self.landmarks.len(), RANKS.len())?;
        expect_len("drawing", self.drawing.len(), RANKS.len())?;
        expect_len("moments", self.moments.len(), DEGREES + 1)
    }
}

/// The sum of each column of some rows, of all their squares, and how many rows there are.
#[derive(Debug, Clone)]
pub struct ColumnSums {
    /// `(d,)`.
    pub sums: Vec<f64>,
    /// Of all entries.
    pub squares: f64,
    /// Rows.
    pub count: f64,
}

impl ColumnSums {
    fn mean(&self) -> Vec<f64> {
        self.sums.iter().map(|sum| sum / self.count).collect()
    }

    fn has_large_mean(&self) -> bool {
        let of_mean: f64 = self.mean().iter().map(|x| x * x).sum();
        of_mean > SMALL_MEAN * SMALL_MEAN * self.squares / self.count
    }

    /// The size of the rows less their mean, relative to their size.
    pub fn spread(&self) -> f64 {
        let of_mean = self.sums.iter().map(|sum| sum * sum).sum::<f64>() / self.count;
        ((self.squares - of_mean).max(0.0) / self.squares).sqrt()
    }
}

/// Rows of a head that polynomials are held against.
#[derive(Debug)]
pub struct Probe<'a> {
    /// How they were drawn.
    pub(crate) draw: &'a Draw,
    /// Their moments.
    pub(crate) moments: &'a Moments,
    /// How large a gradient of these queries might be for a dout of length 1.
    pub natural: f64,
    /// A unit in the last place of 1 of the arrays.
    pub epsilon: f64,
}

/// The plan of one head, as far as it is made. Each step is cheaper than what it may save.
#[derive(Debug, Clone)]
pub struct Planner {
    auto: Auto,
    causal: bool,
    costs: Costs,
    /// Polynomials up to this degree, and the places of landmarks in [`RANKS`], are worth a look.
    degrees: usize,
    ranks: Vec<usize>,
    shift: Option<[Vec<f64>; 2]>,
    plan: HeadPlan,
}

impl Planner {
    /// Discards what would not be clearly faster than exact attention.
    pub fn new(auto: &Auto, causal: bool, costs: Costs) -> Self {
        let degrees = costs.polynomials.iter().take_while(|&&cost| cost <= WORTH_IT * costs.exact).count();
        let ranks: Vec<usize> = (0..RANKS.len())
            .filter(|&i| {
                costs.landmarks[i] <= LANDMARKS_WORTH_IT * costs.exact && costs.drawing[i] <= DRAWING * costs.exact
            })
            .collect();
        let mut planner =
            Self { auto: auto.clone(), causal, plan: HeadPlan::exact(costs.exact), costs, degrees, ranks, shift: None };
        if degrees == 0 && planner.ranks.is_empty() || planner.costs.moments[degrees] > PLANNING * planner.costs.exact {
            (planner.degrees, planner.ranks) = (0, Vec::new());
            planner.plan.reason = "no low-rank engine is clearly faster at this size".into();
        } else if degrees == 0 {
            planner.plan.reason = "polynomials cost too much at this width".into();
        }
        planner
    }

    /// Whether no engine but the exact one is left.
    pub fn is_settled(&self) -> bool {
        self.degrees == 0 && self.ranks.is_empty()
    }

    /// Polynomials up to this degree are worth a look.
    pub fn degrees(&self) -> usize {
        self.degrees
    }

    /// Whether no constant may be taken from the whole sequence.
    pub fn is_strict(&self) -> bool {
        self.causal && self.auto.strict_causal
    }

    /// The polynomial of a degree, as it is run where no constant of it is given.
    pub fn polynomial(degree: usize, strict: bool) -> Polynomial {
        let coefficients = if strict { Coefficients::Fitted } else { Coefficients::Taylor };
        Polynomial { degree, coefficients, ..Polynomial::default() }
    }

    /// What is subtracted from queries and keys: the means of both, where that makes scores smaller.
    pub fn shift(&mut self, queries: &ColumnSums, keys: &ColumnSums) -> Option<&[Vec<f64>; 2]> {
        if !self.is_strict() && (queries.has_large_mean() || keys.has_large_mean()) {
            self.shift = Some([queries.mean(), keys.mean()]);
        }
        self.shift.as_ref()
    }

    /// The shift that was found, as an engine has it.
    pub fn given_shift(&self) -> Shift {
        self.shift.as_ref().map_or(Shift::None, |[query, key]| Shift::Given(query.clone(), key.clone()))
    }

    fn without_polynomials(&mut self, reason: String) {
        self.degrees = 0;
        self.plan.reason = reason;
    }

    /// No polynomial follows these scores.
    pub fn scores_are_too_large(&mut self) {
        self.without_polynomials("scores too large for any polynomial".into());
    }

    /// A first look, at how far weights by the highest degree are off on sampled scores: weights that far off give no
    /// gradient that is near, and no output either but for values that hardly differ, whose `spread` is small.
    pub fn look_at_weights(&mut self, error: f64, spread: impl FnOnce() -> Result<f64>) -> Result<()> {
        let hopeless = error > HOPELESS * self.auto.tol || error.is_nan();
        if hopeless && (self.auto.gradients || spread()? >= SPREAD) {
            let reason = format!("the weights by polynomials up to degree {} err by {error:.1e}", self.degrees);
            self.without_polynomials(reason);
        }
        Ok(())
    }

    /// Takes the cheapest polynomial that is within the tolerance on the drawn rows; `fit` gives the coefficients of a
    /// degree.
    pub fn try_polynomials(&mut self, probe: &Probe<'_>, mut fit: impl FnMut(usize) -> Option<Vec<f64>>) -> Result<()> {
        let Probe { draw, moments, natural, epsilon } = *probe;
        let (tol, gradients) = (self.auto.tol, self.auto.gradients);
        let (out, dq) = moments.exact();
        if let Some(dq) = &dq {
            // Rounding is all that such a gradient has: no engine but the exact one errs as that does.
            let largest = natural * moments.dout().map_or(0.0, Mat::norm_l2);
            if dq.norm_l2() <= ROUNDING * epsilon * largest {
                self.without_polynomials("the gradients of queries vanish".into());
                return Ok(());
            }
        }
        let is_cheap = |degree: usize| {
            self.costs.polynomials[..self.degrees].get(degree - 1).is_some_and(|&cost| cost <= CHEAP * self.costs.exact)
        };
        // The gradients of keys are not known yet: they are given some room, and more where that costs little.
        let within = if gradients { KEYS_ROOM * tol } else { tol };
        let (mut tried, mut best) = (Vec::new(), None::<(usize, Vec<f64>, f64)>);
        for degree in 1..=self.degrees {
            let Some(coefficients) = fit(degree) else { continue };
            let Some((got, got_dq)) = moments.polynomial(&coefficients, false) else { continue };
            let mut error = expected(draw.compare_drawn(&out, &got)?);
            if let (Some(dq), Some(got)) = (&dq, &got_dq) {
                error = error.max(expected(draw.compare_drawn(dq, got)?));
            }
            tried.push(format!("{degree}: {error:.1e}"));
            let better = best.as_ref().is_none_or(|best| gradients && is_cheap(degree) && error < best.2);
            if error <= within && better {
                best = Some((degree, coefficients, error));
            }
            let enough = if gradients && is_cheap(degree + 1) { ROOM * tol } else { within };
            if best.as_ref().is_some_and(|best| best.2 <= enough) {
                break;
            }
        }
        let Some((degree, coefficients, error)) = best else {
            self.plan.reason = format!("errors of polynomials by degree are {}", tried.join(", "));
            return Ok(());
        };
        let strict = self.is_strict();
        let mut engine = Polynomial { shift: self.given_shift(), ..Self::polynomial(degree, strict) };
        let mut whole_sequence = Vec::new();
        if !strict {
            engine.coefficients = Coefficients::Given(coefficients);
        }
        if self.causal && !strict {
            whole_sequence.push("coefficients".into());
            if engine.shift != Shift::None {
                whole_sequence.push("shift".into());
            }
        }
        let cost = self.costs.polynomials[degree - 1];
        self.choose(HeadPlan { whole_sequence, ..self.with(Engine::Polynomial(engine), cost, error) });
        Ok(())
    }

    /// Landmarks that are worth drawing: those that cost less than what was chosen.
    pub fn ranks(&self) -> Vec<usize> {
        let cheaper = |&&i: &&usize| self.costs.landmarks[i] < self.plan.cost;
        self.ranks.iter().filter(cheaper).map(|&i| RANKS[i]).collect()
    }

    /// What landmarks must not exceed to be looked at further.
    pub(crate) fn hopes(&self) -> landmark::Hopes {
        landmark::Hopes { unresolved: UNRESOLVED * self.auto.tol.powf(0.25), error: LANDMARK_MARGIN * self.auto.tol }
    }

    /// Takes the fewest landmarks that are well within the tolerance on their sample, out of what was found for
    /// [`ranks`](Self::ranks): candidates in increasing order, or why there are none.
    pub(crate) fn try_landmarks(&mut self, found: Result<Vec<landmark::Candidate>>) -> Result<()> {
        let largest = self.ranks().into_iter().max().unwrap_or(0);
        let reason = match found {
            Ok(candidates) => {
                let within = LANDMARK_MARGIN * self.auto.tol;
                let least = candidates.iter().map(landmark::Candidate::worst).fold(f64::INFINITY, f64::min);
                let none = candidates.is_empty();
                if let Some(chosen) = candidates.into_iter().find(|candidate| candidate.worst() <= within) {
                    let error = chosen.worst();
                    self.choose_landmarks(chosen.constants, error);
                    return Ok(());
                }
                if none {
                    format!("{largest} landmarks leave too many points unresolved")
                } else {
                    format!("the error of up to {largest} landmarks is {least:.1e}")
                }
            }
            Err(error @ (Error::Cancelled | Error::Memory { .. })) => return Err(error),
            Err(error) => error.to_string(),
        };
        if self.plan.engine == Engine::Exact {
            self.plan.reason = format!("{}; {reason}", self.plan.reason);
        }
        Ok(())
    }

    fn choose_landmarks(&mut self, constants: LandmarkConstants, error: f64) {
        let (rank, strict) = (constants.rank(), self.is_strict());
        // Costs are linear in the rank; fewer landmarks may have been drawn than were asked for.
        let [first, second] = [0, 1].map(|i| (RANKS[i] as f64, self.costs.landmarks[i]));
        let cost = first.1 + (rank as f64 - first.0) / (second.0 - first.0) * (second.1 - first.1);
        let constants = (!strict).then(|| Arc::new(constants));
        let whole_sequence = if self.causal && !strict { vec!["landmarks".into()] } else { Vec::new() };
        let engine = Engine::Landmark(Landmark { rank, seed: self.auto.seed, constants });
        self.choose(HeadPlan { whole_sequence, ..self.with(engine, cost, error) });
    }

    fn with(&self, engine: Engine, cost: f64, error: f64) -> HeadPlan {
        let reason = format!("the cheapest within {:.1e}", self.auto.tol);
        HeadPlan { engine, cost, predicted_error: Some(error), reason, ..HeadPlan::exact(self.costs.exact) }
    }

    fn choose(&mut self, plan: HeadPlan) {
        self.plan = plan;
    }

    /// What was chosen.
    pub fn finish(self) -> HeadPlan {
        self.plan
    }
}

/// What a plan takes for an error of which it has seen few rows: between the estimate and the end of its interval, on a
/// logarithmic scale. An engine that is chosen too easily costs its time, as verification finds it.
fn expected(error: ErrorEstimate) -> f64 {
    (error.relative * error.high).sqrt()
}

//! For a backend that keeps its arrays elsewhere: everything that is decided by samples of a head's tokens, or by sums over
//! them. The backend copies these to arrays that the CPU can read, and hands them over.

use faer::{ColRef, Mat, MatRef};

use super::choice::{Planner, Probe};
use super::moments::Moments;
use crate::context::Context;
use crate::engines::{landmark, polynomial};
use crate::error::{Error, Result, expect_len};
use crate::measure::key_gradients::{self, Pairs};
use crate::measure::{Draw, ErrorEstimate, Squares};
use crate::memory::{copied, filled};
use crate::numerics::draws;
use crate::numerics::real::Real;
use crate::problem::heads::Head;
use crate::problem::scores::{PairArrays, Scores};
use crate::spec::{Landmark, LandmarkConstants, Shift};

/// The arrays of a head's sampled tokens, or of all of them.
#[derive(Debug, Clone)]
pub struct HeadArrays<'a, T> {
    /// `(n, d)`.
    pub q: MatRef<'a, T>,
    /// `(m, d)`.
    pub k: MatRef<'a, T>,
    /// `(m, d_v)`.
    pub v: Option<MatRef<'a, T>>,
    /// `(m,)`.
    pub key_bias: Option<ColRef<'a, T>>,
    /// How scores are made.
    pub scores: Scores,
    /// The head's number, which errors name.
    pub head: usize,
}

impl<T: Real> HeadArrays<'_, T> {
    fn as_head(&self) -> Result<Head<'_, T>> {
        let (m, d) = self.k.shape();
        let v = self.v.unwrap_or_else(|| self.k.subcols(0, 0));
        if d == 0 || self.q.ncols() != d || v.nrows() != m {
            return Err(Error::Shape(format!(
                "q, k and v have shapes {:?}, {:?} and {:?}; expected (n, d), (m, d) and (m, dv)",
                self.q.shape(),
                self.k.shape(),
                v.shape()
            )));
        }
        if let Some(bias) = self.key_bias {
            expect_len("key_bias", bias.nrows(), m)?;
        }
        if !self.scores.scale.is_finite() {
            return Err(Error::Argument(format!("scale is {}; expected a finite number", self.scores.scale)));
        }
        Ok(Head {
            index: self.head,
            q: self.q,
            k: self.k,
            v,
            key_bias: self.key_bias,
            pairs: PairArrays { allowed: None, bias: None },
            sink: None,
            scores: &self.scores,
            mask: self.scores.mask(0, 1),
        })
    }

    fn is_causal(&self) -> bool {
        !self.scores.mask(0, 1).is_none()
    }
}

/// Draws the rows that an error is measured on, by `guides` with a number for each of `total` rows: the rows in order, and
/// their weights.
pub fn draw_rows(total: usize, guides: &[Vec<f64>], samples: usize, seed: u64) -> Result<(Vec<usize>, Vec<f64>)> {
    if total == 0 || samples == 0 {
        return Err(Error::Argument(format!(
            "there are {total} rows and samples is {samples}; expected at least 1 of both"
        )));
    }
    for guide in guides {
        expect_len("guides", guide.len(), total)?;
    }
    let draw = Draw::new(total, samples, seed, guides)?;
    Ok((draw.rows, draw.weights))
}

/// The estimate of a relative error from the squares of rows that [`draw_rows`] drew out of `total`. `given` is the sum of
/// the squares of all given rows, where it is known.
pub fn estimate_error(squares: &[Squares], weights: &[f64], total: usize, given: Option<f64>) -> Result<ErrorEstimate> {
    expect_len("weights", weights.len(), squares.len())?;
    let draw =
        Draw { rows: Vec::new(), weights: copied(weights, "drawn rows")?, total: total.max(squares.len()).max(1) };
    Ok(draw.estimate(squares, given))
}

/// What row sums of queries that were not drawn may add to the squared errors of the gradients of drawn keys, `(keys, 3)`:
/// those of dk, dv and the bias.
///
/// `scores` and `upstream` are `(queries, keys)`: `s_ij` with its bias, minus infinity where the query does not see the key,
/// and `dout_i.v_j`. `weights` says what each drawn query stands for. The others hold two numbers for each query, the first
/// ones of all queries before the second ones: `exact` and `own` hold `ln D_i` and `delta_i`, exact and the engine's,
/// `squares` holds `|c q_i|^2` and `|dout_i|^2`. The equation is in `measure/key_gradients.rs`.
pub fn unseen_row_sums(
    scores: &[f64],
    upstream: &[f64],
    weights: &[f64],
    [exact, own, squares]: [&[f64]; 3],
) -> Result<Vec<[f64; 3]>> {
    let count = weights.len();
    for (name, numbers) in [("exact", exact), ("own", own), ("squares", squares)] {
        expect_len(name, numbers.len(), 2 * count)?;
    }
    expect_len("upstream", upstream.len(), scores.len())?;
    if scores.len().checked_rem(count) != Some(0) {
        return Err(Error::Shape(format!("scores holds {} numbers; expected a multiple of {count}", scores.len())));
    }
    let [exact, engine, squares] = [exact, own, squares].map(|x| <[_; 2]>::from(x.split_at(count)));
    let mut all = filled(scores.len() / count, [0.0; 3], "drawn keys")?;
    key_gradients::unseen_row_sums(&Pairs { scores, upstream, weights, exact, engine, squares }, &mut all);
    Ok(all)
}

/// `count` of the numbers below `n`, in order, one in each of as many equal parts.
pub fn stratified(n: usize, count: usize, seed: u64) -> Vec<usize> {
    draws::stratified(n, count, seed)
}

/// Polynomials fitted to a sample of scores.
#[derive(Debug, Clone)]
pub struct Fits {
    /// `a_0 .. a_g` for `g = 1, 2, ..`; `None` where the scores do not determine them.
    pub coefficients: Vec<Option<Vec<f64>>>,
    /// How far the weights by the last of them are from those by `exp`.
    pub error: f64,
}

/// The scores that coefficients are fitted to: those of up to 256 of the queries and keys, drawn evenly. `positions` are
/// the places of the queries, and of the keys, in the sequence; `None` where all tokens are there.
fn fit_sample<T: Real>(
    arrays: &HeadArrays<'_, T>,
    shift: [Vec<f64>; 2],
    positions: Option<[&[usize]; 2]>,
) -> Result<polynomial::Sample> {
    let head = arrays.as_head()?;
    let [query, key] = shift;
    let shift = if query.is_empty() && key.is_empty() { Shift::None } else { Shift::Given(query, key) };
    let shifts = polynomial::shifts(&head, &shift)?;
    let Some([queries, keys]) = positions else {
        return polynomial::fit_sample(&head, &shifts, false, |i, j| !arrays.is_causal() || j <= i);
    };
    expect_len("queries", queries.len(), head.q.nrows())?;
    expect_len("keys", keys.len(), head.k.nrows())?;
    polynomial::fit_sample(&head, &shifts, false, |i, j| !arrays.is_causal() || keys[j] <= queries[i])
}

/// Coefficients `a_0 .. a_degree` fitted to the scores of these tokens less their shifts, which may be empty: those of
/// [`Coefficients::Fitted`](crate::spec::Coefficients::Fitted).
pub fn fitted_coefficients<T: Real>(
    arrays: &HeadArrays<'_, T>,
    degree: usize,
    shift: [Vec<f64>; 2],
) -> Result<Vec<f64>> {
    fit_sample(arrays, shift, None)?.fit(degree)
}

/// The same for all degrees up to `degree`, of sampled tokens at these `positions`, for planning.
pub fn fitted_polynomials<T: Real>(
    arrays: &HeadArrays<'_, T>,
    degree: usize,
    shift: [Vec<f64>; 2],
    positions: Option<[&[usize]; 2]>,
) -> Result<Fits> {
    let sample = fit_sample(arrays, shift, positions)?;
    let coefficients: Vec<_> = (1..=degree).map(|degree| sample.fit(degree).ok()).collect();
    let last = coefficients.last().and_then(Option::as_ref);
    let error = last.map_or(f64::INFINITY, |a| sample.error(a));
    Ok(Fits { coefficients, error })
}

/// Landmarks drawn from these tokens, as the engine without constants draws them: under a causal mask from the first
/// 1024.
pub fn landmark_constants<T: Real>(
    ctx: &Context,
    arrays: &HeadArrays<'_, T>,
    rank: usize,
    seed: u64,
) -> Result<LandmarkConstants> {
    let engine = Landmark { rank, seed, constants: None };
    engine.check()?;
    landmark::draw(ctx, &arrays.as_head()?, &engine)
}

impl Planner {
    /// The first look at polynomials, on sampled tokens at these `positions`: the coefficients of each degree that is worth
    /// another look, none where polynomials are given up.
    pub fn look_at_tokens<T: Real>(
        &mut self,
        arrays: &HeadArrays<'_, T>,
        positions: Option<[&[usize]; 2]>,
        spread: f64,
    ) -> Result<Vec<Option<Vec<f64>>>> {
        let shift = match self.given_shift() {
            Shift::Given(query, key) => [query, key],
            _ => [Vec::new(), Vec::new()],
        };
        match fitted_polynomials(arrays, self.degrees(), shift, positions) {
            Ok(Fits { coefficients, error }) => {
                self.look_at_weights(error, || Ok(spread))?;
                Ok(coefficients)
            }
            Err(error @ (Error::Cancelled | Error::Memory { .. })) => Err(error),
            Err(_) => {
                self.scores_are_too_large();
                Ok(Vec::new())
            }
        }
    }

    /// Chooses a polynomial with one of the fitted coefficients, if one is within the tolerance on the rows that `moments`
    /// are of: rows drawn out of `total`, with these weights.
    pub fn try_fitted(
        &mut self,
        moments: &Moments,
        (weights, total): (Vec<f64>, usize),
        natural: f64,
        epsilon: f64,
        coefficients: &[Option<Vec<f64>>],
    ) -> Result<()> {
        let draw = Draw { rows: Vec::new(), weights, total };
        let probe = Probe { draw: &draw, moments, natural, epsilon };
        self.try_polynomials(&probe, |degree| coefficients.get(degree - 1)?.clone())
    }

    /// Looks for landmarks on sampled tokens.
    pub fn look_for_landmarks<T: Real>(
        &mut self,
        ctx: &Context,
        arrays: &HeadArrays<'_, T>,
        gradients: bool,
        seed: u64,
    ) -> Result<()> {
        let ranks = self.ranks();
        let Some(&largest) = ranks.last() else { return Ok(()) };
        let (head, hopes) = (arrays.as_head()?, self.hopes());
        let found = landmark::Sample::new(&head, self.is_strict(), largest, seed)
            .and_then(|sample| sample.candidates(ctx, &ranks, gradients, hopes));
        self.try_landmarks(found)
    }
}

/// A random dout of the rows that a plan is made from, `(rows, d_v)`.
pub fn random_dout(rows: usize, d_v: usize, seed: u64) -> Mat<f64> {
    super::random_dout(rows, d_v, seed)
}

/// The largest relative error `max |p(s) e^-s - 1|` of the polynomial with these coefficients over `|s| <= r`; infinite for
/// degrees above 64, of which nothing is known.
pub fn largest_relative_error(coefficients: &[f64], r: f64) -> f64 {
    polynomial::largest_relative_error(coefficients, r)
}

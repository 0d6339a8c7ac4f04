//! What is decided by samples of a head's tokens, for the backend whose arrays the core cannot read.

use lingrad_core::Error;
use lingrad_core::measure::Squares;
use lingrad_core::memory::collected;
use lingrad_core::plan::sampled::{self, Fits, Tokens};
use lingrad_core::spec::{Auto, LandmarkConstants};
use numpy::ndarray::ArrayView1;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{Any, Scalar, View, by_dtype};
use crate::attention::{Estimate, estimate};
use crate::entry::{Later, Outcome, entry};
use crate::error::Result;
use crate::plan::constants_dict;
use crate::run::run;

/// A vector of numbers that are read once.
type Numbers<'py, T> = PyReadonlyArray1<'py, T>;

fn numbers<T: numpy::Element + Copy>(x: &Numbers<'_, T>) -> lingrad_core::Result<Vec<T>> {
    collected(x.as_array().iter().copied(), "a copy of a vector")
}

/// The views of one head's tokens.
struct Inputs<'py, T: Scalar> {
    q: View<'py, T>,
    k: View<'py, T>,
    v: Option<View<'py, T>>,
    key_bias: Option<Vec<T>>,
}

impl<'py, T: Scalar> Inputs<'py, T> {
    fn new(q: Any<'_, 'py>, k: Any<'_, 'py>, v: Option<Any<'_, 'py>>, key_bias: Option<Any<'_, 'py>>) -> Result<Self> {
        Ok(Self {
            q: View::new("q", q)?,
            k: View::new("k", k)?,
            v: v.map(|v| View::new("v", v)).transpose()?,
            key_bias: key_bias.map(|b| View::new("key_bias", b)?.vector()).transpose()?,
        })
    }

    fn tokens(&self, causal: bool, scale: f64, head: usize) -> Result<Tokens<'_, T>> {
        Ok(Tokens {
            q: self.q.matrix()?,
            k: self.k.matrix()?,
            v: self.v.as_ref().map(View::matrix).transpose()?,
            key_bias: self.key_bias.as_deref().map(lingrad_core::ColRef::from_slice),
            causal,
            scale,
            head,
        })
    }
}

/// `(rows, weights)`.
type Drawn<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>);

/// `samples` of `total` rows, drawn by guides `(guides, total)`.
#[pyfunction]
pub fn draw_rows<'py>(
    py: Python<'py>,
    guides: PyReadonlyArray2<'py, f64>,
    samples: usize,
    seed: u64,
) -> Outcome<Drawn<'py>> {
    entry(|| {
        let guides = guides.as_array();
        let total = guides.ncols();
        let copy = |guide: ArrayView1<'_, f64>| collected(guide.iter().copied(), "guides that rows are drawn by");
        let guides = guides.outer_iter().map(copy).collect::<lingrad_core::Result<Vec<_>>>()?;
        let (rows, weights) = run(py, None, |_| sampled::draw_rows(total, &guides, samples, seed))?;
        Ok((indices(py, rows)?, PyArray1::from_vec(py, weights)))
    })
}

fn indices(py: Python<'_>, x: Vec<usize>) -> Result<Bound<'_, PyArray1<i64>>> {
    Ok(PyArray1::from_vec(py, collected(x.into_iter().map(|i| i as i64), "drawn rows")?))
}

/// `(relative, low, high, rows)` from the squared lengths `(rows, 4)` of the errors of drawn rows, of the exact rows and of
/// the given ones, out of `total` rows whose given ones add up to `given`.
#[pyfunction]
#[pyo3(signature = (squares, weights, total, given=None))]
pub fn estimate_error(
    squares: PyReadonlyArray2<'_, f64>,
    weights: Numbers<'_, f64>,
    total: usize,
    given: Option<f64>,
) -> Outcome<Estimate> {
    entry(|| {
        let squares = squares.as_array();
        if squares.ncols() != 4 {
            return Err(Error::Shape(format!("squares has shape {:?}; expected (rows, 4)", squares.shape())).into());
        }
        let rows =
            squares.outer_iter().map(|row| Squares { error: row[0], exact: row[1], given: row[2], more: row[3] });
        let rows = collected(rows, "drawn rows")?;
        Ok(estimate(sampled::estimate_error(&rows, &numbers(&weights)?, total, given)?))
    })
}

/// `(keys, 3)` from pairs `(queries, keys)` and queries: see `lingrad_core::measure::unseen_row_sums`. `exact`, `own` and
/// `squares` have two rows of as many numbers as there are queries.
#[pyfunction]
pub fn unseen_row_sums<'py>(
    py: Python<'py>,
    scores: PyReadonlyArray2<'py, f64>,
    upstream: PyReadonlyArray2<'py, f64>,
    weights: Numbers<'py, f64>,
    exact: PyReadonlyArray2<'py, f64>,
    own: PyReadonlyArray2<'py, f64>,
    squares: PyReadonlyArray2<'py, f64>,
) -> Outcome<Bound<'py, PyArray2<f64>>> {
    entry(|| {
        let copy = |x: PyReadonlyArray2<'py, f64>| collected(x.as_array().iter().copied(), "pairs of queries and keys");
        let (scores, upstream) = (copy(scores)?, copy(upstream)?);
        let (exact, own, squares) = (copy(exact)?, copy(own)?, copy(squares)?);
        let added = sampled::unseen_row_sums(&scores, &upstream, &numbers(&weights)?, [&exact, &own, &squares])?;
        let keys = added.len();
        Ok(PyArray1::from_vec(py, added.into_flattened()).reshape([keys, 3])?)
    })
}

/// Rows, or keys, out of `n` that results within a tolerance are held against.
#[pyfunction]
pub fn rows_to_verify(n: usize) -> Outcome<usize> {
    entry(|| Ok(sampled::rows_to_verify(n)))
}

/// `count` of the numbers below `n`, in order, one in each of as many equal parts.
#[pyfunction]
pub fn stratified(py: Python<'_>, n: usize, count: usize, seed: u64) -> Outcome<Bound<'_, PyArray1<i64>>> {
    entry(|| {
        let drawn = run(py, None, |_| Ok(sampled::stratified(n, count, seed)))?;
        indices(py, drawn)
    })
}

/// `a_0 .. a_degree` for the scores of one head's tokens.
#[pyfunction]
#[pyo3(signature = (q, k, key_bias, *, degree, query_shift, key_shift, causal, scale, head=0))]
pub fn fitted_coefficients<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    key_bias: Option<Any<'_, 'py>>,
    degree: usize,
    query_shift: Later<'py, Vec<f64>>,
    key_shift: Later<'py, Vec<f64>>,
    causal: bool,
    scale: f64,
    head: usize,
) -> Outcome<Vec<f64>> {
    entry(|| {
        by_dtype!(q, T => {
            let inputs = Inputs::<T>::new(q, k, None, key_bias)?;
            let tokens = inputs.tokens(causal, scale, head)?;
            let shift = [query_shift.read()?, key_shift.read()?];
            run(py, None, |_| sampled::fitted_coefficients(&tokens, degree, shift))
        })
    })
}

/// The same for every degree from 1 to `degree`, None where there are none, and how far weights by the last of them are
/// off. `positions` are those of the queries and of the keys, where they are sampled.
#[pyfunction]
#[pyo3(signature = (q, k, key_bias, *, degree, query_shift, key_shift, positions, causal, scale))]
pub fn fitted_polynomials<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    key_bias: Option<Any<'_, 'py>>,
    degree: usize,
    query_shift: Later<'py, Vec<f64>>,
    key_shift: Later<'py, Vec<f64>>,
    positions: Later<'py, Option<(Numbers<'py, i64>, Numbers<'py, i64>)>>,
    causal: bool,
    scale: f64,
) -> Outcome<(Vec<Option<Vec<f64>>>, f64)> {
    entry(|| {
        let position = |x: &Numbers<'py, i64>| -> lingrad_core::Result<Vec<usize>> {
            let negative = |_| Error::Argument("a position is negative; expected those of tokens".into());
            numbers(x)?.into_iter().map(|i| usize::try_from(i).map_err(negative)).collect()
        };
        let positions = positions.read()?.map(|(q, k)| Ok::<_, Error>([position(&q)?, position(&k)?])).transpose()?;
        by_dtype!(q, T => {
            let inputs = Inputs::<T>::new(q, k, None, key_bias)?;
            let tokens = inputs.tokens(causal, scale, 0)?;
            let positions = positions.as_ref().map(|[q, k]| [&q[..], &k[..]]);
            let shift = [query_shift.read()?, key_shift.read()?];
            let Fits { coefficients, error } = run(py, None, |_| {
                sampled::fitted_polynomials(&tokens, degree, shift, positions)
            })?;
            Ok((coefficients, error))
        })
    })
}

/// The landmarks that one head's tokens give, as a dict with the fields of `lingrad_rs.LandmarkConstants`.
#[pyfunction]
#[pyo3(signature = (q, k, v, key_bias, *, rank, seed, causal, scale, head=0))]
pub fn landmark_constants<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    key_bias: Option<Any<'_, 'py>>,
    rank: usize,
    seed: u64,
    causal: bool,
    scale: f64,
    head: usize,
) -> Outcome<Bound<'py, PyDict>> {
    entry(|| {
        let constants: LandmarkConstants = by_dtype!(q, T => {
            let inputs = Inputs::<T>::new(q, k, Some(v), key_bias)?;
            let tokens = inputs.tokens(causal, scale, head)?;
            run(py, None, |ctx| sampled::landmark_constants(ctx, &tokens, rank, seed))?
        });
        constants_dict(py, &constants)
    })
}

/// The rank, the constants (None with `strict`) and the error of landmarks within a tolerance, or why there are none.
type Candidate<'py> = (Option<(usize, Option<Bound<'py, PyDict>>, f64)>, String);

/// The least of `ranks` that does on a sample of one head's tokens.
#[pyfunction]
#[pyo3(signature = (q, k, v, key_bias, *, tol, gradients, strict, seed, ranks, causal, scale, head=0))]
pub fn landmark_candidates<'py>(
    py: Python<'py>,
    q: Any<'_, 'py>,
    k: Any<'_, 'py>,
    v: Any<'_, 'py>,
    key_bias: Option<Any<'_, 'py>>,
    tol: f64,
    gradients: bool,
    strict: bool,
    seed: u64,
    ranks: Later<'py, Vec<usize>>,
    causal: bool,
    scale: f64,
    head: usize,
) -> Outcome<Candidate<'py>> {
    entry(|| {
        let ranks = ranks.read()?;
        let auto = Auto { tol, gradients, strict_causal: strict, seed };
        let found = by_dtype!(q, T => {
            let inputs = Inputs::<T>::new(q, k, Some(v), key_bias)?;
            let tokens = inputs.tokens(causal, scale, head)?;
            run(py, None, |ctx| sampled::landmark_candidates(ctx, &tokens, &auto, strict, &ranks))?
        });
        match found {
            Ok(found) => {
                let constants = found.constants.map(|constants| constants_dict(py, &constants)).transpose()?;
                Ok((Some((found.rank, constants, found.error)), String::new()))
            }
            Err(reason) => Ok((None, reason)),
        }
    })
}

/// The largest relative error of the polynomial with these coefficients over `|s| <= r`; infinite beyond degree 64.
#[pyfunction]
pub fn largest_relative_error(py: Python<'_>, coefficients: Later<'_, Vec<f64>>, r: f64) -> Outcome<f64> {
    entry(|| {
        let coefficients = coefficients.read()?;
        run(py, None, |_| Ok(sampled::largest_relative_error(&coefficients, r)))
    })
}

//! What is decided by samples of a head's tokens, for the backend whose arrays the core cannot read.

use lingrad_core::measure::Squares;
use lingrad_core::memory::{collected, matrix};
use lingrad_core::plan::choice::{ColumnSums, Costs, Planner};
use lingrad_core::plan::moments::Moments;
use lingrad_core::plan::rates::{self, Rates};
use lingrad_core::plan::report::HeadReport;
use lingrad_core::plan::sampled::{self, HeadArrays};
use lingrad_core::spec::{Auto, LandmarkConstants};
use lingrad_core::{Error, Mask, Scores, plan, tolerance};
use numpy::ndarray::ArrayView1;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray3};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{Any, Scalar, View, by_dtype};
use crate::convert::{Estimate, constants_dict, estimate, report_dict};
use crate::entry::{Later, Outcome, entry};
use crate::error::Result;
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

    fn arrays(&self, causal: bool, scale: f64, head: usize) -> Result<HeadArrays<'_, T>> {
        Ok(HeadArrays {
            q: self.q.matrix()?,
            k: self.k.matrix()?,
            v: self.v.as_ref().map(View::matrix).transpose()?,
            key_bias: self.key_bias.as_deref().map(lingrad_core::ColRef::from_slice),
            scores: Scores::new(scale, Mask::causal(causal)),
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
            squares.outer_iter().map(|row| Squares { error: row[0], exact: row[1], given: row[2], unseen: row[3] });
        let rows = collected(rows, "drawn rows")?;
        Ok(estimate(sampled::estimate_error(&rows, &numbers(&weights)?, total, given)?))
    })
}

/// `(keys, 3)` from pairs `(queries, keys)` and queries: see `lingrad_core::plan::sampled::unseen_row_sums`. `exact`, `own` and
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
    entry(|| Ok(tolerance::samples(n)))
}

/// Rows that a plan for `n` queries is made from.
#[pyfunction]
pub fn rows_to_plan(n: usize) -> Outcome<usize> {
    entry(|| Ok(plan::rows(n)))
}

/// A random gradient of the outputs of those rows, `(rows, d_v)`.
#[pyfunction]
pub fn random_dout(py: Python<'_>, rows: usize, d_v: usize, seed: u64) -> Outcome<Bound<'_, PyArray2<f64>>> {
    entry(|| {
        let dout = sampled::random_dout(rows, d_v, seed);
        let entries = (0..rows * d_v).map(|at| dout[(at / d_v, at % d_v)]);
        Ok(PyArray1::from_vec(py, collected(entries, "a random gradient")?).reshape([rows, d_v])?)
    })
}

/// Sets what one thread does in a second with numbers of so many bytes, additions and multiplications and exponentials: for
/// plans that do not depend on the machine.
#[pyfunction]
pub fn set_rates(itemsize: usize, flops: f64, exps: f64) -> Outcome<()> {
    entry(|| {
        rates::set_rates(itemsize, Rates { flops, exps });
        Ok(())
    })
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
            let arrays = inputs.arrays(causal, scale, head)?;
            let shift = [query_shift.read()?, key_shift.read()?];
            run(py, None, |_| sampled::fitted_coefficients(&arrays, degree, shift))
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
            let arrays = inputs.arrays(causal, scale, head)?;
            run(py, None, |ctx| sampled::landmark_constants(ctx, &arrays, rank, seed))?
        });
        constants_dict(py, &constants)
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

/// The positions of sampled queries and keys.
type Positions<'py> = Option<(Numbers<'py, i64>, Numbers<'py, i64>)>;

/// The sum of each column of some rows, that of all squares, and how many rows there are.
type Sums<'py> = (Numbers<'py, f64>, f64, f64);

fn column_sums((sums, squares, count): &Sums<'_>) -> lingrad_core::Result<ColumnSums> {
    Ok(ColumnSums { sums: numbers(sums)?, squares: *squares, count: *count })
}

/// The plan of one head, made step by step of what a backend measures: see `lingrad_core::plan::choice`.
#[pyclass(module = "lingrad_rs._lingrad_rs")]
pub struct HeadPlanner {
    planner: Planner,
    auto: Auto,
    causal: bool,
    scale: f64,
    head: usize,
}

#[pymethods]
impl HeadPlanner {
    /// Costs are in seconds: of exact attention, of polynomials of the degrees 1 to 6, of 32, 64, 128 and 256 landmarks, of
    /// drawing those, and of moments up to the degrees 0 to 6.
    #[new]
    #[pyo3(signature = (*, tol, gradients, strict_causal, seed, causal, scale, head, exact, polynomials, landmarks, drawing, moments))]
    fn new(
        tol: f64,
        gradients: bool,
        strict_causal: bool,
        seed: u64,
        causal: bool,
        scale: f64,
        head: usize,
        exact: f64,
        polynomials: Vec<f64>,
        landmarks: Vec<f64>,
        drawing: Vec<f64>,
        moments: Vec<f64>,
    ) -> Outcome<Self> {
        entry(|| {
            let auto = Auto { tol, gradients, strict_causal, seed };
            let costs = Costs { exact, polynomials, landmarks, drawing, moments };
            costs.check()?;
            Ok(Self { planner: Planner::new(&auto, causal, costs), auto, causal, scale, head })
        })
    }

    /// Polynomials up to this degree are worth a look.
    fn degrees(&self) -> Outcome<usize> {
        entry(|| Ok(self.planner.degrees()))
    }

    /// Landmarks that are worth drawing.
    fn ranks(&self) -> Outcome<Vec<usize>> {
        entry(|| Ok(self.planner.ranks()))
    }

    /// What is to be subtracted from queries and keys, if anything.
    fn shift<'py>(
        &mut self,
        queries: Later<'py, Sums<'py>>,
        keys: Later<'py, Sums<'py>>,
    ) -> Outcome<Option<[Vec<f64>; 2]>> {
        entry(|| {
            let (queries, keys) = (column_sums(&queries.read()?)?, column_sums(&keys.read()?)?);
            Ok(self.planner.shift(&queries, &keys).cloned())
        })
    }

    /// No polynomial follows the scores.
    fn scores_are_too_large(&mut self) -> Outcome<()> {
        entry(|| {
            self.planner.scores_are_too_large();
            Ok(())
        })
    }

    /// The coefficients of each degree that is worth another look, after one at sampled tokens and the sums of all values.
    fn look_at_tokens<'py>(
        &mut self,
        py: Python<'py>,
        q: Any<'_, 'py>,
        k: Any<'_, 'py>,
        key_bias: Option<Any<'_, 'py>>,
        positions: Later<'py, Positions<'py>>,
        values: Later<'py, Sums<'py>>,
    ) -> Outcome<Vec<Option<Vec<f64>>>> {
        entry(|| {
            let position = |x: &Numbers<'py, i64>| -> lingrad_core::Result<Vec<usize>> {
                let negative = |_| Error::Argument("a position is negative; expected those of tokens".into());
                numbers(x)?.into_iter().map(|i| usize::try_from(i).map_err(negative)).collect()
            };
            let positions =
                positions.read()?.map(|(q, k)| Ok::<_, Error>([position(&q)?, position(&k)?])).transpose()?;
            let spread = column_sums(&values.read()?)?.spread();
            by_dtype!(q, T => {
                let inputs = Inputs::<T>::new(q, k, None, key_bias)?;
                let arrays = inputs.arrays(self.causal, self.scale, self.head)?;
                let positions = positions.as_ref().map(|[q, k]| [&q[..], &k[..]]);
                run(py, None, |_| self.planner.look_at_tokens(&arrays, positions, spread))
            })
        })
    }

    /// Takes a polynomial with these coefficients, if one does on drawn rows of `total`: their weights, their moments
    /// `(kinds, rows, width)` (see `lingrad_core::plan::moments`), the gradient of their outputs that these are made with,
    /// how large a gradient of theirs might be for one of length 1, and a unit in the last place.
    #[pyo3(signature = (moments, weights, total, dout, *, d, d_v, natural, epsilon, coefficients))]
    fn try_polynomials<'py>(
        &mut self,
        py: Python<'py>,
        moments: PyReadonlyArray3<'py, f64>,
        weights: Numbers<'py, f64>,
        total: usize,
        dout: Option<PyReadonlyArray2<'py, f64>>,
        d: usize,
        d_v: usize,
        natural: f64,
        epsilon: f64,
        coefficients: Later<'py, Vec<Option<Vec<f64>>>>,
    ) -> Outcome<()> {
        entry(|| {
            let moments = moments.as_array();
            let (kinds, rows, width) = moments.dim();
            let expected = 1 + d_v + if dout.is_some() { 2 * d } else { 0 };
            if kinds < 3 || width != expected {
                return Err(Error::Shape(format!(
                    "moments has shape ({kinds}, {rows}, {width}); expected at least 3 kinds, and width {expected}"
                ))
                .into());
            }
            let dout = match &dout {
                Some(dout) if dout.as_array().dim() == (rows, d_v) => {
                    let dout = dout.as_array();
                    Some(matrix(rows, d_v, "a gradient of drawn rows", |i, c| dout[(i, c)])?)
                }
                Some(_) => return Err(Error::Shape(format!("dout is of other rows; expected ({rows}, {d_v})")).into()),
                None => None,
            };
            let entry = |kind: usize, row: usize, query: usize| moments[(kind, query, row)];
            let moments = Moments::from_sums([d, d_v, rows, kinds], self.scale, dout, entry)?;
            let weights = numbers(&weights)?;
            let coefficients = coefficients.read()?;
            run(py, None, |_| self.planner.try_fitted(&moments, (weights, total), natural, epsilon, &coefficients))
        })
    }

    /// Takes landmarks, if some of the ranks that are worth it do on sampled tokens.
    fn look_for_landmarks<'py>(
        &mut self,
        py: Python<'py>,
        q: Any<'_, 'py>,
        k: Any<'_, 'py>,
        v: Any<'_, 'py>,
        key_bias: Option<Any<'_, 'py>>,
    ) -> Outcome<()> {
        entry(|| {
            by_dtype!(q, T => {
                let inputs = Inputs::<T>::new(q, k, Some(v), key_bias)?;
                let arrays = inputs.arrays(self.causal, self.scale, self.head)?;
                let (gradients, seed) = (self.auto.gradients, self.auto.seed);
                run(py, None, |ctx| self.planner.look_for_landmarks(ctx, &arrays, gradients, seed))
            })
        })
    }

    /// What was chosen, as a report of a head that has not run yet.
    fn report<'py>(&self, py: Python<'py>) -> Outcome<Bound<'py, PyDict>> {
        entry(|| report_dict(py, &HeadReport::new(self.planner.clone().finish())))
    }
}

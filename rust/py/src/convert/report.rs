//! Plans and reports, for Python: what was chosen for each head, and how well it did.

use lingrad_core::measure::ErrorEstimate;
use lingrad_core::plan::report::{HeadPlan, HeadReport};
use lingrad_core::spec::LandmarkConstants;
use lingrad_core::{Engine, Error};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pythonize::pythonize;

use crate::arrays::copy;
use crate::error::Result;

/// `(relative, low, high, rows)`.
pub type Estimate = (f64, f64, f64, usize);

/// An estimate, for Python.
pub fn estimate(e: ErrorEstimate) -> Estimate {
    (e.relative, e.low, e.high, e.rows)
}

/// Reports as dicts with the fields of `lingrad_rs.HeadPlan`, the engine and the errors as dicts too.
pub fn reports<'py>(py: Python<'py>, reports: &[HeadReport]) -> Result<Vec<Bound<'py, PyDict>>> {
    reports.iter().map(|report| report_dict(py, report)).collect()
}

/// One of them.
pub fn report_dict<'py>(py: Python<'py>, report: &HeadReport) -> Result<Bound<'py, PyDict>> {
    let dict = pythonize(py, report).map_err(|error| Error::Argument(format!("a report: {error}")))?;
    let dict = dict.cast_into::<PyDict>().map_err(PyErr::from)?;
    if let HeadPlan { engine: Engine::Landmark(landmark), .. } = &report.plan
        && let Some(constants) = &landmark.constants
        && let Some(engine) = dict.get_item("engine")?
    {
        engine.set_item("constants", constants_dict(py, constants)?)?;
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

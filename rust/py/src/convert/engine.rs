//! Engines, tolerances and plans as Python describes them.

use std::sync::Arc;

use lingrad_core::memory::collected;
use lingrad_core::plan::report::HeadPlan;
use lingrad_core::spec::{Auto, LandmarkConstants};
use lingrad_core::{Engine, Error, Method, Planned};
use numpy::PyReadonlyArrayDyn;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pythonize::depythonize;
use serde::de::DeserializeOwned;

use crate::error::{Failure, Result};

/// What computes attention, read from a `lingrad_rs.Exact`, `Polynomial`, `Landmark`, `Auto` or `Plan`.
pub struct AnyMethod(pub Method);

impl<'py> FromPyObject<'_, 'py> for AnyMethod {
    type Error = Failure;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> std::result::Result<Self, Failure> {
        Ok(Self(match object.get_type().name()?.to_str()? {
            "Auto" => Method::Auto(read(fields(&object)?)?),
            "Plan" => Method::Planned(planned(&object)?),
            // Which engines there are, the core says.
            _ if object.hasattr("__dataclass_fields__")? => Method::Engine(engine(&object)?),
            name => return Err(Error::Argument(format!("engine is a {name}; expected an engine")).into()),
        }))
    }
}

/// The fields of a dataclass.
fn fields<'py>(object: &Bound<'py, PyAny>) -> Result<Bound<'py, PyDict>> {
    let fields = PyDict::new(object.py());
    for name in object.getattr("__dataclass_fields__")?.try_iter()? {
        let name = name?.cast_into::<pyo3::types::PyString>().map_err(PyErr::from)?;
        fields.set_item(&name, object.getattr(&name)?)?;
    }
    Ok(fields)
}

fn read<T: DeserializeOwned>(fields: Bound<'_, PyDict>) -> Result<T> {
    depythonize(&fields).map_err(|error| Error::Argument(format!("a field of an engine or plan: {error}")).into())
}

fn engine(object: &Bound<'_, PyAny>) -> Result<Engine> {
    let fields = fields(object)?;
    fields.set_item("kind", object.get_type().name()?)?;
    let constants = match fields.get_item("constants")? {
        Some(constants) => {
            fields.del_item("constants")?;
            constants.extract::<Option<Constants>>()?
        }
        None => None,
    };
    let mut engine = read(fields)?;
    if let (Engine::Landmark(landmark), Some(Constants(constants))) = (&mut engine, constants) {
        landmark.constants = Some(Arc::new(constants));
    }
    Ok(engine)
}

fn planned(plan: &Bound<'_, PyAny>) -> Result<Planned> {
    let auto: Auto = read(fields(&plan.getattr("auto")?)?)?;
    let mut heads = Vec::new();
    for head in plan.getattr("heads")?.try_iter()? {
        let head = head?;
        let engine = engine(&head.getattr("engine")?)?;
        let fields = fields(&head)?;
        // Read already, with its arrays.
        let kind = PyDict::new(head.py());
        kind.set_item("kind", "Exact")?;
        fields.set_item("engine", kind)?;
        for measured in ["measured_error", "errors"] {
            fields.del_item(measured)?;
        }
        heads.push(HeadPlan { engine, ..read(fields)? });
    }
    Ok(Planned { auto, heads: Arc::new(heads), known: None })
}

/// A `lingrad_rs.LandmarkConstants`.
struct Constants(LandmarkConstants);

impl<'py> FromPyObject<'_, 'py> for Constants {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let numbers = |name: &str| -> PyResult<Vec<f64>> {
            let array = object.getattr(name)?;
            let array = array.extract::<PyReadonlyArrayDyn<'py, f64>>()?;
            Ok(collected(array.as_array().iter().copied(), "constants of landmarks").map_err(Failure::from)?)
        };
        Ok(Self(LandmarkConstants {
            scale: object.getattr("scale")?.extract()?,
            query_shift: numbers("query_shift")?,
            key_shift: numbers("key_shift")?,
            balance: object.getattr("balance")?.extract()?,
            landmarks: numbers("landmarks")?,
            matrix: numbers("matrix")?,
        }))
    }
}

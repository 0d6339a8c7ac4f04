//! Engines as Python describes them.

use std::sync::Arc;

use lingrad_core::memory::collected;
use lingrad_core::{Engine, Error, spec as engine};
use numpy::PyReadonlyArrayDyn;
use pyo3::prelude::*;

use crate::entry::{Later, Outcome, entry};
use crate::error::Failure;
use crate::plan::{AutoFields, PlanFields};

/// An engine, read from a `lingrad_rs.Exact`, `Polynomial`, `Landmark`, `Auto` or `Plan`.
pub struct AnyEngine(pub Engine);

impl<'py> FromPyObject<'_, 'py> for AnyEngine {
    type Error = Failure;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> std::result::Result<Self, Failure> {
        Ok(Self(match object.get_type().name()?.to_str()? {
            "Exact" => Engine::Exact,
            "Polynomial" => object.extract::<Polynomial>()?.engine()?,
            "Auto" => Engine::Auto(object.extract::<AutoFields>()?.into()),
            "Plan" => object.extract::<PlanFields>()?.into(),
            "Landmark" => object.extract::<Landmark>()?.engine(),
            name => {
                return Err(Error::Argument(format!("engine is a {name}; expected an engine")).into());
            }
        }))
    }
}

/// The fields of `lingrad_rs.Polynomial`.
#[derive(FromPyObject)]
struct Polynomial {
    degree: usize,
    coefficients: Coefficients,
    gradient: String,
    shift: Shift,
    diagonal: String,
    window: usize,
}

#[derive(FromPyObject)]
enum Shift {
    Named(String),
    Given(Vec<f64>, Vec<f64>),
}

/// The fields of `lingrad_rs.Landmark`.
#[derive(FromPyObject)]
struct Landmark {
    rank: usize,
    seed: u64,
    constants: Option<LandmarkConstants>,
}

/// The fields of `lingrad_rs.LandmarkConstants`.
#[derive(FromPyObject)]
struct LandmarkConstants {
    scale: f64,
    query_shift: Numbers,
    key_shift: Numbers,
    balance: f64,
    landmarks: Numbers,
    matrix: Numbers,
}

/// The entries of a float64 array, in C order.
struct Numbers(Vec<f64>);

impl<'py> FromPyObject<'_, 'py> for Numbers {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let array = object.extract::<PyReadonlyArrayDyn<'py, f64>>()?;
        Ok(Self(collected(array.as_array().iter().copied(), "constants of landmarks").map_err(Failure::from)?))
    }
}

impl Landmark {
    fn engine(self) -> Engine {
        let constants = self.constants.map(|given| {
            Arc::new(engine::LandmarkConstants {
                scale: given.scale,
                query_shift: given.query_shift.0,
                key_shift: given.key_shift.0,
                balance: given.balance,
                landmarks: given.landmarks.0,
                matrix: given.matrix.0,
            })
        });
        Engine::Landmark(engine::Landmark { rank: self.rank, seed: self.seed, constants })
    }
}

#[derive(FromPyObject)]
enum Coefficients {
    Named(String),
    Given(Vec<f64>),
}

impl Polynomial {
    fn engine(self) -> lingrad_core::Result<Engine> {
        let unknown = |name: &str, got: &str| Err(Error::Argument(format!("{name} is {got:?}, which is unknown")));
        Ok(Engine::Polynomial(engine::Polynomial {
            degree: self.degree,
            coefficients: match self.coefficients {
                Coefficients::Given(a) => engine::Coefficients::Given(a),
                Coefficients::Named(name) => match &*name {
                    "taylor" => engine::Coefficients::Taylor,
                    "fitted" => engine::Coefficients::Fitted,
                    _ => return unknown("coefficients", &name),
                },
            },
            gradient: match &*self.gradient {
                "closed_form" => engine::Gradient::ClosedForm,
                "consistent" => engine::Gradient::Consistent,
                _ => return unknown("gradient", &self.gradient),
            },
            shift: match self.shift {
                Shift::Given(query, key) => engine::Shift::Given { query, key },
                Shift::Named(name) => match &*name {
                    "none" => engine::Shift::None,
                    "mean" => engine::Shift::Mean,
                    _ => return unknown("shift", &name),
                },
            },
            diagonal: match &*self.diagonal {
                "exact" => engine::Diagonal::Exact,
                "polynomial" => engine::Diagonal::Polynomial,
                _ => return unknown("diagonal", &self.diagonal),
            },
            window: self.window,
        }))
    }
}

/// An error where an engine's options do not fit together, or not with a causal mask or numbers of so many bytes.
#[pyfunction]
pub fn check_engine(engine: Later<'_, AnyEngine>, causal: bool, itemsize: usize) -> Outcome<()> {
    entry(|| {
        let engine = engine.read()?.0;
        engine.validate(causal)?;
        Ok(engine.check_floor(itemsize)?)
    })
}

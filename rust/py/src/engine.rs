//! Engines as Python describes them.

use lingrad_core::{Engine, Error, engine};
use pyo3::prelude::*;

use crate::error::Failure;

/// An engine, read from a `lingrad_rs.Exact` or `lingrad_rs.Polynomial`.
pub struct AnyEngine(pub Engine);

impl<'py> FromPyObject<'_, 'py> for AnyEngine {
    type Error = Failure;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> Result<Self, Failure> {
        Ok(Self(match object.get_type().name()?.to_str()? {
            "Exact" => Engine::Exact,
            "Polynomial" => object.extract::<Polynomial>()?.engine()?,
            name => return Err(Error::Argument(format!("engine is a {name}; expected Exact or Polynomial")).into()),
        }))
    }
}

/// The fields of `lingrad_rs.Polynomial`.
#[derive(FromPyObject)]
struct Polynomial {
    degree: usize,
    coefficients: Coefficients,
    gradient: String,
    shift: String,
    diagonal: String,
    window: usize,
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
            shift: match &*self.shift {
                "none" => engine::Shift::None,
                "mean" => engine::Shift::Mean,
                _ => return unknown("shift", &self.shift),
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

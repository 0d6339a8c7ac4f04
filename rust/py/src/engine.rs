//! Engines as Python describes them.

use lingrad_core::{Engine, Error, engine};
use pyo3::prelude::*;

/// The fields of `lingrad_rs.Polynomial`; the exact engine has none, and is `None`.
#[derive(FromPyObject)]
pub struct Polynomial {
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

/// The core's engine.
pub fn engine(polynomial: Option<Polynomial>) -> lingrad_core::Result<Engine> {
    let Some(p) = polynomial else {
        return Ok(Engine::Exact);
    };
    let unknown = |name: &str, got: &str| Err(Error::Argument(format!("{name} is {got:?}, which is unknown")));
    Ok(Engine::Polynomial(engine::Polynomial {
        degree: p.degree,
        coefficients: match p.coefficients {
            Coefficients::Given(a) => engine::Coefficients::Given(a),
            Coefficients::Named(name) => match &*name {
                "taylor" => engine::Coefficients::Taylor,
                "fitted" => engine::Coefficients::Fitted,
                _ => return unknown("coefficients", &name),
            },
        },
        gradient: match &*p.gradient {
            "closed_form" => engine::Gradient::ClosedForm,
            "consistent" => engine::Gradient::Consistent,
            _ => return unknown("gradient", &p.gradient),
        },
        shift: match &*p.shift {
            "none" => engine::Shift::None,
            "mean" => engine::Shift::Mean,
            _ => return unknown("shift", &p.shift),
        },
        diagonal: match &*p.diagonal {
            "exact" => engine::Diagonal::Exact,
            "polynomial" => engine::Diagonal::Polynomial,
            _ => return unknown("diagonal", &p.diagonal),
        },
        window: p.window,
    }))
}

//! Elementwise nonlinearities.
//!
//! With `sigma(x) = 1/(1 + e^-x)`, so that `sigma' = sigma (1 - sigma)` and `1 + tanh(u) = 2 sigma(2u)`:
//! - `relu(x) = max(x, 0)`, with slope 0 at 0;
//! - `silu(x) = x sigma(x)`, with slope `sigma(x) (1 + x (1 - sigma(x)))`;
//! - `gelu_tanh(x) = x sigma(2u)`, `u = sqrt(2/pi) (x + 0.044715 x^3)`, with slope
//!   `sigma(2u) (1 + x (1 - sigma(2u)) 2u')`.

use std::str::FromStr;

use super::expect_rows;
use super::tiles::{for_each_tile, load};
use crate::context::Context;
use crate::error::{Error, Result, expect_len};
use crate::numerics::real::{Real, vectorised};
use crate::problem::rows::Rows;

/// Which nonlinearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationKind {
    /// `max(x, 0)`.
    Relu,
    /// `x sigma(x)`.
    Silu,
    /// The tanh form of `x Phi(x)`.
    GeluTanh,
}

impl FromStr for ActivationKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "relu" => Ok(Self::Relu),
            "silu" => Ok(Self::Silu),
            "gelu_tanh" => Ok(Self::GeluTanh),
            _ => {
                Err(Error::Argument(format!("activation is \"{name}\"; expected \"relu\", \"silu\" or \"gelu_tanh\"")))
            }
        }
    }
}

/// `y = act(x)`, both `(.., d)`. A NaN stays NaN. Time `O(n d)`.
pub fn forward<T: Real>(ctx: &Context, kind: ActivationKind, x: &Rows<'_, T>, y: &mut [T]) -> Result<()> {
    let rows = x.batch() * x.n();
    expect_len("y", y.len(), rows * x.d())?;
    for_each_tile(ctx, rows, x.d(), [(y, x.d())], [], |tile, [y], [], [x_tile]| {
        y.copy_from_slice(load(x, tile, x_tile)?);
        apply(kind, y);
        Ok(())
    })?;
    Ok(())
}

/// `dx = dy act'(x)`. Time `O(n d)`.
pub fn backward<T: Real>(
    ctx: &Context,
    kind: ActivationKind,
    x: &Rows<'_, T>,
    dy: &Rows<'_, T>,
    dx: &mut [T],
) -> Result<()> {
    expect_rows("dy", dy, x.batch(), x.n(), x.d())?;
    let rows = x.batch() * x.n();
    expect_len("dx", dx.len(), rows * x.d())?;
    for_each_tile(ctx, rows, x.d(), [(dx, x.d())], [], |tile, [dx], [], [x_tile, dy_tile]| {
        let count = tile.len() * x.d();
        load(x, tile.clone(), x_tile)?;
        apply_with_slope(kind, &mut x_tile[..count], dx);
        multiply(dx, load(dy, tile, dy_tile)?);
        Ok(())
    })?;
    Ok(())
}

/// `x = act(x)`.
pub(crate) fn apply<T: Real>(kind: ActivationKind, x: &mut [T]) {
    match kind {
        ActivationKind::Relu => map(x, relu),
        ActivationKind::Silu => map(x, silu),
        ActivationKind::GeluTanh => map(x, gelu_tanh),
    }
}

/// `slope = act'(x)`, then `x = act(x)`.
pub(crate) fn apply_with_slope<T: Real>(kind: ActivationKind, x: &mut [T], slope: &mut [T]) {
    match kind {
        ActivationKind::Relu => map_with_slope(x, slope, relu),
        ActivationKind::Silu => map_with_slope(x, slope, silu),
        ActivationKind::GeluTanh => map_with_slope(x, slope, gelu_tanh),
    }
}

/// `x *= y`.
pub(crate) fn multiply<T: Real>(x: &mut [T], y: &[T]) {
    vectorised(
        #[inline(always)]
        || {
            for (x, y) in x.iter_mut().zip(y) {
                *x *= *y;
            }
        },
    );
}

#[inline(always)]
fn map<T: Real>(x: &mut [T], f: impl Fn(T) -> (T, T)) {
    vectorised(
        #[inline(always)]
        || {
            for x in x.iter_mut() {
                *x = f(*x).0;
            }
        },
    );
}

#[inline(always)]
fn map_with_slope<T: Real>(x: &mut [T], slope: &mut [T], f: impl Fn(T) -> (T, T)) {
    vectorised(
        #[inline(always)]
        || {
            for (x, slope) in x.iter_mut().zip(slope.iter_mut()) {
                (*x, *slope) = f(*x);
            }
        },
    );
}

/// The value and the slope; a NaN is not below 0, so it stays.
#[inline(always)]
fn relu<T: Real>(x: T) -> (T, T) {
    (if x < T::ZERO { T::ZERO } else { x }, if x > T::ZERO { T::ONE } else { T::ZERO })
}

#[inline(always)]
fn silu<T: Real>(x: T) -> (T, T) {
    let (s, t) = sigmoid(x);
    (x * s, s * (T::ONE + x * t))
}

#[inline(always)]
fn gelu_tanh<T: Real>(x: T) -> (T, T) {
    // Beyond 64 the sigmoid is 0 or 1 to the last bit; the powers of a larger number could overflow.
    let limit = T::of(64.0);
    let z = if x > limit { limit } else { x };
    let z = if z < -limit { -limit } else { z };
    let (a, b) = (T::of(2.0 * SQRT_2_OVER_PI), T::of(2.0 * SQRT_2_OVER_PI * 0.044715));
    let square = z * z;
    let (s, t) = sigmoid(z * (a + b * square));
    (x * s, s * (T::ONE + z * t * (a + T::of(3.0) * b * square)))
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;

/// `sigma(x)` and `1 - sigma(x)`, both to full relative accuracy.
#[inline(always)]
fn sigmoid<T: Real>(x: T) -> (T, T) {
    let positive = x > T::ZERO;
    let e = (if positive { -x } else { x }).exp_nonpositive();
    let large = T::ONE / (T::ONE + e);
    let small = e * large;
    if positive { (large, small) } else { (small, large) }
}

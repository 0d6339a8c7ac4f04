//! RMSNorm and LayerNorm over the last axis, of width `d`.
//!
//! RMSNorm: `y = x̂ ∘ gain`, `x̂ = r x`, `r = (mean(x^2) + eps)^(-1/2)`. Since `dr/dx = -r^3 x / d`, with
//! `t = gain ∘ dy`
//!
//! ```text
//! dx = r (t - x̂ mean(t ∘ x̂)),    dgain = sum of dy ∘ x̂ over the tokens.
//! ```
//!
//! LayerNorm: `y = x̂ ∘ gain + bias`, `x̂ = r (x - mean(x))`, `r = (mean((x - mean(x))^2) + eps)^(-1/2)`. Centring is
//! its own transpose, and `x̂` is centred already, so
//!
//! ```text
//! dx = r (t - mean(t) - x̂ mean(t ∘ x̂)),    dgain as above,    dbias = sum of dy over the tokens.
//! ```

use super::expect_rows;
use super::tiles::{for_each_tile, load, round, row_dot, row_sum};
use crate::context::Context;
use crate::error::{Error, Result, expect_len};
use crate::numerics::real::{Real, vectorised};
use crate::problem::rows::Rows;

/// RMSNorm of `x (.., d)` with `gain (d,)`. Time `O(n d)`.
pub fn rms_forward<T: Real>(ctx: &Context, x: &Rows<'_, T>, gain: &[T], eps: f64, y: &mut [T]) -> Result<()> {
    forward(ctx, x, gain, None, eps, y)
}

/// The gradients of [`rms_forward`] with respect to `x` and `gain`. Time `O(n d)`.
pub fn rms_backward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    gain: &[T],
    eps: f64,
    dy: &Rows<'_, T>,
    dx: &mut [T],
    dgain: &mut [T],
) -> Result<()> {
    backward(ctx, x, gain, eps, dy, dx, dgain, None)
}

/// LayerNorm of `x (.., d)` with `gain (d,)` and `bias (d,)`. Time `O(n d)`.
pub fn layer_forward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    gain: &[T],
    bias: &[T],
    eps: f64,
    y: &mut [T],
) -> Result<()> {
    forward(ctx, x, gain, Some(bias), eps, y)
}

/// The gradients of [`layer_forward`] with respect to `x`, `gain` and `bias`. Time `O(n d)`.
pub fn layer_backward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    gain: &[T],
    eps: f64,
    dy: &Rows<'_, T>,
    dx: &mut [T],
    dgain: &mut [T],
    dbias: &mut [T],
) -> Result<()> {
    backward(ctx, x, gain, eps, dy, dx, dgain, Some(dbias))
}

/// RMSNorm without a bias, LayerNorm with one.
fn forward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    gain: &[T],
    bias: Option<&[T]>,
    eps: f64,
    y: &mut [T],
) -> Result<()> {
    let (d, rows) = (x.d(), x.batch() * x.n());
    check(d, eps)?;
    expect_len("gain", gain.len(), d)?;
    if let Some(bias) = bias {
        expect_len("bias", bias.len(), d)?;
    }
    expect_len("y", y.len(), rows * d)?;
    for_each_tile(ctx, rows, d, [(y, d)], [], |tile, [y], [], [x_tile]| {
        let x = load(x, tile, x_tile)?;
        vectorised(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    let (mean, r) = moments(x, bias.is_some(), eps)?;
                    for i in 0..d {
                        y[i] = (x[i] - mean) * r * gain[i];
                    }
                    for (y, bias) in y.iter_mut().zip(bias.unwrap_or_default()) {
                        *y += *bias;
                    }
                }
                Ok(())
            },
        )
    })?;
    Ok(())
}

/// RMSNorm without `dbias`, LayerNorm with it.
fn backward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    gain: &[T],
    eps: f64,
    dy: &Rows<'_, T>,
    dx: &mut [T],
    dgain: &mut [T],
    dbias: Option<&mut [T]>,
) -> Result<()> {
    let (d, rows) = (x.d(), x.batch() * x.n());
    check(d, eps)?;
    expect_len("gain", gain.len(), d)?;
    expect_rows("dy", dy, x.batch(), x.n(), d)?;
    expect_len("dx", dx.len(), rows * d)?;
    expect_len("dgain", dgain.len(), d)?;
    if let Some(dbias) = &dbias {
        expect_len("dbias", dbias.len(), d)?;
    }
    let centred = dbias.is_some();
    let bias = if centred { d } else { 0 };
    let [dgain_sum, dbias_sum] =
        for_each_tile(ctx, rows, d, [(dx, d)], [d, bias], |tile, [dx], [dgain, dbias], [x_tile, dy_tile]| {
            let len = dx.len();
            load(x, tile.clone(), x_tile)?;
            let dy = load(dy, tile, dy_tile)?;
            vectorised(
                #[inline(always)]
                || {
                    let x = x_tile[..len].chunks_exact_mut(d);
                    for ((dx, x), dy) in dx.chunks_exact_mut(d).zip(x).zip(dy.chunks_exact(d)) {
                        let (mean, r) = moments(x, centred, eps)?;
                        for i in 0..d {
                            x[i] = (x[i] - mean) * r;
                            dgain[i] += (dy[i] * x[i]).to_f64();
                            dx[i] = gain[i] * dy[i];
                        }
                        for (dbias, dy) in dbias.iter_mut().zip(dy) {
                            *dbias += dy.to_f64();
                        }
                        let along = T::of(row_dot(dx, x, |t, x| t * x) / d as f64);
                        let shift = if centred { T::of(row_sum(dx, |t| t) / d as f64) } else { T::ZERO };
                        for i in 0..d {
                            dx[i] = r * (dx[i] - shift - x[i] * along);
                        }
                    }
                    Ok(())
                },
            )
        })?;
    round(&dgain_sum, dgain);
    if let Some(dbias) = dbias {
        round(&dbias_sum, dbias);
    }
    Ok(())
}

fn check(d: usize, eps: f64) -> Result<()> {
    if d == 0 {
        return Err(Error::Shape("x has width 0; expected at least 1".into()));
    }
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(Error::Argument(format!("eps is {eps}; expected a finite number >= 0")));
    }
    Ok(())
}

/// The mean that is subtracted (0 unless `centred`) and `r`.
#[inline(always)]
fn moments<T: Real>(x: &[T], centred: bool, eps: f64) -> Result<(T, T)> {
    let d = x.len() as f64;
    let mean = if centred { row_sum(x, |x| x) / d } else { 0.0 };
    let square = row_sum(x, |x| (x - mean) * (x - mean)) / d + eps;
    let r = T::of(square.sqrt().recip());
    if square.is_finite() && square > 0.0 && r.finite() { Ok((T::of(mean), r)) } else { Err(unusable(square)) }
}

#[cold]
#[inline(never)]
fn unusable(square: f64) -> Error {
    Error::NonFinite(format!(
        "the mean square of a row of x, plus eps, is {square}; expected a finite number > 0 (x holds NaN or \
         infinity, its square overflows, or both it and eps are zero or nearly)"
    ))
}

//! `y = act(x w_in) w_out`, tile by tile: the hidden units of all tokens never exist at once.
//!
//! With `h = x w_in` and `a = act(h)`: `dw_out = a^T dy`, `dh = (dy w_out^T) ∘ act'(h)`, `dw_in = x^T dh`,
//! `dx = dh w_in^T`. The backward pass computes `h` again.

use faer::{Accum, MatRef};

use super::activation::{ActivationKind, apply, apply_with_slope, multiply};
use super::panels::{self, Split};
use super::tiles::{accumulate_transposed, are_many, for_each_tile, load, product, round, sized};
use super::{expect_rows, expect_shape};
use crate::context::Context;
use crate::error::{Error, Result, expect_len};
use crate::numerics::real::Real;
use crate::numerics::tile::view;
use crate::problem::rows::Rows;

/// `y = act(x w_in) w_out`: `x (.., d)`, `w_in (d, f)`, `w_out (f, e)`, `y (.., e)`.
///
/// Time `O(n f (d + e))`; memory beyond the output a tile of hidden units a thread.
pub fn forward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    w_in: MatRef<'_, T>,
    w_out: MatRef<'_, T>,
    kind: ActivationKind,
    y: &mut [T],
) -> Result<()> {
    let (d, f, e) = check(x, w_in, w_out)?;
    let rows = x.batch() * x.n();
    expect_len("y", y.len(), rows * e)?;
    for_each_tile(ctx, rows, d.max(f), [(y, e)], [], |tile, [y], [], [x_tile, hidden]| {
        let count = tile.len();
        let hidden = sized(hidden, count * f)?;
        product(hidden, Accum::Replace, view(load(x, tile, x_tile)?, count, d), w_in);
        apply(kind, hidden);
        product(y, Accum::Replace, view(hidden, count, f), w_out);
        Ok(())
    })?;
    Ok(())
}

/// The gradients of [`forward`] with respect to `x`, `w_in` and `w_out`.
///
/// Time `O(n f (d + e))`. Memory beyond the outputs, whatever the shape: at most 128 MiB of sums of the weights, in
/// partitions of the tokens or in panels of hidden units, 128 MiB of copies of tokens and their hidden units, and some
/// tiles a thread.
pub fn backward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    w_in: MatRef<'_, T>,
    w_out: MatRef<'_, T>,
    kind: ActivationKind,
    dy: &Rows<'_, T>,
    dx: &mut [T],
    dw_in: &mut [T],
    dw_out: &mut [T],
) -> Result<()> {
    let (d, f, e) = check(x, w_in, w_out)?;
    expect_rows("dy", dy, x.batch(), x.n(), e)?;
    let rows = x.batch() * x.n();
    expect_len("dx", dx.len(), rows * d)?;
    expect_len("dw_in", dw_in.len(), d * f)?;
    expect_len("dw_out", dw_out.len(), f * e)?;
    if are_many(d * f + f * e) {
        return backward_in_panels(ctx, Split::USUAL, x, w_in, w_out, kind, dy, dx, dw_in, dw_out);
    }
    let [in_sum, out_sum] = for_each_tile(
        ctx,
        rows,
        d.max(f).max(e),
        [(dx, d)],
        [d * f, f * e],
        |tile, [dx], [dw_in, dw_out], [x_tile, dy_tile, hidden, slope, dhidden, buffer]| {
            let count = tile.len();
            let x = view(load(x, tile.clone(), x_tile)?, count, d);
            let dy = view(load(dy, tile, dy_tile)?, count, e);
            let (hidden, slope) = (sized(hidden, count * f)?, sized(slope, count * f)?);
            product(hidden, Accum::Replace, x, w_in);
            apply_with_slope(kind, hidden, slope);
            accumulate_transposed(dw_out, view(hidden, count, f), dy, buffer)?;
            let dhidden = sized(dhidden, count * f)?;
            product(dhidden, Accum::Replace, dy, w_out.transpose());
            multiply(dhidden, slope);
            let dhidden = view(dhidden, count, f);
            accumulate_transposed(dw_in, x, dhidden, buffer)?;
            product(dx, Accum::Replace, dhidden, w_in.transpose());
            Ok(())
        },
    )?;
    round(&in_sum, dw_in);
    round(&out_sum, dw_out);
    Ok(())
}

/// [`backward`] of large weights. Nothing is computed twice: a panel's hidden units need no others.
pub(super) fn backward_in_panels<T: Real>(
    ctx: &Context,
    split: Split,
    x: &Rows<'_, T>,
    w_in: MatRef<'_, T>,
    w_out: MatRef<'_, T>,
    kind: ActivationKind,
    dy: &Rows<'_, T>,
    dx: &mut [T],
    dw_in: &mut [T],
    dw_out: &mut [T],
) -> Result<()> {
    let (rows, d, f, e) = (x.batch() * x.n(), x.d(), w_in.ncols(), w_out.ncols());
    let (mut in_sums, mut out_sums) = (Vec::new(), Vec::new());
    let (mut x_chunk, mut dy_chunk) = (Vec::new(), Vec::new());
    let (mut hidden, mut slope, mut dhidden) = (Vec::new(), Vec::new(), Vec::new());
    for units in split.panels(f, d + e) {
        let (w_in, w_out) = (w_in.subcols(units.start, units.len()), w_out.subrows(units.start, units.len()));
        let in_sum = panels::sums(&mut in_sums, d * units.len())?;
        let out_sum = panels::sums(&mut out_sums, units.len() * e)?;
        let accum = if units.start == 0 { Accum::Replace } else { Accum::Add };
        for tokens in split.chunks(rows, d + e + 3 * units.len()) {
            let (count, len) = (tokens.len(), tokens.len() * units.len());
            let x = panels::load(ctx, x, tokens.clone(), 0..d, &mut x_chunk)?;
            let dy = panels::load(ctx, dy, tokens.clone(), 0..e, &mut dy_chunk)?;
            let (hidden, slope) = (sized(&mut hidden, len)?, sized(&mut slope, len)?);
            panels::multiply(ctx, hidden, Accum::Replace, x, w_in)?;
            panels::for_each(hidden, slope, |hidden, slope| apply_with_slope(kind, hidden, slope));
            panels::accumulate(ctx, out_sum, view(hidden, count, units.len()), dy)?;
            let dhidden = sized(&mut dhidden, len)?;
            panels::multiply(ctx, dhidden, Accum::Replace, dy, w_out.transpose())?;
            panels::for_each(dhidden, slope, |dhidden, slope| multiply(dhidden, slope));
            let dhidden = view(dhidden, count, units.len());
            panels::accumulate(ctx, in_sum, x, dhidden)?;
            panels::multiply(ctx, &mut dx[tokens.start * d..tokens.end * d], accum, dhidden, w_in.transpose())?;
        }
        panels::round(out_sum, &mut dw_out[units.start * e..units.end * e], e, 0..e);
        panels::round(in_sum, dw_in, f, units);
    }
    Ok(())
}

/// The widths d, f and e.
fn check<T: Real>(x: &Rows<'_, T>, w_in: MatRef<'_, T>, w_out: MatRef<'_, T>) -> Result<(usize, usize, usize)> {
    let (d, f, e) = (x.d(), w_in.ncols(), w_out.ncols());
    expect_shape("w_in", w_in.shape(), (d, f), format_args!("x of width {d}"))?;
    expect_shape("w_out", w_out.shape(), (f, e), format_args!("w_in of shape {:?}", w_in.shape()))?;
    if f == 0 {
        return Err(Error::Shape("w_in has no columns (d_ff = 0); expected at least one".into()));
    }
    Ok((d, f, e))
}

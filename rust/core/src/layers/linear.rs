//! `y = x w + b`.
//!
//! For `dy = dL/dy`: `dx = dy w^T`, `dw = x^T dy` and `db = 1^T dy`.

use faer::{Accum, MatRef};

use super::tiles::{accumulate_transposed, for_each_tile, load, product, round};
use super::{expect_rows, expect_shape};
use crate::context::Context;
use crate::error::{Result, expect_len};
use crate::numerics::real::Real;
use crate::numerics::tile::view;
use crate::problem::rows::Rows;

/// `y = x w + b`: `x (.., d)`, `w (d, e)`, `b (e,)`, `y (.., e)`.
///
/// Time `O(n d e)`; memory beyond the output a tile a thread.
pub fn forward<T: Real>(ctx: &Context, x: &Rows<'_, T>, w: MatRef<'_, T>, b: Option<&[T]>, y: &mut [T]) -> Result<()> {
    let (d, e) = (x.d(), w.ncols());
    expect_shape("w", w.shape(), (d, e), format_args!("x of width {d}"))?;
    if let Some(b) = b {
        expect_len("b", b.len(), e)?;
    }
    let rows = x.batch() * x.n();
    expect_len("y", y.len(), rows * e)?;
    for_each_tile(ctx, rows, [(y, e)], [], |tile, [y], [], [x_tile]| {
        let count = tile.len();
        let accum = match b {
            Some(b) if e > 0 => {
                y.chunks_exact_mut(e).for_each(|y| y.copy_from_slice(b));
                Accum::Add
            }
            _ => Accum::Replace,
        };
        product(y, accum, view(load(x, tile, x_tile)?, count, d), w);
        Ok(())
    })?;
    Ok(())
}

/// The gradients of [`forward`] with respect to `x`, `w` and, where `db` is given, `b`.
///
/// Time `O(n d e)`; memory beyond the outputs `O(d e)` a partition of the tokens.
pub fn backward<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    w: MatRef<'_, T>,
    dy: &Rows<'_, T>,
    dx: &mut [T],
    dw: &mut [T],
    db: Option<&mut [T]>,
) -> Result<()> {
    let (d, e) = (x.d(), w.ncols());
    expect_shape("w", w.shape(), (d, e), format_args!("x of width {d}"))?;
    expect_rows("dy", dy, x.batch(), x.n(), e)?;
    let rows = x.batch() * x.n();
    expect_len("dx", dx.len(), rows * d)?;
    expect_len("dw", dw.len(), d * e)?;
    if let Some(db) = &db {
        expect_len("db", db.len(), e)?;
    }
    let bias = if db.is_some() { e } else { 0 };
    let [dw_sum, db_sum] =
        for_each_tile(ctx, rows, [(dx, d)], [d * e, bias], |tile, [dx], [dw, db], [x_tile, dy_tile, buffer]| {
            let count = tile.len();
            let x = view(load(x, tile.clone(), x_tile)?, count, d);
            let dy = load(dy, tile, dy_tile)?;
            if bias > 0 {
                for dy in dy.chunks_exact(bias) {
                    db.iter_mut().zip(dy).for_each(|(db, dy)| *db += dy.to_f64());
                }
            }
            let dy = view(dy, count, e);
            product(dx, Accum::Replace, dy, w.transpose());
            accumulate_transposed(dw, x, dy, buffer)
        })?;
    round(&dw_sum, dw);
    if let Some(db) = db {
        round(&db_sum, db);
    }
    Ok(())
}

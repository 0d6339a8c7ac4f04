//! `y = x w + b`.
//!
//! For `dy = dL/dy`: `dx = dy w^T`, `dw = x^T dy` and `db = 1^T dy`.

use faer::{Accum, MatRef};

use super::panels::{self, Split};
use super::tiles::{accumulate_transposed, are_many, for_each_tile, load, product, round};
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
    for_each_tile(ctx, rows, d, [(y, e)], [], |tile, [y], [], [x_tile]| {
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
/// Time `O(n d e)`. Memory beyond the outputs, whatever the shape: at most 128 MiB of sums of `dw`, in partitions of the
/// tokens or in panels of columns, 128 MiB of copies of tokens, and a tile a thread.
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
    if are_many(d * e) {
        if let Some(db) = db {
            bias_backward(ctx, dy, db)?;
        }
        return backward_in_panels(ctx, Split::USUAL, x, w, dy, dx, dw);
    }
    let bias = if db.is_some() { e } else { 0 };
    let [dw_sum, db_sum] = for_each_tile(
        ctx,
        rows,
        d.max(e),
        [(dx, d)],
        [d * e, bias],
        |tile, [dx], [dw, db], [x_tile, dy_tile, buffer]| {
            let count = tile.len();
            let x = view(load(x, tile.clone(), x_tile)?, count, d);
            let dy = load(dy, tile, dy_tile)?;
            if bias > 0 {
                add_rows(dy, db);
            }
            let dy = view(dy, count, e);
            product(dx, Accum::Replace, dy, w.transpose());
            accumulate_transposed(dw, x, dy, buffer)
        },
    )?;
    round(&dw_sum, dw);
    if let Some(db) = db {
        round(&db_sum, db);
    }
    Ok(())
}

/// The gradient with respect to `b` alone.
fn bias_backward<T: Real>(ctx: &Context, dy: &Rows<'_, T>, db: &mut [T]) -> Result<()> {
    let (rows, e) = (dy.batch() * dy.n(), dy.d());
    let [sum] = for_each_tile(ctx, rows, e, [], [e], |tile, [], [sum], [dy_tile]| {
        add_rows(load(dy, tile, dy_tile)?, sum);
        Ok(())
    })?;
    round(&sum, db);
    Ok(())
}

/// Adds rows as long as `sum` to it.
fn add_rows<T: Real>(rows: &[T], sum: &mut [f64]) {
    for row in rows.chunks_exact(sum.len()) {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_f64());
    }
}

/// [`backward`] of a large `w`, without a bias.
pub(super) fn backward_in_panels<T: Real>(
    ctx: &Context,
    split: Split,
    x: &Rows<'_, T>,
    w: MatRef<'_, T>,
    dy: &Rows<'_, T>,
    dx: &mut [T],
    dw: &mut [T],
) -> Result<()> {
    let (rows, d, e) = (x.batch() * x.n(), x.d(), w.ncols());
    let (mut sums, mut x_chunk, mut dy_chunk) = (Vec::new(), Vec::new(), Vec::new());
    for columns in split.panels(e, d) {
        let sum = panels::sums(&mut sums, d * columns.len())?;
        let w = w.subcols(columns.start, columns.len());
        let accum = if columns.start == 0 { Accum::Replace } else { Accum::Add };
        for tokens in split.chunks(rows, d + columns.len()) {
            let x = panels::load(ctx, x, tokens.clone(), 0..d, &mut x_chunk)?;
            let dy = panels::load(ctx, dy, tokens.clone(), columns.clone(), &mut dy_chunk)?;
            panels::multiply(ctx, &mut dx[tokens.start * d..tokens.end * d], accum, dy, w.transpose())?;
            panels::accumulate(ctx, sum, x, dy)?;
        }
        panels::round(sum, dw, e, columns);
    }
    Ok(())
}

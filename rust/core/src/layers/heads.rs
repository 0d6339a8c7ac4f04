//! Projections to heads and back: `(.., heads * width)` side by side, or `(batch * heads, n, width)` head by head.

use std::ops::Range;

use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::panels::{self, Split};
use super::rope::Rope;
use super::tiles::{
    TILE, accumulate_transposed, are_many, for_each_tile, load, product, rounded, row_dot, row_sum, sized,
};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::memory::{collected, room, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::view;
use crate::problem::rows::Rows;

/// Rows of heads, head by head.
#[derive(Debug)]
pub(crate) struct Projected<T> {
    /// `(batch * heads, n, width)`.
    pub rows: Vec<T>,
    pub heads: usize,
    pub width: usize,
    /// `1 / |z|` of every row before it was normalised, 0 where `z = 0`; empty where rows are not normalised.
    pub inverse_norms: Vec<T>,
}

/// What happens to a head's row after the projection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shaping<'a, T> {
    /// It is normalised.
    pub unit: bool,
    /// Then it is turned by its position.
    pub rope: Option<&'a Rope<T>>,
}

/// One projection in the backward pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a, T> {
    /// `None`: the rows are `x` itself.
    pub w: Option<MatRef<'a, T>>,
    /// What the forward pass made.
    pub rows: &'a Projected<T>,
    /// How they were turned.
    pub rope: Option<&'a Rope<T>>,
    /// The gradient with respect to them, `(batch * heads, n, width)`.
    pub gradient: &'a [T],
}

impl<T> Shaping<'_, T> {
    /// Nothing.
    pub(crate) const NONE: Self = Self { unit: false, rope: None };
}

/// What errors call lists of them.
pub(crate) const VIEWS: &str = "views of heads";

impl<T: Real> Projected<T> {
    pub(crate) fn zeros(tokens: usize, heads: usize, width: usize) -> Result<Self> {
        let rows = zeroed(tokens * heads * width, "queries, keys, values or outputs of heads")?;
        Ok(Self { rows, heads, width, inverse_norms: Vec::new() })
    }

    /// Each head's `(n, width)`.
    pub(crate) fn views(&self, n: usize) -> Result<Vec<MatRef<'_, T>>> {
        collected(self.rows.chunks_exact((n * self.width).max(1)).map(|rows| view(rows, n, self.width)), VIEWS)
    }

    /// The rows of the tokens `tile`, `(tile, heads * width)`.
    pub(crate) fn side_by_side<'s>(&self, n: usize, tile: Range<usize>, buffer: &'s mut Vec<T>) -> Result<&'s [T]> {
        let out = sized(buffer, tile.len() * self.heads * self.width)?;
        gather(&self.rows, self.heads, self.width, n, tile, out, |_, _, _| {});
        Ok(out)
    }
}

/// `x w` head by head, each row shaped. `name` is what an error calls the rows.
pub(crate) fn project<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    name: &str,
    w: MatRef<'_, T>,
    heads: usize,
    shaping: Shaping<'_, T>,
) -> Result<Projected<T>> {
    struct Task<'a, T> {
        block: usize,
        start: usize,
        heads: Vec<&'a mut [T]>,
        inverse_norms: Vec<&'a mut [T]>,
    }
    let (n, width) = (x.n(), w.ncols() / heads);
    let mut all = Projected::zeros(x.batch() * n, heads, width)?;
    if all.rows.is_empty() {
        return Ok(all);
    }
    if shaping.unit {
        all.inverse_norms = zeroed(x.batch() * n * heads, "norms of queries or keys")?;
    }
    let tiles = n.div_ceil(TILE);
    let mut tasks: Vec<Task<'_, T>> = room(x.batch() * tiles, VIEWS)?;
    for i in 0..x.batch() * tiles {
        let (norms, of_heads) = (if shaping.unit { heads } else { 0 }, room(heads, VIEWS)?);
        let (block, start) = (i / tiles, i % tiles * TILE);
        tasks.push(Task { block, start, heads: of_heads, inverse_norms: room(norms, VIEWS)? });
    }
    for (i, head) in all.rows.chunks_mut(n * width).enumerate() {
        for (tile, rows) in head.chunks_mut(TILE * width).enumerate() {
            tasks[i / heads * tiles + tile].heads.push(rows);
        }
    }
    for (i, head) in all.inverse_norms.chunks_mut(n).enumerate() {
        for (tile, norms) in head.chunks_mut(TILE).enumerate() {
            tasks[i / heads * tiles + tile].inverse_norms.push(norms);
        }
    }
    tasks.into_par_iter().try_for_each_init(Vec::new, |buffer, mut task| {
        ctx.check()?;
        let count = TILE.min(n - task.start);
        let side_by_side = sized(buffer, count * heads * width)?;
        product(side_by_side, Accum::Replace, x.blocks()[task.block].subrows(task.start, count), w);
        for (head, rows) in task.heads.iter_mut().enumerate() {
            let from = side_by_side.chunks_exact(heads * width).map(|row| &row[head * width..][..width]);
            let norms = task.inverse_norms.get_mut(head).map(|norms| &mut **norms);
            shape(name, from, rows, norms, task.start, shaping.rope)?;
        }
        Ok(())
    })?;
    Ok(all)
}

/// Copies a head's rows, normalising them where `norms` has room for their inverse norms, and turning them.
fn shape<'a, T: Real>(
    name: &str,
    from: impl Iterator<Item = &'a [T]>,
    rows: &mut [T],
    mut norms: Option<&mut [T]>,
    start: usize,
    rope: Option<&Rope<T>>,
) -> Result<()> {
    vectorised(
        #[inline(always)]
        || {
            for (i, from) in from.enumerate() {
                let row = &mut rows[i * from.len()..][..from.len()];
                row.copy_from_slice(from);
                if let Some(norms) = &mut norms {
                    let square = row_sum(from, |x| x * x);
                    if !square.is_finite() {
                        return Err(too_long(name));
                    }
                    let inverse = if square > 0.0 { square.sqrt().recip() } else { 0.0 };
                    norms[i] = T::of(inverse);
                    for x in row.iter_mut() {
                        *x = T::of(x.to_f64() * inverse);
                    }
                }
                if let Some(rope) = rope {
                    rope.turn(start + i, row);
                }
            }
            Ok(())
        },
    )
}

#[cold]
#[inline(never)]
fn too_long(name: &str) -> Error {
    Error::NonFinite(format!(
        "a row of {name} = x w_{name} holds NaN or infinity, or its square overflows; score_bound needs finite norms"
    ))
}

/// The gradients of the projections `rows = x w` with respect to each `w`, where there is one, and the sum of those
/// with respect to `x` in `dx`.
///
/// Memory beyond the results, whatever the shape: at most 128 MiB of sums of the weights, in partitions of the tokens or
/// in panels of columns, 128 MiB of copies of tokens, and some tiles a thread.
pub(crate) fn unproject<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    parts: [Part<'_, T>; 3],
    dx: &mut [T],
) -> Result<[Vec<T>; 3]> {
    let (n, d) = (x.n(), x.d());
    let sizes = parts.map(|part| part.w.map_or(0, |w| w.nrows() * w.ncols()));
    if are_many(sizes.iter().sum()) {
        return unproject_in_panels(ctx, Split::USUAL, x, parts, dx);
    }
    let width = parts.map(|part| part.rows.heads * part.rows.width).into_iter().fold(d, usize::max);
    let sums = for_each_tile(ctx, x.batch() * n, width, [(dx, d)], sizes, |tile, [dx], sums, [x_tile, dz, buffer]| {
        let count = tile.len();
        let x = view(load(x, tile.clone(), x_tile)?, count, d);
        dx.fill(T::ZERO);
        for (part, sum) in parts.iter().zip(sums) {
            let dz = part.pull_back(n, tile.clone(), dz)?;
            match part.w {
                Some(w) => {
                    let dz = view(dz, count, w.ncols());
                    accumulate_transposed(sum, x, dz, buffer)?;
                    product(dx, Accum::Add, dz, w.transpose());
                }
                None => dx.iter_mut().zip(dz).for_each(|(dx, dz)| *dx += *dz),
            }
        }
        Ok(())
    })?;
    let [a, b, c] = &sums;
    Ok([rounded(a)?, rounded(b)?, rounded(c)?])
}

/// [`unproject`] with large weights, one after another.
pub(super) fn unproject_in_panels<T: Real>(
    ctx: &Context,
    split: Split,
    x: &Rows<'_, T>,
    parts: [Part<'_, T>; 3],
    dx: &mut [T],
) -> Result<[Vec<T>; 3]> {
    let (n, d) = (x.n(), x.d());
    let mut grads = [const { Vec::new() }; 3];
    let (mut sums, mut x_chunk, mut dz) = (Vec::new(), Vec::new(), Vec::new());
    dx.fill(T::ZERO);
    for (part, grad) in parts.iter().zip(&mut grads) {
        let columns = part.rows.heads * part.rows.width;
        let Some(w) = part.w else {
            for_each_tile(ctx, x.batch() * n, columns, [(&mut *dx, d)], [], |tile, [dx], [], [dz]| {
                let dz = part.pull_back(n, tile, dz)?;
                dx.iter_mut().zip(dz).for_each(|(dx, dz)| *dx += *dz);
                Ok(())
            })?;
            continue;
        };
        *grad = zeroed(d * columns, "the gradient of a weight")?;
        for panel in split.panels(columns, d) {
            let w = w.subcols(panel.start, panel.len());
            let sum = panels::sums(&mut sums, d * panel.len())?;
            for tokens in split.chunks(x.batch() * n, d + columns) {
                let x = panels::load(ctx, x, tokens.clone(), 0..d, &mut x_chunk)?;
                let dz = part.pull_back_chunk(ctx, n, tokens.clone(), &mut dz)?.subcols(panel.start, panel.len());
                panels::accumulate(ctx, sum, x, dz)?;
                let dx = &mut dx[tokens.start * d..tokens.end * d];
                panels::multiply(ctx, dx, Accum::Add, dz, w.transpose())?;
            }
            panels::round(sum, grad, columns, panel);
        }
    }
    Ok(grads)
}

/// `o^T dy`, the gradient of a weight behind the heads' outputs `o`, side by side; memory as [`unproject`].
pub(crate) fn gradient_of_outputs<T: Real>(ctx: &Context, out: &Projected<T>, dy: &Rows<'_, T>) -> Result<Vec<T>> {
    let (rows, n) = (dy.batch() * dy.n(), dy.n());
    let (width, e) = (out.heads * out.width, dy.d());
    if are_many(width * e) {
        return gradient_of_outputs_in_panels(ctx, Split::USUAL, out, dy);
    }
    let [sum] =
        for_each_tile(ctx, rows, width.max(e), [], [width * e], |tile, [], [sum], [o_tile, dy_tile, buffer]| {
            let count = tile.len();
            let o = view(out.side_by_side(n, tile.clone(), o_tile)?, count, width);
            accumulate_transposed(sum, o, view(load(dy, tile, dy_tile)?, count, e), buffer)
        })?;
    rounded(&sum)
}

/// [`gradient_of_outputs`] of a large weight.
pub(super) fn gradient_of_outputs_in_panels<T: Real>(
    ctx: &Context,
    split: Split,
    out: &Projected<T>,
    dy: &Rows<'_, T>,
) -> Result<Vec<T>> {
    let (rows, n) = (dy.batch() * dy.n(), dy.n());
    let (width, e) = (out.heads * out.width, dy.d());
    let mut grad = zeroed(width * e, "the gradient of a weight")?;
    let (mut sums, mut o_chunk, mut dy_chunk) = (Vec::new(), Vec::new(), Vec::new());
    for panel in split.panels(e, width) {
        let sum = panels::sums(&mut sums, width * panel.len())?;
        for tokens in split.chunks(rows, width + panel.len()) {
            let o = panels::filled(ctx, tokens.clone(), width, &mut o_chunk, |tile, o| {
                gather(&out.rows, out.heads, out.width, n, tile, o, |_, _, _| {});
            })?;
            let dy = panels::load(ctx, dy, tokens, panel.clone(), &mut dy_chunk)?;
            panels::accumulate(ctx, sum, o, dy)?;
        }
        panels::round(sum, &mut grad, e, panel);
    }
    Ok(grad)
}

impl<T: Real> Part<'_, T> {
    /// The gradient of the tokens `tile` with respect to the projection, `(tile, heads * width)`.
    fn pull_back<'s>(&self, n: usize, tile: Range<usize>, buffer: &'s mut Vec<T>) -> Result<&'s [T]> {
        let out = sized(buffer, tile.len() * self.rows.heads * self.rows.width)?;
        self.pull_back_into(n, tile, out);
        Ok(out)
    }

    /// The same of many tokens, on all threads.
    fn pull_back_chunk<'s>(
        &self,
        ctx: &Context,
        n: usize,
        tokens: Range<usize>,
        buffer: &'s mut Vec<T>,
    ) -> Result<MatRef<'s, T>> {
        let width = self.rows.heads * self.rows.width;
        panels::filled(ctx, tokens, width, buffer, |tile, out| self.pull_back_into(n, tile, out))
    }

    fn pull_back_into(&self, n: usize, tile: Range<usize>, out: &mut [T]) {
        let Projected { rows, heads, width, inverse_norms } = self.rows;
        gather(self.gradient, *heads, *width, n, tile, out, |index, position, g| {
            if let Some(inverse) = inverse_norms.get(index) {
                let u = &rows[index * width..][..*width];
                let along = T::of(row_dot(u, g, |u, g| u * g));
                for (g, u) in g.iter_mut().zip(u) {
                    *g = (*g - *u * along) * *inverse;
                }
            }
            if let Some(rope) = self.rope {
                rope.turn_back(position, g);
            }
        });
    }
}

/// Copies the rows of the tokens `tile` from head by head to side by side, each passed through
/// `finish(its index among the rows of all heads, its position, the copy)`.
#[inline(always)]
fn gather<T: Real>(
    rows: &[T],
    heads: usize,
    width: usize,
    n: usize,
    tile: Range<usize>,
    out: &mut [T],
    finish: impl Fn(usize, usize, &mut [T]),
) {
    vectorised(
        #[inline(always)]
        || {
            for (token, out) in tile.zip(out.chunks_exact_mut(heads * width)) {
                let (block, position) = (token / n, token % n);
                for (head, out) in out.chunks_exact_mut(width).enumerate() {
                    let index = (block * heads + head) * n + position;
                    out.copy_from_slice(&rows[index * width..][..width]);
                    finish(index, position, out);
                }
            }
        },
    );
}

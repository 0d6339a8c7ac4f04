//! Self-attention with its projections, in the paper's form and with many heads.
//!
//! The paper's form is `Attn(x) = f v` with `q = x w`, `k = x`, `v = x w_v` (`w = w_q w_k^T`), so that
//!
//! ```text
//! dw = x^T dq,    dw_v = x^T dv,    dx = dq w^T + dk + dv w_v^T.
//! ```
//!
//! With heads, head `h` takes its columns of `q = x w_q` and, with its group, those of `k = x w_k` and `v = x w_v`;
//! the heads' outputs, side by side, are `o`, and `y = o w_o`. Hence
//!
//! ```text
//! do = dy w_o^T,    dw_o = o^T dy,    dw_q = x^T dq (w_k and w_v alike),    dx = dq w_q^T + dk w_k^T + dv w_v^T.
//! ```
//!
//! With a score bound, a head's row `z` of queries or keys becomes `u = z / |z|`, before it is turned by its position.
//! As `du/dz = (1 - u u^T) / |z|` and turning keeps lengths and inner products, a gradient `g` of the turned `u`
//! becomes `(g - u (u . g)) / |z|` and is then turned back. A row of zeros stays zero, and so does its gradient.

use std::collections::BTreeMap;

use faer::{Accum, MatRef};

use super::heads::{Part, Projected, Shaping, VIEWS, gradient_of_outputs, project, unproject};
use super::rope::Rope;
use super::tiles::{for_each_tile, product};
use super::{expect_rows, expect_shape};
use crate::attention::{Attention, Method};
use crate::context::Context;
use crate::error::{Error, Result, expect_len};
use crate::memory::{copied, zeroed};
use crate::numerics::real::Real;
use crate::numerics::tile::view;
use crate::plan::report::HeadReport;
use crate::problem::grads::AttentionGrads;
use crate::problem::heads::Heads;
use crate::problem::rows::Rows;
use crate::tolerance::Saved;

/// The projections around attention.
#[derive(Debug, Clone)]
pub enum Weights<'a, T> {
    /// The paper's form: `q = x w`, `k = x`, `v = x w_v`, one head, and its output is the result.
    Combined {
        /// `w_q w_k^T`, `(d, d)`.
        w: MatRef<'a, T>,
        /// `(d, e)`.
        w_v: MatRef<'a, T>,
    },
    /// Heads side by side in the columns of the projections.
    Heads {
        /// `(d, n_heads * width)`.
        w_q: MatRef<'a, T>,
        /// `(d, n_kv_heads * width)`.
        w_k: MatRef<'a, T>,
        /// `(d, n_kv_heads * value width)`.
        w_v: MatRef<'a, T>,
        /// `(n_heads * value width, e)`.
        w_o: MatRef<'a, T>,
        /// Query heads.
        n_heads: usize,
        /// Key heads, a divisor of `n_heads`: consecutive query heads share one.
        n_kv_heads: usize,
        /// Whether queries and keys are turned by their positions.
        rope: bool,
        /// Normalises queries and keys; with this number as the scale, no score exceeds it.
        score_bound: Option<f64>,
    },
}

/// Self-attention: its weights, and how attention is computed.
#[derive(Debug, Clone)]
pub struct SelfAttention<'a, T> {
    /// The projections.
    pub weights: Weights<'a, T>,
    /// The engine, the mask, and the scale: see [`default_scale`](Self::default_scale).
    pub attention: Attention,
}

/// Gradients of the weights by name.
type Grads<T> = BTreeMap<&'static str, Vec<T>>;

/// Widths: of the result, and of heads.
#[derive(Debug, Clone, Copy)]
struct Widths {
    h: usize,
    h_kv: usize,
    d: usize,
    dv: usize,
    e: usize,
}

/// What the forward pass computes between `x` and `y`, for the backward pass to use.
#[derive(Debug)]
pub(crate) struct Inside<T> {
    q: Projected<T>,
    /// `None`: the keys are `x`.
    k: Option<Projected<T>>,
    v: Projected<T>,
    rope: Option<Rope<T>>,
    out: Projected<T>,
    saved: Option<Saved<T>>,
}

impl<'a, T: Real> SelfAttention<'a, T> {
    /// The scale to use where the caller gives none: the score bound, else `1/sqrt(width of a head)`.
    pub fn default_scale(weights: &Weights<'_, T>) -> f64 {
        match weights {
            Weights::Combined { w, .. } => (w.ncols() as f64).sqrt().recip(),
            Weights::Heads { score_bound: Some(bound), .. } => *bound,
            Weights::Heads { w_q, n_heads, .. } => (*n_heads as f64 / w_q.ncols() as f64).sqrt(),
        }
    }

    /// Width of the result: `y` is `(.., output_width)`.
    pub fn output_width(&self) -> usize {
        match self.weights {
            Weights::Combined { w_v, .. } => w_v.ncols(),
            Weights::Heads { w_o, .. } => w_o.ncols(),
        }
    }

    /// `y (.., output_width)` for `x (.., width)`.
    ///
    /// Time: the projections, `O(n)` times their sizes, and attention's own. Memory beyond the output: q, k, v and the
    /// heads' outputs.
    pub fn forward(&self, ctx: &Context, x: &Rows<'_, T>, y: &mut [T]) -> Result<()> {
        let inside = self.inside(ctx, x)?;
        self.finish(ctx, x, &inside, y)
    }

    /// The gradients with respect to `x`, in `dx`, and to the weights, by name.
    ///
    /// Computes [`forward`](Self::forward) again. Memory beyond the results: q, k, v, the heads' outputs and the
    /// gradients of the four.
    pub fn backward(&self, ctx: &Context, x: &Rows<'_, T>, dy: &Rows<'_, T>, dx: &mut [T]) -> Result<Grads<T>> {
        let inside = self.inside(ctx, x)?;
        Ok(self.pull_back(ctx, x, &inside, dy, 0, dx)?.0)
    }

    /// Everything up to the heads' outputs.
    pub(crate) fn inside(&self, ctx: &Context, x: &Rows<'_, T>) -> Result<Inside<T>> {
        let Widths { h, h_kv, d, dv, .. } = self.widths(x.d())?;
        let (q, k, v, rope) = match self.weights {
            Weights::Combined { w, w_v } => {
                (project(ctx, x, "q", w, 1, Shaping::NONE)?, None, project(ctx, x, "v", w_v, 1, Shaping::NONE)?, None)
            }
            Weights::Heads { w_q, w_k, w_v, rope, score_bound, .. } => {
                let rope = rope.then(|| Rope::new(x.n(), d)).transpose()?;
                let shaping = Shaping { unit: score_bound.is_some(), rope: rope.as_ref() };
                let q = project(ctx, x, "q", w_q, h, shaping)?;
                let k = project(ctx, x, "k", w_k, h_kv, shaping)?;
                (q, Some(k), project(ctx, x, "v", w_v, h_kv, Shaping::NONE)?, rope)
            }
        };
        let out = Projected::zeros(x.batch() * x.n(), h, dv)?;
        let mut inside = Inside { q, k, v, rope, out, saved: None };
        if x.batch() * x.n() > 0 {
            let mut out = std::mem::take(&mut inside.out.rows);
            inside.saved = Some(self.attention.forward(ctx, &inside.heads(x)?, &mut out)?);
            inside.out.rows = out;
        }
        Ok(inside)
    }

    /// From the heads' outputs to `y`.
    pub(crate) fn finish(&self, ctx: &Context, x: &Rows<'_, T>, inside: &Inside<T>, y: &mut [T]) -> Result<()> {
        let (rows, e) = (x.batch() * x.n(), self.output_width());
        expect_len("y", y.len(), rows * e)?;
        let Weights::Heads { w_o, .. } = self.weights else {
            y.copy_from_slice(&inside.out.rows);
            return Ok(());
        };
        for_each_tile(ctx, rows, w_o.nrows(), [(y, e)], [], |tile, [y], [], [buffer]| {
            let count = tile.len();
            let o = inside.out.side_by_side(x.n(), tile, buffer)?;
            product(y, Accum::Replace, view(o, count, w_o.nrows()), w_o);
            Ok(())
        })?;
        Ok(())
    }

    /// [`backward`](Self::backward), given what the forward pass computed; and a report of each head, as from
    /// [`Attention::backward`].
    pub(crate) fn pull_back(
        &self,
        ctx: &Context,
        x: &Rows<'_, T>,
        inside: &Inside<T>,
        dy: &Rows<'_, T>,
        samples: usize,
        dx: &mut [T],
    ) -> Result<(Grads<T>, Vec<HeadReport>)> {
        let Widths { h, h_kv, d, dv, e } = self.widths(x.d())?;
        let (batch, n) = (x.batch(), x.n());
        let rows = batch * n;
        expect_rows("dy", dy, batch, n, e)?;
        expect_len("dx", dx.len(), rows * x.d())?;
        let zeros = |len: usize| zeroed(len, "gradients of queries, keys and values");
        let (mut dq, mut dk, mut dv) = (zeros(rows * h * d)?, zeros(rows * h_kv * d)?, zeros(rows * h_kv * dv)?);
        let mut reports = Vec::new();
        if let Some(saved) = &inside.saved {
            let dout = match self.weights {
                Weights::Combined { .. } => None,
                Weights::Heads { w_o, .. } => Some(project(ctx, dy, "dout", w_o.transpose(), h, Shaping::NONE)?),
            };
            let dout = dout.as_ref().map_or_else(|| copied(dy.blocks(), VIEWS), |dout| dout.views(n))?;
            let grads = AttentionGrads::new(&mut dq, &mut dk, &mut dv);
            let heads = inside.heads(x)?;
            reports = self.attention.backward(ctx, &heads, saved, &inside.out.rows, &dout, samples, grads)?;
        }
        let (w_q, w_k, w_v, names) = match self.weights {
            Weights::Combined { w, w_v } => (w, None, w_v, ["w", "", "w_v"]),
            Weights::Heads { w_q, w_k, w_v, .. } => (w_q, Some(w_k), w_v, ["w_q", "w_k", "w_v"]),
        };
        let rope = inside.rope.as_ref();
        // Keys that are x itself have, like the queries of the paper's form, nothing to undo.
        let k = inside.k.as_ref().unwrap_or(&inside.q);
        let parts = [
            Part { w: Some(w_q), rows: &inside.q, rope, gradient: &dq },
            Part { w: w_k, rows: k, rope, gradient: &dk },
            Part { w: Some(w_v), rows: &inside.v, rope: None, gradient: &dv },
        ];
        let mut grads: Grads<T> = names.into_iter().zip(unproject(ctx, x, parts, dx)?).collect();
        match self.weights {
            Weights::Combined { .. } => {
                grads.remove("");
            }
            Weights::Heads { .. } => {
                grads.insert("w_o", gradient_of_outputs(ctx, &inside.out, dy)?);
            }
        }
        Ok((grads, reports))
    }

    /// The widths, once they are known to fit `x` of width `width` and each other.
    fn widths(&self, width: usize) -> Result<Widths> {
        if width == 0 {
            return Err(Error::Shape("x has width 0; expected at least 1".into()));
        }
        let x = format_args!("x of width {width}");
        match self.weights {
            Weights::Combined { w, w_v } => {
                let e = width_of_heads("w_v", w_v.ncols(), "heads", 1)?;
                expect_shape("w", w.shape(), (width, width), x)?;
                expect_shape("w_v", w_v.shape(), (width, e), x)?;
                Ok(Widths { h: 1, h_kv: 1, d: width, dv: e, e })
            }
            Weights::Heads { w_q, w_k, w_v, w_o, n_heads: h, n_kv_heads: h_kv, rope, score_bound } => {
                check_heads(h, h_kv)?;
                check_score_bound(score_bound)?;
                let d = width_of_heads("w_q", w_q.ncols(), "n_heads", h)?;
                let dv = width_of_heads("w_v", w_v.ncols(), "n_kv_heads", h_kv)?;
                expect_shape("w_q", w_q.shape(), (width, h * d), x)?;
                expect_shape("w_k", w_k.shape(), (width, h_kv * d), format_args!("{x} and {h_kv} key heads of w_q"))?;
                expect_shape("w_v", w_v.shape(), (width, h_kv * dv), x)?;
                expect_shape("w_o", w_o.shape(), (h * dv, w_o.ncols()), format_args!("{h} heads of w_v"))?;
                if rope {
                    check_rope(d)?;
                }
                Ok(Widths { h, h_kv, d, dv, e: w_o.ncols() })
            }
        }
    }
}

impl<T: Real> Inside<T> {
    /// The attention that was computed, for `x` as it was given.
    pub(crate) fn heads<'b>(&'b self, x: &Rows<'b, T>) -> Result<Heads<'b, T>> {
        let k = self.k.as_ref().map_or_else(|| copied(x.blocks(), VIEWS), |k| k.views(x.n()))?;
        Ok(Heads::new(self.q.views(x.n())?, k, self.v.views(x.n())?))
    }

    /// What computes it again by the engines that were used within a tolerance.
    pub(crate) fn planned(&self, attention: &Attention) -> Option<Method> {
        let auto = attention.method.tolerance()?;
        Some(Method::Planned(self.saved.as_ref()?.planned(auto)))
    }

    /// Its output, head by head.
    pub(crate) fn out(&self, n: usize) -> Result<Vec<MatRef<'_, T>>> {
        self.out.views(n)
    }
}

/// An error unless `n_kv_heads` divides `n_heads`.
pub(crate) fn check_heads(n_heads: usize, n_kv_heads: usize) -> Result<()> {
    if n_heads == 0 {
        return Err(Error::Argument("n_heads is 0; expected at least 1".into()));
    }
    if n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
        return Err(Error::Argument(format!("n_kv_heads is {n_kv_heads}; expected a divisor of n_heads = {n_heads}")));
    }
    Ok(())
}

/// An error unless the bound, if any, is a positive number.
pub(crate) fn check_score_bound(score_bound: Option<f64>) -> Result<()> {
    match score_bound {
        Some(bound) if !(bound.is_finite() && bound > 0.0) => {
            Err(Error::Argument(format!("score_bound is {bound}; expected a finite number > 0")))
        }
        _ => Ok(()),
    }
}

/// An error unless heads of width `d` can be turned.
pub(crate) fn check_rope(d: usize) -> Result<()> {
    if d.is_multiple_of(2) {
        Ok(())
    } else {
        Err(Error::Argument(format!("rope=True with heads of width {d}; expected an even width")))
    }
}

fn width_of_heads(name: &str, columns: usize, count_name: &str, count: usize) -> Result<usize> {
    if columns > 0 && columns.is_multiple_of(count) {
        Ok(columns / count)
    } else {
        Err(Error::Shape(format!(
            "{name} has {columns} columns; expected a positive multiple of {count_name} = {count}"
        )))
    }
}

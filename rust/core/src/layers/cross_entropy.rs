//! The mean cross-entropy of logits.
//!
//! With `p = softmax(logits_i)` and target `t`, row `i` of `N` gives `loss_i = -log p_t` and
//! `dlogits_i = (p - e_t) / N` for the mean loss.

use std::ops::Range;

use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::panels::{self, Split};
use super::tiles::{accumulate_transposed, are_many, copy_rows, for_each_tile, load, product, round, row_sum, sized};
use super::{expect_below, expect_shape};
use crate::context::Context;
use crate::error::{Error, Result, expect_len};
use crate::memory::filled;
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::view;
use crate::problem::rows::Rows;

/// The mean over the tokens of `-log softmax(logits)[target]`, and its gradient.
///
/// `logits (.., vocab)`, `targets` one a token, `dlogits (.., vocab)`. NaN or infinite losses are an error.
/// Time `O(n vocab)`; memory beyond the output none.
pub fn mean<T: Real>(ctx: &Context, logits: &Rows<'_, T>, targets: &[u32], dlogits: &mut [T]) -> Result<f64> {
    let (rows, vocab) = (logits.batch() * logits.n(), logits.d());
    check(rows, targets, vocab)?;
    expect_len("dlogits", dlogits.len(), rows * vocab)?;
    let [loss] = for_each_tile(ctx, rows, 0, [(dlogits, vocab)], [1], |tile, [dlogits], [loss], []| {
        copy_rows(logits, tile.clone(), 0..vocab, dlogits);
        loss[0] += differentiate(dlogits, &targets[tile], rows)?;
        Ok(())
    })?;
    mean_of(loss[0], rows)
}

/// Up to so many float64 sums of `dw`, 512 MiB, are kept at once, and the logits are computed once; with more, twice. That
/// is one product in four, and more sums are not worth it: a head of 2048 x 32,768 has as many.
const KEPT_SUMS: usize = 1 << 26;

/// [`mean`] of the logits `x w`, and its gradients with respect to `x` and `w`, tile by tile: the logits of all tokens
/// never exist at once.
///
/// `x (.., d)`, `w (d, vocab)`, `targets` one a token. Time `O(n d vocab)`: three products of the sizes of `x w`, and
/// four where `d vocab > 2^26`. Memory beyond the outputs, whatever the shape: at most 512 MiB of sums of `dw`, 128 MiB
/// of logits and copies of tokens, three numbers a token, and a tile a thread.
pub fn linear_mean<T: Real>(
    ctx: &Context,
    x: &Rows<'_, T>,
    w: MatRef<'_, T>,
    targets: &[u32],
    dx: &mut [T],
    dw: &mut [T],
) -> Result<f64> {
    let (rows, d, vocab) = (x.batch() * x.n(), x.d(), w.ncols());
    expect_shape("w", w.shape(), (d, vocab), format_args!("x of width {d}"))?;
    check(rows, targets, vocab)?;
    expect_len("dx", dx.len(), rows * d)?;
    expect_len("dw", dw.len(), d * vocab)?;
    if are_many(d * vocab) {
        let sum = if d * vocab <= KEPT_SUMS {
            linear_mean_in_chunks(ctx, Split::USUAL, x, w, targets, dx, dw)?
        } else {
            linear_mean_in_panels(ctx, Split::USUAL, x, w, targets, dx, dw)?
        };
        return mean_of(sum, rows);
    }
    let [loss, dw_sum] = for_each_tile(
        ctx,
        rows,
        d.max(vocab),
        [(dx, d)],
        [1, d * vocab],
        |tile, [dx], [loss, dw], [x_tile, logits, buffer]| {
            let count = tile.len();
            let x = view(load(x, tile.clone(), x_tile)?, count, d);
            let logits = sized(logits, count * vocab)?;
            product(logits, Accum::Replace, x, w);
            loss[0] += differentiate(logits, &targets[tile], rows)?;
            let dlogits = view(logits, count, vocab);
            accumulate_transposed(dw, x, dlogits, buffer)?;
            product(dx, Accum::Replace, dlogits, w.transpose());
            Ok(())
        },
    )?;
    round(&dw_sum, dw);
    mean_of(loss[0], rows)
}

/// The sum of the losses and the gradients of [`linear_mean`], for a large `w` of which all sums are kept.
pub(super) fn linear_mean_in_chunks<T: Real>(
    ctx: &Context,
    split: Split,
    x: &Rows<'_, T>,
    w: MatRef<'_, T>,
    targets: &[u32],
    dx: &mut [T],
    dw: &mut [T],
) -> Result<f64> {
    let (rows, d, vocab) = (x.batch() * x.n(), x.d(), w.ncols());
    let (mut sums, mut chunk) = (Vec::new(), Chunk::new());
    let sum = panels::sums(&mut sums, d * vocab)?;
    let mut loss = 0.0;
    for tokens in split.chunks(rows, d + vocab) {
        let (x, logits) = chunk.logits(ctx, x, tokens.clone(), w)?;
        let losses = (logits.par_chunks_mut(ROWS * vocab), targets[tokens.clone()].par_chunks(ROWS))
            .into_par_iter()
            .map(|(logits, targets)| differentiate(logits, targets, rows))
            .collect::<Result<Vec<f64>>>()?;
        loss += losses.iter().sum::<f64>();
        let dlogits = view(logits, tokens.len(), vocab);
        panels::accumulate(ctx, sum, x, dlogits)?;
        let dx = &mut dx[tokens.start * d..tokens.end * d];
        panels::multiply(ctx, dx, Accum::Replace, dlogits, w.transpose())?;
    }
    panels::round(sum, dw, vocab, 0..vocab);
    Ok(loss)
}

/// [`linear_mean_in_chunks`] for any `w`, by panels of the vocabulary: what a row's softmax divides by is known only after
/// all of them, so all logits are computed once for that and once more for the gradients.
pub(super) fn linear_mean_in_panels<T: Real>(
    ctx: &Context,
    split: Split,
    x: &Rows<'_, T>,
    w: MatRef<'_, T>,
    targets: &[u32],
    dx: &mut [T],
    dw: &mut [T],
) -> Result<f64> {
    let (rows, d, vocab) = (x.batch() * x.n(), x.d(), w.ncols());
    let (mut sums, mut chunk) = (Vec::new(), Chunk::new());
    let mut softmax = filled(rows, Softmax::<T>::NONE, "softmax of tokens")?;
    for panel in split.panels(vocab, d) {
        let w = w.subcols(panel.start, panel.len());
        for tokens in split.chunks(rows, d + panel.len()) {
            let (_, logits) = chunk.logits(ctx, x, tokens.clone(), w)?;
            (logits.par_chunks_mut(panel.len()), &mut softmax[tokens.clone()], &targets[tokens])
                .into_par_iter()
                .for_each(|(row, softmax, target)| {
                    softmax.add(row, (*target as usize).checked_sub(panel.start));
                });
        }
    }
    let mut loss = 0.0;
    for softmax in &softmax {
        loss += softmax.loss()?;
    }
    for panel in split.panels(vocab, d) {
        let w = w.subcols(panel.start, panel.len());
        let sum = panels::sums(&mut sums, d * panel.len())?;
        let accum = if panel.start == 0 { Accum::Replace } else { Accum::Add };
        for tokens in split.chunks(rows, d + panel.len()) {
            let (x, logits) = chunk.logits(ctx, x, tokens.clone(), w)?;
            (logits.par_chunks_mut(panel.len()), &softmax[tokens.clone()], &targets[tokens.clone()])
                .into_par_iter()
                .for_each(|(row, softmax, target)| {
                    softmax.differentiate(row, (*target as usize).checked_sub(panel.start), rows);
                });
            let dlogits = view(logits, tokens.len(), panel.len());
            panels::accumulate(ctx, sum, x, dlogits)?;
            let dx = &mut dx[tokens.start * d..tokens.end * d];
            panels::multiply(ctx, dx, accum, dlogits, w.transpose())?;
        }
        panels::round(sum, dw, vocab, panel);
    }
    Ok(loss)
}

/// Some tokens and their logits, in buffers that are used again.
struct Chunk<T> {
    x: Vec<T>,
    logits: Vec<T>,
}

impl<T: Real> Chunk<T> {
    const fn new() -> Self {
        Self { x: Vec::new(), logits: Vec::new() }
    }

    /// The tokens, `(tokens, d)`, and `x w`, row-major.
    fn logits(
        &mut self,
        ctx: &Context,
        x: &Rows<'_, T>,
        tokens: Range<usize>,
        w: MatRef<'_, T>,
    ) -> Result<(MatRef<'_, T>, &mut [T])> {
        let logits = sized(&mut self.logits, tokens.len() * w.ncols())?;
        let x = panels::load(ctx, x, tokens, 0..x.d(), &mut self.x)?;
        panels::multiply(ctx, logits, Accum::Replace, x, w)?;
        Ok((x, logits))
    }
}

/// Rows of logits that one task takes.
const ROWS: usize = 4;

/// What is known of a row of logits after some of its panels.
#[derive(Debug, Clone, Copy)]
struct Softmax<T> {
    /// The largest logit.
    max: T,
    /// The sum of `exp(logit - max)`.
    sum: f64,
    at_target: T,
}

impl<T: Real> Softmax<T> {
    const NONE: Self = Self { max: T::NEG_INFINITY, sum: 0.0, at_target: T::NEG_INFINITY };

    /// Takes in the next panel of a row, which becomes scratch. `target` is its place, in this panel or a later one.
    fn add(&mut self, row: &mut [T], target: Option<usize>) {
        if let Some(x) = target.and_then(|target| row.get(target)) {
            self.at_target = *x;
        }
        vectorised(
            #[inline(always)]
            || {
                let max = self.max.larger(largest(row));
                if max > self.max {
                    self.sum *= (self.max - max).exp_nonpositive().to_f64();
                    self.max = max;
                }
                // Without a finite logit yet, NaN must still come through.
                let max = if self.max > T::NEG_INFINITY { self.max } else { T::ZERO };
                for x in row.iter_mut() {
                    *x = (*x - max).exp_nonpositive();
                }
                self.sum += row_sum(row, |x| x);
            },
        );
    }

    /// After the last panel.
    fn loss(&self) -> Result<f64> {
        let loss = self.sum.ln() + (self.max.to_f64() - self.at_target.to_f64());
        if loss.is_finite() { Ok(loss) } else { Err(not_finite(loss)) }
    }

    /// Replaces a panel of the row by `(softmax - e_target) / total`.
    fn differentiate(&self, row: &mut [T], target: Option<usize>, total: usize) {
        let factor = T::of((self.sum * total as f64).recip());
        vectorised(
            #[inline(always)]
            || {
                for x in row.iter_mut() {
                    *x = (*x - self.max).exp_nonpositive() * factor;
                }
            },
        );
        if let Some(x) = target.and_then(|target| row.get_mut(target)) {
            *x -= T::of((total as f64).recip());
        }
    }
}

/// Losses that are finite each may have no sum.
fn mean_of(sum: f64, rows: usize) -> Result<f64> {
    if sum.is_finite() {
        return Ok(sum / rows as f64);
    }
    Err(Error::NonFinite("the mean cross-entropy overflows: its logits are too large; scale them down".into()))
}

pub(crate) fn check(rows: usize, targets: &[u32], vocab: usize) -> Result<()> {
    expect_len("targets", targets.len(), rows)?;
    expect_below("targets", targets, vocab, "vocabulary's size")?;
    if rows == 0 {
        return Err(Error::Argument("the mean loss of no tokens; expected at least one token".into()));
    }
    Ok(())
}

/// Replaces rows of logits by `(softmax - e_target) / total`, and returns the sum of their losses.
fn differentiate<T: Real>(logits: &mut [T], targets: &[u32], total: usize) -> Result<f64> {
    let vocab = logits.len() / targets.len();
    vectorised(
        #[inline(always)]
        || {
            let mut sum_of_losses = 0.0;
            for (row, target) in logits.chunks_exact_mut(vocab).zip(targets) {
                let max = largest(row);
                let at_target = row[*target as usize].to_f64();
                for x in row.iter_mut() {
                    *x = (*x - max).exp_nonpositive();
                }
                let sum = row_sum(row, |x| x);
                let loss = sum.ln() + (max.to_f64() - at_target);
                if !loss.is_finite() {
                    return Err(not_finite(loss));
                }
                sum_of_losses += loss;
                let factor = T::of((sum * total as f64).recip());
                for x in row.iter_mut() {
                    *x *= factor;
                }
                row[*target as usize] -= T::of((total as f64).recip());
            }
            Ok(sum_of_losses)
        },
    )
}

#[cold]
#[inline(never)]
fn not_finite(loss: f64) -> Error {
    Error::NonFinite(format!(
        "the cross-entropy of a token is {loss}: its logits hold NaN or infinity; expected finite logits"
    ))
}

/// The largest entry, in eight interleaved parts so that it vectorises.
#[inline(always)]
fn largest<T: Real>(row: &[T]) -> T {
    let (chunks, rest) = row.as_chunks::<8>();
    let mut lanes = [T::NEG_INFINITY; 8];
    for x in chunks {
        for l in 0..8 {
            lanes[l] = lanes[l].larger(x[l]);
        }
    }
    lanes.iter().chain(rest).fold(T::NEG_INFINITY, |max, x| max.larger(*x))
}

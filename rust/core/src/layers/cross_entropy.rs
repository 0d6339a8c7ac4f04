//! The mean cross-entropy of logits.
//!
//! With `p = softmax(logits_i)` and target `t`, row `i` of `N` gives `loss_i = -log p_t` and
//! `dlogits_i = (p - e_t) / N` for the mean loss.

use faer::{Accum, MatRef};

use super::tiles::{accumulate_transposed, for_each_tile, load, product, round, row_sum, sized};
use super::{expect_below, expect_shape};
use crate::context::Context;
use crate::error::{Error, Result, expect_len};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::view;
use crate::problem::rows::Rows;

/// The mean over the tokens of `-log softmax(logits)[target]`, and its gradient.
///
/// `logits (.., vocab)`, `targets` one a token, `dlogits (.., vocab)`. NaN or infinite losses are an error.
/// Time `O(n vocab)`.
pub fn mean<T: Real>(ctx: &Context, logits: &Rows<'_, T>, targets: &[u32], dlogits: &mut [T]) -> Result<f64> {
    let (rows, vocab) = (logits.batch() * logits.n(), logits.d());
    check(rows, targets, vocab)?;
    expect_len("dlogits", dlogits.len(), rows * vocab)?;
    let [loss] = for_each_tile(ctx, rows, [(dlogits, vocab)], [1], |tile, [dlogits], [loss], [buffer]| {
        dlogits.copy_from_slice(load(logits, tile.clone(), buffer)?);
        loss[0] += differentiate(dlogits, &targets[tile], rows)?;
        Ok(())
    })?;
    mean_of(loss[0], rows)
}

/// [`mean`] of the logits `x w`, and its gradients with respect to `x` and `w`, tile by tile: the logits of all tokens
/// never exist at once.
///
/// `x (.., d)`, `w (d, vocab)`, `targets` one a token. Time `O(n d vocab)`; memory beyond the outputs a tile of logits
/// a thread and `O(d vocab)` a partition of the tokens.
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
    let [loss, dw_sum] =
        for_each_tile(ctx, rows, [(dx, d)], [1, d * vocab], |tile, [dx], [loss, dw], [x_tile, logits, buffer]| {
            let count = tile.len();
            let x = view(load(x, tile.clone(), x_tile)?, count, d);
            let logits = sized(logits, count * vocab)?;
            product(logits, Accum::Replace, x, w);
            loss[0] += differentiate(logits, &targets[tile], rows)?;
            let dlogits = view(logits, count, vocab);
            accumulate_transposed(dw, x, dlogits, buffer)?;
            product(dx, Accum::Replace, dlogits, w.transpose());
            Ok(())
        })?;
    round(&dw_sum, dw);
    mean_of(loss[0], rows)
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

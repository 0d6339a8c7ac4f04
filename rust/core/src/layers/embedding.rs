//! `y_i = embed[tokens_i]`.
//!
//! `dembed[t]` is the sum of `dy_i` over the positions `i` that hold the token `t`.

use faer::MatRef;
use rayon::prelude::*;

use super::expect_below;
use super::tiles::{TILE, for_each_tile, round};
use crate::context::Context;
use crate::error::{Result, expect_len};
use crate::memory::{made, zeroed};
use crate::numerics::real::Real;
use crate::problem::rows::Rows;

/// `y_i = embed[tokens_i]`: `embed (vocab, d)`, `y (tokens, d)`. Time `O(n d)`.
pub fn forward<T: Real>(ctx: &Context, tokens: &[u32], embed: MatRef<'_, T>, y: &mut [T]) -> Result<()> {
    let d = embed.ncols();
    expect_below("tokens", tokens, embed.nrows(), "rows of embed")?;
    expect_len("y", y.len(), tokens.len() * d)?;
    for_each_tile(ctx, tokens.len(), 0, [(y, d)], [], |tile, [y], [], []| {
        for (y, token) in y.chunks_exact_mut(d.max(1)).zip(&tokens[tile]) {
            let row = embed.row(*token as usize);
            y.iter_mut().zip(row.iter()).for_each(|(y, x)| *y = *x);
        }
        Ok(())
    })?;
    Ok(())
}

/// The gradient of [`forward`] with respect to `embed`, `(vocab, d)`: rows without a token are 0.
///
/// The positions are sorted by token; each row of `dembed` is then a sum in float64, in the order of the positions.
/// Time `O(n d + vocab d)`, memory beyond the output `O(n + vocab)`.
pub fn backward<T: Real>(
    ctx: &Context,
    tokens: &[u32],
    dy: &Rows<'_, T>,
    vocab: usize,
    dembed: &mut [T],
) -> Result<()> {
    let d = dy.d();
    expect_below("tokens", tokens, vocab, "rows of embed")?;
    expect_len("tokens", tokens.len(), dy.batch() * dy.n())?;
    expect_len("dembed", dembed.len(), vocab * d)?;
    let mut ends = zeroed::<usize>(vocab, "counts of tokens")?;
    for token in tokens {
        ends[*token as usize] += 1;
    }
    let mut total = 0;
    for end in &mut ends {
        total += std::mem::replace(end, total);
    }
    let mut positions = zeroed::<usize>(tokens.len(), "positions of tokens")?;
    for (i, token) in tokens.iter().enumerate() {
        let end = &mut ends[*token as usize];
        positions[*end] = i;
        *end += 1;
    }
    dembed.par_chunks_mut(d.max(1)).enumerate().try_for_each_init(
        || zeroed::<f64>(d, "the sum of a row"),
        |sum, (token, out)| {
            let sum = made(sum)?;
            let start = if token == 0 { 0 } else { ends[token - 1] };
            sum.fill(0.0);
            for (count, i) in positions[start..ends[token]].iter().enumerate() {
                if count % TILE == 0 {
                    ctx.check()?;
                }
                let row = dy.blocks()[i / dy.n()].row(i % dy.n());
                sum.iter_mut().zip(row.iter()).for_each(|(sum, x)| *sum += x.to_f64());
            }
            round(sum, out);
            Ok(())
        },
    )
}

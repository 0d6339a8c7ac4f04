//! Measured errors: rows drawn at random, computed exactly in float64, and compared with given ones.

use faer::MatRef;
use rayon::prelude::*;

use self::draw::{DRAWN, squares};
use self::exact_rows::exact_rows;
use self::guides::Known;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::memory::{collected, matrix, room};
use crate::numerics::real::Real;
use crate::numerics::tile::TILE;
use crate::problem::finite::check_finite;
use crate::problem::grads::expect_views;
use crate::problem::heads::{Copies, Heads, Sizes};
use crate::problem::scores::Scores;

pub(crate) mod draw;
pub(crate) mod exact_rows;
pub(crate) mod guides;
pub(crate) mod key_gradients;

pub(crate) use self::draw::Draw;
pub use self::draw::{ErrorEstimate, Squares};

/// Tokens that one task goes through.
const TOKENS_A_TASK: usize = 32 * TILE;

/// Estimates `‖out - exact‖_F / ‖exact‖_F` over all heads together, from `samples` rows that are drawn at random and computed
/// exactly, in float64. The top of `measure/draw.rs` says how rows are drawn, and what the interval is; it is a point where
/// all rows are drawn.
///
/// Time `O(samples m (d + d_v) + (n + m) d^2)` a head. Errors: shapes that do not fit, `samples` of 0, numbers that are not
/// finite, and rows without a key to attend to.
pub fn measure_error<T: Real>(
    ctx: &Context,
    heads: &Heads<'_, T>,
    scores: &Scores,
    out: &[MatRef<'_, T>],
    samples: usize,
    seed: u64,
) -> Result<ErrorEstimate> {
    let Sizes { h, n, m, d_v, .. } = heads.sizes()?;
    expect_views("out", out, h, n, d_v)?;
    scores.check(h, n, m)?;
    if samples == 0 {
        return Err(Error::Argument("samples is 0; expected at least 1".into()));
    }
    if h * n == 0 {
        return Ok(ErrorEstimate { relative: 0.0, low: 0.0, high: 0.0, rows: 0 });
    }
    let mut copies = Copies::new();
    let heads = &*heads.without_removed(&mut copies)?;
    heads.check_finite()?;
    check_finite("out", out)?;
    let draw = Draw::new(h * n, samples, seed, &guides_of_all_heads(heads, scores, out)?)?;
    let of_heads: Vec<&[usize]> = draw.rows.chunk_by(|a, b| a / n == b / n).collect();
    let exact = of_heads
        .into_par_iter()
        .map(|rows| {
            let of_head = collected(rows.iter().map(|i| i % n), DRAWN)?;
            exact_rows(ctx, &heads.head(rows[0] / n, scores), &of_head, None)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut rows = room(draw.rows.len(), DRAWN)?;
    rows.extend(exact.iter().flat_map(|part| part.out.row_iter()));
    let exact = matrix(rows.len(), d_v, "exact rows", |i, c| rows[i][c])?;
    let given = |i: usize, c: usize| out[draw.rows[i] / n][(draw.rows[i] % n, c)].to_f64();
    let mut all = 0.0;
    for out in out {
        all += guides::squares(*out)?.iter().sum::<f64>();
    }
    Ok(draw.estimate(&squares(&exact, given)?, Some(all)))
}

/// The guides that rows of all heads together are drawn by, head after head.
fn guides_of_all_heads<T: Real>(heads: &Heads<'_, T>, scores: &Scores, out: &[MatRef<'_, T>]) -> Result<Vec<Vec<f64>>> {
    let of_head = |i: usize| {
        let head = heads.head(i, scores);
        let mut guides = Known::new(&head)?.query_guides(&head, None)?;
        guides.push(guides::squares(out[i])?);
        Ok(guides)
    };
    let mut all = Vec::new();
    for i in 0..out.len() {
        let guides: Vec<Vec<f64>> = of_head(i)?;
        if i == 0 {
            for guide in &guides {
                all.push(room(out.len() * guide.len(), "guides that rows are drawn by")?);
            }
        }
        all.iter_mut().zip(guides).for_each(|(all, guide)| all.extend(guide));
    }
    Ok(all)
}

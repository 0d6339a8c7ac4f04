//! Measured errors: exact rows drawn at random, compared with given ones.

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::attention::{Heads, Sizes, check_finite, expect_views};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::exact::{Softmax, TILE, add_bias};
use crate::real::Real;
use crate::sample::stratified;
use crate::tile::{product, view_mut};

/// An estimate of a relative Frobenius error, with its 95% confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ErrorEstimate {
    /// The estimate.
    pub relative: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Rows that were computed exactly.
    pub rows: usize,
}

/// Half the width of a normal distribution's 95% interval, in standard deviations.
const NORMAL_95: f64 = 1.96;

/// Estimates `‖out - exact‖_F / ‖exact‖_F` over all heads together, from `samples` rows drawn at random without
/// replacement (one in each of as many equal strata of heads and rows), each computed exactly, in float64.
///
/// With `e_i` the squared error and `x_i` the squared size of row i, the square of the estimate is the ratio `R = sum
/// e_i / sum x_i`; its standard error is that of the mean of `e_i - R x_i` over the mean of `x_i`, less the
/// finite-population factor, and the interval is taken on its logarithm. All rows sampled: the interval is a point.
/// Time `O(samples m (d + dv))`.
pub fn measure_error<T: Real>(
    ctx: &Context,
    heads: &Heads<'_, T>,
    causal: bool,
    scale: f64,
    out: &[MatRef<'_, T>],
    samples: usize,
    seed: u64,
) -> Result<ErrorEstimate> {
    let Sizes { h, n, m, dv, .. } = heads.sizes()?;
    expect_views("out", out, h, n, dv)?;
    if causal && n != m {
        return Err(Error::Shape(format!("causal=True with n = {n} queries and m = {m} keys; expected n == m")));
    }
    if samples == 0 {
        return Err(Error::Argument("samples is 0; expected at least 1".into()));
    }
    let total = h * n;
    let rows = samples.min(total);
    if rows == 0 {
        return Ok(ErrorEstimate { relative: 0.0, low: 0.0, high: 0.0, rows: 0 });
    }
    heads.check_finite()?;
    check_finite("out", out)?;
    let drawn = stratified(total, rows, seed);
    let blocks: Vec<&[usize]> =
        drawn.chunk_by(|a, b| a / n == b / n).flat_map(|of_head| of_head.chunks(TILE)).collect();
    let pairs = blocks
        .into_par_iter()
        .map(|block| {
            let head = heads.head(block[0] / n);
            let rows: Vec<usize> = block.iter().map(|i| i % n).collect();
            let wide = |x: MatRef<'_, T>| Mat::from_fn(x.nrows(), x.ncols(), |i, c| x[(i, c)].to_f64());
            let q = Mat::from_fn(rows.len(), head.q.ncols(), |i, c| head.q[(rows[i], c)].to_f64());
            let mut softmax = Softmax::new(dv);
            softmax.start(rows.len());
            let end = if causal { rows[rows.len() - 1] + 1 } else { m };
            for j0 in (0..end).step_by(TILE) {
                ctx.check()?;
                let bk = TILE.min(end - j0);
                let s = &mut softmax.scores;
                product(view_mut(s, bk, rows.len()), wide(head.k.subrows(j0, bk)).as_ref(), q.transpose(), scale);
                if let Some(bias) = head.key_bias {
                    add_bias(bias.subrows(j0, bk).iter().map(|b| b.to_f64()), rows.len(), s);
                }
                if causal {
                    for (i, &row) in rows.iter().enumerate() {
                        for j in (row + 1).saturating_sub(j0)..bk {
                            s[j * rows.len() + i] = f64::NEG_INFINITY;
                        }
                    }
                }
                softmax.add(bk, wide(head.v.subrows(j0, bk)).as_ref());
            }
            let (mut exact, mut max, mut scales) =
                (vec![0.0; rows.len() * dv], vec![0.0; rows.len()], vec![0.0; rows.len()]);
            softmax.finish(head.index, |i| rows[i], &mut exact, &mut max, &mut scales)?;
            Ok(rows
                .iter()
                .zip(exact.chunks_exact(dv))
                .map(|(&i, exact)| {
                    let given = out[head.index].row(i);
                    let (mut error, mut size) = (0.0, 0.0);
                    for (c, x) in exact.iter().enumerate() {
                        error += (given[c].to_f64() - x).powi(2);
                        size += x.powi(2);
                    }
                    (error, size)
                })
                .collect::<Vec<_>>())
        })
        .collect::<Result<Vec<_>>>()?
        .concat();
    Ok(ratio(&pairs, total))
}

/// The estimate from sampled `(e_i, x_i)` out of `total` rows.
fn ratio(pairs: &[(f64, f64)], total: usize) -> ErrorEstimate {
    let rows = pairs.len();
    let (error, size) = pairs.iter().fold((0.0, 0.0), |(e, x), pair| (e + pair.0, x + pair.1));
    if error == 0.0 || size == 0.0 {
        let relative = if error == 0.0 { 0.0 } else { f64::INFINITY };
        return ErrorEstimate { relative, low: relative, high: relative, rows };
    }
    let r = error / size;
    let spread: f64 = pairs.iter().map(|(e, x)| (e - r * x).powi(2)).sum();
    let left_out = 1.0 - rows as f64 / total as f64;
    let deviation = (left_out * spread / (rows.max(2) - 1) as f64 / rows as f64).sqrt() / (size / rows as f64);
    // The errors of rows are skewed, so the interval is taken on the logarithm of R.
    let factor = match (rows, r) {
        _ if left_out == 0.0 => 1.0,
        (1, _) => f64::INFINITY,
        _ => (NORMAL_95 * deviation / r).exp(),
    };
    ErrorEstimate { relative: r.sqrt(), low: (r / factor).sqrt(), high: (r * factor).sqrt(), rows }
}

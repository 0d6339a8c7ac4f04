//! What the low-rank weights of a query leave out, and the logarithms of row sums.
//!
//! Features may leave out a factor of the weights that all pairs of a query share (see [`FeatureMap::half`]), and weights
//! of keys are relative to a level. With `h` the half of queries, a query's sums over the weights `w_j φ(q'_i)^T W χ(k'_j)`
//! are those of `A_ij = e^{c q'_i.k'_j + b'_j}` times `e^{-(level + row_level)}`, where `row_level = h |q'_i|^2`.

use rayon::prelude::*;

use super::features::{FeatureMap, Side};
use super::floor::Floor;
use super::pass::Pass;
use super::shifts::{Relative, Shifts, biases};
use crate::error::Result;
use crate::memory::collected_in_parallel;
use crate::numerics::real::Real;
use crate::problem::grads::{RowFactors, Upstream};
use crate::problem::heads::Head;

/// What makes of a query's sums over its far keys those over `A_ij`: the sums times `scale e^level`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FarLevel {
    pub level: f64,
    pub scale: f64,
}

impl<T: Real> Pass<'_, T> {
    /// `h |q'_i|^2`: see the top of this file.
    pub fn row_level(&self, i: usize) -> f64 {
        match self.features.half(Side::Queries) {
            0.0 => 0.0,
            half => half * self.tokens.shifts.query(self.tokens.head, i).map(|q| q * q).sum::<f64>(),
        }
    }

    /// For each query, the factor that turns its low-rank weights relative to `level` into entries of `f = A / D`.
    pub fn far_factor(&self, up: &Upstream<'_, T>, level: f64) -> impl Fn(usize) -> T {
        let (rows, has_floor) = (up.rows, self.features.has_floor());
        move |i| {
            if has_floor {
                T::of(rows.scale[i].to_f64() * (level + self.row_level(i) - rows.max[i].to_f64()).exp())
            } else {
                rows.scale[i] * T::of(level - rows.max[i].to_f64()).exp_nonpositive()
            }
        }
    }

    /// Writes to `far` the levels of the queries from `start` on, given their sums of far weights relative to `level`.
    ///
    /// Where the features have a floor, a query's level is the logarithm of its own sum, which may lie far from the keys'
    /// level; a sum below its floor is an error.
    pub fn far_levels(
        &self,
        level: f64,
        floor: Option<&Floor>,
        start: usize,
        denominators: &[T],
        far: &mut Vec<FarLevel>,
    ) -> Result<()> {
        far.clear();
        for (t, &denominator) in denominators.iter().enumerate() {
            far.push(match floor {
                None => FarLevel { level, scale: 1.0 },
                Some(floor) => FarLevel {
                    level: floor.check(self, level, denominator, start + t)?,
                    scale: 1.0 / denominator.to_f64(),
                },
            });
        }
        Ok(())
    }
}

/// `ln sum_j e^{c q_i.k_j + b_j}` of every query, unshifted, from the row factors that a pass with these shifts and
/// features has left. Time `O(n d)`.
pub(crate) fn log_row_sums<T: Real>(
    head: &Head<'_, T>,
    shifts: &Shifts<T>,
    features: Option<&dyn FeatureMap<T>>,
    rows: RowFactors<'_, T>,
) -> Result<Vec<f64>> {
    let half = |side: Side| features.map_or(0.0, |features| features.half(side));
    let (full, query_half) = (head.mask.is_none(), half(Side::Queries));
    // Without a mask the forward pass leaves out the level of the keys, and the row levels.
    let level = match biases(head, Relative::under(head.mask), shifts, half(Side::Keys))? {
        Some(biases) if full => biases.base + biases.of_keys.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        _ => 0.0,
    };
    let entry = |shift: &[T], c: usize| shift.get(c).map_or(0.0, |shift| shift.to_f64());
    let log_sum = |i: usize| {
        let mut log_sum = rows.max[i].to_f64() - rows.scale[i].to_f64().ln() + level;
        for (c, q) in head.q.row(i).iter().enumerate() {
            let q = q.to_f64();
            log_sum += head.scores.scale * q * entry(&shifts.key, c);
            if full {
                log_sum += query_half * (q - entry(&shifts.query, c)).powi(2);
            }
        }
        log_sum
    };
    collected_in_parallel((0..rows.max.len()).into_par_iter().map(log_sum), "logarithms of row sums")
}

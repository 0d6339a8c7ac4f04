//! Jensen's lower bound of a row's denominator: what tells a denominator that a feature map has not resolved.
//!
//! `sum_j e^{s_ij} >= e^{weight + c q'_i.mean}` over some keys, with `weight = ln sum_j e^{b_j}` and the mean of the
//! shifted keys under these weights.

use std::ops::Range;

use super::features::Side;
use super::pass::Pass;
use crate::error::{Error, Result};
use crate::memory::{collected, room};
use crate::numerics::real::Real;

/// A denominator below this much of its lower bound is wrong.
pub const LEAST_OF_FLOOR: f64 = 0.5;

const BOUNDS: &str = "bounds of denominators";

/// The bound over some keys.
#[derive(Debug, Clone)]
pub(crate) struct Floor {
    /// `ln sum_j e^{b_j}`.
    weight: f64,
    /// The mean of the shifted keys under these weights, times `c`.
    mean: Vec<f64>,
}

impl Floor {
    /// The logarithm of a denominator of low-rank weights relative to `level`, if it is not below the bound.
    pub fn check<T: Real>(&self, pass: &Pass<'_, T>, level: f64, denominator: T, row: usize) -> Result<f64> {
        pass.inverse(denominator, row)?;
        let log = level + pass.row_level(row) + denominator.to_f64().ln();
        let along = pass.tokens.shifts.query(pass.tokens.head, row).zip(&self.mean).map(|(q, k)| q * k);
        let bound = self.weight + along.sum::<f64>();
        if log >= bound + LEAST_OF_FLOOR.ln() {
            return Ok(log);
        }
        Err(Error::Denominator(format!(
            "row {row} of head {} has a denominator of e^{log:.3}, below Jensen's lower bound of e^{bound:.3}: {}",
            pass.tokens.head.index,
            pass.features.remedy()
        )))
    }
}

/// The bounds over the first `c + 1` of `count` ranges of keys, for every `c`, where the features have them.
pub(crate) fn floors<T: Real>(
    pass: &Pass<'_, T>,
    count: usize,
    keys: impl Fn(usize) -> Range<usize>,
) -> Result<Option<Vec<Floor>>> {
    if !pass.features.has_floor() {
        return Ok(None);
    }
    let (tokens, half) = (&pass.tokens, pass.features.half(Side::Keys));
    let (head, scale) = (tokens.head, tokens.head.scores.scale);
    let (mut level, mut weight, mut sum) = (f64::NEG_INFINITY, 0.0, vec![0.0; head.d()]);
    let mut floors = room(count, BOUNDS)?;
    for c in 0..count {
        for j in keys(c).filter(|&j| tokens.bias(j) > f64::NEG_INFINITY) {
            let k = || tokens.shifts.key(head, j);
            let bias = tokens.bias(j) - half * k().map(|k| k * k).sum::<f64>();
            if bias > level {
                let decay = (level - bias).exp();
                weight *= decay;
                sum.iter_mut().for_each(|sum| *sum *= decay);
                level = bias;
            }
            let w = (bias - level).exp();
            weight += w;
            sum.iter_mut().zip(k()).for_each(|(sum, k)| *sum += w * k);
        }
        let mean = collected(sum.iter().map(|sum| scale * sum / weight), BOUNDS)?;
        floors.push(Floor { weight: level + weight.ln(), mean });
    }
    Ok(Some(floors))
}

//! Rotary position embedding.
//!
//! At position `p`, the pair `(x_i, x_{i + d/2})` is turned by the angle `p 10000^(-2i/d)`:
//!
//! ```text
//! y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin.
//! ```
//!
//! The gradient is turned back by the same angle.

use rayon::prelude::*;

use crate::error::Result;
use crate::memory::zeroed;
use crate::numerics::real::Real;

const BASE: f64 = 10000.0;
/// Positions that share a computed angle.
const BLOCK: usize = 64;

/// Cosines and sines of the positions `0 .. n`: `(n, d)`, the cosines of a position before its sines.
#[derive(Debug)]
pub(crate) struct Rope<T> {
    table: Vec<T>,
    d: usize,
}

impl<T: Real> Rope<T> {
    /// For heads of the even width `d`; the angles are computed in float64.
    ///
    /// Sines are slow, so only every 64th position's and those of the first 64 are computed: the others follow by the
    /// addition theorem, `cos(a + b) = cos a cos b - sin a sin b` and `sin(a + b) = sin a cos b + cos a sin b`.
    pub(crate) fn new(n: usize, d: usize) -> Result<Self> {
        let half = d / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| BASE.powf(-2.0 * i as f64 / d as f64)).collect();
        let angle = |position: usize| frequencies.iter().map(move |f| (position as f64 * f).sin_cos());
        let near: Vec<(f64, f64)> = (0..BLOCK.min(n)).flat_map(angle).collect();
        let mut table = zeroed(n * d, "cosines and sines of positions")?;
        table.par_chunks_mut(BLOCK * d).enumerate().for_each(|(block, rows)| {
            let far: Vec<(f64, f64)> = angle(block * BLOCK).collect();
            for (row, near) in rows.chunks_exact_mut(d).zip(near.chunks_exact(half)) {
                let (cos, sin) = row.split_at_mut(half);
                for i in 0..half {
                    let ((sin_a, cos_a), (sin_b, cos_b)) = (far[i], near[i]);
                    cos[i] = T::of(cos_a * cos_b - sin_a * sin_b);
                    sin[i] = T::of(sin_a * cos_b + cos_a * sin_b);
                }
            }
        });
        Ok(Self { table, d })
    }

    /// Turns `x`, a head's row at `position`.
    #[inline(always)]
    pub(crate) fn turn(&self, position: usize, x: &mut [T]) {
        let (cos, sin) = self.table[position * self.d..][..self.d].split_at(self.d / 2);
        let (x1, x2) = x.split_at_mut(self.d / 2);
        for (((x1, x2), c), s) in x1.iter_mut().zip(x2).zip(cos).zip(sin) {
            (*x1, *x2) = (*x1 * *c - *x2 * *s, *x2 * *c + *x1 * *s);
        }
    }

    /// Undoes [`turn`](Self::turn), and pulls gradients back through it.
    #[inline(always)]
    pub(crate) fn turn_back(&self, position: usize, x: &mut [T]) {
        let (cos, sin) = self.table[position * self.d..][..self.d].split_at(self.d / 2);
        let (x1, x2) = x.split_at_mut(self.d / 2);
        for (((x1, x2), c), s) in x1.iter_mut().zip(x2).zip(cos).zip(sin) {
            (*x1, *x2) = (*x1 * *c + *x2 * *s, *x2 * *c - *x1 * *s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_is_by_the_angle_of_the_position_and_can_be_undone() {
        let (n, d) = (1000, 6);
        let rope = Rope::<f64>::new(n, d).expect("room for a small table");
        let x = [0.3, -1.0, 2.0, 0.7, 0.1, -0.4];
        for position in [0, 1, 63, 64, 65, 999] {
            let mut y = x;
            rope.turn(position, &mut y);
            for i in 0..3 {
                let (sin, cos) = (position as f64 * 10000f64.powf(-(i as f64) / 3.0)).sin_cos();
                // The angle's own rounding, up to 1000 half units in the last place of 1, and a few more.
                assert!((y[i] - (x[i] * cos - x[i + 3] * sin)).abs() <= 1e-12);
                assert!((y[i + 3] - (x[i + 3] * cos + x[i] * sin)).abs() <= 1e-12);
            }
            rope.turn_back(position, &mut y);
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() <= 1e-14));
        }
    }
}

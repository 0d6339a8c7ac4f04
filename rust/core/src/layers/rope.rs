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

use crate::real::Real;

const BASE: f64 = 10000.0;

/// Cosines and sines of the positions `0 .. n`: `(n, d)`, the cosines of a position before its sines.
#[derive(Debug)]
pub(crate) struct Rope<T> {
    table: Vec<T>,
    d: usize,
}

impl<T: Real> Rope<T> {
    /// For heads of the even width `d`; the angles are computed in float64.
    pub(crate) fn new(n: usize, d: usize) -> Self {
        let half = d / 2;
        let frequency: Vec<f64> = (0..half)
            .map(|i| BASE.powf(-2.0 * i as f64 / d as f64))
            .collect();
        let mut table = vec![T::ZERO; n * d];
        table
            .par_chunks_mut(d)
            .enumerate()
            .for_each(|(position, row)| {
                let (cos, sin) = row.split_at_mut(half);
                for i in 0..half {
                    let (s, c) = (position as f64 * frequency[i]).sin_cos();
                    (cos[i], sin[i]) = (T::of(c), T::of(s));
                }
            });
        Self { table, d }
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

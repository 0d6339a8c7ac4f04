//! What engines cost on the CPU, in seconds of one thread.

use super::choice::{Costs, DEGREES, RANKS};
use super::rates::Rates;
use crate::engines::landmark;
use crate::engines::polynomial::{near_keys, potential_degree};
use crate::linear::monomials;
use crate::linear::nearby::NearKeys;
use crate::linear::shifts::PREFIX;
use crate::linear::state::LARGEST_STATE;
use crate::numerics::real::Real;
use crate::problem::heads::Head;
use crate::spec::Polynomial;

/// Operations that a monomial costs in a forward pass, and in a backward one, beside those of the states that it is added
/// to or multiplied with (fitted to `cargo bench --bench flops`).
const OPERATIONS_A_MONOMIAL: [f64; 2] = [16.0, 50.0];
/// A general product, and gathering, do not reach the rate of the small one: landmarks take so much longer.
const DRAWING: f64 = 3.0;
/// Masks and powers cost as much again as the products of moments, and more.
const MOMENTS: f64 = 2.5;

/// The sizes that times depend on.
#[derive(Debug, Clone, Copy)]
struct Size {
    n: usize,
    m: usize,
    d: usize,
    d_v: usize,
    /// Queries and keys that see each other.
    pairs: f64,
    causal: bool,
    gradients: bool,
}

/// The costs of a head: of the exact engine, of `polynomial(degree)` and of landmarks.
pub(super) fn costs<T: Real>(
    head: &Head<'_, T>,
    gradients: bool,
    strict: bool,
    polynomial: impl Fn(usize) -> Polynomial,
) -> Costs {
    let (n, size) = (head.n(), Size::new(head, gradients));
    Costs {
        exact: size.exact::<T>(),
        polynomials: (1..=DEGREES).map(|degree| size.polynomial::<T>(&polynomial(degree))).collect(),
        landmarks: RANKS.map(|rank| size.landmarks::<T>(rank, landmark::near_keys(strict))).to_vec(),
        drawing: RANKS.map(|rank| size.drawing(rank)).to_vec(),
        moments: (0..=DEGREES).map(|degree| size.moments(super::rows(n), degree)).collect(),
    }
}

/// The cost of a head by the exact engine, under any mask.
pub(super) fn exact<T: Real>(head: &Head<'_, T>, gradients: bool) -> f64 {
    Size::new(head, gradients).exact::<T>()
}

impl Size {
    fn new<T: Real>(head: &Head<'_, T>, gradients: bool) -> Self {
        let (n, m, d, d_v, mask) = (head.n(), head.m(), head.d(), head.d_v(), head.mask);
        let all = n as f64 * m as f64;
        let pairs = match mask.is_plain(n, m) {
            true if mask.is_none() => all,
            true => all / 2.0,
            false => (0..n).map(|i| mask.seen(i, m).len() as f64).sum(),
        };
        Self { n, m, d, d_v, pairs, causal: !mask.is_none(), gradients }
    }

    /// Seconds of one thread for so many operations.
    fn seconds<T: Real>(flops: f64, exps: f64) -> f64 {
        let rates = Rates::of::<T>();
        flops / rates.flops + exps / rates.exps
    }

    /// Exact attention.
    fn exact<T: Real>(&self) -> f64 {
        let (d, d_v) = (self.d as f64, self.d_v as f64);
        let (mut flops, mut exps) = (2.0 * (d + d_v), 1.0);
        if self.gradients {
            flops += 2.0 * (3.0 * d + 2.0 * d_v);
            exps += 1.0;
        }
        Self::seconds::<T>(flops * self.pairs, exps * self.pairs)
    }

    /// The near pairs of a low-rank engine under a causal mask.
    fn near<T: Real>(&self, near: NearKeys) -> f64 {
        if !self.causal {
            return 0.0;
        }
        let pairs = self.n as f64 * (near.window as f64 + self.span(near));
        let one_pair = Self { pairs: 1.0, ..*self };
        pairs.min(self.pairs) * one_pair.exact::<T>()
    }

    /// The average length of the near keys beyond the window.
    fn span(&self, near: NearKeys) -> f64 {
        let (last, prefix) = (self.n.saturating_sub(1), PREFIX as f64);
        let mean_block = (last - near.start_of_query(last)) as f64 - near.window as f64;
        let of_prefix = if near.from_prefix { prefix / 2.0 * (prefix / self.n.max(1) as f64).min(1.0) } else { 0.0 };
        mean_block.max(0.0) / 2.0 + of_prefix
    }

    /// A polynomial; infinite where its monomials are too many.
    fn polynomial<T: Real>(&self, options: &Polynomial) -> f64 {
        let rank = |degree| monomials::rank(self.d, degree).filter(|r| r.saturating_mul(self.d_v + 1) <= LARGEST_STATE);
        let (Some(r), Some(potential)) = (rank(options.degree), rank(potential_degree(options))) else {
            return f64::INFINITY;
        };
        let (r, potential, e) = (r as f64, potential as f64, self.d_v as f64 + 1.0);
        let [forward, backward] = OPERATIONS_A_MONOMIAL;
        let mut flops = r * (2.0 * e + forward);
        if self.gradients {
            flops += potential * (4.0 * e + backward) + r * e;
        }
        Self::seconds::<T>(flops * (self.n + self.m) as f64, 0.0) + self.near::<T>(near_keys(options))
    }

    /// Landmarks.
    fn landmarks<T: Real>(&self, rank: usize, near: NearKeys) -> f64 {
        let (r, d, e) = (rank as f64, self.d as f64, self.d_v as f64 + 1.0);
        let (mut flops, mut exps) = (2.0 * (d + e), 1.5);
        if self.gradients {
            flops += 6.0 * d + 6.0 * e;
            exps += 3.0;
        }
        let tokens = (self.n + self.m) as f64 * r;
        Self::seconds::<T>(flops * tokens, exps * tokens) + self.near::<T>(near)
    }

    /// Drawing landmarks up to some rank, in float64 on one thread.
    fn drawing(&self, rank: usize) -> f64 {
        let (r, s) = (rank as f64, landmark::fit_size(rank) as f64);
        let flops = 4.0 * s * s * (self.d as f64 + r) + 12.0 * s * r * r + 20.0 * r * r * r;
        DRAWING * Self::seconds::<f64>(flops, 3.0 * s * s)
    }

    /// Moments of so many rows up to a degree, in float64.
    fn moments(&self, rows: usize, degree: usize) -> f64 {
        let (d, d_v) = (self.d as f64, self.d_v as f64);
        let one = 2.0 * (d_v + 1.0) + if self.gradients { 4.0 * d } else { 0.0 };
        let flops = 2.0 * (d + d_v) + one * (degree + 2) as f64;
        MOMENTS * Self::seconds::<f64>(flops * (rows * self.m) as f64, (rows * self.m) as f64)
    }
}

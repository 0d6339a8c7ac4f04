//! What this machine does in a second.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::numerics::real::{Real, vectorised};
use crate::numerics::tile::{TILE, product, view, view_mut};

/// What one thread does in a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Additions and multiplications in small matrix products.
    pub flops: f64,
    /// Exponentials.
    pub exps: f64,
}

/// Those of float32 and of float64, once they are measured or set.
static RATES: Mutex<[Option<Rates>; 2]> = Mutex::new([None; 2]);

/// Sets the rates of numbers of so many bytes, which are measured otherwise: for plans that do not depend on the machine.
pub fn set_rates(bytes: usize, rates: Rates) {
    RATES.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(bytes == 8)] = Some(rates);
}

impl Rates {
    /// Those of `T`, measured once.
    pub(super) fn of<T: Real>() -> Self {
        let mut all = RATES.lock().unwrap_or_else(PoisonError::into_inner);
        *all[usize::from(size_of::<T>() == 8)].get_or_insert_with(Self::measure::<T>)
    }

    /// The best of a few runs over tiles that stay in the cache.
    fn measure<T: Real>() -> Self {
        const SIDE: usize = TILE;
        const TURNS: usize = 12;
        let (a, b) = (vec![T::ONE; SIDE * SIDE], vec![T::of(0.5); SIDE * SIDE]);
        let mut c = vec![T::ZERO; SIDE * SIDE];
        let best = |work: &mut dyn FnMut()| {
            (0..TURNS)
                .map(|_| {
                    let start = Instant::now();
                    work();
                    start.elapsed().as_secs_f64()
                })
                .fold(f64::INFINITY, f64::min)
                .max(1e-9)
        };
        let multiply = best(&mut || {
            product(view_mut(&mut c, SIDE, SIDE), view(&a, SIDE, SIDE), view(&b, SIDE, SIDE), T::ONE);
        });
        let exponentiate = best(&mut || {
            vectorised(
                #[inline(always)]
                || c.iter_mut().for_each(|x| *x = (-*x).exp_nonpositive()),
            );
        });
        let count = (SIDE * SIDE) as f64;
        Self { flops: 2.0 * count * SIDE as f64 / multiply, exps: count / exponentiate }
    }
}

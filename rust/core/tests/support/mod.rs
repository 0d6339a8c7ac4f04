//! What the tests of layers and of the transformer share: data, central differences, and the limits.

#![allow(dead_code, reason = "each test file uses its own part")]

use lingrad_core::{Error, Result, Rows};

/// Central differences with [`STEP`] of functions with derivatives of order one: truncation about `STEP^2`, rounding
/// about `1e-16 / STEP`, each a few times 1e-10 of the gradient's norm for sums of thousands of terms.
pub const DIFFERENCES: f64 = 2e-8;
/// Relative; the same sums in float64, in another order.
pub const SAME: f64 = 1e-12;
/// Relative, in float32, for sums of any length.
pub const FLOAT32: f64 = 2e-6;

const STEP: f64 = 1e-5;

/// Reproducible numbers, uniform with variance 1.
pub fn numbers(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) as f64 / u64::MAX as f64 - 0.5) * 12f64.sqrt()
        })
        .collect()
}

/// [`numbers`] in float32.
pub fn numbers_f32(seed: u64, len: usize) -> Vec<f32> {
    numbers(seed, len).into_iter().map(|x| x as f32).collect()
}

/// A batch from contiguous data.
pub fn rows<T>(data: &[T], batch: usize, n: usize, d: usize) -> Rows<'_, T> {
    Rows::from_slice(data, batch, n, d).unwrap()
}

/// An output that shows what nobody wrote.
pub fn nan(len: usize) -> Vec<f64> {
    vec![f64::NAN; len]
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// `|a - b| <= limit |b|`, and neither holds NaN.
pub fn assert_close(what: &str, a: &[f64], b: &[f64], limit: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    let difference: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let (error, size) = (norm(&difference), norm(b));
    assert!(error <= limit * size, "{what}: difference {error:e} of {size:e}, limit {limit:e}");
}

/// `gradient` is that of `f` at `x`, by central differences in every entry.
pub fn assert_gradient(what: &str, f: impl Fn(&[f64]) -> f64, x: &[f64], gradient: &[f64]) {
    let mut at = x.to_vec();
    let differences: Vec<f64> = (0..x.len())
        .map(|i| {
            at[i] = x[i] + STEP;
            let above = f(&at);
            at[i] = x[i] - STEP;
            let below = f(&at);
            at[i] = x[i];
            (above - below) / (2.0 * STEP)
        })
        .collect();
    assert_close(what, gradient, &differences, DIFFERENCES);
}

/// `dx` is the pullback of `dy` through `f` at `x`: by central differences in every entry, and by the adjoint identity
/// `dy . (df t) = dx . t` with `df t` by central differences along random directions `t`.
pub fn assert_pullback(what: &str, f: impl Fn(&[f64]) -> Vec<f64>, x: &[f64], dy: &[f64], dx: &[f64]) {
    assert_gradient(what, |x| dot(dy, &f(x)), x, dx);
    for seed in 100..103 {
        let t = numbers(seed, x.len());
        let shifted = |by: f64| f(&x.iter().zip(&t).map(|(x, t)| x + by * t).collect::<Vec<_>>());
        let (above, below) = (shifted(STEP), shifted(-STEP));
        let along: Vec<f64> = above.iter().zip(&below).map(|(a, b)| (a - b) / (2.0 * STEP)).collect();
        let (left, right) = (dot(dy, &along), dot(dx, &t));
        let limit = DIFFERENCES * (norm(dy) * norm(&along) + norm(dx) * norm(&t));
        assert!((left - right).abs() <= limit, "{what}: dy.(df t) = {left:e}, dx.t = {right:e}, limit {limit:e}");
    }
}

/// The message of a result that must be an error, which names every one of `parts`.
pub fn assert_message<R: std::fmt::Debug>(result: Result<R>, parts: &[&str]) -> Error {
    let error = result.expect_err("an error");
    for part in parts {
        assert!(error.to_string().contains(part), "{error:?} does not name {part:?}");
    }
    error
}

/// `f` on pools of one, two and seven threads gives the same.
pub fn assert_same_on_any_threads<R: PartialEq + Send>(what: &str, f: impl Fn() -> R + Sync) {
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
    let one = on(1);
    for threads in [2, 7] {
        assert!(one == on(threads), "{what}: {threads} threads differ from one");
    }
}

//! Gradients by panels against those of small weights, which are held against central differences.

use faer::MatRef;

use super::super::activation::ActivationKind;
use super::super::heads::{Part, Projected, Shaping, project};
use super::super::rope::Rope;
use super::super::{cross_entropy, feed_forward, heads, linear};
use super::Split;
use crate::context::Context;
use crate::numerics::draws::uniform;
use crate::numerics::real::Real;
use crate::numerics::tile::view;
use crate::problem::rows::Rows;

/// Panels of some columns and chunks of some tokens, where neither ends where the weight or a sequence does; and all at
/// once.
const SPLITS: [Split; 3] = [Split { sums: 60, chunk: 90 }, Split { sums: 700, chunk: 1000 }, Split::USUAL];

/// Sums of at most 600 terms of size 1 in another order.
const LIMIT_F64: f64 = 1e-13;
const LIMIT_F32: f64 = 1e-6;

fn numbers<T: Real>(seed: u64, len: usize) -> Vec<T> {
    (0..len as u64).map(|i| T::of(2.0 * uniform(seed, i) - 1.0)).collect()
}

fn targets(tokens: usize, vocab: usize) -> Vec<u32> {
    // The first and the last word too.
    (0..tokens).map(|i| (i * 7 % vocab) as u32).collect()
}

fn nan<T: Real>(len: usize) -> Vec<T> {
    vec![T::of(f64::NAN); len]
}

/// Each of the results is within the limit of what it should be, relative to the largest entry of that; NaN is not.
fn assert_close<T: Real>(got: &[Vec<T>], want: &[Vec<T>]) {
    let limit = if size_of::<T>() == 4 { LIMIT_F32 } else { LIMIT_F64 };
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len());
        let largest = want.iter().map(|x| x.to_f64().abs()).fold(0.0, f64::max);
        for (got, want) in got.iter().zip(want) {
            let error = (got.to_f64() - want.to_f64()).abs();
            assert!(error <= limit * largest.max(1e-3), "result {i}: {got:?}, expected {want:?}");
        }
    }
}

/// Runs `by_panels` with every split, on one thread and on three: close to `want`, and of the same bits.
fn check<T: Real>(want: &[Vec<T>], by_panels: impl Fn(Split) -> Vec<Vec<T>> + Sync) {
    for split in SPLITS {
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| by_panels(split))
        };
        let got = on(1);
        assert_close(&got, want);
        assert_eq!(got, on(3), "{split:?}");
    }
}

/// Sizes `(batch, n, d, e)`: two sequences that no chunk divides, and more columns and tokens than a block and a tile.
const SIZES: [[usize; 4]; 2] = [[2, 130, 5, 37], [1, 300, 260, 530]];

fn rows<T>(data: &[T], batch: usize, n: usize, d: usize) -> Rows<'_, T> {
    Rows::from_slice(data, batch, n, d).expect("as many numbers")
}

fn linear_by_panels_is_linear<T: Real>() {
    let ctx = Context::new();
    for [batch, n, d, e] in SIZES {
        let tokens = batch * n;
        let (x, w, dy) = (numbers::<T>(1, tokens * d), numbers(2, d * e), numbers(3, tokens * e));
        let (x, w, dy) = (rows(&x, batch, n, d), view(&w, d, e), rows(&dy, batch, n, e));
        let mut want = [nan(tokens * d), nan(d * e)];
        let [dx, dw] = &mut want;
        linear::backward(&ctx, &x, w, &dy, dx, dw, None).expect("sizes that fit");
        check(&want, |split| {
            let (mut dx, mut dw) = (nan(tokens * d), nan(d * e));
            linear::backward_in_panels(&ctx, split, &x, w, &dy, &mut dx, &mut dw).expect("sizes that fit");
            vec![dx, dw]
        });
    }
}

fn feed_forward_by_panels_is_feed_forward<T: Real>() {
    let ctx = Context::new();
    for [batch, n, d, f] in SIZES {
        let (tokens, e, kind) = (batch * n, d + 2, ActivationKind::Silu);
        let (x, dy) = (numbers::<T>(1, tokens * d), numbers(2, tokens * e));
        let (w_in, w_out) = (numbers::<T>(3, d * f), numbers::<T>(4, f * e));
        let (x, dy) = (rows(&x, batch, n, d), rows(&dy, batch, n, e));
        let (w_in, w_out) = (view(&w_in, d, f), view(&w_out, f, e));
        let made = || (nan(tokens * d), nan(d * f), nan(f * e));
        let (mut dx, mut dw_in, mut dw_out) = made();
        feed_forward::backward(&ctx, &x, w_in, w_out, kind, &dy, &mut dx, &mut dw_in, &mut dw_out)
            .expect("sizes that fit");
        check(&[dx, dw_in, dw_out], |split| {
            let (mut dx, mut dw_in, mut dw_out) = made();
            let grads = (&mut dx[..], &mut dw_in[..], &mut dw_out[..]);
            feed_forward::backward_in_panels(&ctx, split, &x, w_in, w_out, kind, &dy, grads.0, grads.1, grads.2)
                .expect("sizes that fit");
            vec![dx, dw_in, dw_out]
        });
    }
}

fn cross_entropy_by_chunks_and_by_panels_is_cross_entropy<T: Real>() {
    let ctx = Context::new();
    for [batch, n, d, vocab] in SIZES {
        let tokens = batch * n;
        let (x, mut w, targets) = (numbers::<T>(1, tokens * d), numbers::<T>(2, d * vocab), targets(tokens, vocab));
        // The largest logit of a row stands in any panel, and far above the others.
        w.iter_mut().step_by(3).for_each(|w| *w = T::of(10.0 * w.to_f64()));
        let (x, w) = (rows(&x, batch, n, d), view(&w, d, vocab));
        let (mut dx, mut dw) = (nan(tokens * d), nan(d * vocab));
        let loss = cross_entropy::linear_mean(&ctx, &x, w, &targets, &mut dx, &mut dw).expect("finite losses");
        let want = [dx, dw, vec![T::of(loss)]];
        for by_panels in [cross_entropy::linear_mean_in_chunks, cross_entropy::linear_mean_in_panels] {
            check(&want, |split| {
                let (mut dx, mut dw) = (nan(tokens * d), nan(d * vocab));
                let loss = by_panels(&ctx, split, &x, w, &targets, &mut dx, &mut dw).expect("finite losses");
                vec![dx, dw, vec![T::of(loss / tokens as f64)]]
            });
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_is_an_error_by_panels_too() {
    let ctx = Context::new();
    let (n, d, vocab) = (3, 2, 40);
    let (x, w) = (numbers::<f64>(1, n * d), numbers::<f64>(2, d * vocab));
    for (at, bad) in [(0, f64::NAN), (39, f64::NAN), (20, f64::INFINITY), (39, f64::INFINITY)] {
        let mut w = w.clone();
        w[at] = bad;
        let (mut dx, mut dw) = (nan::<f64>(n * d), nan::<f64>(d * vocab));
        let (x, w) = (rows(&x, 1, n, d), view(&w, d, vocab));
        for by_panels in [cross_entropy::linear_mean_in_chunks, cross_entropy::linear_mean_in_panels] {
            assert!(by_panels(&ctx, SPLITS[0], &x, w, &targets(n, vocab), &mut dx, &mut dw).is_err(), "{bad} at {at}");
        }
    }
}

fn heads_by_panels_are_heads<T: Real>() {
    let ctx = Context::new();
    let (batch, n, d, heads, width) = (2, 130, 12, 4, 6);
    let tokens = batch * n;
    let x = numbers::<T>(1, tokens * d);
    let x = rows(&x, batch, n, d);
    let [w_q, w_v]: [Vec<T>; 2] = [2, 3].map(|seed| numbers(seed, d * heads * width));
    let [w_q, w_v]: [MatRef<'_, T>; 2] = [&w_q, &w_v].map(|w| view(w, d, heads * width));
    let rope = Rope::new(n, width).expect("room");
    // Normalised and turned; as they are; and `x` itself, which has no weight.
    let shaping = Shaping { unit: true, rope: Some(&rope) };
    let q = project(&ctx, &x, "q", w_q, heads, shaping).expect("finite rows");
    let v = project(&ctx, &x, "v", w_v, heads, Shaping::NONE).expect("finite rows");
    let own = Projected { rows: numbers(4, tokens * d), heads: 1, width: d, inverse_norms: Vec::new() };
    let [dq, dv]: [Vec<T>; 2] = [5, 6].map(|seed| numbers(seed, tokens * heads * width));
    let down = numbers::<T>(7, tokens * d);
    let parts = [
        Part { w: Some(w_q), rows: &q, rope: Some(&rope), gradient: &dq },
        Part { w: None, rows: &own, rope: None, gradient: &down },
        Part { w: Some(w_v), rows: &v, rope: None, gradient: &dv },
    ];
    let mut dx = nan(tokens * d);
    let [a, b, c] = heads::unproject(&ctx, &x, parts, &mut dx).expect("sizes that fit");
    check(&[dx, a, b, c], |split| {
        let mut dx = nan(tokens * d);
        let [a, b, c] = heads::unproject_in_panels(&ctx, split, &x, parts, &mut dx).expect("sizes that fit");
        vec![dx, a, b, c]
    });

    let e = 37;
    let dy = numbers::<T>(8, tokens * e);
    let dy = rows(&dy, batch, n, e);
    let want = heads::gradient_of_outputs(&ctx, &q, &dy).expect("sizes that fit");
    check(&[want], |split| vec![heads::gradient_of_outputs_in_panels(&ctx, split, &q, &dy).expect("sizes that fit")]);
}

#[test]
fn gradients_by_panels_are_those_of_small_weights_in_float64() {
    linear_by_panels_is_linear::<f64>();
    feed_forward_by_panels_is_feed_forward::<f64>();
    cross_entropy_by_chunks_and_by_panels_is_cross_entropy::<f64>();
    heads_by_panels_are_heads::<f64>();
}

#[test]
fn gradients_by_panels_are_those_of_small_weights_in_float32() {
    linear_by_panels_is_linear::<f32>();
    feed_forward_by_panels_is_feed_forward::<f32>();
    cross_entropy_by_chunks_and_by_panels_is_cross_entropy::<f32>();
    heads_by_panels_are_heads::<f32>();
}

//! The engines against the float64 oracle: out and every gradient, both dtypes, all options.

use std::sync::Arc;

use faer::prelude::Solve;
use faer::{ColRef, Mat};
use lingrad_core::measure::measure_error;
use lingrad_core::naive::{Naive, Options, relative_error};
use lingrad_core::plan::sampled::largest_relative_error;
use lingrad_core::spec::{Coefficients, Diagonal, Engine, Gradient, Landmark, LandmarkConstants, Polynomial, Shift};
use lingrad_core::{Attention, AttentionGrads, Context, Error, Heads, Mask, Method, Real};
use proptest::prelude::*;

/// Rounding alone separates an engine from the oracle of the same weights. float32: sums of up to 1000 terms and a
/// score of rounding error 1e-6; float64 the same with 1e-15.
const LIMIT_F32: f64 = 2e-5;
const LIMIT_F64: f64 = 1e-11;

/// Standard normal numbers times `size`, from a fixed seed.
fn normal(seed: u64, n: usize, d: usize, size: f64) -> Mat<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    Mat::from_fn(n, d, |_, _| size * ((0..12).map(|_| uniform()).sum::<f64>() - 6.0))
}

#[derive(Debug, Clone)]
struct Case {
    n: usize,
    m: usize,
    d: usize,
    dv: usize,
    /// Query heads that share one key head, and key heads.
    group: usize,
    heads: usize,
    bias: bool,
    attention: Attention,
    size: f64,
    seed: u64,
}

impl Case {
    fn new(engine: Engine, n: usize, causal: bool) -> Self {
        let attention = Attention::new(engine, Mask::causal(causal), 0.4);
        Self { n, m: n, d: 5, dv: 3, group: 1, heads: 1, bias: false, attention, size: 0.8, seed: 7 }
    }
}

/// The engine of a case.
fn engine_of(case: &Case) -> &Engine {
    match &case.attention.method {
        Method::Engine(engine) => engine,
        _ => panic!("a case without an engine"),
    }
}

struct Output<T> {
    out: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    db: Vec<T>,
}

struct Data<T> {
    q: Vec<Mat<T>>,
    k: Vec<Mat<T>>,
    v: Vec<Mat<T>>,
    dout: Vec<Mat<T>>,
    bias: Option<Vec<Vec<T>>>,
}

impl<T: Real> Data<T> {
    fn draw(case: &Case) -> Self {
        let mats = |salt: u64, count: usize, n: usize, d: usize, size: f64| -> Vec<Mat<T>> {
            (0..count)
                .map(|h| {
                    let x = normal(case.seed * 1000 + salt * 100 + h as u64, n, d, size);
                    Mat::from_fn(n, d, |i, j| T::of(x[(i, j)]))
                })
                .collect()
        };
        let bias = case.bias.then(|| {
            (0..case.heads)
                .map(|h| {
                    let x = normal(case.seed + 31 + h as u64, case.m, 1, 1.0);
                    (0..case.m).map(|j| if j % 5 == 3 { T::NEG_INFINITY } else { T::of(x[(j, 0)]) }).collect()
                })
                .collect()
        });
        Self {
            q: mats(1, case.heads * case.group, case.n, case.d, case.size),
            k: mats(2, case.heads, case.m, case.d, case.size),
            v: mats(3, case.heads, case.m, case.dv, 1.0),
            dout: mats(4, case.heads * case.group, case.n, case.dv, 1.0),
            bias,
        }
    }

    fn heads(&self) -> Heads<'_, T> {
        let (q, k, v) = (
            self.q.iter().map(|x| x.as_ref()).collect(),
            self.k.iter().map(|x| x.as_ref()).collect(),
            self.v.iter().map(|x| x.as_ref()).collect(),
        );
        let key_bias = self.bias.as_ref().map(|b| b.iter().map(|b| ColRef::from_slice(b)).collect());
        Heads { key_bias, ..Heads::new(q, k, v) }
    }
}

fn run<T: Real>(case: &Case, data: &Data<T>) -> lingrad_core::Result<Output<T>> {
    let nan = |len: usize| vec![T::of(f64::NAN); len];
    let h = case.heads * case.group;
    let mut result = Output {
        out: nan(h * case.n * case.dv),
        dq: nan(h * case.n * case.d),
        dk: nan(case.heads * case.m * case.d),
        dv: nan(case.heads * case.m * case.dv),
        db: nan(case.heads * case.m),
    };
    let (ctx, heads) = (Context::new(), data.heads());
    let saved = case.attention.forward(&ctx, &heads, &mut result.out)?;
    let dout: Vec<_> = data.dout.iter().map(|x| x.as_ref()).collect();
    let dkey_bias = case.bias.then_some(&mut result.db[..]);
    let grads = AttentionGrads { dkey_bias, ..AttentionGrads::new(&mut result.dq, &mut result.dk, &mut result.dv) };
    case.attention.backward(&ctx, &heads, &saved, &result.out, &dout, 0, grads)?;
    Ok(result)
}

/// The oracle's answer, with the same weights (exp, or the polynomial).
fn oracle(case: &Case, data: &Data<f64>, polynomial: Option<(&[f64], Gradient)>) -> Output<f64> {
    let flat =
        |x: &Mat<f64>| -> Vec<f64> { x.row_iter().flat_map(|r| r.iter().copied().collect::<Vec<_>>()).collect() };
    let mut result = Output { out: vec![], dq: vec![], dk: vec![], dv: vec![], db: vec![] };
    for kv in 0..case.heads {
        let (mut dk, mut dv, mut db) = (Mat::zeros(case.m, case.d), Mat::zeros(case.m, case.dv), vec![0.0; case.m]);
        for h in kv * case.group..(kv + 1) * case.group {
            let naive = Naive {
                q: data.q[h].as_ref(),
                k: data.k[kv].as_ref(),
                v: data.v[kv].as_ref(),
                key_bias: data.bias.as_ref().map_or(&[], |b| &b[kv]),
                mask: case.attention.scores.mask(0, 1).clone(),
                scale: case.attention.scores.scale,
                options: Options::default(),
                polynomial,
            };
            result.out.extend(flat(&naive.forward()));
            let grads = naive.backward(data.dout[h].as_ref());
            result.dq.extend(flat(&grads.dq));
            dk += grads.dk;
            dv += grads.dv;
            db.iter_mut().zip(grads.dkey_bias).for_each(|(a, b)| *a += b);
        }
        result.dk.extend(flat(&dk));
        result.dv.extend(flat(&dv));
        result.db.extend(db);
    }
    result
}

fn check<T: Real>(case: &Case, limit: f64) {
    let polynomial = match engine_of(case) {
        Engine::Exact => None,
        Engine::Polynomial(p) => {
            let a = match &p.coefficients {
                Coefficients::Given(a) => a.clone(),
                _ => (0..=p.degree).map(|j| 1.0 / (1..=j).product::<usize>() as f64).collect(),
            };
            Some((a, p.gradient))
        }
        other => panic!("the oracle knows no {other:?}"),
    };
    let expected = oracle(case, &Data::draw(case), polynomial.as_ref().map(|(a, g)| (&a[..], *g)));
    let got = run(case, &Data::<T>::draw(case)).unwrap();
    let wide = |x: &[T]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
    let mut pairs = vec![
        ("out", wide(&got.out), &expected.out),
        ("dq", wide(&got.dq), &expected.dq),
        ("dk", wide(&got.dk), &expected.dk),
        ("dv", wide(&got.dv), &expected.dv),
    ];
    if case.bias {
        pairs.push(("db", wide(&got.db), &expected.db));
    }
    for (name, got, expected) in pairs {
        // A single key leaves gradients that are exactly 0: then the error itself has to be rounding.
        let size: f64 = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error =
            if size <= 1e-12 { got.iter().map(|x| x * x).sum::<f64>().sqrt() } else { relative_error(&got, expected) };
        assert!(error <= limit, "{name}: error {error:.2e} over {limit:.0e} in {case:?}");
    }
}

fn both(case: &Case) {
    check::<f64>(case, LIMIT_F64);
    check::<f32>(case, LIMIT_F32);
}

fn polynomial(degree: usize, gradient: Gradient) -> Polynomial {
    Polynomial { degree, gradient, diagonal: Diagonal::Polynomial, ..Default::default() }
}

const SIZES: [usize; 7] = [1, 2, 63, 64, 65, 300, 1000];

#[test]
fn exact_engine_matches_the_oracle() {
    for n in SIZES {
        for causal in [false, true] {
            both(&Case::new(Engine::Exact, n, causal));
            both(&Case { bias: true, seed: 3, ..Case::new(Engine::Exact, n, false) });
        }
    }
    both(&Case { n: 40, m: 333, bias: true, group: 2, heads: 2, ..Case::new(Engine::Exact, 0, false) });
    both(&Case { n: 333, m: 40, ..Case::new(Engine::Exact, 0, false) });
    both(&Case { n: 2500, m: 2500, d: 2, dv: 2, ..Case::new(Engine::Exact, 0, true) });
}

#[test]
fn polynomial_engine_matches_the_oracle_of_the_same_polynomial() {
    for gradient in [Gradient::ClosedForm, Gradient::Consistent] {
        for causal in [false, true] {
            for n in SIZES {
                both(&Case::new(Engine::Polynomial(polynomial(2, gradient)), n, causal));
            }
            for degree in [1, 3, 4] {
                // Odd degrees need small scores for positive denominators.
                let case = Case::new(Engine::Polynomial(polynomial(degree, gradient)), 200, causal);
                both(&Case { size: 0.5, ..case });
            }
            let given =
                Polynomial { coefficients: Coefficients::Given(vec![1.5, 0.7, 0.6]), ..polynomial(2, gradient) };
            both(&Case::new(Engine::Polynomial(given), 200, causal));
        }
        let many = Case::new(Engine::Polynomial(polynomial(2, gradient)), 150, true);
        both(&Case { group: 2, heads: 3, ..many });
        let biased = Case::new(Engine::Polynomial(polynomial(2, gradient)), 0, false);
        both(&Case { n: 40, m: 333, bias: true, ..biased });
    }
}

#[test]
fn biases_reach_every_part_of_the_causal_scan() {
    // Keys 3, 8, … are removed, so every query needs an earlier key: the first three have them.
    for gradient in [Gradient::ClosedForm, Gradient::Consistent] {
        let case = Case::new(Engine::Polynomial(polynomial(2, gradient)), 700, true);
        both(&Case { bias: true, ..case });
    }
}

#[test]
fn states_are_carried_from_segment_to_segment() {
    // States of 1820 x 21 numbers: segments of 32 blocks of 112 tokens, so that there are two.
    for gradient in [Gradient::ClosedForm, Gradient::Consistent] {
        let case = Case::new(Engine::Polynomial(polynomial(4, gradient)), 4000, true);
        both(&Case { d: 12, dv: 20, size: 0.5, bias: true, ..case });
    }
    let given = Polynomial {
        coefficients: Coefficients::Given(vec![1.5, 0.7, 0.6, 0.1, 0.05]),
        ..polynomial(4, Gradient::ClosedForm)
    };
    both(&Case { d: 12, dv: 20, size: 0.3, ..Case::new(Engine::Polynomial(given), 4000, true) });
}

/// What a case gives with these biases, against the oracle with the same polynomial.
fn errors_with_bias<T: Real>(case: &Case, bias: impl Fn(usize) -> f64) -> Vec<f64> {
    let mut wide = Data::<f64>::draw(case);
    wide.bias = Some(vec![(0..case.m).map(|j| T::of(bias(j)).to_f64()).collect()]);
    let mut data = Data::<T>::draw(case);
    data.bias = Some(vec![(0..case.m).map(|j| T::of(bias(j))).collect()]);
    let polynomial = match engine_of(case) {
        Engine::Polynomial(p) => Some((&[1.0, 1.0, 0.5][..], p.gradient)),
        _ => None,
    };
    let (got, expected) = (run(case, &data).unwrap(), oracle(case, &wide, polynomial));
    let error =
        |got: &[T], expected: &[f64]| relative_error(&got.iter().map(|x| x.to_f64()).collect::<Vec<_>>(), expected);
    vec![
        error(&got.out, &expected.out),
        error(&got.dq, &expected.dq),
        error(&got.dk, &expected.dk),
        error(&got.dv, &expected.dv),
        error(&got.db, &expected.db),
    ]
}

#[test]
fn biases_of_any_range_fit_under_a_causal_mask() {
    for gradient in [Gradient::ClosedForm, Gradient::Consistent] {
        let case = Case { bias: true, ..Case::new(Engine::Polynomial(polynomial(2, gradient)), 1200, true) };
        type Bias = fn(usize) -> f64;
        let biases: [(&str, Bias); 4] = [
            ("a rising slope", |j| 0.25 * j as f64),
            ("a falling slope", |j| -0.25 * j as f64),
            ("a late peak", |j| if j == 900 { 200.0 } else { (j % 7) as f64 / 7.0 }),
            ("padding on the left", |j| if j < 300 { -1e4 } else { 0.0 }),
        ];
        for (name, bias) in biases {
            let (narrow, wide) = (errors_with_bias::<f32>(&case, bias), errors_with_bias::<f64>(&case, bias));
            assert!(wide.iter().all(|e| *e <= LIMIT_F64), "{name}: {wide:.1?}");
            // A bias of 300 beside scores of 1 leaves a score's last bits 3e-5 apart in float32.
            assert!(narrow.iter().all(|e| *e <= 1e-4), "{name}: {narrow:.1?}");
        }
    }
}

#[test]
fn what_a_removed_key_holds_is_never_seen() {
    for engine in [
        Engine::Exact,
        Engine::Polynomial(Polynomial::default()),
        Engine::Polynomial(polynomial(2, Gradient::Consistent)),
    ] {
        for causal in [false, true] {
            let case = Case { bias: true, ..Case::new(engine.clone(), 300, causal) };
            let clean = Data::<f32>::draw(&case);
            let mut dirty = Data::<f32>::draw(&case);
            for j in (3..300).step_by(5) {
                dirty.k[0][(j, 1)] = 1e30;
                dirty.v[0][(j, 0)] = -1e30;
            }
            let (a, b) = (run(&case, &clean).unwrap(), run(&case, &dirty).unwrap());
            assert!(a.out == b.out && a.dq == b.dq && a.dk == b.dk && a.dv == b.dv, "{case:?}");
        }
    }
}

#[test]
fn results_that_overflow_are_an_error() {
    for engine in [Engine::Exact, Engine::Polynomial(Polynomial::default())] {
        for causal in [false, true] {
            let case = Case::new(engine.clone(), 200, causal);
            let mut data = Data::<f32>::draw(&case);
            data.v[0] = Mat::from_fn(200, 3, |_, _| 1e30);
            data.dout[0] = Mat::from_fn(200, 3, |i, _| if i % 2 == 0 { 1e15 } else { -1e15 });
            assert!(matches!(run(&case, &data).err(), Some(Error::NonFinite(_))), "{case:?}");
        }
    }
}

#[test]
fn an_exact_window_over_everything_is_exact_attention() {
    let wide = Polynomial { window: 1000, diagonal: Diagonal::Exact, ..Default::default() };
    let case = Case { size: 3.0, bias: true, ..Case::new(Engine::Polynomial(wide), 300, true) };
    let exact =
        Case { attention: Attention { method: Engine::Exact.into(), ..case.attention.clone() }, ..case.clone() };
    let (got, expected) = (run(&case, &Data::<f64>::draw(&case)).unwrap(), oracle(&exact, &Data::draw(&exact), None));
    for (got, expected) in [
        (got.out, expected.out),
        (got.dq, expected.dq),
        (got.dk, expected.dk),
        (got.dv, expected.dv),
        (got.db, expected.db),
    ] {
        let error = relative_error(&got, &expected);
        assert!(error <= LIMIT_F64, "{error:.2e}");
    }
}

/// Loss = sum of `dout * out`, by central differences in one direction, against the gradient.
fn consistent_gradient_error(case: &Case) -> f64 {
    let data = Data::<f64>::draw(case);
    let got = run(case, &data).unwrap();
    let (direction, h) = (Data::<f64>::draw(&Case { seed: case.seed + 1, ..case.clone() }), 1e-4);
    let moved = |sign: f64| {
        let along =
            |x: &[Mat<f64>], d: &[Mat<f64>]| x.iter().zip(d).map(|(x, d)| x + faer::Scale(sign * h) * d).collect();
        let bias = data.bias.as_ref().zip(direction.bias.as_ref()).map(|(x, d)| {
            let along = |(x, d): (&f64, &f64)| if x.is_finite() { x + sign * h * d } else { *x };
            x.iter().zip(d).map(|(x, d)| x.iter().zip(d).map(along).collect()).collect()
        });
        let data = Data {
            q: along(&data.q, &direction.q),
            k: along(&data.k, &direction.k),
            v: along(&data.v, &direction.v),
            dout: data.dout.clone(),
            bias,
        };
        let out = run(case, &data).unwrap().out;
        let dout = data
            .dout
            .iter()
            .flat_map(|x| x.row_iter().flat_map(|r| r.iter().copied().collect::<Vec<_>>()).collect::<Vec<_>>());
        out.iter().zip(dout).map(|(a, b)| a * b).sum::<f64>()
    };
    let expected = (moved(1.0) - moved(-1.0)) / (2.0 * h);
    let dot = |g: &[f64], d: &[Mat<f64>]| -> f64 {
        g.iter()
            .zip(
                d.iter()
                    .flat_map(|x| x.row_iter().flat_map(|r| r.iter().copied().collect::<Vec<_>>()).collect::<Vec<_>>()),
            )
            .map(|(a, b)| a * b)
            .sum()
    };
    let mut by_gradient = dot(&got.dq, &direction.q) + dot(&got.dk, &direction.k) + dot(&got.dv, &direction.v);
    if let Some(bias) = &direction.bias {
        by_gradient +=
            got.db.iter().zip(bias.iter().flatten()).filter(|(_, d)| d.is_finite()).map(|(a, b)| a * b).sum::<f64>();
    }
    (by_gradient - expected).abs() / expected.abs()
}

#[test]
fn consistent_gradient_passes_central_differences() {
    for (causal, shift) in [(false, Shift::None), (true, Shift::None), (false, Shift::Mean)] {
        for diagonal in [Diagonal::Exact, Diagonal::Polynomial] {
            for degree in [1, 2, 3, 4] {
                let engine = Polynomial {
                    degree,
                    gradient: Gradient::Consistent,
                    diagonal,
                    shift: shift.clone(),
                    window: 20,
                    ..Default::default()
                };
                let case = Case { size: 0.5, bias: true, ..Case::new(Engine::Polynomial(engine), 300, causal) };
                let error = consistent_gradient_error(&case);
                assert!(error <= 1e-6, "{error:.2e} in {case:?}");
            }
        }
    }
    let error = consistent_gradient_error(&Case { bias: true, ..Case::new(Engine::Exact, 300, true) });
    assert!(error <= 1e-6, "exact: {error:.2e}");
}

fn error_of_out(case: &Case) -> f64 {
    let data = Data::<f64>::draw(case);
    relative_error(&run(case, &data).unwrap().out, &oracle(case, &data, None).out)
}

#[test]
fn fitted_coefficients_and_mean_shifts_lower_the_error() {
    let base = Polynomial::default();
    for causal in [false, true] {
        let taylor = Case { size: 0.7, ..Case::new(Engine::Polynomial(base.clone()), 2500, causal) };
        let mut fitted = taylor.clone();
        fitted.attention.method =
            Engine::Polynomial(Polynomial { coefficients: Coefficients::Fitted, ..base.clone() }).into();
        assert!(error_of_out(&fitted) <= 0.9 * error_of_out(&taylor), "causal = {causal}");
    }
}

#[test]
fn a_fit_to_scores_that_are_all_equal_reproduces_their_exponential() {
    let fitted = |degree| Polynomial { degree, coefficients: Coefficients::Fitted, ..Default::default() };
    for degree in [2, 4, 8] {
        for causal in [false, true] {
            let case = |p| Case { d: 2, size: 0.3, bias: true, ..Case::new(Engine::Polynomial(p), 1200, causal) };
            let mut data = Data::<f64>::draw(&case(fitted(degree)));
            data.q[0] = Mat::from_fn(1200, 2, |_, _| 0.5);
            data.k[0] = Mat::from_fn(1200, 2, |_, _| 0.5);
            let case = case(fitted(degree));
            let error = relative_error(&run(&case, &data).unwrap().out, &oracle(&case, &data, None).out);
            assert!(error <= 1e-9, "degree {degree}: {error:.2e}");
        }
    }
}

#[test]
fn fitted_coefficients_never_look_ahead() {
    let engine = Polynomial { coefficients: Coefficients::Fitted, ..Default::default() };
    let case = Case::new(Engine::Polynomial(engine), 2500, true);
    let data = Data::<f64>::draw(&case);
    let before = run(&case, &data).unwrap().out;
    for changed in [100, 1023, 1024, 1500, 2300] {
        let mut data = Data::<f64>::draw(&case);
        let later =
            |x: &Mat<f64>| Mat::from_fn(x.nrows(), x.ncols(), |i, c| x[(i, c)] * if i < changed { 1.0 } else { 0.3 });
        (data.q[0], data.k[0], data.v[0]) = (later(&data.q[0]), later(&data.k[0]), later(&data.v[0]));
        let after = run(&case, &data).unwrap().out;
        assert_eq!(before[..changed * case.dv], after[..changed * case.dv], "{changed}");
        assert_ne!(before[changed * case.dv..], after[changed * case.dv..]);
    }
}

#[test]
fn every_gradient_of_the_fitted_engine_is_near_the_exact_one() {
    for gradient in [Gradient::ClosedForm, Gradient::Consistent] {
        let engine = Polynomial { coefficients: Coefficients::Fitted, gradient, ..Default::default() };
        let case = Case { size: 0.3, bias: true, ..Case::new(Engine::Polynomial(engine), 3000, true) };
        let exact =
            Case { attention: Attention { method: Engine::Exact.into(), ..case.attention.clone() }, ..case.clone() };
        let data = Data::<f64>::draw(&case);
        let (got, expected) = (run(&case, &data).unwrap(), run(&exact, &data).unwrap());
        for (got, expected) in [
            (got.out, expected.out),
            (got.dq, expected.dq),
            (got.dk, expected.dk),
            (got.dv, expected.dv),
            (got.db, expected.db),
        ] {
            let error = relative_error(&got, &expected);
            assert!(error <= 3e-2, "{error:.2e}"); // scores of standard deviation 0.08: a lost block would show as 1
        }
    }
}

#[test]
fn a_fit_bears_biases_that_leave_early_rows_almost_no_weight() {
    // Relative to the largest bias of the prefix, the weights of the first keys are below the smallest normal number.
    let engine = Polynomial { coefficients: Coefficients::Fitted, ..Default::default() };
    let case = Case { size: 0.3, bias: true, ..Case::new(Engine::Polynomial(engine), 1500, true) };
    let exact =
        Case { attention: Attention { method: Engine::Exact.into(), ..case.attention.clone() }, ..case.clone() };
    let mut data = Data::<f64>::draw(&case);
    data.bias = Some(vec![(0..case.m).map(|j| 0.72 * j as f64).collect()]);
    let (got, expected) = (run(&case, &data).unwrap(), run(&exact, &data).unwrap());
    for (got, expected) in [(got.out, expected.out), (got.dk, expected.dk)] {
        let error = relative_error(&got, &expected);
        assert!(error <= 3e-2, "{error:.2e}");
    }
}

#[test]
fn a_mean_shift_makes_distant_keys_harmless() {
    let case = Case {
        size: 0.3,
        ..Case::new(Engine::Polynomial(Polynomial { shift: Shift::Mean, ..Default::default() }), 400, false)
    };
    let near = Data::<f64>::draw(&case);
    let mut far = Data::<f64>::draw(&case);
    far.k[0] = Mat::from_fn(case.m, case.d, |i, j| near.k[0][(i, j)] + 3.0);
    let (a, b) = (run(&case, &near).unwrap(), run(&case, &far).unwrap());
    for (a, b) in [(a.out, b.out), (a.dq, b.dq), (a.dv, b.dv)] {
        let error = relative_error(&b, &a);
        assert!(error <= 1e-10, "{error:.2e}");
    }
}

#[test]
fn one_thread_equals_many_bitwise() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let engines = [
        Engine::Exact,
        Engine::Polynomial(Polynomial::default()),
        Engine::Polynomial(polynomial(3, Gradient::Consistent)),
    ];
    for engine in engines {
        for causal in [false, true] {
            let case = Case { size: 0.4, group: 2, ..Case::new(engine.clone(), 2500, causal) };
            let data = Data::<f32>::draw(&case);
            let one = pool(1).install(|| run(&case, &data).unwrap());
            let many = pool(7).install(|| run(&case, &data).unwrap());
            assert!(one.out == many.out && one.dq == many.dq && one.dk == many.dk && one.dv == many.dv);
        }
    }
}

#[test]
fn float32_errors_do_not_grow_with_the_length() {
    let error = |n: usize, engine: Engine| {
        let case = Case { n: 256, m: n, d: 2, dv: 2, ..Case::new(engine, 0, false) };
        let got: Vec<f64> = run(&case, &Data::<f32>::draw(&case)).unwrap().out.iter().map(|x| f64::from(*x)).collect();
        let expected = run(&case, &Data::<f64>::draw(&case)).unwrap().out;
        // Averages over more keys are smaller, so the error is taken against the size of v, which is 1.
        got.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt() / (got.len() as f64).sqrt()
    };
    for engine in [Engine::Exact, Engine::Polynomial(Polynomial::default())] {
        let long = error(400_000, engine);
        assert!(long <= 2e-6, "{long:.2e}");
    }
}

#[test]
fn a_row_without_a_usable_denominator_is_an_error_that_says_what_to_do() {
    let message = |case: &Case| match run(case, &Data::<f32>::draw(case)) {
        Err(Error::Denominator(text)) => text,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("no error"),
    };
    let odd = Engine::Polynomial(polynomial(1, Gradient::Consistent));
    assert!(message(&Case { size: 4.0, ..Case::new(odd, 50, true) }).contains("Exact()"));
    let huge = Engine::Polynomial(polynomial(4, Gradient::Consistent));
    assert!(message(&Case { size: 1e9, ..Case::new(huge, 50, false) }).contains("Exact()"));
    assert!(message(&Case { size: 1e25, ..Case::new(Engine::Exact, 50, false) }).contains("overflow"));
    let case = Case::new(Engine::Exact, 10, true);
    let mut data = Data::<f64>::draw(&case);
    data.bias = Some(vec![(0..10).map(|j| if j < 2 { f64::NEG_INFINITY } else { 0.0 }).collect()]);
    for engine in [Engine::Exact, Engine::Polynomial(Polynomial::default())] {
        let mut case = Case { bias: true, ..case.clone() };
        case.attention.method = engine.into();
        assert!(matches!(run(&case, &data), Err(Error::Denominator(text)) if text.contains("no key")));
    }
}

#[test]
fn a_lone_very_negative_score_is_still_a_whole_softmax() {
    let case = Case { size: 30.0, seed: 5, ..Case::new(Engine::Polynomial(Polynomial::default()), 100, true) };
    let error = error_of_out(&case);
    assert!(error <= 1e-10, "{error:.2e}"); // 100 tokens lie in the exact window
}

#[test]
fn cancelled_work_stops_with_an_error() {
    let case = Case::new(Engine::Exact, 200, false);
    let data = Data::<f32>::draw(&case);
    let ctx = Context::new();
    ctx.cancel();
    let mut out = vec![0.0; case.n * case.dv];
    assert_eq!(case.attention.forward(&ctx, &data.heads(), &mut out).err(), Some(Error::Cancelled));
}

#[test]
fn nan_and_infinity_are_refused_by_name() {
    let case = Case { bias: true, ..Case::new(Engine::Polynomial(Polynomial::default()), 70, false) };
    type Poison = fn(&mut Data<f32>);
    let poisons: [(&str, Poison); 4] = [
        ("q", |d| d.q[0][(69, 2)] = f32::NAN),
        ("k", |d| d.k[0][(0, 0)] = f32::INFINITY),
        ("v", |d| d.v[0][(5, 1)] = f32::NEG_INFINITY),
        ("key_bias", |d| d.bias.as_mut().unwrap()[0][4] = f32::INFINITY),
    ];
    for (name, poison) in poisons {
        let mut data = Data::draw(&case);
        poison(&mut data);
        let error = run(&case, &data).err();
        assert!(matches!(&error, Some(Error::NonFinite(text)) if text.starts_with(name)), "{name}: {error:?}");
    }
}

#[test]
fn the_measured_error_is_the_true_one_on_all_rows_and_covers_it_on_a_sample() {
    for causal in [false, true] {
        let case = Case {
            group: 2,
            bias: true,
            ..Case::new(Engine::Polynomial(polynomial(2, Gradient::Consistent)), 400, causal)
        };
        let data = Data::<f64>::draw(&case);
        let got = run(&case, &data).unwrap();
        let truth = relative_error(&got.out, &oracle(&case, &data, None).out);
        let views: Vec<_> =
            got.out.chunks(case.n * case.dv).map(|x| faer::MatRef::from_row_major_slice(x, case.n, case.dv)).collect();
        let measure = |samples, seed| {
            measure_error(&Context::new(), &data.heads(), &case.attention.scores, &views, samples, seed).unwrap()
        };
        let whole = measure(10_000, 0);
        assert_eq!(whole.rows, 800);
        assert!((whole.relative - truth).abs() <= 1e-10 * truth && whole.low == whole.high);
        // 95% intervals: of 40 some 38 hold the truth; 33 or fewer has a probability below 1e-3.
        let covered = (0..40).map(|seed| measure(100, seed)).filter(|e| e.low <= truth && truth <= e.high).count();
        assert!(covered >= 33, "{covered} of 40, causal = {causal}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_shape_matches_the_oracle(
        n in 1usize..200, m in 1usize..200, d in 1usize..7, dv in 1usize..5, group in 1usize..3, heads in 1usize..3,
        bias: bool, causal: bool, degree in 0usize..4, consistent: bool, seed in 0u64..1000,
    ) {
        let gradient = if consistent { Gradient::Consistent } else { Gradient::ClosedForm };
        let engine = if degree == 0 { Engine::Exact } else { Engine::Polynomial(polynomial(degree, gradient)) };
        let attention = Attention::new(engine, Mask::causal(causal), 0.4);
        // Biased and causal, the first keys must stay: they do (key 3 is the first removed).
        let m = if causal { n } else { m };
        let case = Case { n, m, d, dv, group, heads, bias: bias && m > 1, attention, size: 0.4, seed };
        check::<f64>(&case, 1e-9); // a few rows may lie near a small denominator
    }
}

/// Constants of landmarks among points of the size of a case's queries and keys.
fn landmark_constants(case: &Case) -> LandmarkConstants {
    let (r, d, scale) = (12, case.d, case.attention.scores.scale);
    let number = |i: usize| ((i * 7919 + 13) % 1009) as f64 / 1009.0 - 0.5;
    let points = Mat::from_fn(r, d, |i, c| 2.0 * case.size * number(i * d + c));
    let kernel = Mat::from_fn(r, r, |i, j| {
        let square: f64 = (0..d).map(|c| (points[(i, c)] - points[(j, c)]).powi(2)).sum();
        (-scale.abs() / 2.0 * square).exp() + if i == j { 1e-2 } else { 0.0 }
    });
    let inverse = kernel.llt(faer::Side::Lower).unwrap().solve(Mat::<f64>::identity(r, r));
    let rows = |x: &Mat<f64>| (0..x.nrows()).flat_map(|i| (0..x.ncols()).map(move |c| x[(i, c)])).collect();
    LandmarkConstants {
        scale,
        query_shift: (0..d).map(|c| 0.1 * number(c + 90)).collect(),
        key_shift: (0..d).map(|c| 0.1 * number(c + 70)).collect(),
        balance: 1.2,
        landmarks: rows(&points),
        matrix: rows(&inverse),
    }
}

#[test]
fn gradients_with_constant_shifts_and_of_landmarks_pass_central_differences() {
    for causal in [false, true] {
        let number = |i: usize| ((i * 31 + 7) % 17) as f64 / 17.0 - 0.5;
        let case = Case { size: 0.5, bias: true, ..Case::new(Engine::Exact, 300, causal) };
        let shifted = Polynomial {
            gradient: Gradient::Consistent,
            shift: Shift::Given((0..case.d).map(number).collect(), (0..case.d).map(|c| number(c + 40)).collect()),
            window: 20,
            ..Default::default()
        };
        let constants = Some(Arc::new(landmark_constants(&case)));
        for engine in [Engine::Polynomial(shifted), Engine::Landmark(Landmark { rank: 12, seed: 0, constants })] {
            let case =
                Case { attention: Attention { method: engine.into(), ..case.attention.clone() }, ..case.clone() };
            let error = consistent_gradient_error(&case);
            assert!(error <= 1e-6, "{error:.2e} in {case:?}");
        }
    }
}

#[test]
fn many_landmarks_give_exact_attention() {
    for causal in [false, true] {
        let engine = Engine::Landmark(Landmark { rank: 512, seed: 3, constants: None });
        let case = Case { size: 0.6, bias: true, ..Case::new(engine, 1500, causal) };
        let data = Data::<f64>::draw(&case);
        let exact =
            Case { attention: Attention { method: Engine::Exact.into(), ..case.attention.clone() }, ..case.clone() };
        let (got, expected) = (run(&case, &data).unwrap(), oracle(&exact, &data, None));
        let errors = [
            relative_error(&got.out, &expected.out),
            relative_error(&got.dq, &expected.dq),
            relative_error(&got.dk, &expected.dk),
            relative_error(&got.dv, &expected.dv),
        ];
        assert!(errors.iter().all(|&error| error <= 0.05), "causal = {causal}: {errors:?}");
    }
}

#[test]
fn a_degree_beyond_all_polynomials_is_an_argument_error() {
    let x = normal(1, 4, 1, 0.5);
    let heads = Heads::new(vec![x.as_ref()], vec![x.as_ref()], vec![x.as_ref()]);
    let given = Coefficients::Given(vec![1.0; 3]);
    for (degree, coefficients) in [
        (usize::MAX, Coefficients::Taylor),
        (usize::MAX, given),
        (1 << 31, Coefficients::Taylor),
        (8000, Coefficients::Fitted),
    ] {
        for gradient in [Gradient::ClosedForm, Gradient::Consistent] {
            let coefficients = coefficients.clone();
            let engine = Engine::Polynomial(Polynomial { degree, coefficients, gradient, ..Default::default() });
            let attention = Attention::new(engine, Mask::NONE, 1.0);
            let result = attention.forward(&Context::new(), &heads, &mut [0.0; 4]);
            assert!(matches!(result, Err(Error::Argument(_))), "degree {degree}: {result:?}");
        }
    }
}

#[test]
fn nothing_is_known_of_the_error_of_a_polynomial_of_a_huge_degree() {
    let taylor = |degree: usize| (0..=degree).scan(1.0, |a, j| Some(std::mem::replace(a, *a / (j + 1) as f64)));
    let error = |degree: usize| largest_relative_error(&taylor(degree).collect::<Vec<f64>>(), 1.0);
    assert!(error(64) < 1e-14);
    assert_eq!(error(1 << 16), f64::INFINITY);
}

//! The exact engine under every mask: its results, their measured errors and their bits.

use faer::{ColRef, Mat, MatRef};

use super::{Naive, Options};
use crate::attention::Attention;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::measure::{ErrorEstimate, measure_error};
use crate::numerics::draws::uniform;
use crate::numerics::real::Real;
use crate::numerics::tile::TILE;
use crate::plan::report::HeadReport;
use crate::problem::grads::{AttentionGrads, BiasGrads};
use crate::problem::heads::Heads;
use crate::problem::scores::Mask;
use crate::spec::{Auto, Diagonal, Engine, Landmark, Polynomial};

const D: usize = 5;
const D_V: usize = 3;
const SCALE: f64 = 0.4;
/// Query heads, which share one key head.
const GROUP: usize = 2;

/// Sums of at most 1800 terms and scores of up to 20, whose rounding the exponential passes on: measured below 1e-13.
const LIMIT_F64: f64 = 1e-12;
/// The same for float32: the largest error of out and dv here is 4e-7, that of the others, whose terms cancel, 2.7e-6.
const LIMIT_F32: f64 = 5e-6;

/// Tokens at which tiles end, and those of other engines.
const SIZES: [usize; 9] = [1, 7, 63, 64, 65, TILE - 1, TILE, TILE + 1, 200];

fn window(offset: isize, width: usize) -> Mask {
    Mask::band(true, offset, Some(width - 1), None)
}

fn segments(starts: impl IntoIterator<Item = usize>, causal: bool) -> Mask {
    Mask::causal(causal).packed(starts.into_iter().collect::<Vec<_>>().into())
}

fn causal(offset: isize) -> Mask {
    Mask::band(true, offset, None, None)
}

/// Every kind of mask for `n` queries, with its keys.
fn masks(n: usize) -> Vec<(Mask, usize)> {
    let mut all: Vec<_> = SIZES.iter().map(|&m| (Mask::NONE, m)).collect();
    for offset in [0, 1, 7, 64, TILE as isize, 200] {
        let m = n + offset as usize;
        all.push((causal(offset), m));
        all.extend([1, 2, 64, 65, TILE, 1000].map(|width| (window(offset, width), m)));
        // Fewer keys, or more, than positions; and windows that see later keys.
        all.extend([m.div_ceil(2), m + 70].map(|m| (causal(offset), m)));
        all.extend(
            [(Some(3), Some(70)), (None, Some(5)), (Some(120), None)]
                .map(|(l, r)| (Mask::band(false, offset, l, r), m)),
        );
    }
    for causal in [false, true] {
        // One segment, segments of one token, across and at the ends of tiles, and all lengths from 1 on.
        let cut = |starts: &[usize]| segments(starts.iter().copied().filter(|&start| start < n), causal);
        let triangles = (0..).map(|i| i * (i + 1) / 2).take_while(|&start| start < n);
        all.extend(
            [cut(&[0]), cut(&[0, 1, 2, 60, 61, 130]), cut(&[0, TILE]), cut(&[0, 64, TILE - 1, TILE + 1])]
                .map(|mask| (mask, n)),
        );
        all.extend([segments(0..n, causal), segments(triangles, causal)].map(|mask| (mask, n)));
    }
    all
}

/// A call on numbers of variance 1. Where it is biased, a third of the keys weigh next to nothing beside the others, and
/// every fifth is removed.
#[derive(Debug, Clone)]
struct Call {
    mask: Mask,
    n: usize,
    m: usize,
    biased: bool,
}

struct Arrays<T> {
    q: Vec<Mat<T>>,
    k: Mat<T>,
    v: Mat<T>,
    bias: Option<Vec<T>>,
    dout: Vec<Mat<T>>,
}

/// `out`, and the gradients by name.
type Results<T> = [(&'static str, Vec<T>); 5];

impl Call {
    fn new((mask, m): (Mask, usize), n: usize, biased: bool) -> Self {
        mask.check(n, m).expect("sizes that fit");
        Self { mask, n, m, biased }
    }

    /// The arrays, of numbers that float32 holds exactly: both types have the same ones.
    fn arrays<T: Real>(&self) -> Arrays<T> {
        let number = |array: u64, at: usize| 12f64.sqrt() * (uniform(array, at as u64) - 0.5);
        let rows = |array: u64, n: usize, d: usize| {
            Mat::from_fn(n, d, |i, c| T::of(f64::from(number(array, i * d + c) as f32)))
        };
        // No key is removed that some query sees alone; every other query sees more keys than removed ones.
        let removed = |j: usize| {
            let seen_alone = |i: usize| self.mask.seen(i, self.m) == (j..j + 1);
            j % 5 == 3 && !(0..self.n).any(seen_alone)
        };
        let bias = |j: usize| match j {
            j if removed(j) => f64::NEG_INFINITY,
            j => f64::from(number(9, j) as f32) - if j % 3 == 0 { 20.0 } else { 0.0 },
        };
        Arrays {
            q: (0..GROUP as u64).map(|h| rows(10 + h, self.n, D)).collect(),
            k: rows(2, self.m, D),
            v: rows(3, self.m, D_V),
            bias: self.biased.then(|| (0..self.m).map(|j| T::of(bias(j))).collect()),
            dout: (0..GROUP as u64).map(|h| rows(20 + h, self.n, D_V)).collect(),
        }
    }

    fn attention(&self, engine: Engine) -> Attention {
        Attention::new(engine, self.mask.clone(), SCALE)
    }

    /// The exact engine's results, in arrays that held NaN before, and its reports of errors measured on so many tokens.
    fn run<T: Real>(&self, arrays: &Arrays<T>, samples: usize) -> Result<(Results<T>, Vec<HeadReport>)> {
        let nan = |len: usize| vec![T::of(f64::NAN); len];
        let (mut out, mut dq) = (nan(GROUP * self.n * D_V), nan(GROUP * self.n * D));
        let (mut dk, mut dv, mut db) = (nan(self.m * D), nan(self.m * D_V), nan(self.m));
        let (ctx, heads, attention) = (Context::new(), arrays.heads(), self.attention(Engine::Exact));
        let saved = attention.forward(&ctx, &heads, &mut out)?;
        let dout: Vec<_> = arrays.dout.iter().map(Mat::as_ref).collect();
        let grads = AttentionGrads { dkey_bias: Some(&mut db), ..AttentionGrads::new(&mut dq, &mut dk, &mut dv) };
        let reports = attention.backward(&ctx, &heads, &saved, &out, &dout, samples, grads)?;
        Ok(([("out", out), ("dq", dq), ("dk", dk), ("dv", dv), ("dkey_bias", db)], reports))
    }

    fn oracle(&self) -> Results<f64> {
        let arrays = self.arrays::<f64>();
        let flat =
            |x: &Mat<f64>| x.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<_>>()).collect::<Vec<_>>();
        let (mut out, mut dq) = (Vec::new(), Vec::new());
        let (mut dk, mut dv, mut db) = (Mat::zeros(self.m, D), Mat::zeros(self.m, D_V), vec![0.0; self.m]);
        for (q, dout) in arrays.q.iter().zip(&arrays.dout) {
            let naive = Naive {
                q: q.as_ref(),
                k: arrays.k.as_ref(),
                v: arrays.v.as_ref(),
                key_bias: arrays.bias.as_deref().unwrap_or_default(),
                mask: self.mask.clone(),
                scale: SCALE,
                options: Options::default(),
                polynomial: None,
            };
            out.extend(flat(&naive.forward()));
            let grads = naive.backward(dout.as_ref());
            dq.extend(flat(&grads.dq));
            dk += grads.dk;
            dv += grads.dv;
            db.iter_mut().zip(grads.dkey_bias).for_each(|(sum, x)| *sum += x);
        }
        [("out", out), ("dq", dq), ("dk", flat(&dk)), ("dv", flat(&dv)), ("dkey_bias", db)]
    }

    fn check<T: Real>(&self, oracle: &Results<f64>, limit: f64) {
        let (got, _) = self.run(&self.arrays::<T>(), 0).expect("every row sees a key");
        for ((name, got), (_, want)) in got.iter().zip(oracle) {
            let got: Vec<f64> = got.iter().map(|x| x.to_f64()).collect();
            let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            // Where one key has nearly all of a row's weight, terms of size 1 cancel in its gradient, and rounding stays:
            // that of one row for each query, and for each key that of the rows that weigh it.
            let rows = if name.starts_with("dk") { (GROUP * self.n).div_ceil(self.m) } else { 1 };
            let least = ((want.len() * rows) as f64).sqrt() / 8.0;
            let difference: Vec<f64> = got.iter().zip(want).map(|(got, want)| got - want).collect();
            let error = norm(&difference) / norm(want).max(least);
            assert!(error <= limit, "{name}: error {error:.2e} over {limit:.0e} in {self:?}");
        }
    }
}

impl<T: Real> Arrays<T> {
    fn heads(&self) -> Heads<'_, T> {
        let key_bias = self.bias.as_ref().map(|bias| vec![ColRef::from_slice(bias)]);
        let q = self.q.iter().map(Mat::as_ref).collect();
        Heads { key_bias, ..Heads::new(q, vec![self.k.as_ref()], vec![self.v.as_ref()]) }
    }
}

fn calls(n: usize) -> impl Iterator<Item = Call> {
    masks(n).into_iter().flat_map(move |mask| [false, true].map(|biased| Call::new(mask.clone(), n, biased)))
}

/// What takes several squares of the backward pass.
fn long_calls() -> Vec<Call> {
    let n = 700;
    let masks = [
        causal(1100),
        window(0, 1),
        window(500, 350),
        segments([0, 1, 3, 350, 672, 673], false),
        segments([0, 250, 672, 699], true),
    ];
    masks.map(|mask| Call::new(with_keys(mask, n), n, true)).into()
}

/// What takes more than one task of measured rows, and of measured keys.
fn longer_calls() -> Vec<Call> {
    let n = 3700;
    let masks = [window(200, 65), segments([0, 1, 3600], false), segments([0, 1700, 3584], true)];
    masks.map(|mask| Call::new(with_keys(mask, n), n, true)).into()
}

/// A mask and its keys, for `n` queries.
fn with_keys(mask: Mask, n: usize) -> (Mask, usize) {
    let offset = mask.upper.unwrap_or(0) as usize;
    (mask, n + offset)
}

#[test]
fn exact_attention_and_its_gradients_match_the_oracle_under_every_mask() {
    for call in SIZES.into_iter().flat_map(calls).chain(long_calls()) {
        let oracle = call.oracle();
        call.check::<f64>(&oracle, LIMIT_F64);
        call.check::<f32>(&oracle, LIMIT_F32);
    }
}

#[test]
fn results_have_the_same_bits_for_any_number_of_threads_under_every_mask() {
    let on = |threads: usize, call: &Call| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| call.run(&call.arrays::<f32>(), 0)).expect("every row sees a key").0
    };
    for call in calls(200).chain(long_calls()) {
        let (one, two) = (on(1, &call), on(2, &call));
        for ((name, one), (_, two)) in one.iter().zip(&two) {
            assert!(one.iter().zip(two).all(|(one, two)| one.to_bits() == two.to_bits()), "{name} in {call:?}");
        }
    }
}

#[test]
fn a_row_whose_keys_are_all_removed_is_an_error_that_names_it() {
    // The keys of row 130: by a window that holds removed ones alone, by its segment, and by all that come before.
    for (mask, m, removed) in [
        (window(0, 2), 200, 129..131),
        (window(50, 1), 250, 180..181),
        (segments([0, 130, 131], false), 200, 130..131),
        (segments([0, 120, 180], true), 200, 120..131),
        (causal(5), 205, 0..136),
    ] {
        let call = Call::new((mask, m), 200, true);
        let mut arrays = call.arrays::<f64>();
        arrays.bias = Some((0..m).map(|j| if removed.contains(&j) { f64::NEG_INFINITY } else { 0.0 }).collect());
        let first = (0..200).find(|&i| call.mask.seen(i, m).all(|j| removed.contains(&j))).expect("such a row");
        let Err(Error::Denominator(text)) = call.run(&arrays, 0) else { panic!("no such error in {call:?}") };
        assert!(text.contains(&format!("row {first} of head")) && text.contains("no key to attend to"), "{text}");
    }
}

#[test]
fn measured_errors_of_exact_results_are_rounding_and_those_of_others_are_found_under_every_mask() {
    let rounding = |error: ErrorEstimate| error.relative <= 1e-11;
    for call in calls(130).chain(long_calls()).chain(longer_calls()) {
        let arrays = call.arrays::<f64>();
        let (results, reports) =
            call.run(&arrays, if call.n > 700 { 100 } else { usize::MAX }).expect("every row sees a key");
        let single = (0..call.n).all(|i| call.mask.seen(i, call.m).len() == 1);
        for errors in reports.iter().map(|report| &report.errors) {
            let measured = [errors.out, errors.dv].map(|error| error.expect("a measurement"));
            assert!(measured.into_iter().all(rounding), "{measured:?} in {call:?}");
            let measured = [errors.dq, errors.dk].map(|error| error.expect("a measurement"));
            assert!(single || measured.into_iter().all(rounding), "{measured:?} in {call:?}");
        }
        let doubled: Vec<f64> = results[0].1.iter().map(|x| 2.0 * x).collect();
        let views: Vec<_> =
            doubled.chunks(call.n * D_V).map(|x| MatRef::from_row_major_slice(x, call.n, D_V)).collect();
        let scores = call.attention(Engine::Exact).scores;
        let error = measure_error(&Context::new(), &arrays.heads(), &scores, &views, 1000, 0).expect("rows");
        // A point where all rows are drawn.
        let (low, high) = (error.low - 1e-11, error.high + 1e-11);
        assert!(low <= 1.0 && 1.0 <= high && error.relative < 1.1, "{error:?} in {call:?}");
    }
}

fn low_rank_engines() -> [Engine; 3] {
    let landmark = Landmark { rank: 8, seed: 0, constants: None };
    let polynomial = Polynomial { diagonal: Diagonal::Polynomial, ..Polynomial::default() };
    [Engine::Polynomial(Polynomial::default()), Engine::Polynomial(polynomial), Engine::Landmark(landmark)]
}

#[test]
fn low_rank_engines_refuse_masks_that_they_do_not_have() {
    for call in calls(65) {
        let served = call.mask.lower.is_none();
        for engine in low_rank_engines() {
            let mut out = vec![0.0; GROUP * call.n * D_V];
            let arrays = call.arrays::<f64>();
            let result = call.attention(engine).forward(&Context::new(), &arrays.heads(), &mut out);
            // Eight landmarks need not resolve a head, which is another error.
            match result {
                Err(Error::Argument(text)) => {
                    assert!(!served && text.contains("window") && text.contains("Exact()"), "{text}");
                }
                _ => assert!(served, "{call:?}"),
            }
        }
    }
}

#[test]
fn a_tolerance_is_met_by_the_exact_engine_under_masks_that_no_other_has() {
    // Scores that a polynomial of degree 1 follows, at a length where it would be much cheaper.
    let n = 6000;
    for (mask, m) in [
        (causal(3), n + 3),
        (window(0, 3000), n),
        (window(9, n), n + 9),
        (segments([0], true), n),
        (segments([0, 10], false), n),
    ] {
        let row = |i: usize, c: usize| 0.01 * (uniform(1, (2 * i + c) as u64) - 0.5);
        let (q, k) = (Mat::from_fn(n, 2, row), Mat::from_fn(m, 2, row));
        let v = Mat::from_fn(m, 1, |j, _| 1.0 + uniform(2, j as u64));
        let heads = Heads::new(vec![q.as_ref()], vec![k.as_ref()], vec![v.as_ref()]);
        let auto = Auto { tol: 1e-2, gradients: false, strict_causal: false, seed: 0 };
        let attention = Attention { method: crate::Method::Auto(auto), ..Attention::new(Engine::Exact, mask, 1.0) };
        let mut out = vec![f64::NAN; n];
        let saved = attention.forward(&Context::new(), &heads, &mut out).expect("exact attention");
        let report = &saved.reports[0];
        assert!(report.plan.engine == Engine::Exact && report.missed.is_none(), "{report:?}");
        assert!(report.plan.reason.starts_with("no plan is made for"), "{report:?}");
    }
}

#[test]
fn queries_and_keys_that_do_not_fit_a_mask_are_refused() {
    let call = Call::new((Mask::NONE, 9), 7, false);
    let arrays = call.arrays::<f64>();
    for mask in [segments([0], true), segments([0, 7], false)] {
        let attention = Attention::new(Engine::Exact, mask, SCALE);
        let result = attention.forward(&Context::new(), &arrays.heads(), &mut vec![0.0; GROUP * 7 * D_V]);
        assert!(matches!(result, Err(Error::Shape(_) | Error::Argument(_))), "{:?}", attention.scores.masks);
    }
}

/// Numbers of variance 1, or what else comes of them.
fn numbers<T>(array: u64, n: usize, m: usize, of: impl Fn(f64) -> T) -> Mat<T> {
    Mat::from_fn(n, m, |i, j| of(12f64.sqrt() * (uniform(array, (i * m + j) as u64) - 0.5)))
}

#[test]
fn caps_arrays_of_pairs_and_sinks_match_the_oracle_and_so_do_their_gradients() {
    // There are tiles of fewer tokens than others; the last rows and the first keys of the second size see nothing of each other.
    for (n, m, mask) in [(7, 9, Mask::NONE), (130, 150, window(3, 100)), (113, 113, causal(0))] {
        let [q, k] = [numbers(1, n, D, |x| x), numbers(2, m, D, |x| x)];
        let [v, dout] = [numbers(3, m, D_V, |x| x), numbers(4, n, D_V, |x| x)];
        let allowed = numbers(5, n, m, |x| x < 0.8);
        let bias = numbers(6, n, m, |x| if x > 1.6 { f64::NEG_INFINITY } else { x });
        let (cap, sink) = (0.9, 0.3);
        let options = Options {
            softcap: Some(cap),
            allowed: Some(allowed.as_ref()),
            bias: Some(bias.as_ref()),
            sink: Some(sink),
        };
        let (q, k, v) = (q.as_ref(), k.as_ref(), v.as_ref());
        let naive = Naive { q, k, v, key_bias: &[], mask: mask.clone(), scale: SCALE, options, polynomial: None };
        let (want, grads) = (naive.forward(), naive.backward(dout.as_ref()));

        let mut attention = Attention::new(Engine::Exact, mask, SCALE);
        attention.scores.softcap = Some(cap);
        let heads = Heads {
            allowed: Some(vec![allowed.as_ref()]),
            bias: Some(vec![bias.as_ref()]),
            sinks: Some(vec![sink]),
            ..Heads::new(vec![q], vec![k], vec![v])
        };
        let nan = |len: usize| vec![f64::NAN; len];
        let (mut out, mut dq, mut dk, mut dv) = (nan(n * D_V), nan(n * D), nan(m * D), nan(m * D_V));
        let (mut dbias, mut dsinks) = (vec![0.0; n * m], nan(1));
        let ctx = Context::new();
        let saved = attention.forward(&ctx, &heads, &mut out).expect("a sink");
        let places = BiasGrads { data: &mut dbias, offsets: &[0], row_stride: m, col_stride: 1 };
        let all = AttentionGrads {
            dbias: Some(places),
            dsinks: Some(&mut dsinks),
            ..AttentionGrads::new(&mut dq, &mut dk, &mut dv)
        };
        attention.backward(&ctx, &heads, &saved, &out, &[dout.as_ref()], 0, all).expect("gradients");
        for (name, got, want) in [
            ("out", &out, &want),
            ("dq", &dq, &grads.dq),
            ("dk", &dk, &grads.dk),
            ("dv", &dv, &grads.dv),
            ("dbias", &dbias, &grads.dbias),
            ("dsinks", &dsinks, &Mat::full(1, 1, grads.dsink)),
        ] {
            let want: Vec<f64> = want.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<_>>()).collect();
            let error = super::relative_error(got, &want);
            assert!(error <= LIMIT_F64, "{name}: error {error:.2e} for n = {n}, m = {m}");
        }
    }
}

#[test]
fn gradients_of_pairs_that_share_a_number_but_by_a_stride_of_0_are_refused() {
    let call = Call::new((Mask::NONE, 9), 7, false);
    let arrays = call.arrays::<f64>();
    let bias = Mat::<f64>::zeros(7, 9);
    let heads = Heads { bias: Some(vec![bias.as_ref(); GROUP]), ..arrays.heads() };
    let attention = call.attention(Engine::Exact);
    let mut out = vec![0.0; GROUP * 7 * D_V];
    let saved = attention.forward(&Context::new(), &heads, &mut out).expect("rows");
    let (mut dq, mut dk, mut dv) = (vec![0.0; GROUP * 7 * D], vec![0.0; 9 * D], vec![0.0; 9 * D_V]);
    let mut data = vec![0.0; 1000];
    let dbias = Some(BiasGrads { data: &mut data, offsets: &[0, 0], row_stride: 8, col_stride: 1 });
    let grads = AttentionGrads { dbias, ..AttentionGrads::new(&mut dq, &mut dk, &mut dv) };
    let dout: Vec<_> = arrays.dout.iter().map(Mat::as_ref).collect();
    let result = attention.backward(&Context::new(), &heads, &saved, &out, &dout, 0, grads);
    assert!(matches!(result, Err(Error::Argument(_))), "{result:?}");
}

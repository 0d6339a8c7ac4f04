//! Useful flop/s of every engine, as a share of the rate at which this machine multiplies two large square matrices.
//!
//! Both are measured in the same run, turn by turn, and medians are taken: so that a regression shows as a ratio,
//! whatever the machine and its load. Useful are the multiplications and additions that the formulas ask for, once
//! each: not what is computed again, and not those of features, exponentials and divisions. With `r` features, values
//! extended to `e = dv + 1` columns and `pairs` exact scores:
//!
//! - exact: forward `2 (d + dv) pairs`, backward `2 (3 d + 2 dv) pairs`;
//! - polynomial: forward `4 n r e`; backward, `8 n r e` for the consistent gradient, and `8 n r' e + 2 n r e` for the
//!   closed form, whose state of `r'` features, of one degree more, is another; causal, the exact near pairs besides.
//!
//! `cargo bench --bench flops -- [words]` runs the cases whose names hold all the words.
#![allow(missing_docs)]

use std::time::Instant;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, Par};
use lingrad_benches::{Head, numbers};
use lingrad_core::spec::{Engine, Gradient, Polynomial};
use lingrad_core::{Attention, AttentionGrads, Context, Mask, MatRef};
use rayon::prelude::*;

/// Sides of the square product.
const SIDE: usize = 2048;
const ROUNDS: usize = 7;
/// Keys that a query meets exactly in the polynomial engine: the window, and half a block on average.
const NEAR: f64 = 64.0 + 56.5;

struct Case {
    engine: &'static str,
    n: usize,
    d: usize,
    degree: usize,
    gradient: Gradient,
    causal: bool,
}

impl Case {
    fn name(&self) -> String {
        let word = if self.causal { "causal" } else { "full" };
        let gradient = if self.gradient == Gradient::Consistent { "consistent" } else { "closed_form" };
        match self.engine {
            "exact" => format!("exact n={} d={} {word}", self.n, self.d),
            _ => format!("polynomial g={} {gradient} n={} d={} {word}", self.degree, self.n, self.d),
        }
    }

    fn attention(&self) -> Attention {
        let engine = match self.engine {
            "exact" => Engine::Exact,
            _ => Engine::Polynomial(Polynomial { degree: self.degree, gradient: self.gradient, ..Default::default() }),
        };
        Attention::new(engine, Mask::causal(self.causal), (self.d as f64).powf(-0.5))
    }

    /// Useful flops, forward and backward.
    fn flops(&self) -> [f64; 2] {
        let (n, d) = (self.n as f64, self.d as f64);
        let exact = |pairs: f64| [4.0 * d * pairs, 10.0 * d * pairs];
        if self.engine == "exact" {
            return exact(if self.causal { n * (n + 1.0) / 2.0 } else { n * n });
        }
        let rank = |degree: usize| (1..=degree).fold(1.0, |r, j| r * (d + j as f64) / j as f64);
        let (r, e) = (rank(self.degree), d + 1.0);
        let backward = match self.gradient {
            Gradient::Consistent => 8.0 * r,
            Gradient::ClosedForm => 8.0 * rank(self.degree + 1) + 2.0 * r,
        };
        let near = exact(if self.causal { n * NEAR } else { 0.0 });
        [4.0 * n * r * e + near[0], n * backward * e + near[1]]
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for causal in [false, true] {
        for d in [16, 64] {
            cases.push(Case { engine: "exact", n: 8192, d, degree: 0, gradient: Gradient::ClosedForm, causal });
        }
        for (n, d, degree, gradient) in [
            (40_960, 12, 2, Gradient::Consistent),
            (40_960, 12, 2, Gradient::ClosedForm),
            (65_536, 16, 2, Gradient::Consistent),
            (65_536, 16, 2, Gradient::ClosedForm),
            (65_536, 64, 2, Gradient::Consistent),
            (16_384, 16, 4, Gradient::Consistent),
            (4096, 16, 4, Gradient::ClosedForm),
        ] {
            cases.push(Case { engine: "polynomial", n, d, degree, gradient, causal });
        }
    }
    cases
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn timed(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// `c = a b`, each thread so many columns.
fn multiply(c: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let columns = SIDE.div_ceil(rayon::current_num_threads());
    c.par_chunks_mut(columns * SIDE).enumerate().for_each(|(part, c)| {
        let count = c.len() / SIDE;
        let c = MatMut::from_column_major_slice_mut(c, SIDE, count);
        matmul(c, Accum::Replace, a, b.subcols(part * columns, count), 1.0, Par::Seq);
    });
}

fn run(case: &Case) {
    let (n, d) = (case.n, case.d);
    let side = [5, 6].map(|seed| numbers(seed, SIDE * SIDE, 1.0));
    let [a, b] = side.each_ref().map(|x| MatRef::from_column_major_slice(x, SIDE, SIDE));
    let mut square = vec![0f32; SIDE * SIDE];
    let head = Head::new(n, d);
    let (heads, dout) = (head.heads(), head.dout());
    let (ctx, attention) = (Context::new(), case.attention());
    let [mut out, mut dq, mut dk, mut dv] = std::array::from_fn(|_| vec![0f32; n * d]);
    let mut times: [Vec<f64>; 3] = Default::default();
    for round in 0..=ROUNDS {
        let product = timed(|| multiply(&mut square, a, b));
        let mut saved = None;
        let forward = timed(|| saved = Some(attention.forward(&ctx, &heads, &mut out).unwrap()));
        let backward = timed(|| {
            let grads = AttentionGrads::new(&mut dq, &mut dk, &mut dv);
            attention.backward(&ctx, &heads, saved.as_ref().unwrap(), &out, &dout, 0, grads).unwrap();
        });
        if round > 0 {
            times.iter_mut().zip([product, forward, backward]).for_each(|(times, time)| times.push(time));
        }
    }
    let both = median(times[1].iter().zip(&times[2]).map(|(f, b)| f + b).collect());
    let [product, forward, backward] = times.map(median);
    let rate = 2.0 * (SIDE as f64).powi(3) / product;
    let [flops_forward, flops_backward] = case.flops();
    println!(
        "{:<56} {:>8.1} {:>8.1} {:>6.0} {:>6.0} {:>6.2} {:>6.2} {:>6.2}",
        case.name(),
        forward * 1e3,
        backward * 1e3,
        rate / 1e9,
        (flops_forward + flops_backward) / both / 1e9,
        flops_forward / forward / rate,
        flops_backward / backward / rate,
        (flops_forward + flops_backward) / both / rate,
    );
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    println!(
        "{:<56} {:>8} {:>8} {:>6} {:>6} {:>6} {:>6} {:>6}",
        "", "fwd ms", "bwd ms", "square", "GF/s", "fwd", "bwd", "both"
    );
    for case in cases() {
        let name = case.name();
        if words.iter().all(|word| name.split(' ').any(|part| part == word)) {
            run(&case);
        }
    }
}

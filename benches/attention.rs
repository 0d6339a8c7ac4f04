//! Forward and backward of both engines, one head, float32, over length, width, degree and causality.
//!
//! Queries and keys have entries of standard deviation `d^(-1/2)`, so that scores are small: of standard deviation
//! `1/d`. Throughput is in tokens.
#![allow(missing_docs)]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lingrad_benches::Head;
use lingrad_core::spec::{Engine, Gradient, Polynomial};
use lingrad_core::{Attention, AttentionGrads, Context, Mask};

struct Case {
    name: String,
    n: usize,
    d: usize,
    engine: Engine,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, d) in [(2048, 16), (8192, 16), (8192, 64)] {
        cases.push(Case { name: "exact".into(), n, d, engine: Engine::Exact });
    }
    for (n, d, degree) in [(8192, 16, 2), (40_960, 12, 2), (65_536, 16, 2), (8192, 16, 4), (8192, 64, 2)] {
        for (word, gradient) in [("closed_form", Gradient::ClosedForm), ("consistent", Gradient::Consistent)] {
            // The closed form of (64, 2) has 47,905 features: a bench of seconds that tells nothing new.
            if d == 64 && gradient == Gradient::ClosedForm {
                continue;
            }
            let engine = Engine::Polynomial(Polynomial { degree, gradient, ..Default::default() });
            cases.push(Case { name: format!("polynomial_g{degree}_{word}"), n, d, engine });
        }
    }
    cases
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for Case { name, n, d, engine } in cases() {
        let head = Head::new(n, d);
        let (heads, dout) = (head.heads(), head.dout());
        let ctx = Context::new();
        group.throughput(Throughput::Elements(n as u64));
        for causal in [false, true] {
            let attention = Attention::new(engine.clone(), Mask::causal(causal), (d as f64).powf(-0.5));
            let word = if causal { "causal" } else { "full" };
            let [mut out, mut dq, mut dk, mut dv] = std::array::from_fn(|_| vec![0f32; n * d]);
            let id = BenchmarkId::new(format!("{name}/{word}/forward"), format!("n{n}_d{d}"));
            group.bench_function(id, |b| b.iter(|| attention.forward(&ctx, &heads, &mut out).unwrap()));
            let saved = attention.forward(&ctx, &heads, &mut out).unwrap();
            let id = BenchmarkId::new(format!("{name}/{word}/backward"), format!("n{n}_d{d}"));
            group.bench_function(id, |b| {
                b.iter(|| {
                    let grads = AttentionGrads::new(&mut dq, &mut dk, &mut dv);
                    attention.backward(&ctx, &heads, &saved, &out, &dout, 0, grads).unwrap();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, attention);
criterion_main!(benches);

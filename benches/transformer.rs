//! A whole model step: loss and the gradient of every weight, float32, both engines.
#![allow(missing_docs)]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lingrad_benches::numbers;
use lingrad_core::layers::activation::ActivationKind;
use lingrad_core::model::{Config, Norm, Params, value_and_grad};
use lingrad_core::spec::{Engine, Polynomial};
use lingrad_core::{Context, MatRef};

fn model_step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("value_and_grad");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    for (name, engine) in [("exact", Engine::Exact), ("polynomial_g2", Engine::Polynomial(Polynomial::default()))] {
        for n in [2048, 8192] {
            let config = Config {
                n_layers: 4,
                d_model: 64,
                n_heads: 4,
                n_kv_heads: 4,
                d_ff: 256,
                vocab_size: 256,
                causal: true,
                norm: Norm::Rms,
                activation: ActivationKind::Silu,
                rope: true,
                score_bound: None,
                engine: engine.clone().into(),
            };
            let owned: Vec<(String, usize, usize, Vec<f32>)> = (config.param_shapes().into_iter().zip(1..))
                .map(|((name, shape), seed)| {
                    let (rows, columns) = if shape.len() == 1 { (1, shape[0]) } else { (shape[0], shape[1]) };
                    let values =
                        if shape.len() == 1 { vec![1.0; columns] } else { numbers(seed, rows * columns, 0.08) };
                    (name, rows, columns, values)
                })
                .collect();
            let params: Params<'_, f32> = (owned.iter())
                .map(|(name, rows, columns, x)| (name.clone(), MatRef::from_row_major_slice(x, *rows, *columns)))
                .collect();
            let tokens: Vec<u32> = (0..=n as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 24).collect();
            let ctx = Context::new();
            group.throughput(Throughput::Elements(n as u64));
            group.bench_function(BenchmarkId::new(name, format!("n{n}_d64_l4")), |b| {
                b.iter(|| value_and_grad(&ctx, &config, &params, &tokens[..n], &tokens[1..], 1, n, 0).unwrap());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, model_step);
criterion_main!(benches);

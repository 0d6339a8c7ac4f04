//! What the benches share: numbers to compute with, and a head of attention made of them.

use lingrad_core::{Heads, MatRef};

/// `count` numbers of mean 0 and standard deviation `size`, uniform, from a fixed seed.
pub fn numbers(seed: u64, count: usize, size: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let half_width = size * 3f32.sqrt();
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * half_width
        })
        .collect()
}

/// One head's `q, k, v, dout`, each `(n, d)`. Entries of queries and keys have the standard deviation `d^(-1/2)`, so that
/// scores have `1/d`.
pub struct Head {
    arrays: [Vec<f32>; 4],
    n: usize,
    d: usize,
}

impl Head {
    /// From fixed seeds.
    pub fn new(n: usize, d: usize) -> Self {
        let small = (d as f32).powf(-0.5);
        let arrays = [(1, small), (2, small), (3, 1.0), (4, 1.0)].map(|(seed, size)| numbers(seed, n * d, size));
        Self { arrays, n, d }
    }

    /// `q, k, v`.
    pub fn heads(&self) -> Heads<'_, f32> {
        let [q, k, v, _] = &self.arrays;
        Heads::new(vec![self.matrix(q)], vec![self.matrix(k)], vec![self.matrix(v)])
    }

    /// `dout`.
    pub fn dout(&self) -> [MatRef<'_, f32>; 1] {
        [self.matrix(&self.arrays[3])]
    }

    fn matrix<'a>(&self, x: &'a [f32]) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice(x, self.n, self.d)
    }
}

//! What the benches share: numbers to compute with.

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

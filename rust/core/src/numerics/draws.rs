//! Draws that are the same on every machine and for any number of threads.

/// `count` of the numbers below `n`, in order, one drawn in each of as many equal strata by a hash of `seed`: no period
/// of the data is met. All of them where `count >= n`.
pub(crate) fn stratified(n: usize, count: usize, seed: u64) -> Vec<usize> {
    let count = count.min(n);
    let part = |s: usize| (s as u128 * n as u128 / count as u128) as usize;
    (0..count)
        .map(|s| {
            let (start, end) = (part(s), part(s + 1));
            start + (splitmix(seed ^ splitmix(s as u64)) % (end - start) as u64) as usize
        })
        .collect()
}

/// A well-mixed 64-bit hash.
fn splitmix(x: u64) -> u64 {
    let mut z = x.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number in `[0, 1)`, the `index`-th of a sequence of its own for every seed.
pub(crate) fn uniform(seed: u64, index: u64) -> f64 {
    (splitmix(seed ^ splitmix(index)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_drawn_in_each_part_of_any_number() {
        let drawn = stratified(usize::MAX, 4, 1);
        let parts: Vec<usize> = drawn.iter().map(|x| x / (usize::MAX / 4 + 1)).collect();
        assert_eq!(parts, [0, 1, 2, 3]);
    }
}

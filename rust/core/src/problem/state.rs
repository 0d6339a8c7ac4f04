//! What stands for the keys that queries have met, so that they need not be met again.

use crate::error::{Error, Result};
use crate::memory::room;

/// A summary of some keys of a head. Keys are added to it, and it is applied to queries, each in a way of its own; two of
/// the same head that stand for different keys make one that stands for both, in one process or on two machines.
pub trait State: Sized {
    /// Adds what `other` stands for. The order of merges decides the rounding, and nothing else.
    fn merge(&mut self, other: &Self) -> Result<()>;

    /// All of it as bytes, numbers little-endian.
    fn to_bytes(&self) -> Result<Vec<u8>>;

    /// The same state again, to the last bit; an error where the bytes are not those of one.
    fn from_bytes(bytes: &[u8]) -> Result<Self>;
}

/// What errors call them.
const BYTES: &str = "the bytes of a state";

/// Sizes and numbers as bytes: how many of either there are, the sizes, the numbers.
pub(crate) fn pack(sizes: &[usize], parts: &[&[f64]]) -> Result<Vec<u8>> {
    let count: usize = parts.iter().map(|part| part.len()).sum();
    let mut bytes = room(8 * (2 + sizes.len() + count), BYTES)?;
    for size in [sizes.len(), count].iter().chain(sizes) {
        bytes.extend_from_slice(&(*size as u64).to_le_bytes());
    }
    for x in parts.iter().copied().flatten() {
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    Ok(bytes)
}

/// What [`pack`] packed: `SIZES` sizes, and the numbers.
pub(crate) fn unpack<const SIZES: usize>(bytes: &[u8]) -> Result<([usize; SIZES], Vec<f64>)> {
    let wrong = || Error::Argument("the bytes are not those of a state".into());
    let (words, rest) = bytes.as_chunks::<8>();
    let size = |word: &[u8; 8]| usize::try_from(u64::from_le_bytes(*word)).map_err(|_| wrong());
    let [sizes, count, words @ ..] = words else { return Err(wrong()) };
    if !rest.is_empty() || size(sizes)? != SIZES || words.len().checked_sub(SIZES) != Some(size(count)?) {
        return Err(wrong());
    }
    let mut sizes = [0; SIZES];
    for (to, word) in sizes.iter_mut().zip(words) {
        *to = size(word)?;
    }
    let mut numbers = room(words.len() - SIZES, BYTES)?;
    numbers.extend(words[SIZES..].iter().map(|word| f64::from_le_bytes(*word)));
    Ok((sizes, numbers))
}

/// An error unless two states that are to be merged have the same sizes.
pub(crate) fn expect_same(sizes: &[usize], other: &[usize]) -> Result<()> {
    if sizes == other {
        return Ok(());
    }
    Err(Error::Argument(format!("states of sizes {sizes:?} and {other:?} stand for keys of different heads")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_back_and_anything_else_is_refused() {
        let bytes = pack(&[3, 1], &[&[1.5, -0.0], &[f64::NEG_INFINITY]]).expect("room");
        let (sizes, numbers) = unpack::<2>(&bytes).expect("a state");
        assert_eq!(sizes, [3, 1]);
        assert_eq!(
            numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            [1.5, -0.0, f64::NEG_INFINITY].map(f64::to_bits)
        );
        for wrong in
            [&bytes[..bytes.len() - 1], &bytes[..bytes.len() - 8], &bytes[..8], &[], &[&bytes[..], &[0; 8]].concat()]
        {
            assert!(unpack::<2>(wrong).is_err());
        }
        assert!(unpack::<1>(&bytes).is_err());
        assert!(unpack::<2>(&[255; 64]).is_err());
    }
}

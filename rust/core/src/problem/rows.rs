//! A batch of sequences, read tile by tile.

use faer::MatRef;

use crate::error::{Error, Result};
use crate::memory::collected;

/// Equally shaped `(n, d)` strided views, one a sequence.
#[derive(Debug, Clone)]
pub struct Rows<'a, T> {
    blocks: Vec<MatRef<'a, T>>,
    n: usize,
    d: usize,
}

impl<'a, T> Rows<'a, T> {
    /// The sequences `blocks`, each `(n, d)`; an empty batch still has a width.
    pub fn new(blocks: Vec<MatRef<'a, T>>, n: usize, d: usize) -> Result<Self> {
        match blocks.iter().find(|b| b.nrows() != n || b.ncols() != d) {
            Some(b) => {
                Err(Error::Shape(format!("a sequence has shape ({}, {}); expected ({n}, {d})", b.nrows(), b.ncols())))
            }
            None => Ok(Self { blocks, n, d }),
        }
    }

    /// `data` of shape `(batch, n, d)`, contiguous.
    pub fn from_slice(data: &'a [T], batch: usize, n: usize, d: usize) -> Result<Self> {
        if Some(data.len()) != batch.checked_mul(n).and_then(|rows| rows.checked_mul(d)) {
            return Err(Error::Shape(format!("{} numbers; expected {batch} x {n} x {d}", data.len())));
        }
        let block = |b: usize| MatRef::from_row_major_slice(&data[b * n * d..(b + 1) * n * d], n, d);
        Self::new(collected((0..batch).map(block), "the views of a batch")?, n, d)
    }

    /// The sequences.
    pub fn blocks(&self) -> &[MatRef<'a, T>] {
        &self.blocks
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.blocks.len()
    }

    /// Tokens a sequence.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Width of a token.
    pub fn d(&self) -> usize {
        self.d
    }
}

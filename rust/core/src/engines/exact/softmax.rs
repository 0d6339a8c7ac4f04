//! The running softmax of a block of queries over block after block of keys.

use faer::MatRef;

use crate::error::{Error, Result};
use crate::memory::{Aligned, aligned, zeroed};
use crate::numerics::real::{Real, vectorised};
use crate::numerics::softmax::exponentials;
use crate::numerics::stored::Stored;
use crate::numerics::tile::{TILE, product, view, view_mut};
use crate::problem::scores::NO_KEY_REMEDY;
use crate::problem::state::{State, expect_same, pack, unpack};

/// The running softmax of a block of queries. Sums over many keys are kept in float64.
pub(crate) struct Softmax<T> {
    /// The tile of scores `(keys, queries)` that [`add`](Self::add) takes.
    pub scores: Aligned<T>,
    bq: usize,
    d_v: usize,
    max: Vec<T>,
    sum: Vec<f64>,
    weighted: Aligned<f64>,
    correction: Vec<T>,
    tile_sum: Vec<T>,
    tile_out: Aligned<T>,
}

impl<T: Real> Softmax<T> {
    pub fn new(d_v: usize) -> Result<Self> {
        let tile = |rows: usize| aligned(rows * TILE, "a tile of exact attention");
        let row = || zeroed(TILE, "a row of exact attention");
        Ok(Self {
            scores: tile(TILE)?,
            bq: 0,
            d_v,
            max: row()?,
            sum: zeroed(TILE, "a tile's row sums")?,
            weighted: aligned(d_v * TILE, "a tile's sums of values")?,
            correction: row()?,
            tile_sum: row()?,
            tile_out: tile(d_v)?,
        })
    }

    pub fn start(&mut self, bq: usize) {
        self.bq = bq;
        self.max[..bq].fill(T::NEG_INFINITY);
        self.sum[..bq].fill(0.0);
        self.weighted.fill(0.0);
    }

    /// Adds the keys whose scores are in `self.scores`.
    pub fn add(&mut self, bk: usize, v: MatRef<'_, T>) {
        self.add_with(bk, &[(v, None)]);
    }

    /// The same for several values side by side, each pair's weight times a factor `(keys, queries)` where there is one.
    pub fn add_with(&mut self, bk: usize, values: &[(MatRef<'_, T>, Option<&[T]>)]) {
        let bq = self.bq;
        let s = &mut self.scores[..bk * bq];
        let (max, correction) = (&mut self.max[..bq], &mut self.correction[..bq]);
        let (sum, tile_sum) = (&mut self.sum[..bq], &mut self.tile_sum[..bq]);
        correction.copy_from_slice(max);
        exponentials(s, max, tile_sum);
        for ((sum, (c, &max)), &t) in sum.iter_mut().zip(correction.iter_mut().zip(&*max)).zip(&*tile_sum) {
            // A row that has seen no key yet has -inf here, perhaps twice; whatever it scales is 0.
            *c = if *c == T::NEG_INFINITY { T::ZERO } else { (*c - max).exp_nonpositive() };
            *sum = *sum * c.to_f64() + t.to_f64();
        }
        let mut first = 0;
        for (v, factor) in values {
            if let Some(factor) = factor {
                self.scores[..bk * bq].iter_mut().zip(*factor).for_each(|(s, factor)| *s = s.times(*factor));
            }
            let width = v.ncols();
            let tile_out = view_mut(&mut self.tile_out[first * bq..], width, bq);
            product(tile_out, v.transpose(), view(&self.scores, bk, bq), T::ONE);
            first += width;
        }
        let (weighted, tile_out) = (&mut self.weighted[..], &self.tile_out[..]);
        vectorised(
            #[inline(always)]
            || {
                for (acc, tile) in weighted.chunks_exact_mut(bq).zip(tile_out.chunks_exact(bq)) {
                    for ((acc, &t), &c) in acc.iter_mut().zip(tile).zip(&*correction) {
                        *acc = *acc * c.to_f64() + t.to_f64();
                    }
                }
            },
        );
    }

    /// Writes the rows, or says which one (`row(i)` of the head, for query i of the block) has no usable denominator.
    /// A row without keys that `may_be_empty` is 0.
    pub fn finish<E: Stored<T>>(
        &mut self,
        head: usize,
        row: impl Fn(usize) -> usize,
        may_be_empty: impl Fn(usize) -> bool,
        out: &mut [E],
        max: &mut [T],
        scale: &mut [T],
    ) -> Result<()> {
        let bq = self.bq;
        for i in 0..bq {
            if self.max[i] == T::NEG_INFINITY && may_be_empty(row(i)) {
                out[i * self.d_v..(i + 1) * self.d_v].fill(E::narrow(T::ZERO));
                (max[i], scale[i]) = (T::ZERO, T::ZERO);
                continue;
            }
            if self.max[i] == T::NEG_INFINITY {
                return Err(Error::Denominator(format!(
                    "row {} of head {head} has no key to attend to: key_bias is -inf (or its scores overflow) for every key \
                     that it may see; {NO_KEY_REMEDY}",
                    row(i)
                )));
            }
            if !(self.sum[i] > 0.0 && self.sum[i].is_finite()) {
                return Err(Error::Denominator(format!(
                    "row {} of head {head} has scores that overflow; make q, k, scale or key_bias smaller",
                    row(i)
                )));
            }
            let inverse = 1.0 / self.sum[i];
            max[i] = self.max[i];
            scale[i] = T::of(inverse);
            for c in 0..self.d_v {
                out[i * self.d_v + c] = E::of_sum(self.weighted[c * bq + i] * inverse);
            }
        }
        Ok(())
    }
}

impl State for Softmax<f64> {
    fn merge(&mut self, other: &Self) -> Result<()> {
        expect_same(&[self.bq, self.d_v], &[other.bq, other.d_v])?;
        let bq = self.bq;
        for i in 0..bq {
            let max = self.max[i].max(other.max[i]);
            let factor = |from: f64| if from == f64::NEG_INFINITY { 0.0 } else { (from - max).exp() };
            let (own, others) = (factor(self.max[i]), factor(other.max[i]));
            self.max[i] = max;
            self.sum[i] = self.sum[i] * own + other.sum[i] * others;
            for c in 0..self.d_v {
                let weighted = &mut self.weighted[c * bq + i];
                *weighted = *weighted * own + other.weighted[c * bq + i] * others;
            }
        }
        Ok(())
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        let Self { bq, d_v, .. } = *self;
        pack(&[bq, d_v], &[&self.max[..bq], &self.sum[..bq], &self.weighted[..bq * d_v]])
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let ([bq, d_v], numbers) = unpack::<2>(bytes)?;
        if bq > TILE || d_v.checked_add(2).and_then(|rows| rows.checked_mul(bq)) != Some(numbers.len()) {
            return Err(Error::Argument("the bytes are not those of a softmax".into()));
        }
        let mut state = Self::new(d_v)?;
        state.start(bq);
        let (max, rest) = numbers.split_at(bq);
        let (sum, weighted) = rest.split_at(bq);
        state.max[..bq].copy_from_slice(max);
        state.sum[..bq].copy_from_slice(sum);
        state.weighted[..bq * d_v].copy_from_slice(weighted);
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A softmax of some keys, of scores that are not small, in tiles `(keys, queries)`.
    fn of_keys(keys: std::ops::Range<usize>) -> Softmax<f64> {
        let mut softmax = Softmax::new(3).expect("room");
        softmax.start(4);
        for j in keys {
            for i in 0..4 {
                softmax.scores[i] = ((i * 7 + j * 5) % 11) as f64 * 3.0 - 20.0;
            }
            let v: Vec<f64> = (0..3).map(|c| ((c + 2 * j) % 7) as f64 - 3.0).collect();
            softmax.add(1, view(&v, 1, 3));
        }
        softmax
    }

    fn rows(softmax: &mut Softmax<f64>) -> Vec<f64> {
        let (mut out, mut max, mut scale) = (vec![f64::NAN; 12], vec![f64::NAN; 4], vec![f64::NAN; 4]);
        softmax.finish(0, |i| i, |_| false, &mut out, &mut max, &mut scale).expect("keys");
        out.into_iter().chain(max.iter().zip(&scale).map(|(max, scale)| max - scale.ln())).collect()
    }

    #[test]
    fn states_of_keys_apart_make_the_state_of_all_also_by_way_of_bytes() {
        let whole = rows(&mut of_keys(0..17));
        let mut state = of_keys(0..0);
        for part in [0..3, 3..4, 4..17] {
            let bytes = of_keys(part).to_bytes().expect("room");
            state.merge(&Softmax::from_bytes(&bytes).expect("a state")).expect("the same head");
        }
        for (got, want) in rows(&mut state).into_iter().zip(whole) {
            assert!((got - want).abs() <= 1e-14 * want.abs().max(1.0), "{got} {want}");
        }
        assert!(state.merge(&Softmax::new(2).expect("room")).is_err());
        assert!(Softmax::from_bytes(&[0; 40]).is_err());
    }
}

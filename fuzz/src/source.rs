//! What inputs are drawn from.

use std::fmt::Debug;

use arbitrary::Unstructured;
use faer::{ColRef, MatRef};
use lingrad_core::Real;

/// A sequence of 64-bit numbers that is the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// That of input `index` of a seed.
    pub fn new(seed: u64, index: u64) -> Self {
        let mut random = Self(seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        random.0 = random.bits() ^ index;
        random
    }

    /// The next number.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// About normal, of standard deviation 1.
    fn normal(&mut self) -> f64 {
        let bits = self.bits();
        let sum: u32 = (0..4).map(|i| (bits >> (16 * i) & 0xFFFF) as u32).sum();
        (f64::from(sum) / 65536.0 - 2.0) * 3f64.sqrt()
    }
}

/// Bytes turned into what functions take; once they are used up, everything is 0.
#[derive(Debug)]
pub struct Source<'a> {
    bytes: Unstructured<'a>,
    /// One in so many things is not as it should be; 0: none.
    odd: usize,
    /// Whether all things have been as they should be.
    plain: bool,
    told: bool,
}

/// Sizes and numbers that are often wrong.
const SIZES: [usize; 16] =
    [0, 1, 2, 3, 7, 63, 64, 65, 1000, 8192, 8193, 1 << 31, 1 << 32, 1 << 62, usize::MAX / 2, usize::MAX];
const NUMBERS: [f64; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-5,
    1e-12,
    1e-300,
    5e-324,
    1e30,
    1e300,
    -1e300,
    f64::MAX,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
];
/// What biases hold for padding, in float32 too, and a huge one of the other sign.
const PADDINGS: [f64; 7] = [f64::NEG_INFINITY, f64::NEG_INFINITY, f64::MIN, f32::MIN as f64, -1e9, -5e9, 1e10];

impl<'a> Source<'a> {
    /// From these bytes; `told`: what they make is printed.
    pub fn new(bytes: &'a [u8], told: bool) -> Self {
        let mut source = Self { bytes: Unstructured::new(bytes), odd: 0, plain: true, told };
        source.odd = source.pick(&[0, 0, 100, 30, 8]);
        source
    }

    /// Tells what an input is, where that is asked for.
    pub fn tell(&self, what: &dyn Debug) {
        if self.told {
            println!("{what:?}");
        }
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.bytes.int_in_range(0..=n - 1).unwrap_or(0)
    }

    /// One of these.
    pub fn pick<X: Clone>(&mut self, options: &[X]) -> X {
        options[self.below(options.len())].clone()
    }

    /// True or false.
    pub fn flag(&mut self) -> bool {
        self.bytes.arbitrary().unwrap_or(false)
    }

    /// Once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// Whether this once a thing is not as it should be.
    pub fn oddly(&mut self) -> bool {
        let odd = self.odd > 0 && self.one_in(self.odd);
        self.plain &= !odd;
        odd
    }

    /// Whether nothing that was drawn is not as it should be.
    pub fn plain(&self) -> bool {
        self.plain
    }

    /// Any bits.
    pub fn bits(&mut self) -> u64 {
        self.bytes.arbitrary().unwrap_or(0)
    }

    /// A size: one of the usual ones, or a wrong one.
    pub fn size(&mut self, usual: &[usize]) -> usize {
        if self.oddly() { self.pick(&SIZES) } else { self.pick(usual) }
    }

    /// A number: one of the usual ones, or an odd one.
    pub fn number(&mut self, usual: &[f64]) -> f64 {
        match self.oddly() {
            true if self.flag() => f64::from_bits(self.bits()),
            true => self.pick(&NUMBERS),
            false => self.pick(usual),
        }
    }

    /// Tokens: few, and at times some more.
    pub fn tokens(&mut self) -> usize {
        match self.below(32) {
            0 => self.pick(&[0, 63, 64, 65, 112, 113, 128, 129, 200]),
            1 if self.one_in(16) => self.pick(&[1024, 1025, 1100]),
            2..=8 => self.below(41),
            _ => 1 + self.below(12),
        }
    }

    /// A length that is near this one, mostly the same.
    pub fn near(&mut self, length: usize) -> usize {
        if self.oddly() {
            self.pick(&[0, length.saturating_sub(1), length.saturating_add(1), length.saturating_mul(2)])
        } else {
            length
        }
    }

    /// So many numbers.
    pub fn numbers<T: Real>(&mut self, count: usize) -> Vec<T> {
        let mut random = Random::new(self.bits(), 0);
        let kind = if self.oddly() { self.below(5) } else { 5 };
        let single = self.pick(&NUMBERS);
        let size = self.pick(&[0.1, 0.5, 1.0, 1.0, 3.0]);
        let mut entry = |i: usize| match kind {
            0 => single,
            1 => NUMBERS[random.bits() as usize % NUMBERS.len()],
            2 => f64::from_bits(random.bits()),
            3 => single * random.normal(),
            4 if i == 0 => single,
            _ => size * random.normal(),
        };
        (0..count).map(|i| T::of(entry(i))).collect()
    }

    /// A matrix, in one of many layouts.
    pub fn matrix<T: Real>(&mut self, n: usize, d: usize) -> Matrix<T> {
        let (n, d) = (self.near(n), self.near(d));
        Matrix { entries: self.numbers(n * d), n, d, layout: self.below(6) }
    }

    /// What callers give keys that are not to be seen, or alone: here and there, or at one end.
    fn pad<T: Real>(&mut self, bias: &mut [T]) {
        let n = bias.len();
        let padding = T::of(self.pick(&PADDINGS));
        if self.flag() {
            bias.fill(T::ZERO);
        }
        let (first, end, step) = match self.below(3) {
            0 => (0, n, 1 + self.below(4)),
            1 => (0, self.below(n + 1), 1),
            _ => (self.below(n + 1), n, 1),
        };
        bias[first..end].iter_mut().step_by(step).for_each(|x| *x = padding);
    }

    /// A vector; in a bias, some keys may be padding.
    pub fn column<T: Real>(&mut self, n: usize, bias: bool) -> Column<T> {
        let n = self.near(n);
        let mut entries = self.numbers(n);
        if bias && self.flag() {
            self.pad(&mut entries);
        }
        Column { entries, reversed: self.flag() }
    }
}

/// Numbers, and how they are looked at.
#[derive(Debug)]
pub struct Matrix<T> {
    entries: Vec<T>,
    n: usize,
    d: usize,
    layout: usize,
}

impl<T: Real> Matrix<T> {
    /// The `(n, d)` view.
    pub fn view(&self) -> MatRef<'_, T> {
        let (n, d, x) = (self.n, self.d, &self.entries);
        match self.layout {
            0 => MatRef::from_column_major_slice(x, n, d),
            1 => MatRef::from_row_major_slice(x, n, d).reverse_rows(),
            2 => MatRef::from_row_major_slice(x, n, d).reverse_rows_and_cols(),
            // SAFETY: with row strides of 0 all of it is the first row, which is there where any row is.
            3 => unsafe { MatRef::from_raw_parts(x.as_ptr(), n, d, 0, 1) },
            _ => MatRef::from_row_major_slice(x, n, d),
        }
    }
}

/// A vector, and how it is looked at.
#[derive(Debug)]
pub struct Column<T> {
    entries: Vec<T>,
    reversed: bool,
}

impl<T: Real> Column<T> {
    /// The `(n,)` view.
    pub fn view(&self) -> ColRef<'_, T> {
        let x = ColRef::from_slice(&self.entries);
        if self.reversed { x.reverse_rows() } else { x }
    }
}

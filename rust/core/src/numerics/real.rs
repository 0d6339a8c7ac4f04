//! The two scalar types, `f32` and `f64`, and the vectorised exponential.

use faer::traits::RealField;
use pulp::Simd;

use super::stored::Stored;
use crate::memory::Zeroable;

/// Vectors of a scalar type.
///
/// # Safety
/// A vector must hold exactly [`lanes`](Self::lanes) numbers, which are no more than 16.
pub unsafe trait Lanes: Copy {
    /// A register full.
    type Vector<S: Simd>: Copy;
    /// Numbers in a vector.
    fn lanes<S: Simd>() -> usize;
    /// `x` in every lane.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// `a b`.
    fn multiply<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a b + c`, rounded once where the machine can.
    fn multiply_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    /// The sum of all lanes.
    fn sum_of_lanes<S: Simd>(simd: S, x: Self::Vector<S>) -> Self;
    /// A vector from any address.
    ///
    /// # Safety
    /// `at` must be valid for reading a vector.
    unsafe fn load<S: Simd>(simd: S, at: *const Self) -> Self::Vector<S>;
    /// The first `count` lanes, no more than there are; the others are 0.
    ///
    /// # Safety
    /// `at` must be valid for reading `count` numbers.
    unsafe fn load_first<S: Simd>(simd: S, at: *const Self, count: usize) -> Self::Vector<S>;
    /// Writes a vector to any address.
    ///
    /// # Safety
    /// `at` must be valid for writing a vector.
    unsafe fn store<S: Simd>(simd: S, at: *mut Self, x: Self::Vector<S>);
    /// Writes the first `count` lanes, no more than there are.
    ///
    /// # Safety
    /// `at` must be valid for reading and writing `count` numbers.
    unsafe fn store_first<S: Simd>(simd: S, at: *mut Self, count: usize, x: Self::Vector<S>);
}

macro_rules! lanes {
    ($t:ty, $vector:ident, $lanes:ident, $splat:ident, $mul:ident, $mul_add:ident, $load:ident, $store:ident, $sum:ident) => {
        // SAFETY: pulp's vectors hold so many numbers, at most 64 bytes of them.
        unsafe impl Lanes for $t {
            type Vector<S: Simd> = S::$vector;
            #[inline(always)]
            fn lanes<S: Simd>() -> usize {
                S::$lanes
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$vector {
                simd.$splat(x)
            }
            #[inline(always)]
            fn multiply<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
            }
            #[inline(always)]
            fn multiply_add<S: Simd>(simd: S, a: S::$vector, b: S::$vector, c: S::$vector) -> S::$vector {
                simd.$mul_add(a, b, c)
            }
            #[inline(always)]
            fn sum_of_lanes<S: Simd>(simd: S, x: S::$vector) -> Self {
                simd.$sum(x)
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(_: S, at: *const Self) -> S::$vector {
                // SAFETY: valid for reading, and a vector is plain numbers.
                unsafe { at.cast::<S::$vector>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn load_first<S: Simd>(simd: S, at: *const Self, count: usize) -> S::$vector {
                // SAFETY: valid for reading `count` numbers.
                simd.$load(unsafe { std::slice::from_raw_parts(at, count) })
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(_: S, at: *mut Self, x: S::$vector) {
                // SAFETY: valid for writing, and a vector is plain numbers.
                unsafe { at.cast::<S::$vector>().write_unaligned(x) }
            }
            #[inline(always)]
            unsafe fn store_first<S: Simd>(simd: S, at: *mut Self, count: usize, x: S::$vector) {
                // SAFETY: valid for `count` numbers.
                simd.$store(unsafe { std::slice::from_raw_parts_mut(at, count) }, x)
            }
        }
    };
}

lanes!(
    f32,
    f32s,
    F32_LANES,
    splat_f32s,
    mul_f32s,
    mul_add_e_f32s,
    partial_load_f32s,
    partial_store_f32s,
    reduce_sum_f32s
);
lanes!(
    f64,
    f64s,
    F64_LANES,
    splat_f64s,
    mul_f64s,
    mul_add_e_f64s,
    partial_load_f64s,
    partial_store_f64s,
    reduce_sum_f64s
);

/// `f32` or `f64`.
pub trait Real:
    Lanes
    + RealField
    + Copy
    + Send
    + Sync
    + PartialOrd
    + std::fmt::Debug
    + 'static
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
    + std::iter::Sum
    + Zeroable
    + Stored<Self>
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Minus infinity.
    const NEG_INFINITY: Self;
    /// Rounds to the type.
    fn of(x: f64) -> Self;
    /// Widens, exactly.
    fn to_f64(self) -> f64;
    /// Neither NaN nor infinite.
    fn finite(self) -> bool;
    /// Plus or minus infinity.
    fn infinite(self) -> bool;
    /// `e^x` for `x <= 0` (to the last bits), 0 for `-inf`; written so that loops over it vectorise.
    fn exp_nonpositive(self) -> Self;
    /// `tanh x` to the last bits; written so that loops over it vectorise.
    fn tanh_fast(self) -> Self;
    /// The larger of two numbers that are not NaN.
    fn larger(self, other: Self) -> Self;
    /// `self x` for a weight: 0 where the weight is, though `x` be infinite or NaN. What a key without weight holds may
    /// overflow in a product, and must not be seen.
    fn times(self, x: Self) -> Self;
}

macro_rules! real {
    ($t:ty, $bits:ty, $magic:expr, $shift:expr, $bias:expr, $lowest:expr, $ln2_hi:expr, $ln2_lo:expr, $inv:expr) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn finite(self) -> bool {
                self.is_finite()
            }
            #[inline(always)]
            fn infinite(self) -> bool {
                self.is_infinite()
            }
            // e^x = 2^j e^r with j = round(x / ln 2), |r| <= ln(2)/2, and e^r by its Taylor polynomial, whose
            // remainder is below half a unit in the last place. Adding `magic` rounds to an integer and leaves that
            // integer in the low bits.
            #[inline(always)]
            fn exp_nonpositive(self) -> Self {
                let x = if self < $lowest { $lowest } else { self };
                let shifted = x * std::f64::consts::LOG2_E as $t + $magic;
                let j = shifted - $magic;
                let r = (x - j * $ln2_hi) - j * $ln2_lo;
                let mut p: $t = $inv[0];
                let mut i = 1;
                while i < $inv.len() {
                    p = p * r + $inv[i];
                    i += 1;
                }
                let power = <$t>::from_bits((shifted.to_bits().wrapping_add($bias)) << $shift);
                if self < $lowest { 0.0 } else { p * power }
            }
            // With e = expm1(-2|x|), tanh |x| = -e / (2 + e); near 0 e is the Taylor polynomial without its constant term.
            #[inline(always)]
            fn tanh_fast(self) -> Self {
                let y = -2.0 * self.abs();
                let mut p: $t = $inv[0];
                let mut i = 1;
                while i < $inv.len() - 1 {
                    p = p * y + $inv[i];
                    i += 1;
                }
                let e = if y > -0.34 { p * y } else { y.exp_nonpositive() - 1.0 };
                (-e / (2.0 + e)).copysign(self)
            }
            #[inline(always)]
            fn larger(self, other: Self) -> Self {
                if self > other { self } else { other }
            }
            #[inline(always)]
            fn times(self, x: Self) -> Self {
                if self == 0.0 { 0.0 } else { self * x }
            }
        }
    };
}

const INV_F32: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
const INV_F64: [f64; 14] = [
    1.0 / 6227020800.0,
    1.0 / 479001600.0,
    1.0 / 39916800.0,
    1.0 / 3628800.0,
    1.0 / 362880.0,
    1.0 / 40320.0,
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

real!(f32, u32, 12582912.0f32, 23, 127, -87.0f32, 355.0 / 512.0, -2.121_944_4e-4f32, INV_F32);
real!(
    f64,
    u64,
    6755399441055744.0f64,
    52,
    1023,
    -708.0f64,
    6.931_471_803_691_238e-1,
    1.908_214_929_270_587_7e-10,
    INV_F64
);

/// `f` compiled for, and run on, the widest vector instructions of this machine.
#[inline(always)]
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

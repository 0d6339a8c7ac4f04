//! Numbers as arrays hold them: of the type that is computed with, or in half precision.

use faer::MatRef;
use half::{bf16, f16};

/// What an array holds whose numbers are computed with as `T`.
pub trait Stored<T>: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// The same number, exactly.
    fn widen(self) -> T;
    /// Rounds.
    fn narrow(x: T) -> Self;
    /// Rounds what was summed in float64.
    fn of_sum(x: f64) -> Self;
    /// The same array, where it holds `T`.
    fn plain(x: MatRef<'_, Self>) -> Option<MatRef<'_, T>>;

    /// [`widen`](Self::widen), number after number.
    fn widen_all(x: &[Self], to: &mut [T]) {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || to.iter_mut().zip(x).for_each(|(to, x)| *to = x.widen()),
        );
    }
}

macro_rules! own {
    ($t:ty) => {
        impl Stored<$t> for $t {
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(x: $t) -> Self {
                x
            }
            #[inline(always)]
            fn of_sum(x: f64) -> Self {
                x as $t
            }
            fn plain(x: MatRef<'_, Self>) -> Option<MatRef<'_, $t>> {
                Some(x)
            }
        }
    };
}
own!(f32);
own!(f64);

impl Stored<f32> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn of_sum(x: f64) -> Self {
        bf16::from_f64(x)
    }
    fn plain(_: MatRef<'_, Self>) -> Option<MatRef<'_, f32>> {
        None
    }
}

impl Stored<f32> for f16 {
    // The exponent's bias is 112 smaller than that of float32: a product takes care of it, of subnormal numbers too. What
    // is infinite, or no number, has the largest exponent in both.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let size = (bits & 0x7fff) << 13;
        let scaled = (f32::from_bits(size) * f32::from_bits((127 + 112) << 23)).to_bits();
        let size = if bits & 0x7c00 == 0x7c00 { size | 0x7f80_0000 } else { scaled };
        f32::from_bits(size | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
    #[inline(always)]
    fn of_sum(x: f64) -> Self {
        f16::from_f64(x)
    }
    fn plain(_: MatRef<'_, Self>) -> Option<MatRef<'_, f32>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_exactly_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (a, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(a.widen() == a.to_f32() || a.is_nan() && a.widen().is_nan(), "{bits:x}");
            assert!(b.widen() == b.to_f32() || b.is_nan() && b.widen().is_nan(), "{bits:x}");
            assert!(a.is_nan() || f16::narrow(a.widen()).to_bits() == bits);
            assert!(b.is_nan() || bf16::narrow(b.widen()).to_bits() == bits);
        }
    }
}

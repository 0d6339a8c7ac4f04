//! Allocations that may fail: whatever grows with the sizes of a call comes from here, so that a call that needs more
//! memory than there is ends in [`Error::Memory`] and not in an abort, which is what `vec!` makes of it.

use std::alloc::{Layout, alloc_zeroed};

use crate::error::{Error, Result};

/// A type of which all bytes 0 are a value, 0.
///
/// # Safety
/// They must be.
pub unsafe trait Zeroable: Copy {}

// SAFETY: so are integers and floating-point numbers.
unsafe impl Zeroable for u32 {}
// SAFETY: as above.
unsafe impl Zeroable for usize {}
// SAFETY: as above.
unsafe impl Zeroable for f32 {}
// SAFETY: as above.
unsafe impl Zeroable for f64 {}

/// `len` zeros, from pages that the system clears when they are first used. `what` is what an error calls them.
pub fn zeroed<T: Zeroable>(len: usize, what: &'static str) -> Result<Vec<T>> {
    let Ok(layout) = Layout::array::<T>(len) else { return Err(too_large::<T>(len, what)) };
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout is not of size 0.
    let at = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if at.is_null() {
        return Err(too_large::<T>(len, what));
    }
    // SAFETY: the allocation is that of an array of `len` numbers, and zeros are such numbers.
    Ok(unsafe { Vec::from_raw_parts(at, len, len) })
}

/// No entries yet, and room for `len`.
pub fn room<T>(len: usize, what: &'static str) -> Result<Vec<T>> {
    let mut room = Vec::new();
    room.try_reserve_exact(len).map_err(|_| too_large::<T>(len, what))?;
    Ok(room)
}

/// A copy.
pub fn copied<T: Copy>(x: &[T], what: &'static str) -> Result<Vec<T>> {
    let mut copy = room(x.len(), what)?;
    copy.extend_from_slice(x);
    Ok(copy)
}

/// The items of an iterator that knows how many they are.
pub fn collected<T>(items: impl ExactSizeIterator<Item = T>, what: &'static str) -> Result<Vec<T>> {
    let mut all = room(items.len(), what)?;
    all.extend(items);
    Ok(all)
}

/// Strides of 0 make shapes of any size: what no machine can address is a wrong shape, the rest is not there just now.
fn too_large<T>(len: usize, what: &'static str) -> Error {
    match len.checked_mul(size_of::<T>()).filter(|bytes| isize::try_from(*bytes).is_ok()) {
        Some(bytes) => Error::Memory { what, bytes },
        None => Error::Shape(format!("{what} would hold {len} entries, more than any memory has room for")),
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn what_no_memory_holds_is_an_error_that_tells_its_size() {
        // Looked at by more than its length: an allocation that nobody reads may be left out of a release, and succeeds.
        let bytes = |result: Result<Vec<f64>>| match black_box(result) {
            Err(Error::Memory { what: "a test", bytes }) => bytes,
            other => panic!("{:?}", other.map(|x| x.len())),
        };
        assert_eq!(bytes(zeroed(1 << 59, "a test")), 1 << 62);
        assert_eq!(bytes(room(1 << 59, "a test")), 1 << 62);
        assert_eq!(bytes(collected((0..1 << 59).map(|i: usize| i as f64), "a test")), 1 << 62);
    }

    #[test]
    fn what_no_machine_can_address_is_a_wrong_shape() {
        for len in [1 << 60, usize::MAX] {
            assert!(matches!(zeroed::<f64>(len, "a test"), Err(Error::Shape(_))));
            assert!(matches!(room::<f64>(len, "a test"), Err(Error::Shape(_))));
        }
    }

    #[test]
    fn what_memory_holds_is_there() {
        assert_eq!(zeroed::<f32>(5, "a test"), Ok(vec![0.0; 5]));
        assert_eq!(zeroed::<f32>(0, "a test"), Ok(Vec::new()));
        assert_eq!(copied(&[1, 2], "a test"), Ok(vec![1, 2]));
        assert_eq!(collected([1, 2].into_iter(), "a test"), Ok(vec![1, 2]));
    }
}

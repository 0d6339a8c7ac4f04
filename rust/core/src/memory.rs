//! Allocations that may fail: what grows with the tokens, heads, widths or samples of a call comes from here, so that a
//! call that needs more memory than there is ends in [`Error::Memory`] and not in an abort, which is what `vec!` makes of
//! it.
//!
//! What does not grow so, and cannot fail, may still be asked for when memory is gone: a thread's tile, a task of rayon's,
//! the text of the error. A global allocator may keep a reserve for that. It asks [`may_fail`] which of the two it meets.

use std::alloc::{Layout, alloc_zeroed};
use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;

use crate::error::{Error, Result};

thread_local! {
    /// Of a type without a destructor, so that an allocator may read it.
    static MAY_FAIL: Cell<bool> = const { Cell::new(false) };
}

/// Whether the allocation that this thread is in the middle of is one of this module's, whose failure is an error and no
/// more. For a global allocator.
pub fn may_fail() -> bool {
    MAY_FAIL.get()
}

/// Runs an allocation that may fail, and never panics.
fn fallible<R>(allocate: impl FnOnce() -> R) -> R {
    MAY_FAIL.set(true);
    let result = allocate();
    MAY_FAIL.set(false);
    result
}

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
    let at = fallible(|| unsafe { alloc_zeroed(layout) }).cast::<T>();
    if at.is_null() {
        return Err(too_large::<T>(len, what));
    }
    // SAFETY: the allocation is that of an array of `len` numbers, and zeros are such numbers.
    Ok(unsafe { Vec::from_raw_parts(at, len, len) })
}

/// Zeros that begin where a line of the cache does: vectors of them never lie in two lines, which would take two loads
/// (3 to 6% of exact attention).
#[derive(Debug)]
pub(crate) struct Aligned<T> {
    numbers: Vec<T>,
    first: usize,
}

/// Bytes of a line of the cache, and of the widest vectors.
const LINE: usize = 64;

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { numbers: Vec::new(), first: 0 }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.numbers[self.first..]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.numbers[self.first..]
    }
}

/// As [`zeroed`], aligned.
pub(crate) fn aligned<T: Zeroable>(len: usize, what: &'static str) -> Result<Aligned<T>> {
    let mut numbers: Vec<T> = zeroed(len.saturating_add(LINE / size_of::<T>()), what)?;
    let first = numbers.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
    numbers.truncate(first + len);
    Ok(Aligned { numbers, first })
}

/// No entries yet, and room for `len`.
pub fn room<T>(len: usize, what: &'static str) -> Result<Vec<T>> {
    let mut room = Vec::new();
    fallible(|| room.try_reserve_exact(len)).map_err(|_| too_large::<T>(len, what))?;
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

/// `len` times the same.
pub fn filled<T: Copy>(len: usize, value: T, what: &'static str) -> Result<Vec<T>> {
    let mut all = room(len, what)?;
    all.resize(len, value);
    Ok(all)
}

/// The items of a parallel iterator that knows how many they are.
pub fn collected_in_parallel<T: Send>(
    items: impl IndexedParallelIterator<Item = T>,
    what: &'static str,
) -> Result<Vec<T>> {
    let mut all = room(items.len(), what)?;
    items.collect_into_vec(&mut all);
    Ok(all)
}

/// What a task has made for itself, or why it could not.
pub(crate) fn made<S>(scratch: &mut Result<S>) -> Result<&mut S> {
    scratch.as_mut().map_err(|error| error.clone())
}

/// Makes a buffer at least so long. What it held is lost where it grows.
pub fn lengthen<T: Zeroable>(buffer: &mut Vec<T>, len: usize, what: &'static str) -> Result<()> {
    if buffer.len() < len {
        *buffer = Vec::new();
        *buffer = zeroed(len, what)?;
    }
    Ok(())
}

/// The matrix of `entry(row, column)`.
pub fn matrix(
    rows: usize,
    columns: usize,
    what: &'static str,
    entry: impl FnMut(usize, usize) -> f64,
) -> Result<Mat<f64>> {
    let mut matrix = Mat::new();
    let len = rows.saturating_mul(columns);
    fallible(|| matrix.try_reserve(rows, columns)).map_err(|_| too_large::<f64>(len, what))?;
    matrix.resize_with(rows, columns, entry);
    Ok(matrix)
}

/// `lhs rhs`, on this thread.
pub(crate) fn multiplied(lhs: MatRef<'_, f64>, rhs: MatRef<'_, f64>, what: &'static str) -> Result<Mat<f64>> {
    let mut product = matrix(lhs.nrows(), rhs.ncols(), what, |_, _| 0.0)?;
    matmul(product.as_mut(), Accum::Replace, lhs, rhs, 1.0, Par::Seq);
    Ok(product)
}

/// Makes what general matrix products keep for this thread, and cannot fail to get: as much as two of the last cache, on
/// some machines. For threads that begin, while there is memory.
pub fn make_product_buffers() {
    // More than products by unrolled code alone are given.
    const SIDE: usize = 64;
    let x = Mat::<f64>::zeros(SIDE, SIDE);
    let mut product = Mat::<f64>::zeros(SIDE, SIDE);
    matmul(product.as_mut(), Accum::Replace, x.as_ref(), x.as_ref(), 1.0, Par::Seq);
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
        assert_eq!(bytes(filled(1 << 59, 1.0, "a test")), 1 << 62);
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
        for len in [0, 1, 5, 100] {
            let aligned = aligned::<f32>(len, "a test").expect("room");
            assert_eq!((&*aligned, aligned.as_ptr().addr() % LINE), (&*vec![0.0; len], 0));
        }
        assert_eq!(copied(&[1, 2], "a test"), Ok(vec![1, 2]));
        assert_eq!(collected([1, 2].into_iter(), "a test"), Ok(vec![1, 2]));
        assert_eq!(filled(2, 7, "a test"), Ok(vec![7, 7]));
        assert_eq!(collected_in_parallel((0..3).into_par_iter(), "a test"), Ok(vec![0, 1, 2]));
        let mut buffer = vec![1.0f64];
        assert_eq!(lengthen(&mut buffer, 3, "a test"), Ok(()));
        assert_eq!(buffer, [0.0; 3]);
        let matrix = matrix(2, 3, "a test", |i, j| (10 * i + j) as f64).expect("room for six numbers");
        assert_eq!((matrix.shape(), matrix[(1, 2)]), ((2, 3), 12.0));
    }

    #[test]
    fn only_what_may_fail_says_so_and_a_matrix_that_no_memory_holds_is_an_error() {
        assert!(!may_fail());
        assert!(fallible(may_fail));
        assert!(
            matches!(matrix(1 << 40, 1 << 19, "a test", |_, _| 0.0), Err(Error::Memory { bytes, .. }) if bytes == 1 << 62)
        );
        assert!(!may_fail());
    }
}

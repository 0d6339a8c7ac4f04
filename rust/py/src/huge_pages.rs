//! The allocator of this module: the system's, with a wish for huge pages where memory is large, and the
//! [reserve](crate::reserve) where there is none.
//!
//! A long sequence's arrays are written once or twice before they are given back, so that the kernel's work on every
//! page of 4 KiB, to clear it and to enter it, shows. NumPy asks the same for its own large arrays. Kernels with other
//! pages may refuse, which does no harm.

use std::alloc::{GlobalAlloc, Layout, System};

use crate::reserve::allocate;

/// Allocations of so many bytes are worth a system call.
const LARGE: usize = 1 << 22;

pub(crate) struct HugePages;

// SAFETY: every method is the system allocator's, asked again where it gave null; the advice changes no contents, and
// nothing here unwinds.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the system allocator's.
        advise(allocate(layout.size(), || unsafe { System.alloc(layout) }), layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        advise(allocate(layout.size(), || unsafe { System.alloc_zeroed(layout) }), layout.size())
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; null leaves the old allocation as it was.
        advise(allocate(size, || unsafe { System.realloc(at, layout, size) }), size)
    }
}

/// Asks for huge pages in the whole pages of an allocation.
#[cfg(target_os = "linux")]
fn advise(at: *mut u8, size: usize) -> *mut u8 {
    const PAGE: usize = 1 << 12;
    if size >= LARGE && !at.is_null() {
        let skip = at.align_offset(PAGE);
        // SAFETY: the range lies within the allocation. A refusal leaves everything as it was.
        unsafe { libc::madvise(at.add(skip).cast(), (size - skip) / PAGE * PAGE, libc::MADV_HUGEPAGE) };
    }
    at
}

#[cfg(not(target_os = "linux"))]
fn advise(at: *mut u8, _size: usize) -> *mut u8 {
    at
}

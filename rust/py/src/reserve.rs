//! Memory that is kept for the time when there is no other.
//!
//! Whatever grows with the sizes of a call is allocated so that it may fail (see `lingrad_core::memory`). The rest cannot
//! fail, without ending the process: a task of rayon's, a matrix product's packed panels, the text of the error itself.
//! When the system has nothing left for such an allocation, blocks of the reserve are given back to the system, which is
//! then asked again. From there on until the next call begins, whatever may fail does, so that the reserve is not spent on
//! that. Nobody ever writes to the reserve, so it takes part of the address space, and no memory.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use lingrad_core::memory::may_fail;

/// Bytes of a block.
const BLOCK: usize = 1 << 22;
/// Blocks in all, 64 MiB: many times what the threads of a large machine have been seen to take.
const BLOCKS: usize = 16;
/// Blocks without which no call begins.
const LEAST: usize = 4;
/// Bytes that NumPy and Python may need for the objects that a call returns.
const OBJECTS: usize = 1 << 21;

static RESERVE: [AtomicPtr<u8>; BLOCKS] = [const { AtomicPtr::new(null_mut()) }; BLOCKS];
/// Whether a block was given back, since the last call began, for what may not fail.
static SHORT: AtomicBool = AtomicBool::new(false);

/// Asks for `size` bytes, until they are there or nothing is left to give back.
#[inline(always)]
pub(crate) fn allocate(size: usize, ask: impl Fn() -> *mut u8) -> *mut u8 {
    if SHORT.load(Ordering::Relaxed) && may_fail() {
        return null_mut();
    }
    let at = ask();
    if at.is_null() { allocate_from_reserve(size, ask) } else { at }
}

#[cold]
fn allocate_from_reserve(size: usize, ask: impl Fn() -> *mut u8) -> *mut u8 {
    while !may_fail() && give_back(size) {
        SHORT.store(true, Ordering::Relaxed);
        let at = ask();
        if !at.is_null() {
            return at;
        }
    }
    null_mut()
}

/// Lays what is missing of the reserve, as far as there is memory for it, and says how many bytes it lacks to be enough.
pub fn lay() -> Option<usize> {
    SHORT.store(false, Ordering::Relaxed);
    let mut laid = lay_blocks();
    if laid < BLOCKS {
        // Memory that was freed since may still be kept for small objects.
        trim();
        laid = lay_blocks();
    }
    (laid < LEAST).then_some((LEAST - laid) * BLOCK)
}

fn lay_blocks() -> usize {
    for (laid, slot) in RESERVE.iter().enumerate() {
        if !slot.load(Ordering::Relaxed).is_null() {
            continue;
        }
        let block = system::map(BLOCK);
        if block.is_null() {
            return laid + RESERVE[laid..].iter().filter(|slot| !slot.load(Ordering::Relaxed).is_null()).count();
        }
        if slot.compare_exchange(null_mut(), block, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            system::unmap(block, BLOCK); // another thread was faster
        }
    }
    BLOCKS
}

/// Gives back at least so many bytes, or all that there is; whether that was anything.
fn give_back(size: usize) -> bool {
    let mut given = 0;
    for slot in &RESERVE {
        let block = slot.swap(null_mut(), Ordering::Relaxed);
        if !block.is_null() {
            system::unmap(block, BLOCK);
            given += BLOCK;
        }
        // More than asked for: allocators round up.
        if given > size {
            break;
        }
    }
    given > 0
}

/// Gives back some of the reserve where Python would otherwise not have the memory for an error, or for results.
pub fn make_room() {
    let probe = system::map(OBJECTS);
    if probe.is_null() {
        give_back(OBJECTS);
    } else {
        system::unmap(probe, OBJECTS);
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::ptr::null_mut;

    /// Pages that nobody has written to, or null.
    pub fn map(size: usize) -> *mut u8 {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping touches nobody else's memory.
        let at = unsafe { libc::mmap(null_mut(), size, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED { null_mut() } else { at.cast() }
    }

    pub fn unmap(at: *mut u8, size: usize) {
        // SAFETY: all of what `map` gave, which nobody uses.
        unsafe { libc::munmap(at.cast(), size) };
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::alloc::{GlobalAlloc, Layout, System};

    fn layout(size: usize) -> Layout {
        Layout::array::<u8>(size).expect("a few MiB have a layout")
    }

    /// Memory that nobody has written to, or null.
    pub fn map(size: usize) -> *mut u8 {
        // SAFETY: the layout is not of size 0.
        unsafe { System.alloc(layout(size)) }
    }

    pub fn unmap(at: *mut u8, size: usize) {
        // SAFETY: what `map` gave, by the same layout.
        unsafe { System.dealloc(at, layout(size)) }
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn trim() {
    // SAFETY: it gives free pages back to the system.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn trim() {}

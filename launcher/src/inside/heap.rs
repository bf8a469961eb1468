//! The heap of a launcher, of which there are as many as machines.
#![allow(unsafe_code)]

/// From this size on, a piece of the heap is memory of its own: fresh pages of it take no room until they are written, and
/// go back to the kernel with it.
#[cfg(target_env = "gnu")]
const LARGE: std::ffi::c_int = 32 << 10;

/// Keeps the heap small: large buffers are apart from it, and threads share one.
///
/// To be called before the process has threads.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_ARENA_MAX, 1)] {
        // SAFETY: mallopt(3) only sets a number of the allocator, which no other thread reads meanwhile, by the caller's
        // promise.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Gives memory that is no longer used back to the kernel.
pub fn give_back() {
    // SAFETY: malloc_trim(3) takes the allocator's own locks, and moves nothing that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

use core::arch::asm;

use super::{GlobalPointer, SharedPointer};
use crate::Value;

/// `$emit!(cache, bytes)`: 16 bytes go past L1, fewer cannot.
macro_rules! sized {
    ($bytes:expr, $emit:ident) => {
        match $bytes {
            4 => $emit!("ca", "4"),
            8 => $emit!("ca", "8"),
            _ => $emit!("cg", "16"),
        }
    };
}

#[inline(always)]
pub unsafe fn copy_async<T: Value>(
    to: SharedPointer<T>,
    to_index: usize,
    from: GlobalPointer<T>,
    from_index: usize,
) {
    let (to, from) = (to.address(to_index), from.address(from_index));
    macro_rules! emit {
        ($cache:literal, $bytes:literal) => {
            asm!(
                concat!("cp.async.", $cache, ".shared.global [{to}], [{from}], ", $bytes, ";"),
                to = in(reg32) to,
                from = in(reg64) from,
                options(nostack)
            )
        };
    }
    sized!(size_of::<T>(), emit);
}

#[inline(always)]
pub unsafe fn copy_async_or_zero<T: Value>(
    to: SharedPointer<T>,
    to_index: usize,
    from: GlobalPointer<T>,
    from_index: usize,
    valid: bool,
) {
    // With no byte to read the source address is not used; the view's base stands in for one that may be wild.
    let (to, from) = (to.address(to_index), from.address(if valid { from_index } else { 0 }));
    let read = if valid { size_of::<T>() as u32 } else { 0 };
    macro_rules! emit {
        ($cache:literal, $bytes:literal) => {
            asm!(
                concat!("cp.async.", $cache, ".shared.global [{to}], [{from}], ", $bytes, ", {read};"),
                to = in(reg32) to,
                from = in(reg64) from,
                read = in(reg32) read,
                options(nostack)
            )
        };
    }
    sized!(size_of::<T>(), emit);
}

#[inline(always)]
pub fn commit_group() {
    // SAFETY: closes a group, touches no memory.
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

#[inline(always)]
pub fn wait_group<const PENDING: u32>() {
    // SAFETY: waits.
    unsafe { asm!("cp.async.wait_group {};", const PENDING, options(nostack)) }
}

#[inline(always)]
pub fn wait_all() {
    // SAFETY: waits.
    unsafe { asm!("cp.async.wait_all;", options(nostack)) }
}

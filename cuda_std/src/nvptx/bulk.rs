use core::arch::asm;

use super::{GlobalPointer, SharedPointer};
use crate::Value;
use crate::bulk::Barrier;

#[inline(always)]
pub unsafe fn barrier_init(barriers: SharedPointer<Barrier>, index: usize, arrivals: u32) {
    asm!(
        "mbarrier.init.shared::cta.b64 [{barrier}], {arrivals};",
        barrier = in(reg32) barriers.address(index),
        arrivals = in(reg32) arrivals,
        options(nostack)
    )
}

#[inline(always)]
pub unsafe fn barrier_arrive_expect(barriers: SharedPointer<Barrier>, index: usize, bytes: u32) {
    asm!(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {bytes};",
        barrier = in(reg32) barriers.address(index),
        bytes = in(reg32) bytes,
        options(nostack)
    )
}

#[inline(always)]
pub unsafe fn barrier_try_wait(barriers: SharedPointer<Barrier>, index: usize, phase: u32) -> bool {
    let ended: u32;
    asm!(
        "{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{barrier}], {parity}; selp.u32 {ended}, 1, 0, p; }}",
        barrier = in(reg32) barriers.address(index),
        parity = in(reg32) phase & 1,
        ended = out(reg32) ended,
        options(nostack)
    );
    ended != 0
}

#[inline(always)]
pub unsafe fn bulk_copy_in<T: Value>(
    to: SharedPointer<T>,
    from: GlobalPointer<T>,
    len: usize,
    barriers: SharedPointer<Barrier>,
    index: usize,
) {
    asm!(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [{from}], {bytes}, [{barrier}];",
        to = in(reg32) to.address(0),
        from = in(reg64) from.address(0),
        bytes = in(reg32) (len * size_of::<T>()) as u32,
        barrier = in(reg32) barriers.address(index),
        options(nostack)
    )
}

#[inline(always)]
pub unsafe fn bulk_copy_out<T: Value>(to: GlobalPointer<T>, from: SharedPointer<T>, len: usize) {
    asm!(
        "cp.async.bulk.global.shared::cta.bulk_group [{to}], [{from}], {bytes};",
        to = in(reg64) to.address(0),
        from = in(reg32) from.address(0),
        bytes = in(reg32) (len * size_of::<T>()) as u32,
        options(nostack)
    )
}

#[inline(always)]
pub fn bulk_commit_group() {
    // SAFETY: closes a group, touches no memory.
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}

#[inline(always)]
pub fn bulk_wait_group<const PENDING: u32>() {
    // SAFETY: waits.
    unsafe { asm!("cp.async.bulk.wait_group {};", const PENDING, options(nostack)) }
}

#[inline(always)]
pub fn bulk_wait_group_read<const PENDING: u32>() {
    // SAFETY: waits.
    unsafe { asm!("cp.async.bulk.wait_group.read {};", const PENDING, options(nostack)) }
}

#[inline(always)]
pub fn fence_proxy_async() {
    // SAFETY: orders.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}

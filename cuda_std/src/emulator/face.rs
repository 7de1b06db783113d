//! The host face: every function of the facade, carried out by the emulator.

use std::marker::PhantomData;
use std::panic::Location;

use crate::atomic::{Fence, Order, Rmw, Scope};
use crate::bulk::Barrier;
use crate::emulator::Operation;
use crate::emulator::barrier::{Kind, barrier};
use crate::emulator::buffer::Header;
use crate::emulator::bulk::Sides;
use crate::emulator::machine::{
    GlobalView, Machine, SharedView, Site, checked, interrupt, suspend, with, yield_turn,
};
use crate::emulator::mbarrier;
use crate::emulator::mma::Fragments;
use crate::emulator::order::{Chain, Tag};
use crate::emulator::warp::{Call, collective};
use crate::emulator::wgmma::{self, Product};
use crate::emulator::{Access, FaultKind, Space, arithmetic, sfu};
use crate::view::{LoadCache, StoreCache};
use crate::warp::{FULL_MASK, ShuffleMode};
use crate::wgmma::{Left, Right};
use crate::{U32x4, Value};

/// Elements of a buffer.
pub struct GlobalPointer<T> {
    view: GlobalView,
    of: PhantomData<*mut T>,
}

/// Elements of an array in shared memory.
pub struct SharedPointer<T> {
    view: SharedView,
    of: PhantomData<*mut T>,
}

impl<T> Clone for GlobalPointer<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for GlobalPointer<T> {}

impl<T> Clone for SharedPointer<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SharedPointer<T> {}

/// Stands in for a value after a fault; nobody gets to see it.
fn nothing<T: Value>() -> T {
    // SAFETY: every bit pattern of a Value is valid.
    unsafe { std::mem::zeroed() }
}

fn is_outside(start: usize, len: usize, of: usize) -> bool {
    start.checked_add(len).is_none_or(|end| end > of)
}

impl<T: Value> GlobalPointer<T> {
    /// All of a buffer.
    pub(crate) fn of(header: &'static Header, len: usize) -> Self {
        let view = GlobalView { header, generation: header.generation(), start: 0, len };
        Self { view, of: PhantomData }
    }

    #[inline]
    fn at(self, index: usize, tag: Tag, read_only: bool, site: Site) -> Option<*mut T> {
        checked(|machine| machine.global(self.view, index, tag, read_only, site)).map(<*mut u8>::cast)
    }

    #[track_caller]
    #[inline]
    pub unsafe fn read(self, index: usize) -> T {
        interrupt();
        let element = self.at(index, Tag::LOAD, false, Location::caller());
        // SAFETY: an element of a live buffer.
        element.map_or_else(nothing, |element| unsafe { element.read() })
    }

    #[track_caller]
    #[inline]
    pub unsafe fn prefetch(self, index: usize) {
        interrupt();
        self.at(index, Tag::LOAD, false, Location::caller());
    }

    #[track_caller]
    #[inline]
    pub unsafe fn read_with(self, index: usize, cache: LoadCache) -> T {
        interrupt();
        let read_only =
            matches!(cache, LoadCache::ReadOnly | LoadCache::ReadOnlyOnce | LoadCache::ReadOnlyRun);
        let element = self.at(index, Tag::LOAD, read_only, Location::caller());
        // SAFETY: an element of a live buffer.
        element.map_or_else(nothing, |element| unsafe { element.read() })
    }

    #[track_caller]
    #[inline]
    pub unsafe fn write(self, index: usize, value: T) {
        interrupt();
        if let Some(element) = self.at(index, Tag::STORE, false, Location::caller()) {
            // SAFETY: an element of a live buffer.
            unsafe { element.write(value) };
        }
    }

    #[track_caller]
    #[inline]
    pub unsafe fn write_with(self, index: usize, value: T, _cache: StoreCache) {
        self.write(index, value);
    }

    #[track_caller]
    #[inline]
    pub unsafe fn slice(self, start: usize, len: usize) -> Self {
        let GlobalView { start: before, len: whole, .. } = self.view;
        if is_outside(start, len, whole) {
            let space = Space::Global;
            let buffer_len = self.view.buffer_len();
            leave(space, start.saturating_add(len), before, whole, buffer_len, Location::caller());
            return self;
        }
        Self { view: GlobalView { start: before + start, len, ..self.view }, ..self }
    }
}

impl<T: Value> SharedPointer<T> {
    #[inline]
    fn at(self, index: usize, tag: Tag, site: Site) -> Option<*mut T> {
        checked(|machine| machine.shared(self.view, index, size_of::<T>(), tag, site)).map(<*mut u8>::cast)
    }

    #[track_caller]
    #[inline]
    pub unsafe fn read(self, index: usize) -> T {
        interrupt();
        let element = self.at(index, Tag::LOAD, Location::caller());
        // SAFETY: an element within the block's shared memory, aligned as its array is.
        element.map_or_else(nothing, |element| unsafe { element.read() })
    }

    #[track_caller]
    #[inline]
    pub unsafe fn write(self, index: usize, value: T) {
        interrupt();
        if let Some(element) = self.at(index, Tag::STORE, Location::caller()) {
            // SAFETY: an element within the block's shared memory, aligned as its array is.
            unsafe { element.write(value) };
        }
    }

    #[track_caller]
    #[inline]
    pub unsafe fn slice(self, start: usize, len: usize) -> Self {
        let SharedView { start: before, len: whole, array_len, .. } = self.view;
        if is_outside(start, len, whole) {
            let space = Space::Shared;
            leave(space, start.saturating_add(len), before, whole, array_len, Location::caller());
            return self;
        }
        Self { view: SharedView { start: before + start, len, ..self.view }, ..self }
    }
}

/// A slice to `index` leaves its view.
#[cold]
fn leave(space: Space, index: usize, start: usize, len: usize, buffer_len: usize, site: Site) {
    let access = Access::Slice;
    with(|machine| {
        machine.raise(site, FaultKind::OutOfBounds { space, access, index, start, len, buffer_len });
    });
    suspend();
}

#[track_caller]
pub unsafe fn dynamic_shared<T: Value>(offset: usize, len: usize) -> SharedPointer<T> {
    let site = Location::caller();
    let fits = checked(|machine| {
        let (launched, bytes) = (machine.launch.shared_bytes, len.saturating_mul(size_of::<T>()));
        let fits = offset.is_multiple_of(size_of::<T>()) && !is_outside(offset, bytes, launched);
        if !fits {
            machine.raise(site, FaultKind::SharedLayout { offset, bytes, launched });
        }
        fits.then_some(())
    });
    let len = if fits.is_some() { len } else { 0 };
    SharedPointer { view: SharedView { base: offset, array_len: len, start: 0, len }, of: PhantomData }
}

/// What has atomics, and how a read-modify-write combines.
pub trait AtomicFace: Value + PartialEq {
    fn combine(op: Rmw, old: Self, new: Self, space: Space) -> Self;
}

macro_rules! integers {
    ($($ty:ty),*) => { $(
        impl AtomicFace for $ty {
            fn combine(op: Rmw, old: Self, new: Self, _: Space) -> Self {
                match op {
                    Rmw::Add => old.wrapping_add(new),
                    Rmw::Min => old.min(new),
                    Rmw::Max => old.max(new),
                    Rmw::And => old & new,
                    Rmw::Or => old | new,
                    Rmw::Xor => old ^ new,
                    Rmw::Exchange => new,
                }
            }
        }
    )* };
}
integers!(u32, i32, u64);

impl AtomicFace for f32 {
    fn combine(op: Rmw, old: Self, new: Self, space: Space) -> Self {
        match op {
            Rmw::Add => arithmetic::atomic_add(old, new, space == Space::Global),
            _ => unreachable!("the facade gives f32 additions alone"),
        }
    }
}

impl Order {
    fn acquires(self) -> bool {
        matches!(self, Self::Acquire | Self::AcqRel)
    }
    fn releases(self) -> bool {
        matches!(self, Self::Release | Self::AcqRel)
    }
}

/// An atomic's way to its element and its part in chains of releases and acquires.
#[derive(Clone, Copy)]
struct Atomic {
    access: Access,
    tag: Tag,
    chain: Chain,
    /// An order that the access cannot have.
    refused: Option<&'static str>,
}

impl Atomic {
    fn new(access: Access, tag: Tag, order: Order, scope: Scope) -> Self {
        let block_scope = scope == Scope::Block;
        let (reads, writes) = (tag.reads(), tag.writes());
        let refused = match order {
            Order::AcqRel if !(reads && writes) => Some("AcqRel"),
            Order::Acquire if !reads => Some("Acquire"),
            Order::Release if !writes => Some("Release"),
            _ => None,
        };
        let chain =
            Chain { reads, writes, acquire: order.acquires(), release: order.releases(), block_scope };
        Self { access, tag: tag.block_scope(block_scope), chain, refused }
    }

    fn rmw(order: Order, scope: Scope) -> Self {
        Self::new(Access::Atomic, Tag::RMW, order, scope)
    }
    fn load(order: Order, scope: Scope) -> Self {
        Self::new(Access::AtomicLoad, Tag::ATOMIC_LOAD, order, scope)
    }
    fn store(order: Order, scope: Scope) -> Self {
        Self::new(Access::AtomicStore, Tag::ATOMIC_STORE, order, scope)
    }

    /// Checks the order, then lets others run.
    fn begin(self, site: Site) {
        if let Some(order) = self.refused {
            with(|machine| machine.raise(site, FaultKind::OrderRefused { access: self.access, order }));
        }
        yield_turn();
    }
}

/// Replaces an element's value by what `new` makes of it, and gives the old one.
///
/// # Safety
/// `element` is valid for reads and writes.
unsafe fn replace<T: AtomicFace>(element: *mut T, atomic: Atomic, new: impl FnOnce(T) -> T) -> T {
    // SAFETY: the caller's word.
    let old = unsafe { element.read() };
    let new = new(old);
    let changed = atomic.chain.writes && old != new;
    if atomic.chain.writes {
        // SAFETY: the caller's word.
        unsafe { element.write(new) };
    }
    with(|machine| machine.poll(changed));
    old
}

macro_rules! atomics {
    ($pointer:ident, $space:expr, |$self:ident, $index:ident, $atomic:ident, $site:ident| $element:expr) => {
        impl<T: AtomicFace> $pointer<T> {
            fn element($self, $index: usize, $atomic: Atomic, $site: Site) -> Option<*mut T> {
                $atomic.begin($site);
                $element
            }

            fn atomic(self, index: usize, atomic: Atomic, site: Site, new: impl FnOnce(T) -> T) -> T {
                let element = self.element(index, atomic, site);
                // SAFETY: an element within bounds.
                element.map_or_else(nothing, |element| unsafe { replace(element, atomic, new) })
            }

            #[track_caller]
            pub unsafe fn rmw(self, op: Rmw, index: usize, value: T, order: Order, scope: Scope) -> T {
                let combine = |old| T::combine(op, old, value, $space);
                self.atomic(index, Atomic::rmw(order, scope), Location::caller(), combine)
            }

            #[track_caller]
            pub unsafe fn atomic_load(self, index: usize, order: Order, scope: Scope) -> T {
                self.atomic(index, Atomic::load(order, scope), Location::caller(), |old| old)
            }

            #[track_caller]
            pub unsafe fn atomic_store(self, index: usize, value: T, order: Order, scope: Scope) {
                self.atomic(index, Atomic::store(order, scope), Location::caller(), |_| value);
            }

            #[track_caller]
            pub unsafe fn compare_exchange(
                self,
                index: usize,
                expected: T,
                new: T,
                order: Order,
                scope: Scope,
            ) -> T {
                let exchange = |old| if old == expected { new } else { old };
                self.atomic(index, Atomic::rmw(order, scope), Location::caller(), exchange)
            }
        }
    };
}
atomics!(GlobalPointer, Space::Global, |self, index, atomic, site| {
    let element = self.at(index, atomic.tag, false, site);
    if element.is_some() {
        with(|machine| machine.chain_global(self.view, index, atomic.chain));
    }
    element
});
atomics!(SharedPointer, Space::Shared, |self, index, atomic, site| {
    let element = self.at(index, atomic.tag, site);
    if element.is_some() {
        let byte = self.view.base + (self.view.start + index) * size_of::<T>();
        with(|machine| machine.chain_shared(byte, atomic.chain));
    }
    element
});

pub fn fence(_strength: Fence, scope: Scope) {
    with(|machine| {
        let me = machine.me;
        machine.block().order.fence(me, scope == Scope::Block);
        machine.refresh();
    });
}

macro_rules! registers {
    ($($name:ident: |$machine:ident| $value:expr;)*) => { $(
        #[inline]
        pub fn $name() -> u32 {
            with(|$machine| $value)
        }
    )* };
}
registers! {
    thread_idx_x: |machine| machine.thread_index().x;
    thread_idx_y: |machine| machine.thread_index().y;
    thread_idx_z: |machine| machine.thread_index().z;
    block_dim_x: |machine| machine.launch.block.0;
    block_dim_y: |machine| machine.launch.block.1;
    block_dim_z: |machine| machine.launch.block.2;
    block_idx_x: |machine| machine.block().index.x;
    block_idx_y: |machine| machine.block().index.y;
    block_idx_z: |machine| machine.block().index.z;
    grid_dim_x: |machine| machine.launch.grid.0;
    grid_dim_y: |machine| machine.launch.grid.1;
    grid_dim_z: |machine| machine.launch.grid.2;
    lane_id: |machine| machine.me.lane() as u32;
    activemask: |machine| machine.active_lanes();
}

#[track_caller]
pub unsafe fn sync_threads() {
    barrier(Kind::Plain, false, Location::caller());
}

#[track_caller]
pub unsafe fn sync_threads_count(predicate: bool) -> u32 {
    barrier(Kind::Count, predicate, Location::caller()).1
}

#[track_caller]
pub unsafe fn sync_threads_and(predicate: bool) -> bool {
    let (threads, set) = barrier(Kind::And, predicate, Location::caller());
    threads == set
}

#[track_caller]
pub unsafe fn sync_threads_or(predicate: bool) -> bool {
    barrier(Kind::Or, predicate, Location::caller()).1 > 0
}

pub fn launch_dependents() {}

pub fn wait_dependencies() {}

pub fn nanosleep(_nanoseconds: u32) {
    with(|machine| machine.poll(false));
    yield_turn();
}

#[track_caller]
pub unsafe fn shuffle(mode: ShuffleMode, mask: u32, value: u32, lane: u32, c: u32) -> u32 {
    let call = Call { operation: Operation::Shuffle, mask, value: value.into(), shuffle: (mode, lane, c) };
    collective(call, Location::caller()) as u32
}

#[track_caller]
fn plain(operation: Operation, mask: u32, value: u64) -> u64 {
    collective(Call { operation, mask, value, shuffle: (ShuffleMode::Idx, 0, 0) }, Location::caller())
}

macro_rules! collectives {
    ($($name:ident($($value:ident: $ty:ty)?) $(-> $result:ty)?: $operation:ident, |$bits:ident, $mask:ident| $from:expr;)*) => { $(
        #[track_caller]
        pub unsafe fn $name($mask: u32 $(, $value: $ty)?) $(-> $result)? {
            #[allow(unused_mut, unused_assignments, reason = "sync_warp has no value")]
            let mut value = 0;
            $( value = u64::from($value); )?
            let $bits = plain(Operation::$operation, $mask, value);
            $from
        }
    )* };
}
collectives! {
    sync_warp(): SyncWarp, |_none, mask| ();
    vote_all(predicate: bool) -> bool: VoteAll, |bits, mask| bits != 0;
    vote_any(predicate: bool) -> bool: VoteAny, |bits, mask| bits != 0;
    vote_ballot(predicate: bool) -> u32: VoteBallot, |bits, mask| bits as u32;
    match_any_u32(value: u32) -> u32: MatchAny, |bits, mask| bits as u32;
    match_any_u64(value: u64) -> u32: MatchAny, |bits, mask| bits as u32;
    match_all_u32(value: u32) -> (u32, bool): MatchAll, |bits, mask| (bits as u32, bits != 0);
    match_all_u64(value: u64) -> (u32, bool): MatchAll, |bits, mask| (bits as u32, bits != 0);
    reduce_add(value: u32) -> u32: ReduceAdd, |bits, mask| bits as u32;
    reduce_min(value: u32) -> u32: ReduceMin, |bits, mask| bits as u32;
    reduce_max(value: u32) -> u32: ReduceMax, |bits, mask| bits as u32;
    reduce_and(value: u32) -> u32: ReduceAnd, |bits, mask| bits as u32;
    reduce_or(value: u32) -> u32: ReduceOr, |bits, mask| bits as u32;
    reduce_xor(value: u32) -> u32: ReduceXor, |bits, mask| bits as u32;
}

#[track_caller]
pub unsafe fn mma_m16n8k16_bf16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    let mut fragments = Fragments { a, b, c };
    // The lane that comes last works in all lanes' fragments: they wait here, so theirs are still in place.
    plain(Operation::Mma, FULL_MASK, (&raw mut fragments) as u64);
    fragments.c
}

#[track_caller]
pub unsafe fn transpose_8x8(pair: u32) -> u32 {
    plain(Operation::Transpose, FULL_MASK, pair.into()) as u32
}

#[track_caller]
pub unsafe fn load_8x8x4(from: SharedPointer<U32x4>, row: usize) -> [u32; 4] {
    load_matrices(Operation::LoadMatrices, from, row)
}

#[track_caller]
pub unsafe fn load_transposed_8x8x4(from: SharedPointer<U32x4>, row: usize) -> [u32; 4] {
    load_matrices(Operation::LoadTransposed, from, row)
}

#[track_caller]
unsafe fn load_matrices(operation: Operation, from: SharedPointer<U32x4>, row: usize) -> [u32; 4] {
    let mut row = from.read(row).to_array();
    // As for products: the lane that comes last hands out what all have read.
    plain(operation, FULL_MASK, (&raw mut row) as u64);
    row
}

#[track_caller]
pub unsafe fn copy_async<T: Value>(
    to: SharedPointer<T>,
    to_index: usize,
    from: GlobalPointer<T>,
    from_index: usize,
) {
    copy_async_or_zero(to, to_index, from, from_index, true);
}

#[track_caller]
pub unsafe fn copy_async_or_zero<T: Value>(
    to: SharedPointer<T>,
    to_index: usize,
    from: GlobalPointer<T>,
    from_index: usize,
    valid: bool,
) {
    let site = Location::caller();
    interrupt();
    checked(|machine| {
        machine.start_copy((to.view, to_index), (from.view, from_index), size_of::<T>(), valid, site)
    });
}

pub fn commit_group() {
    with(Machine::commit_copies);
}

pub fn wait_group<const PENDING: u32>() {
    checked(|machine| machine.wait_for_copies(Some(PENDING)));
}

pub fn wait_all() {
    checked(|machine| machine.wait_for_copies(None));
}

#[track_caller]
pub unsafe fn barrier_init(barriers: SharedPointer<Barrier>, index: usize, arrivals: u32) {
    let site = Location::caller();
    interrupt();
    checked(|machine| machine.init_barrier(barriers.view, index, arrivals, site));
}

#[track_caller]
pub unsafe fn barrier_arrive_expect(barriers: SharedPointer<Barrier>, index: usize, bytes: u32) {
    let site = Location::caller();
    interrupt();
    checked(|machine| machine.arrive_expect(barriers.view, index, bytes, site));
}

#[track_caller]
pub unsafe fn barrier_try_wait(barriers: SharedPointer<Barrier>, index: usize, phase: u32) -> bool {
    mbarrier::try_wait(barriers.view, index, phase, Location::caller())
}

#[track_caller]
pub unsafe fn bulk_copy_in<T: Value>(
    to: SharedPointer<T>,
    from: GlobalPointer<T>,
    len: usize,
    barriers: SharedPointer<Barrier>,
    index: usize,
) {
    let site = Location::caller();
    interrupt();
    let sides = Sides { global: from.view, shared: to.view, len, size: size_of::<T>() };
    checked(|machine| machine.start_copy_in(sides, barriers.view, index, site));
}

#[track_caller]
pub unsafe fn bulk_copy_out<T: Value>(to: GlobalPointer<T>, from: SharedPointer<T>, len: usize) {
    let site = Location::caller();
    interrupt();
    let sides = Sides { global: to.view, shared: from.view, len, size: size_of::<T>() };
    checked(|machine| machine.start_copy_out(sides, site));
}

pub fn bulk_commit_group() {
    with(Machine::commit_copies_out);
}

pub fn bulk_wait_group<const PENDING: u32>() {
    checked(|machine| machine.wait_for_copies_out(PENDING, true));
}

pub fn bulk_wait_group_read<const PENDING: u32>() {
    checked(|machine| machine.wait_for_copies_out(PENDING, false));
}

pub fn fence_proxy_async() {
    with(Machine::fence_proxy);
}

pub use crate::emulator::wgmma::MatrixSlice;

#[track_caller]
pub unsafe fn matrix_from_row(words: SharedPointer<U32x4>, row: usize) -> SharedPointer<U32x4> {
    words.slice(8 * row, words.view.len.saturating_sub(8 * row))
}

#[track_caller]
pub unsafe fn matrix_columns(words: SharedPointer<U32x4>, stride: usize, step: usize) -> MatrixSlice {
    MatrixSlice::columns(words.view, stride, step, Location::caller())
}

#[track_caller]
pub unsafe fn matrix_rows(words: SharedPointer<U32x4>, stride: usize, step: usize) -> MatrixSlice {
    MatrixSlice::rows(words.view, stride, step, Location::caller())
}

/// The products whose sums have one length.
pub trait SumsFace {
    #[track_caller]
    unsafe fn product(&mut self, left: Left, right: Right, add: bool);
}

impl<const N: usize> SumsFace for [f32; N] {
    #[track_caller]
    unsafe fn product(&mut self, left: Left, right: Right, add: bool) {
        wgmma::start(Product::new(left, right, add, 2 * N), left, self, Location::caller());
    }
}

#[track_caller]
pub unsafe fn product_fence() {
    plain(Operation::ProductFence, FULL_MASK, 0);
    with(Machine::fence_products);
}

#[track_caller]
pub unsafe fn product_commit_group() {
    plain(Operation::ProductGroup, FULL_MASK, 0);
    with(Machine::commit_products);
}

#[track_caller]
pub unsafe fn product_wait_group<const PENDING: u32>() {
    plain(Operation::ProductWait, FULL_MASK, 0);
    with(|machine| machine.wait_for_products(PENDING));
}

#[track_caller]
pub unsafe fn pin_sums(sums: &mut [f32], waited: bool) {
    let site = Location::caller();
    if waited {
        checked(|machine| machine.give_back(sums, site));
    }
}

pub unsafe fn pin_left(_parts: &mut [u32; 4]) {}

pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    arithmetic::fma(a, b, c)
}

pub fn max(a: f32, b: f32) -> f32 {
    arithmetic::max(a, b)
}

pub fn min(a: f32, b: f32) -> f32 {
    arithmetic::min(a, b)
}

pub fn exp2_approx(x: f32) -> f32 {
    sfu::ex2_approx_ftz(x)
}

pub fn reciprocal_approx(x: f32) -> f32 {
    sfu::rcp_approx_ftz(x)
}

pub fn rsqrt_approx(x: f32) -> f32 {
    sfu::rsqrt_approx_ftz(x)
}

pub fn pack_bf16(low: f32, high: f32) -> u32 {
    u32::from(arithmetic::to_bf16(high)) << 16 | u32::from(arithmetic::to_bf16(low))
}

pub fn from_f32_bf16(value: f32) -> u16 {
    arithmetic::to_bf16(value)
}

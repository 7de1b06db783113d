//! Atomics with their order and scope spelled out.
//!
//! `core::sync::atomic` is no substitute: on this target its read-modify-writes silently lose their ordering and their
//! scope. Here each is one PTX instruction, `atom.{order}.{scope}.{space}.{op}.{type}`; where the result is unused ptxas makes it
//! a `red`.
//!
//! # Safety
//! As for [views](crate::view#safety); and while some thread uses an element atomically, all do.

use crate::{Global, GlobalMut, Shared, Value, face};

/// How an atomic orders the thread's other accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `.relaxed`: not at all.
    Relaxed,
    /// `.acquire`: what follows stays after it.
    Acquire,
    /// `.release`: what precedes stays before it.
    Release,
    /// `.acq_rel`: both.
    AcqRel,
}

/// Who sees an atomic as atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// `.cta`: threads of the block.
    Block,
    /// `.gpu`: threads of the device.
    Device,
    /// `.sys`: the host and other devices too.
    System,
}

/// The strength of a [`fence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// `.acq_rel`: what precedes is seen before what follows.
    AcqRel,
    /// `.sc`: and all such fences have one order.
    SeqCst,
}

/// Orders the thread's accesses before it with those after it, for `scope`.
///
/// PTX: `fence.acq_rel.{scope}`, `fence.sc.{scope}`.
#[inline(always)]
pub fn fence(strength: Fence, scope: Scope) {
    face::fence(strength, scope);
}

/// A read-modify-write.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rmw {
    /// Wrapping for integers.
    Add,
    /// The lesser.
    Min,
    /// The greater.
    Max,
    /// Bitwise.
    And,
    /// Bitwise.
    Or,
    /// Bitwise.
    Xor,
    /// The new value.
    Exchange,
}

/// A type with atomics: `u32`, `i32`, `u64`, and `f32` for additions.
pub trait AtomicValue: Value + face::AtomicFace {}
/// A type whose atomics compare, order and combine bits.
pub trait AtomicInteger: AtomicValue {}

impl AtomicValue for u32 {}
impl AtomicValue for i32 {}
impl AtomicValue for u64 {}
impl AtomicValue for f32 {}
impl AtomicInteger for u32 {}
impl AtomicInteger for i32 {}
impl AtomicInteger for u64 {}

macro_rules! rmw {
    ($($(#[$doc:meta])* $name:ident: $op:ident;)*) => { $(
        $(#[$doc])*
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        #[inline(always)]
        pub unsafe fn $name(self, index: usize, value: T, order: Order, scope: Scope) -> T {
            self.0.rmw(Rmw::$op, index, value, order, scope)
        }
    )* };
}

macro_rules! atomics {
    ($view:ident, $space:literal) => {
        impl<T: AtomicValue> $view<T> {
            rmw! {
                /// Adds, wrapping for integers, and returns the old value.
                ///
                #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".add.{u32,s32,u64,f32}`; f32 in global memory flushes subnormals.")]
                atomic_add: Add;
            }

            /// Reads.
            ///
            #[doc = concat!("PTX: `ld.{relaxed,acquire}.{scope}.", $space, "`; [`Order::Release`] and [`Order::AcqRel`] are refused.")]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            pub unsafe fn atomic_load(self, index: usize, order: Order, scope: Scope) -> T {
                self.0.atomic_load(index, order, scope)
            }

            /// Writes.
            ///
            #[doc = concat!("PTX: `st.{relaxed,release}.{scope}.", $space, "`; [`Order::Acquire`] and [`Order::AcqRel`] are refused.")]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            pub unsafe fn atomic_store(self, index: usize, value: T, order: Order, scope: Scope) {
                self.0.atomic_store(index, value, order, scope);
            }
        }

        impl<T: AtomicInteger> $view<T> {
            rmw! {
                /// Keeps the lesser and returns the old value.
                ///
                #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".min.{u32,s32,u64}`.")]
                atomic_min: Min;
                /// Keeps the greater and returns the old value.
                ///
                #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".max.{u32,s32,u64}`.")]
                atomic_max: Max;
                /// Clears the bits that `value` lacks and returns the old value.
                ///
                #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".and.{b32,b64}`.")]
                atomic_and: And;
                /// Sets the bits of `value` and returns the old value.
                ///
                #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".or.{b32,b64}`.")]
                atomic_or: Or;
                /// Flips the bits of `value` and returns the old value.
                ///
                #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".xor.{b32,b64}`.")]
                atomic_xor: Xor;
                /// Puts `value` in and returns the old value.
                ///
                #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".exch.{b32,b64}`.")]
                atomic_exchange: Exchange;
            }

            /// Puts `new` in if the element is `expected`, and returns the old value.
            ///
            #[doc = concat!("PTX: `atom.{order}.{scope}.", $space, ".cas.{b32,b64}`.")]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            pub unsafe fn atomic_compare_exchange(
                self,
                index: usize,
                expected: T,
                new: T,
                order: Order,
                scope: Scope,
            ) -> T {
                self.0.compare_exchange(index, expected, new, order, scope)
            }
        }
    };
}
atomics!(GlobalMut, "global");
atomics!(Shared, "shared");

impl<T: AtomicValue> Global<T> {
    /// Reads, where another kernel or the host may be writing.
    ///
    /// PTX: `ld.{relaxed,acquire}.{scope}.global`; [`Order::Release`] and [`Order::AcqRel`] are refused.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn atomic_load(self, index: usize, order: Order, scope: Scope) -> T {
        self.0.atomic_load(index, order, scope)
    }
}

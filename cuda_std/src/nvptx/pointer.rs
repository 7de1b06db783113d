use core::arch::asm;

use super::address;
use super::atomic::AtomicFace;
use crate::atomic::{Order, Rmw, Scope};
use crate::view::{LoadCache, StoreCache};
use crate::{U32x4, Value};

/// A pointer to global memory, of the device or mapped from the host.
#[repr(transparent)]
pub struct GlobalPointer<T>(*mut T);

/// A pointer to the block's shared memory.
#[repr(transparent)]
pub struct SharedPointer<T>(*mut T);

/// The array at byte `offset` of the launch's dynamic shared memory.
#[inline(always)]
pub unsafe fn dynamic_shared<T: Value>(offset: usize, _len: usize) -> SharedPointer<T> {
    SharedPointer(address::shared_base().add(offset).cast())
}

macro_rules! pointer {
    ($pointer:ident, $space:ident, $rmw:ident, $compare_exchange:ident, $load:ident, $store:ident) => {
        impl<T> Clone for $pointer<T> {
            #[inline(always)]
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $pointer<T> {}

        impl<T: Value> $pointer<T> {
            #[inline(always)]
            pub unsafe fn read(self, index: usize) -> T {
                T::read(self.0.add(index))
            }

            #[inline(always)]
            pub unsafe fn write(self, index: usize, value: T) {
                T::write(self.0.add(index), value);
            }

            #[inline(always)]
            pub unsafe fn slice(self, start: usize, _len: usize) -> Self {
                Self(self.0.add(start))
            }
        }

        impl<T: AtomicFace> $pointer<T> {
            #[inline(always)]
            pub unsafe fn rmw(self, op: Rmw, index: usize, value: T, order: Order, scope: Scope) -> T {
                T::$rmw(address::$space(self.0.add(index)), op, value, order, scope)
            }

            #[inline(always)]
            pub unsafe fn compare_exchange(
                self,
                index: usize,
                expected: T,
                new: T,
                order: Order,
                scope: Scope,
            ) -> T {
                T::$compare_exchange(address::$space(self.0.add(index)), expected, new, order, scope)
            }

            #[inline(always)]
            pub unsafe fn atomic_load(self, index: usize, order: Order, scope: Scope) -> T {
                T::$load(address::$space(self.0.add(index)), order, scope)
            }

            #[inline(always)]
            pub unsafe fn atomic_store(self, index: usize, value: T, order: Order, scope: Scope) {
                T::$store(address::$space(self.0.add(index)), value, order, scope);
            }
        }
    };
}
pointer!(GlobalPointer, global, rmw_global, compare_exchange_global, load_global, store_global);
pointer!(SharedPointer, shared, rmw_shared, compare_exchange_shared, load_shared, store_shared);

impl<T> GlobalPointer<T> {
    /// What an instruction with `.global` takes for element `index`.
    #[inline(always)]
    pub unsafe fn address(self, index: usize) -> u64 {
        address::global(self.0.add(index))
    }
}

impl<T: Value> GlobalPointer<T> {
    #[inline(always)]
    pub unsafe fn prefetch(self, index: usize) {
        asm!(
            "prefetch.global.L2 [{}];",
            in(reg64) self.address(index),
            options(readonly, nostack, preserves_flags)
        );
    }
}

impl<T> SharedPointer<T> {
    /// What an instruction with `.shared` takes for element `index`.
    #[inline(always)]
    pub unsafe fn address(self, index: usize) -> u32 {
        address::shared(self.0.add(index))
    }
}

impl GlobalPointer<U32x4> {
    #[inline(always)]
    pub unsafe fn read_with(self, index: usize, cache: LoadCache) -> U32x4 {
        let address = self.address(index);
        let (x, y, z, w);
        // Not `pure`: volatile asm keeps its order, so loads written side by side are in flight side by side.
        macro_rules! load {
            ($hint:literal) => {
                asm!(
                    concat!("ld.global", $hint, ".v4.u32 {{{x}, {y}, {z}, {w}}}, [{address}];"),
                    address = in(reg64) address,
                    x = out(reg32) x,
                    y = out(reg32) y,
                    z = out(reg32) z,
                    w = out(reg32) w,
                    options(readonly, nostack, preserves_flags)
                )
            };
        }
        match cache {
            LoadCache::All => load!(""),
            LoadCache::Global => load!(".cg"),
            LoadCache::Streaming => load!(".cs"),
            LoadCache::ReadOnly => load!(".nc"),
            LoadCache::ReadOnlyOnce => load!(".nc.L1::no_allocate"),
            LoadCache::ReadOnlyRun => load!(".nc.L1::no_allocate.L2::256B"),
        }
        U32x4 { x, y, z, w }
    }

    #[inline(always)]
    pub unsafe fn write_with(self, index: usize, value: U32x4, cache: StoreCache) {
        let address = self.address(index);
        macro_rules! store {
            ($hint:literal) => {
                asm!(
                    concat!("st.global", $hint, ".v4.u32 [{address}], {{{x}, {y}, {z}, {w}}};"),
                    address = in(reg64) address,
                    x = in(reg32) value.x,
                    y = in(reg32) value.y,
                    z = in(reg32) value.z,
                    w = in(reg32) value.w,
                    options(nostack, preserves_flags)
                )
            };
        }
        match cache {
            StoreCache::WriteBack => store!(""),
            StoreCache::Global => store!(".cg"),
            StoreCache::Streaming => store!(".cs"),
        }
    }
}

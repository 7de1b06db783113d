//! Views: a base, a length and an address space. The only ways of a kernel to memory.
//!
//! On the device a view is a bare pointer, so that it can be a kernel parameter, and its length is the caller's word. In the
//! emulator it knows its buffer and its bounds, and a view cut to a row knows the row's bounds too, so an index that
//! strays into the next row is found even where the buffer goes on.
//!
//! # Safety
//! For every access: the index lies within the view, and no other thread writes the same element without being ordered
//! before or after by a barrier, an atomic or the end of the launch.

use crate::face;
use crate::{U32x4, Value};

/// How a 16-byte load from global memory treats the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadCache {
    /// `ld.global.v4.u32`: keep in L1 and L2.
    All,
    /// `ld.global.cg.v4.u32`: L2 alone; sees what other blocks have written.
    Global,
    /// `ld.global.cs.v4.u32`: evicted first; for data that is read once.
    Streaming,
    /// `ld.global.nc.v4.u32`: the read-only path; nothing may write the element during the launch.
    ReadOnly,
    /// `ld.global.nc.L1::no_allocate.v4.u32`: read-only and once, leaving L1 to others.
    ReadOnlyOnce,
    /// `ld.global.nc.L1::no_allocate.L2::256B.v4.u32`: the same, for long runs: L2 fetches 256 bytes at a time.
    ReadOnlyRun,
}

/// How a 16-byte store to global memory treats the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreCache {
    /// `st.global.v4.u32`: write back.
    WriteBack,
    /// `st.global.cg.v4.u32`: L2 alone.
    Global,
    /// `st.global.cs.v4.u32`: evicted first; for data that is not read again soon.
    Streaming,
}

/// Global memory that the kernel reads: of the device, or of the host where it is mapped.
#[repr(transparent)]
pub struct Global<T>(pub(crate) face::GlobalPointer<T>);

/// Global memory that the kernel reads and writes.
#[repr(transparent)]
pub struct GlobalMut<T>(pub(crate) face::GlobalPointer<T>);

/// Shared memory of the block; from [`shared_layout!`](crate::shared_layout).
#[repr(transparent)]
pub struct Shared<T>(pub(crate) face::SharedPointer<T>);

/// A read-only view cut into rows of equal length; see [`Global::rows`].
pub struct Rows<T> {
    view: Global<T>,
    width: usize,
}

/// A view cut into rows of equal length; see [`GlobalMut::rows`].
pub struct RowsMut<T> {
    view: GlobalMut<T>,
    width: usize,
}

macro_rules! copyable {
    ($($view:ident),*) => { $(
        impl<T> Clone for $view<T> {
            #[inline(always)]
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<T> Copy for $view<T> {}
    )* };
}
copyable!(Global, GlobalMut, Shared, Rows, RowsMut);

macro_rules! reading {
    ($view:ident, $space:literal) => {
        impl<T: Value> $view<T> {
            /// Reads element `index`.
            ///
            #[doc = concat!("PTX: `ld.", $space, "`, one access of the element's size.")]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            pub unsafe fn load(self, index: usize) -> T {
                self.0.read(index)
            }

            /// The `len` elements from `start`, as a view of their own.
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            pub unsafe fn slice(self, start: usize, len: usize) -> Self {
                Self(self.0.slice(start, len))
            }
        }
    };
}

macro_rules! writing {
    ($view:ident, $space:literal) => {
        impl<T: Value> $view<T> {
            /// Writes element `index`.
            ///
            #[doc = concat!("PTX: `st.", $space, "`, one access of the element's size.")]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            pub unsafe fn store(self, index: usize, value: T) {
                self.0.write(index, value);
            }
        }
    };
}

macro_rules! rows {
    ($view:ident, $rows:ident) => {
        impl<T: Value> $view<T> {
            /// Cuts the view into rows of `width` elements.
            #[inline(always)]
            pub fn rows(self, width: usize) -> $rows<T> {
                $rows { view: self, width }
            }
        }

        impl<T: Value> $rows<T> {
            /// Row `index`: a view of its elements alone.
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            #[inline(always)]
            pub unsafe fn row(self, index: usize) -> $view<T> {
                self.view.slice(index * self.width, self.width)
            }
        }
    };
}

reading!(Global, "global");
reading!(GlobalMut, "global");
reading!(Shared, "shared");
writing!(GlobalMut, "global");
writing!(Shared, "shared");
rows!(Global, Rows);
rows!(GlobalMut, RowsMut);

impl<T: Value> GlobalMut<T> {
    /// The same memory, to read.
    #[inline(always)]
    pub fn as_global(self) -> Global<T> {
        Global(self.0)
    }
}

impl<T: Value> Global<T> {
    /// Asks for the line of element `index`, so that it is in the L2 when somebody reads it. Under the emulator a load whose value is dropped. PTX: `prefetch.global.L2`.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn prefetch(self, index: usize) {
        self.0.prefetch(index);
    }
}

impl Global<U32x4> {
    /// Reads element `index` with a cache hint. PTX: see [`LoadCache`].
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn load_with(self, index: usize, cache: LoadCache) -> U32x4 {
        self.0.read_with(index, cache)
    }
}

impl GlobalMut<U32x4> {
    /// Writes element `index` with a cache hint. PTX: see [`StoreCache`].
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[inline(always)]
    pub unsafe fn store_with(self, index: usize, value: U32x4, cache: StoreCache) {
        self.0.write_with(index, value, cache);
    }
}

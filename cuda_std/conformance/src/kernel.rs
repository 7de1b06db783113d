//! What the kernels share.

use core::cell::Cell;

pub use cuda_std::atomic::{Fence, Order, Scope, fence};
#[cfg(any(not(target_arch = "nvptx64"), sm_90))]
pub use cuda_std::bulk;
pub use cuda_std::prelude::*;
pub use cuda_std::thread::*;
pub use cuda_std::warp::*;
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
pub use cuda_std::wgmma;
pub use cuda_std::{Value, bf16, copy, math, mma, shared};

/// A thread's rows of the input and the output.
pub struct Io<I, O> {
    /// All of the input.
    pub input: Global<I>,
    /// All of the output.
    pub output: GlobalMut<O>,
    /// The thread's number in the launch.
    pub thread: usize,
    ins: usize,
    outs: usize,
    taken: Cell<usize>,
    put: Cell<usize>,
}

impl<I: Value, O: Value> Io<I, O> {
    /// For a launch along x.
    #[inline(always)]
    pub unsafe fn new(input: Global<I>, output: GlobalMut<O>, ins: usize, outs: usize) -> Self {
        Self { input, output, thread: index_1d() as usize, ins, outs, taken: Cell::new(0), put: Cell::new(0) }
    }

    /// For a launch of three dimensions.
    #[inline(always)]
    pub unsafe fn in_space(self) -> Self {
        let block = (block_idx_z() * grid_dim_y() + block_idx_y()) * grid_dim_x() + block_idx_x();
        let thread = (thread_idx_z() * block_dim_y() + thread_idx_y()) * block_dim_x() + thread_idx_x();
        let threads = block_dim_x() * block_dim_y() * block_dim_z();
        Self { thread: (block * threads + thread) as usize, ..self }
    }

    /// The thread's row of the input.
    #[inline(always)]
    pub unsafe fn given(&self) -> Global<I> {
        self.input.rows(self.ins).row(self.thread)
    }

    /// The thread's row of the output.
    #[inline(always)]
    pub unsafe fn results(&self) -> GlobalMut<O> {
        self.results_of(self.thread)
    }

    /// The row of the output of thread `thread`.
    #[inline(always)]
    pub unsafe fn results_of(&self, thread: usize) -> GlobalMut<O> {
        self.output.rows(self.outs).row(thread)
    }

    /// The first thread of the block, in a launch along x.
    #[inline(always)]
    pub fn first_of_block(&self) -> usize {
        self.thread - thread_idx_x() as usize
    }

    /// The next of the thread's input.
    #[inline(always)]
    pub unsafe fn take(&self) -> I {
        self.given().load(self.taken.replace(self.taken.get() + 1))
    }

    /// The next of the input of the warp's first thread: the same in all lanes.
    #[inline(always)]
    pub unsafe fn take_of_warp(&self) -> I {
        let first = self.input.rows(self.ins).row(self.thread - lane_id() as usize);
        first.load(self.taken.replace(self.taken.get() + 1))
    }

    /// The next of the thread's output.
    #[inline(always)]
    pub unsafe fn put(&self, value: O) {
        self.results().store(self.put.replace(self.put.get() + 1), value);
    }
}

/// Something with 32 bits to decide by.
pub trait Bits {
    fn bits(self) -> u32;
}

macro_rules! bits {
    ($($ty:ty: |$value:ident| $bits:expr;)*) => { $(
        impl Bits for $ty {
            #[inline(always)]
            fn bits(self) -> u32 {
                let $value = self;
                $bits
            }
        }
    )* };
}
bits! {
    u32: |value| value;
    i32: |value| value as u32;
    f32: |value| value.to_bits();
    u64: |value| value as u32;
    U32x4: |value| value.x;
}

/// `mask` for its lanes and the rest for the rest, so that each lane has a mask that it is in.
#[inline(always)]
pub fn own(mask: u32) -> u32 {
    if mask >> lane_id() & 1 == 1 { mask } else { !mask }
}

/// A mask of whole groups of `width` lanes.
#[inline(always)]
pub fn whole_groups(bits: u32, width: u32) -> u32 {
    let (mut mask, mut lane) = (0, 0);
    while lane < WARP_SIZE {
        mask |= (bits >> (lane & !(width - 1)) & 1) << lane;
        lane += 1;
    }
    mask
}

/// The first `len` elements of the launch's shared memory.
#[inline(always)]
pub unsafe fn scratch<T: Value>(len: usize) -> Shared<T> {
    shared::dynamic(0, len)
}

/// A statement for each order of a read-modify-write and each scope.
macro_rules! every_order {
    (|$order:ident, $scope:ident| $body:expr) => {
        every_scope!([Relaxed, Acquire, Release, AcqRel] | $order, $scope | $body)
    };
}

/// A statement for each of some orders and each scope.
macro_rules! every_scope {
    ([$($of:ident),*] |$order:ident, $scope:ident| $body:expr) => { $(
        { let ($order, $scope) = (Order::$of, Scope::Block); $body; }
        { let ($order, $scope) = (Order::$of, Scope::Device); $body; }
        { let ($order, $scope) = (Order::$of, Scope::System); $body; }
    )* };
}
pub(crate) use {every_order, every_scope};

//! Shared memory: one dynamic block, carved by a layout that is known at compile time.
//!
//! ```ignore
//! shared_layout! {
//!     /// What the block's warps hand to each other.
//!     pub struct Scratch {
//!         sums: [f32; 32],
//!         tile: [U32x4; 256],
//!     }
//! }
//! let sums = unsafe { Scratch::sums() }; // Shared<f32> of 32 elements
//! sums.store(warp, sum);
//! // launched with Scratch::BYTES bytes of shared memory
//! ```
//!
//! rustc has no shared statics, so arrays are const offsets into the launch's dynamic shared memory. Each starts at a multiple
//! of 128 bytes: no bank conflict comes from where an array starts, and bulk copies will want it.

use crate::{Shared, Value, face};

/// Where each array of a layout starts.
pub const ALIGNMENT: usize = 128;

/// `len` elements from byte `offset` of the block's dynamic shared memory.
///
/// # Safety
/// `offset` is a multiple of the element's size, the range lies within the launch's shared memory, and no array of
/// another type overlaps it.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn dynamic<T: Value>(offset: usize, len: usize) -> Shared<T> {
    Shared(face::dynamic_shared(offset, len))
}

/// Declares what a kernel keeps in shared memory: an item with `BYTES`, the bytes to launch with, and a function an array
/// that gives its [`Shared`] view. See the [module](crate::shared).
#[macro_export]
macro_rules! shared_layout {
    ($(#[$attribute:meta])* $vis:vis struct $name:ident { $($field:ident: [$ty:ty; $len:expr]),+ $(,)? }) => {
        $(#[$attribute])*
        $vis struct $name;

        #[allow(missing_docs, dead_code, non_camel_case_types, reason = "named by the layout's own doc")]
        const _: () = {
            enum Field { $($field),+ }
            const BYTES: &[usize] = &[$($len * ::core::mem::size_of::<$ty>()),+];
            /// The byte at which array `field` starts.
            const fn start(field: usize) -> usize {
                let mut at = 0;
                let mut before = 0;
                while before < field {
                    at += BYTES[before].next_multiple_of($crate::shared::ALIGNMENT);
                    before += 1;
                }
                at
            }

            impl $name {
                /// Dynamic shared memory of a launch, in bytes.
                $vis const BYTES: usize = start(BYTES.len());

                $(
                    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
                    #[inline(always)]
                    $vis unsafe fn $field() -> $crate::Shared<$ty> {
                        const START: usize = start(Field::$field as usize);
                        // SAFETY: const offsets of one layout, which do not overlap; the launch has BYTES bytes.
                        unsafe { $crate::shared::dynamic::<$ty>(START, $len) }
                    }
                )+
            }
        };
    };
}

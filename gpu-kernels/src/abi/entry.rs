/// One request's part in a decode step, as the host writes it before the step; the kernels of a step read it from device memory,
/// so that a captured graph serves every step. All numbers that change from step to step are here, and nowhere else.
///
/// Tables of a request hold its rows one after another, `row = layer * kv_heads + kv_head`. Where a table of the request
/// begins is counted in its elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Entry {
    /// Tokens that the request holds after the step; the new token is the last of them. 0 for an entry that only fills the batch:
    /// nothing is read or written for it, its counts are 0.
    pub tokens: u32,
    /// The request's step clock, modulo 64: one more than in its last step.
    pub clock: u32,
    /// Its directory in the directories: segment of page keys `512 * i ..`, as far as its context has come; as many numbers as its
    /// host tables are long: `slab_stride / 32`, rounded up.
    pub directory: u32,
    /// Row 0 in the slot arrays, a multiple of 4; row `r` begins at `first_slot + r * slot_stride`.
    pub first_slot: u32,
    /// Slots between rows: a multiple of 4.
    pub slot_stride: u32,
    /// Slot numbers of each row lie below this number, a multiple of 4 and at most `slot_stride`. Numbers without a slot are
    /// [`SLOT_PINNED`](super::SLOT_PINNED) and not held, whatever their stamp, and have no page.
    pub slots: u32,
    /// Row 0 in the steady lists, each `[sink_pages + ring_pages]`.
    pub first_steady: u32,
    /// Pages of the sinks, by key, at the start of a steady list.
    pub sink_pages: u32,
    /// Places of the tail's pages, a ring by key, after those of the sinks; at least 1.
    pub ring_pages: u32,
    /// Row 0 in the host tables: slab of page keys `16 * i ..`; row `r` begins at `first_slab + r * slab_stride`.
    pub first_slab: u32,
    /// Slabs between rows.
    pub slab_stride: u32,
    /// The first partition that may be selected.
    pub first_partition: u32,
    /// Partitions that may be selected.
    pub partitions: u32,
    /// The most partitions to select.
    pub limit: u32,
    /// The first page key that leaves the steady zone in this step.
    pub leaving_key: u32,
    /// Pages that leave the steady zone in this step: they come into the cache. Of a prompt, pages that never are in it: they go to the
    /// host alone.
    pub leaving: u32,
    /// The first partition that leaves the steady zone in this step.
    pub new_partition: u32,
    /// Partitions that leave the steady zone in this step: they get their summaries. Of clusters, which are made before their tokens leave: layers, from the
    /// first on, whose last run may not be selected yet.
    pub new_partitions: u32,
    /// Row 0 among the rows of all requests: the marks of row `r` are the words from `(first_marks + r) * mark_words` on.
    pub first_marks: u32,
    /// Its basis among those of all requests, if its keys are kept in low rank.
    pub basis: u32,
}

// SAFETY: twenty u32 without padding, any bits.
unsafe impl bytemuck::Zeroable for Entry {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Entry {}

/// An [`Entry`] in words of 16 bytes: what a kernel reads of it.
pub const ENTRY_WORDS: usize = size_of::<Entry>() / super::WORD_BYTES;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod device {
    use cuda_std::{Global, U32x4};

    use super::{ENTRY_WORDS, Entry};
    use crate::abi::SLAB_PAGES;

    impl Entry {
        /// Entry `index` of `entries`, in words.
        ///
        /// # Safety
        /// `entries` has it.
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        #[inline(always)]
        pub unsafe fn load(entries: Global<U32x4>, index: u32) -> Self {
            let words = entries.slice(index as usize * ENTRY_WORDS, ENTRY_WORDS);
            let U32x4 { x: tokens, y: clock, z: directory, w: first_slot } = words.load(0);
            let U32x4 { x: slot_stride, y: slots, z: first_steady, w: sink_pages } = words.load(1);
            let U32x4 { x: ring_pages, y: first_slab, z: slab_stride, w: first_partition } = words.load(2);
            let U32x4 { x: partitions, y: limit, z: leaving_key, w: leaving } = words.load(3);
            let U32x4 { x: new_partition, y: new_partitions, z: first_marks, w: basis } = words.load(4);
            Self {
                tokens,
                clock,
                directory,
                first_slot,
                slot_stride,
                slots,
                first_steady,
                sink_pages,
                ring_pages,
                first_slab,
                slab_stride,
                first_partition,
                partitions,
                limit,
                leaving_key,
                leaving,
                new_partition,
                new_partitions,
                first_marks,
                basis,
            }
        }

        /// The place of page `key` in its row's steady list.
        #[inline(always)]
        pub fn steady_place(&self, row: u32, key: u32) -> u32 {
            let list = self.first_steady + row * (self.sink_pages + self.ring_pages);
            let place = if key < self.sink_pages {
                key
            } else {
                self.sink_pages + (key - self.sink_pages) % self.ring_pages
            };
            list + place
        }

        /// The place of page `key`'s slab in the host tables.
        #[inline(always)]
        pub fn slab_place(&self, row: u32, key: u32) -> u32 {
            self.first_slab + row * self.slab_stride + key / SLAB_PAGES
        }
    }
}

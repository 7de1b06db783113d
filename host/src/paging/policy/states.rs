use super::super::bits::Bits;
use crate::paging::SlotId;

/// What a row knows of its slots: one byte each, as a GPU kernel would keep it, and which slots the selection
/// that is being resolved uses.
///
/// Of the byte, bits 0 to 5 belong to the policy, bit 6 says that the slot is pinned and bit 7 that it holds a
/// page.
#[derive(Clone, Debug, Default)]
pub struct SlotStates {
    bytes: Vec<u8>,
    touched: Bits,
    pinned: usize,
}

impl SlotStates {
    /// The bits of a slot that belong to the policy.
    pub const POLICY: u8 = 0x3f;
    /// The slot stays, whatever the policy wants.
    pub const PINNED: u8 = 0x40;
    /// The slot holds a page.
    pub const HELD: u8 = 0x80;

    /// The slots' bytes, `[slots]`.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The slots' bytes, `[slots]`, for a policy to change its bits of them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Whether a policy may name `slot` as a victim: it holds a page, is not pinned, and the selection that is
    /// being resolved does not use it.
    pub fn is_evictable(&self, slot: SlotId) -> bool {
        Self::may_leave(self.bytes[slot.index()]) && !self.touched.contains(slot.index())
    }

    /// The slots that a policy may name as victims, ascending.
    pub fn evictable(&self) -> impl Iterator<Item = SlotId> {
        (0..self.bytes.len() as u32).map(SlotId).filter(|slot| self.is_evictable(*slot))
    }

    /// Whether a slot of this byte holds a page that no pin keeps.
    pub(super) fn may_leave(byte: u8) -> bool {
        byte & (Self::HELD | Self::PINNED) == Self::HELD
    }

    /// Whether the slot holds a page.
    pub fn is_held(&self, slot: SlotId) -> bool {
        self.bytes[slot.index()] & Self::HELD != 0
    }

    /// Whether the slot is pinned.
    pub fn is_pinned(&self, slot: SlotId) -> bool {
        self.bytes[slot.index()] & Self::PINNED != 0
    }

    /// Slots that are pinned.
    pub fn pinned(&self) -> usize {
        self.pinned
    }

    pub(in crate::paging) fn resize(&mut self, slots: usize) {
        self.bytes.resize(slots, 0);
        self.touched.grow(slots);
    }

    /// Marks `slot` as used by the current selection; false if it was marked already.
    pub(in crate::paging) fn touch(&mut self, slot: SlotId) -> bool {
        self.touched.insert(slot.index())
    }

    pub(in crate::paging) fn untouch_all(&mut self) {
        self.touched.clear();
    }

    pub(in crate::paging) fn fill(&mut self, slot: SlotId) {
        self.bytes[slot.index()] |= Self::HELD;
    }

    pub(in crate::paging) fn vacate(&mut self, slot: SlotId) {
        self.bytes[slot.index()] = 0;
        self.touched.remove(slot.index());
    }

    pub(in crate::paging) fn set_pinned(&mut self, slot: SlotId, pinned: bool) {
        debug_assert_ne!(self.is_pinned(slot), pinned);
        self.bytes[slot.index()] ^= Self::PINNED;
        self.pinned = if pinned { self.pinned + 1 } else { self.pinned - 1 };
    }

    pub(in crate::paging) fn table_bytes(&self) -> usize {
        self.bytes.len() + self.touched.bytes()
    }
}

/// An id as it was when it was noted down: with the generation of what it named.
///
/// Pages, slabs and segments are used again under the same id, and each time their generation goes up by one. An
/// id that outlives its owner is told from the new owner's by that; whoever keeps an id beyond a step keeps it
/// stamped. (Requests need no generation: their ids are never used again.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamped<Id> {
    /// The id.
    pub id: Id,
    /// The generation that it had.
    pub generation: u32,
}

// SAFETY: zero bytes are a valid generation, and a valid id by the bound.
unsafe impl<Id: bytemuck::Zeroable> bytemuck::Zeroable for Stamped<Id> {}

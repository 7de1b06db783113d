use super::Allocator;
use crate::Result;

/// Storage of summaries: one block for each segment of page keys, for all rows of a request, `[rows][partitions,
/// width]`. A request owns its blocks; those it gives back are used again.
#[derive(Debug)]
pub struct SummaryPool {
    elements: usize,
    allocator: Allocator,
    spare: Vec<Box<[f32]>>,
}

impl SummaryPool {
    /// A pool of blocks of `elements` elements each.
    pub fn new(elements: usize, allocator: Allocator) -> Self {
        Self { elements, allocator, spare: Vec::new() }
    }

    /// Takes a block, of any content.
    ///
    /// # Errors
    /// [`AllocationFailed`](crate::Error::AllocationFailed); nothing is then changed.
    pub fn take(&mut self) -> Result<Box<[f32]>> {
        match self.spare.pop() {
            Some(block) => Ok(block),
            None if self.elements == 0 => Ok(Box::default()),
            None => self.allocator.zeroed(self.elements, "summaries"),
        }
    }

    /// Takes a block back. In debug builds its elements become NaNs, so that a stale read shows.
    pub fn give_back(&mut self, mut block: Box<[f32]>) {
        if cfg!(debug_assertions) {
            block.fill(f32::NAN);
        }
        self.spare.push(block);
    }
}

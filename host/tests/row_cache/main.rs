//! The cache of a row against models that share no code with it: the design's invariants I1 to I9, I12 and I13, each
//! policy's order, and the mistakes that other systems shipped.

mod ages;
mod model;
mod policies;
mod reports;
mod state_machine;

use spinkv::memory::PhysicalPage;
use spinkv::partition::SelectedPage;

/// A selection of whole pages of 8 tokens.
fn select(keys: &[u32]) -> Vec<SelectedPage> {
    keys.iter().map(|key| SelectedPage { key: *key, tokens: 8 }).collect()
}

/// Physical pages by number.
fn physical(pages: impl IntoIterator<Item = u32>) -> Vec<PhysicalPage> {
    pages.into_iter().map(PhysicalPage).collect()
}

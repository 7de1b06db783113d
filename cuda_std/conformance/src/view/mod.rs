//! Loads and stores.

pub(crate) mod cached;
pub(crate) mod cut;
pub(crate) mod element;

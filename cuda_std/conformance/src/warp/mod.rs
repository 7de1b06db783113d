//! Collectives of a warp.

pub(crate) mod collective;
pub(crate) mod combined;
pub(crate) mod shuffle;

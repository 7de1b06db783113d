//! Atomics.

pub(crate) mod access;
pub(crate) mod contended;
pub(crate) mod order;
pub(crate) mod rmw;

//! Every kind of fault: a kernel that is broken on purpose, and its repaired twin.

#![allow(
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    reason = "kernels of a few lines, most of them wrong"
)]

mod barriers;
mod bounds;
mod bulk;
mod collectives;
mod copies;
mod endings;
mod global_races;
mod launches;
mod shared_races;
#[path = "../support/mod.rs"]
mod support;
mod uninitialised;
mod wgmma;

use cuda_std::emulator::Fault;
use cuda_std::prelude::*;
use cuda_std::shared_layout;

const SOURCES: [&str; 11] = [
    include_str!("bounds.rs"),
    include_str!("uninitialised.rs"),
    include_str!("shared_races.rs"),
    include_str!("global_races.rs"),
    include_str!("copies.rs"),
    include_str!("bulk.rs"),
    include_str!("barriers.rs"),
    include_str!("collectives.rs"),
    include_str!("endings.rs"),
    include_str!("launches.rs"),
    include_str!("wgmma.rs"),
];

/// The line that ends in the comment `// {marker}`.
fn line(marker: &str) -> u32 {
    let end = format!("// {marker}");
    let all = SOURCES.iter().flat_map(|source| (1..).zip(source.lines()));
    let lines: Vec<u32> = all.filter(|(_, line)| line.ends_with(&end)).map(|(number, _)| number).collect();
    assert_eq!(lines.len(), 1, "lines that end in {end:?}: {lines:?}");
    lines[0]
}

/// The fault's line is the marked one.
#[track_caller]
fn at(fault: &Fault, marker: &str) {
    assert_eq!(fault.location.line(), line(marker), "{fault}");
}

/// The fault's block and thread, by x.
#[track_caller]
fn by(fault: &Fault, block: u32, thread: u32) {
    assert_eq!((fault.block.x, fault.thread.x), (block, thread), "{fault}");
}

shared_layout! {
    pub struct Scratch {
        words: [u32; 256],
        bytes: [u8; 64],
        quads: [U32x4; 64],
    }
}

fn tid() -> usize {
    thread::thread_idx_x() as usize
}

//! Launches.

use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};

use super::fault::{Fault, FaultKind, Index, LaunchError};
use super::{schedule, stacks};

/// Shared memory that a block can have on the largest hardware.
const SHARED_LIMIT: usize = 227 * 1024;

/// How a kernel is launched, and how its threads are interleaved.
///
/// Everything random comes from `seed`: the order of blocks and threads, preemptions, and when asynchronous copies read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Launch {
    /// Blocks: x, y, z.
    pub grid: (u32, u32, u32),
    /// Threads of a block: x, y, z.
    pub block: (u32, u32, u32),
    /// Dynamic shared memory; with [`shared_layout!`](crate::shared_layout), its `BYTES`.
    pub shared_bytes: usize,
    /// The same seed gives the same schedule.
    pub seed: u64,
    /// Blocks that run at a time. Blocks that wait for each other need as many as wait.
    pub resident_blocks: usize,
    /// How likely a thread is interrupted before an access; it always is before an atomic.
    pub preemption: f64,
    /// Failed polls (atomics that change nothing, sleeps) with no store or other progress in between, then a livelock.
    pub poll_limit: u64,
    /// Accesses and turns of threads in all, then a livelock.
    pub step_limit: u64,
    /// Each thread's stack, 16 KiB to 1 GiB. Past its end the process is killed, as by any stack overflow.
    pub stack_bytes: usize,
}

impl Default for Launch {
    fn default() -> Self {
        Self {
            grid: (1, 1, 1),
            block: (1, 1, 1),
            shared_bytes: 0,
            seed: 0,
            resident_blocks: 4,
            preemption: 1.0 / 64.0,
            poll_limit: 1 << 20,
            step_limit: 1 << 31,
            stack_bytes: 128 * 1024,
        }
    }
}

impl Launch {
    /// `blocks` blocks of `threads` threads, both in one dimension.
    pub fn new(blocks: u32, threads: u32) -> Self {
        Self { grid: (blocks, 1, 1), block: (threads, 1, 1), ..Self::default() }
    }

    /// The same launch with dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared_bytes: bytes, ..self }
    }

    /// The same launch with another schedule.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Runs the kernel: `kernel` is called once a thread, and calls it with its arguments.
    ///
    /// After the first fault nothing runs on; what the launch wrote until then stays in the buffers.
    #[track_caller]
    pub fn run(&self, kernel: impl Fn()) -> Result<Report, Fault> {
        let (location, nowhere) = (Location::caller(), Index::default());
        let fault = |refused| Fault {
            kernel: "",
            block: nowhere,
            thread: nowhere,
            location,
            kind: FaultKind::Launch(refused),
        };
        self.check().map_err(fault)?;
        // A stack that the system refuses unwinds to here, and the machine is lost; kernels' panics do not come this far.
        match catch_unwind(AssertUnwindSafe(|| schedule::run(self, &kernel))) {
            Ok(result) => result.map_err(|fault| *fault),
            Err(payload) => match payload.downcast() {
                Ok(refused) => Err(fault(*refused)),
                Err(payload) => resume_unwind(payload),
            },
        }
    }

    fn check(&self) -> Result<(), LaunchError> {
        let (grid, block) = (Index::from(self.grid), Index::from(self.block));
        if [grid.x, grid.y, grid.z, block.x, block.y, block.z].contains(&0) {
            return Err(LaunchError::Empty { grid, block });
        }
        if block.x > 1024 || block.y > 1024 || block.z > 64 || product(self.block) > 1024 {
            return Err(LaunchError::BlockTooLarge { block });
        }
        if grid.x > i32::MAX as u32 || grid.y > 65535 || grid.z > 65535 {
            return Err(LaunchError::GridTooLarge { grid });
        }
        if product(self.grid) > u128::from(u32::MAX) / product(self.block) {
            return Err(LaunchError::GridTooLarge { grid });
        }
        if self.shared_bytes > SHARED_LIMIT {
            return Err(LaunchError::SharedTooLarge { bytes: self.shared_bytes, limit: SHARED_LIMIT });
        }
        stacks::check(self.stack_bytes)?;
        if schedule::is_running() {
            return Err(LaunchError::Nested);
        }
        Ok(())
    }
}

fn product((x, y, z): (u32, u32, u32)) -> u128 {
    u128::from(x) * u128::from(y) * u128::from(z)
}

/// What a launch did: counts of all its threads, each access of a thread counted once, whatever its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Threads that ran.
    pub threads: u64,
    /// Global memory.
    pub global: Traffic,
    /// Shared memory.
    pub shared: Traffic,
    /// Barriers that blocks passed; each counts once a block.
    pub barriers: u64,
    /// `sync_warp`s; this and the other collectives count once a set of lanes.
    pub warp_syncs: u64,
    /// Shuffles of 32 bits.
    pub shuffles: u64,
    /// Votes.
    pub votes: u64,
    /// Matches.
    pub matches: u64,
    /// Reductions.
    pub reductions: u64,
    /// Matrix products, of a warp or a warpgroup.
    pub matrix_products: u64,
    /// Fences, groups and waits of warpgroups' products; each counts once a warp.
    pub product_steps: u64,
    /// Asynchronous copies of an element.
    pub copies: u64,
    /// Bulk copies, of any length.
    pub bulk_copies: u64,
    /// Turns that threads were given.
    pub turns: u64,
    /// A digest of the schedule: launches with equal digests took their turns in the same order.
    pub schedule: u64,
}

/// Accesses to one kind of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Plain and atomic loads, and sources of copies.
    pub loads: u64,
    /// Plain and atomic stores, and destinations of copies.
    pub stores: u64,
    /// Read-modify-writes.
    pub atomics: u64,
    /// Bytes loaded, atomics included.
    pub bytes_loaded: u64,
    /// Bytes stored, atomics included.
    pub bytes_stored: u64,
}

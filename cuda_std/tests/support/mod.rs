//! What the tests of the emulator share.
#![allow(dead_code, reason = "each test crate uses what it needs")]

use cuda_std::emulator::{Fault, Report};

/// Seeds of tests where a schedule could hide a fault.
pub const SEEDS: u64 = 200;

/// Runs with many seeds, all of which must find a fault.
pub fn every_seed_finds(run: impl Fn(u64) -> Result<Report, Fault>, check: impl Fn(&Fault)) {
    for seed in 0..SEEDS {
        match run(seed) {
            Ok(_) => panic!("seed {seed} finds nothing"),
            Err(fault) => check(&fault),
        }
    }
}

/// Runs with many seeds, none of which may find a fault.
pub fn every_seed_passes(run: impl Fn(u64) -> Result<Report, Fault>) {
    for seed in 0..SEEDS {
        if let Err(fault) = run(seed) {
            panic!("seed {seed}: {fault}");
        }
    }
}

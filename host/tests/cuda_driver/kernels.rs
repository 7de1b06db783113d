//! What the kernels' launch types refuse, and what a launch hands over. In each, the operands are right but for one.

#[path = "kernels/attend.rs"]
mod attend;
#[path = "kernels/cluster.rs"]
mod cluster;
#[path = "kernels/drift.rs"]
mod drift;
#[path = "kernels/fill_random.rs"]
mod fill_random;
#[path = "kernels/gate.rs"]
mod gate;
#[path = "kernels/index.rs"]
mod index;
#[path = "kernels/linear.rs"]
mod linear;
#[path = "kernels/low_rank.rs"]
mod low_rank;
#[path = "kernels/model.rs"]
mod model;
#[path = "kernels/offload.rs"]
mod offload;
#[path = "kernels/outliers.rs"]
mod outliers;
#[path = "kernels/prefill.rs"]
mod prefill;
#[path = "kernels/retrieve.rs"]
mod retrieve;
#[path = "kernels/select.rs"]
mod select;

use spinkv::backend::cuda::driver::DriverError;

const ANY: u64 = u32::MAX as u64;

fn operand(what: &'static str, value: u64, min: u64, max: u64) -> DriverError {
    DriverError::Operand { what, value, min, max }
}

fn short(what: &'static str, len: usize, limit: usize) -> DriverError {
    DriverError::OutOfRange { what, start: 0, len, limit }
}

fn multiple(what: &'static str, value: u64) -> DriverError {
    DriverError::Multiple { what, value, of: 4 }
}

fn length(what: &'static str, expected: usize, found: usize) -> DriverError {
    DriverError::Length { what, expected, found }
}

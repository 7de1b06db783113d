use std::path::PathBuf;

use super::super::driver::DriverError;
use super::super::library::{MissingSymbol, each};

/// The result of every fallible call of NCCL.
pub type Result<T> = std::result::Result<T, NcclError>;

/// What can go wrong between here and NCCL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each field is named in its variant's message")]
pub enum NcclError {
    /// With each file that was tried and what the system's loader said about it.
    #[error(
        "no NCCL on this machine: {}; {} can name its file, which the pip package nvidia-nccl-cu13 has",
        each(tried),
        super::PATH_VARIABLE
    )]
    Missing { tried: Vec<(PathBuf, String)> },

    #[error("{} has no function {symbol}", library.display())]
    MissingSymbol { library: PathBuf, symbol: &'static str },

    /// With what the library says about the last thing that went wrong, which may be another call's.
    #[error("{call} failed with result {code} ({name}): {last}")]
    Result { call: &'static str, code: u32, name: String, last: String },

    #[error("the communicator of rank {rank} was aborted")]
    Aborted { rank: usize },

    #[error("GPU {ordinal} is two ranks, {first} and {second}: each rank needs its own")]
    SameGpu { ordinal: u32, first: usize, second: usize },

    #[error(transparent)]
    Driver(#[from] DriverError),
}

impl From<MissingSymbol> for NcclError {
    fn from(MissingSymbol { library, symbol }: MissingSymbol) -> Self {
        Self::MissingSymbol { library, symbol }
    }
}

use std::path::PathBuf;

use super::super::driver::DriverError;
use super::super::library::{MissingSymbol, each};

/// The result of every fallible call of [`BlasLt`](super::BlasLt).
pub type Result<T> = std::result::Result<T, BlasError>;

/// What can go wrong between here and cuBLASLt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each field is named in its variant's message")]
pub enum BlasError {
    /// With each file that was tried and what the system's loader said about it.
    #[error(
        "no cuBLASLt on this machine: {}; {} can name its file, which the pip package nvidia-cublas has",
        each(tried),
        super::PATH_VARIABLE
    )]
    Missing { tried: Vec<(PathBuf, String)> },

    #[error("{} has no function {symbol}", library.display())]
    MissingSymbol { library: PathBuf, symbol: &'static str },

    #[error("{call} failed with status {code} ({name})")]
    Status { call: &'static str, code: u32, name: String },

    #[error("cuBLASLt has no algorithm for a product of {tokens} tokens, n {n} and k {k} on this GPU")]
    NoAlgorithm { tokens: usize, n: usize, k: usize },

    #[error(transparent)]
    Driver(#[from] DriverError),
}

impl From<MissingSymbol> for BlasError {
    fn from(MissingSymbol { library, symbol }: MissingSymbol) -> Self {
        Self::MissingSymbol { library, symbol }
    }
}

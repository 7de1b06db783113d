use std::ffi::CStr;
use std::ops::RangeInclusive;
use std::ptr;

use cust::error::CudaError;

use super::raw::{self, Code};

/// The result of every fallible call of the driver layer.
pub type Result<T> = std::result::Result<T, DriverError>;

/// What can go wrong between here and the GPU.
///
/// A kernel that fails (an illegal address, a trap) makes every later call in its context fail with the same
/// [`Call`](Self::Call) code, whatever that call does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each field is named in its variant's message")]
pub enum DriverError {
    #[error("no CUDA driver on this machine: looked for {library} ({reason})")]
    NoDriver { library: &'static str, reason: String },

    #[error("the CUDA driver is installed and finds no GPU (code {code}, {name})")]
    NoDevice { code: u32, name: String },

    #[error("there is no GPU {ordinal}; this machine has {count}, counted from 0")]
    UnknownDevice { ordinal: u32, count: u32 },

    #[error("GPU {name} has compute capability {}.{}; kernels need 8.0 or newer", capability.0, capability.1)]
    UnsupportedDevice { name: String, capability: (u32, u32) },

    #[error("GPU {name} cannot use host memory at the address that the host uses")]
    NoSharedAddresses { name: String },

    #[error("{call} failed with code {code} ({name})")]
    Call { call: &'static str, code: u32, name: String },

    #[error("out of GPU memory: {wanted} bytes wanted, {free} of {total} are free")]
    OutOfGpuMemory { wanted: u64, free: u64, total: u64 },

    #[error(
        "the system refused {wanted} bytes of pinned host memory, of which {pinned} were pinned (code {code}, {name}): \
         ask for less, or free host memory"
    )]
    PinnedMemoryRefused { wanted: u64, pinned: u64, code: u32, name: String },

    #[error("the system refused to reserve {wanted} bytes of address space: {reason}")]
    AddressSpaceRefused { wanted: u64, reason: String },

    #[error("{what} has {found} elements where {expected} were expected")]
    Length { what: &'static str, expected: usize, found: usize },

    #[error("{what}: {len} elements from {start} on are beyond the end at {limit}")]
    OutOfRange { what: &'static str, start: usize, len: usize, limit: usize },

    #[error("{what} is {value}; allowed: {min} to {max}")]
    Operand { what: &'static str, value: u64, min: u64, max: u64 },

    #[error("{what} is {value}; allowed: {}", list(allowed))]
    Choice { what: &'static str, value: u32, allowed: &'static [u32] },

    #[error("{what} is {value}, which is no multiple of {of}")]
    Multiple { what: &'static str, value: u64, of: u64 },

    #[error("{what} is {value}; it must be above 0 and at most 1")]
    Share { what: &'static str, value: String },

    #[error("{what} is {value}; it must be above 0 and finite")]
    Positive { what: &'static str, value: String },

    #[error("{what} is not a number")]
    NotANumber { what: &'static str },

    #[error("{what} belongs to another context than the stream")]
    OtherContext { what: &'static str },

    #[error("{what} is another buffer than the stage before it fills")]
    OtherBuffer { what: &'static str },

    #[error("the PTX module was refused with code {code} ({name}):\n{log}")]
    InvalidModule { code: u32, name: String, log: String },

    #[error("the module has no kernel {name:?}")]
    UnknownFunction { name: String },

    #[error("kernel {function:?} takes {expected} parameters, and {found} were given")]
    ParameterCount { function: String, expected: usize, found: usize },

    #[error("kernel {function:?}: parameter {index} has {expected} bytes, and {found} were given")]
    ParameterSize { function: String, index: usize, expected: usize, found: usize },

    #[error("kernel {function:?}: {dimension} is {value}; allowed: 1 to {limit}")]
    LaunchShape { function: String, dimension: &'static str, value: u64, limit: u64 },

    #[error("kernel {function:?}: {wanted} bytes of dynamic shared memory, beyond the limit of {limit}")]
    SharedMemory { function: String, wanted: u32, limit: u32 },
}

impl DriverError {
    /// For a refused call.
    pub(super) fn call(call: &'static str, code: Code) -> Self {
        Self::Call { call, code: code.0, name: code_name(code) }
    }

    /// For `map_err` after a call through `cust`. `UnknownError` stands for codes that it does not tell apart.
    pub(super) fn cust(call: &'static str) -> impl FnOnce(CudaError) -> Self {
        move |error| Self::call(call, Code(error as u32))
    }
}

/// `Ok` for success.
pub(super) fn check(call: &'static str, code: Code) -> Result<()> {
    if code == Code::SUCCESS { Ok(()) } else { Err(DriverError::call(call, code)) }
}

/// Refuses an operand of the wrong length, for the types that launch kernels.
///
/// # Errors
/// [`DriverError::Length`] with the operand's name.
pub fn check_length(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(DriverError::Length { what, expected, found }) }
}

/// Refuses a number that a kernel does not take, for the types that launch kernels.
///
/// # Errors
/// [`DriverError::Operand`] with the number's name.
pub fn check_operand(what: &'static str, value: u64, allowed: RangeInclusive<u64>) -> Result<()> {
    if allowed.contains(&value) {
        return Ok(());
    }
    let (min, max) = allowed.into_inner();
    Err(DriverError::Operand { what, value, min, max })
}

/// Refuses a number that is none of a few.
///
/// # Errors
/// [`DriverError::Choice`] with the number's name.
pub fn check_choice(what: &'static str, value: u32, allowed: &'static [u32]) -> Result<()> {
    if allowed.contains(&value) { Ok(()) } else { Err(DriverError::Choice { what, value, allowed }) }
}

/// Numbers as people list them.
fn list(numbers: &[u32]) -> String {
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// Refuses a number that is no multiple of `of`.
///
/// # Errors
/// [`DriverError::Multiple`] with the number's name.
pub fn check_multiple(what: &'static str, value: u64, of: u64) -> Result<()> {
    if value.is_multiple_of(of) { Ok(()) } else { Err(DriverError::Multiple { what, value, of }) }
}

/// Refuses a factor that is no number above 0.
///
/// # Errors
/// [`DriverError::Positive`] with the factor's name.
pub(in crate::backend::cuda) fn check_positive(what: &'static str, value: f32) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        Ok(())
    } else {
        Err(DriverError::Positive { what, value: value.to_string() })
    }
}

/// Refuses `len` elements from `start` on where there are `limit`.
pub(in crate::backend::cuda) fn check_range(
    what: &'static str,
    start: usize,
    len: usize,
    limit: usize,
) -> Result<()> {
    match start.checked_add(len) {
        Some(end) if end <= limit => Ok(()),
        _ => Err(DriverError::OutOfRange { what, start, len, limit }),
    }
}

/// The driver's name for a code, such as `CUDA_ERROR_ILLEGAL_ADDRESS`.
pub(super) fn code_name(code: Code) -> String {
    let mut name = ptr::null();
    // SAFETY: it takes any number; where it knows it, it writes a pointer to a constant of the library.
    let known = unsafe { raw::cuGetErrorName(code.0, &raw mut name) };
    if known != Code::SUCCESS || name.is_null() {
        return "a code that the driver does not name".to_owned();
    }
    // SAFETY: a C string of the driver's library, which is never unloaded.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_call_names_itself_and_its_code() {
        let error = check("cuStreamSynchronize", Code(226)).unwrap_err();
        let DriverError::Call { call, code, name } = &error else { panic!("{error}") };
        assert_eq!((*call, *code), ("cuStreamSynchronize", 226));
        assert_eq!(error.to_string(), format!("cuStreamSynchronize failed with code 226 ({name})"));
        assert!(!name.is_empty());
        assert_eq!(check("cuInit", Code::SUCCESS), Ok(()));
    }

    /// Displaying `cust`'s own error would call the driver and panic without one.
    #[test]
    fn codes_out_of_cust_are_kept_and_need_no_driver_to_print() {
        let error = DriverError::cust("cuDeviceGetCount")(CudaError::NoDevice);
        assert!(error.to_string().starts_with("cuDeviceGetCount failed with code 100 ("), "{error}");
    }

    #[test]
    fn ranges_are_checked_without_overflow() {
        assert_eq!(check_range("read", 3, 5, 8), Ok(()));
        assert_eq!(check_range("read", 8, 0, 8), Ok(()));
        let beyond = |start, len| DriverError::OutOfRange { what: "read", start, len, limit: 8 };
        assert_eq!(check_range("read", 3, 6, 8), Err(beyond(3, 6)));
        assert_eq!(check_range("read", 2, usize::MAX, 8), Err(beyond(2, usize::MAX)));
    }

    #[test]
    fn a_refused_number_is_named_with_what_is_allowed() {
        assert_eq!(check_operand("gather blocks", 1, 1..=4), Ok(()));
        assert_eq!(check_operand("gather blocks", 4, 1..=4), Ok(()));
        for value in [0, 5] {
            let error = check_operand("gather blocks", value, 1..=4).unwrap_err();
            assert_eq!(error, DriverError::Operand { what: "gather blocks", value, min: 1, max: 4 });
            assert_eq!(error.to_string(), format!("gather blocks is {value}; allowed: 1 to 4"));
        }
    }

    #[test]
    fn errors_travel_between_threads() {
        fn sendable<T: Send + Sync + 'static>() {}
        sendable::<DriverError>();
    }
}

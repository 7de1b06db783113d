//! NCCL's functions. Types and numbers are those of `nccl.h`, the same in all versions of NCCL 2.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use super::super::library::functions;
use super::error::{NcclError, Result};

/// `ncclResult_t`: any number, of whatever version.
pub(super) type Code = u32;

pub(super) const SUCCESS: Code = 0;

/// `ncclFloat32` of `ncclDataType_t`.
pub(super) const FLOAT32: c_int = 7;

/// `ncclSum` of `ncclRedOp_t`.
pub(super) const SUM: c_int = 0;

/// `ncclComm_t`.
pub(super) type Opaque = *mut c_void;

functions! {
    version = ncclGetVersion(version: *mut c_int) -> Code;
    error_string = ncclGetErrorString(code: Code) -> *const c_char;
    last_error = ncclGetLastError(communicator: Opaque) -> *const c_char;
    init_all = ncclCommInitAll(communicators: *mut Opaque, ranks: c_int, devices: *const c_int) -> Code;
    all_reduce = ncclAllReduce(
        from: *const c_void, to: *mut c_void, count: usize, element: c_int, operation: c_int, communicator: Opaque,
        stream: *mut c_void
    ) -> Code;
    destroy = ncclCommDestroy(communicator: Opaque) -> Code;
    abort = ncclCommAbort(communicator: Opaque) -> Code;
}

impl Functions {
    /// `Ok` for success, else an error with the library's words for the result.
    pub fn check(&self, call: &'static str, code: Code) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: it takes any number; it returns null or a constant C string of the library, which stays loaded.
        let name = text(unsafe { (self.error_string)(code) }, "a result without a name");
        // SAFETY: null stands for all communicators; it returns null or a C string of the library.
        let last = text(unsafe { (self.last_error)(ptr::null_mut()) }, "nothing more is known");
        Err(NcclError::Result { call, code, name, last })
    }
}

/// A C string of the library's, or `otherwise` for null and for an empty one.
fn text(text: *const c_char, otherwise: &str) -> String {
    if text.is_null() {
        return otherwise.to_owned();
    }
    // SAFETY: not null, so a C string of the library, which stays loaded.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    if text.is_empty() { otherwise.to_owned() } else { text.into_owned() }
}

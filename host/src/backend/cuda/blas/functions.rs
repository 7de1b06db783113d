//! cuBLASLt's functions. Types and numbers are those of `cublasLt.h`, the same in CUDA 12 and 13.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::super::library::functions;
use super::error::{BlasError, Result};

/// `cublasStatus_t`: any number, of whatever version.
pub(super) type Status = u32;

pub(super) const SUCCESS: Status = 0;

/// `CUDA_R_32F` and `CUDA_R_16BF` of `cudaDataType`.
pub(super) const TYPE_F32: c_int = 0;
pub(super) const TYPE_BF16: c_int = 14;

/// `CUBLAS_COMPUTE_32F`.
pub(super) const COMPUTE_F32: c_int = 68;

/// `CUBLAS_OP_T`.
pub(super) const TRANSPOSED: c_int = 1;

/// `CUBLASLT_MATMUL_DESC_TRANSA`.
pub(super) const DESC_TRANSPOSE_A: c_int = 3;

/// `CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES`, `…_REDUCTION_SCHEME_MASK`, and `…_MIN_ALIGNMENT_…_BYTES` of A, B, C and D.
pub(super) const PREFERENCE_WORKSPACE: c_int = 1;
pub(super) const PREFERENCE_REDUCTION: c_int = 3;
pub(super) const PREFERENCE_ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];

/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: partial sums are in f32. The others add up in the output's elements.
pub(super) const REDUCTION_F32: u32 = 2;

/// A handle, descriptor, layout or preference: opaque.
pub(super) type Opaque = *mut c_void;

/// `cublasLtMatmulAlgo_t`: plain data, to be kept and handed back.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Heuristic {
    pub algorithm: Algorithm,
    pub workspace_bytes: usize,
    pub state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

functions! {
    create = cublasLtCreate(handle: *mut Opaque) -> Status;
    destroy = cublasLtDestroy(handle: Opaque) -> Status;
    version = cublasLtGetVersion() -> usize;
    status_name = cublasLtGetStatusName(status: Status) -> *const c_char;
    descriptor_create = cublasLtMatmulDescCreate(descriptor: *mut Opaque, compute: c_int, scale: c_int) -> Status;
    descriptor_destroy = cublasLtMatmulDescDestroy(descriptor: Opaque) -> Status;
    descriptor_set = cublasLtMatmulDescSetAttribute(
        descriptor: Opaque, attribute: c_int, value: *const c_void, bytes: usize
    ) -> Status;
    layout_create = cublasLtMatrixLayoutCreate(
        layout: *mut Opaque, element: c_int, rows: u64, columns: u64, leading: i64
    ) -> Status;
    layout_destroy = cublasLtMatrixLayoutDestroy(layout: Opaque) -> Status;
    preference_create = cublasLtMatmulPreferenceCreate(preference: *mut Opaque) -> Status;
    preference_destroy = cublasLtMatmulPreferenceDestroy(preference: Opaque) -> Status;
    preference_set = cublasLtMatmulPreferenceSetAttribute(
        preference: Opaque, attribute: c_int, value: *const c_void, bytes: usize
    ) -> Status;
    heuristic = cublasLtMatmulAlgoGetHeuristic(
        handle: Opaque, descriptor: Opaque, a: Opaque, b: Opaque, c: Opaque, d: Opaque, preference: Opaque,
        wanted: c_int, results: *mut Heuristic, found: *mut c_int
    ) -> Status;
    matmul = cublasLtMatmul(
        handle: Opaque, descriptor: Opaque, alpha: *const c_void, a: *const c_void, a_layout: Opaque,
        b: *const c_void, b_layout: Opaque, beta: *const c_void, c: *const c_void, c_layout: Opaque,
        d: *mut c_void, d_layout: Opaque, algorithm: *const Algorithm, workspace: *mut c_void,
        workspace_bytes: usize, stream: *mut c_void
    ) -> Status;
}

impl Functions {
    /// `Ok` for success, else an error with the library's name for the status.
    pub fn check(&self, call: &'static str, code: Status) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: it takes any number and returns null or a constant C string of the library, which stays loaded.
        let name = unsafe { (self.status_name)(code) };
        let name = if name.is_null() {
            "a status without a name".to_owned()
        } else {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        Err(BlasError::Status { call, code, name })
    }
}

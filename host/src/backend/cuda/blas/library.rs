//! cuBLASLt's file and functions. Types and numbers are those of `cublasLt.h`, the same in CUDA 12 and 13.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

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

macro_rules! functions {
    ($($field:ident = $symbol:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        /// The functions that products need.
        #[derive(Debug)]
        pub(super) struct Functions {
            $(pub $field: unsafe extern "C" fn($($argument: $type),*) -> $result,)*
        }

        impl Functions {
            fn find(library: &Library) -> Result<Self> {
                // SAFETY: the types are those of the header, for these names.
                unsafe { Ok(Self { $($field: library.function(stringify!($symbol))?,)* }) }
            }
        }
    };
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

/// A file that is loaded, for good: libraries that start the CUDA runtime do not survive being unloaded.
#[derive(Debug)]
struct Library {
    handle: *mut c_void,
    path: PathBuf,
}

/// Loads the first of `candidates` that the system's loader takes.
pub(super) fn load(candidates: &[impl AsRef<Path>]) -> Result<(Functions, PathBuf)> {
    let mut tried = Vec::new();
    for path in candidates.iter().map(AsRef::as_ref) {
        match Library::open(path) {
            Ok(library) => return Ok((Functions::find(&library)?, library.path)),
            Err(reason) => tried.push((path.to_owned(), reason)),
        }
    }
    Err(BlasError::Missing { tried })
}

impl Library {
    fn open(path: &Path) -> std::result::Result<Self, String> {
        let file = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
        // SAFETY: the name is a C string. Loading runs the library's constructors; the caller names cuBLASLt, which is made
        // to be loaded at any time.
        let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(loader_error(path)) } else { Ok(Self { handle, path: path.to_owned() }) }
    }

    /// # Safety
    /// `F` is the type of the function of this name.
    unsafe fn function<F: Copy>(&self, symbol: &'static str) -> Result<F> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let name = CString::new(symbol).expect("a name without NUL");
        // SAFETY: the library is loaded, for good, and the name is a C string.
        let function = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if function.is_null() {
            return Err(BlasError::MissingSymbol { library: self.path.clone(), symbol });
        }
        // SAFETY: a function, not null, whose type the caller vouches for.
        Ok(unsafe { std::mem::transmute_copy(&function) })
    }
}

/// Why the last `dlopen` of this thread failed, without the file's name in front.
fn loader_error(path: &Path) -> String {
    // SAFETY: dlerror takes nothing and returns null or a C string that is this thread's until its next call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "cannot be loaded".to_owned();
    }
    // SAFETY: not null, so a C string, and no dl call comes between.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let reason = path.to_str().and_then(|path| text.strip_prefix(path)).unwrap_or(&text);
    reason.trim_start_matches([':', ' ']).to_owned()
}

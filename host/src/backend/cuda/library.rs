//! Libraries of NVIDIA's that are loaded at run time: the system's loader, and the functions that are looked up.

use std::ffi::{CStr, CString, OsString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Files that were tried, each with what the system's loader said about it.
pub(super) type Tried = Vec<(PathBuf, String)>;

/// A function that a library does not have.
pub(super) struct MissingSymbol {
    pub library: PathBuf,
    pub symbol: &'static str,
}

/// A file that is loaded, for good: libraries that start the CUDA runtime do not survive being unloaded.
#[derive(Debug)]
pub(super) struct Library {
    handle: *mut c_void,
    path: PathBuf,
}

/// The types of functions, which are looked up by `Functions::find`.
macro_rules! functions {
    ($($field:ident = $symbol:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        /// The functions that are called.
        #[derive(Debug)]
        pub(super) struct Functions {
            $(pub $field: unsafe extern "C" fn($($argument: $type),*) -> $result,)*
        }

        impl Functions {
            pub fn find(
                library: &$crate::backend::cuda::library::Library,
            ) -> std::result::Result<Self, $crate::backend::cuda::library::MissingSymbol> {
                // SAFETY: the types are those of the header, for these names.
                unsafe { Ok(Self { $($field: library.function(stringify!($symbol))?,)* }) }
            }
        }
    };
}
pub(super) use functions;

/// The files to try: the one that the environment variable names, and no other then, since who names one would not want another in
/// silence; else `usual`.
pub(super) fn candidates(variable: &str, usual: &[&str]) -> Vec<PathBuf> {
    let named = std::env::var_os(variable).filter(|path: &OsString| !path.is_empty()).map(PathBuf::from);
    named.map_or_else(|| usual.iter().map(PathBuf::from).collect(), |named| vec![named])
}

/// Files and reasons as people list them.
pub(super) fn each(tried: &[(PathBuf, String)]) -> String {
    let one = |(file, reason): &(PathBuf, String)| format!("{} ({reason})", file.display());
    tried.iter().map(one).collect::<Vec<_>>().join(", ")
}

impl Library {
    /// Loads the first of `candidates` that the system's loader takes: paths, or names that it looks for.
    pub fn load(candidates: &[impl AsRef<Path>]) -> Result<Self, Tried> {
        let mut tried = Vec::new();
        for path in candidates.iter().map(AsRef::as_ref) {
            match Self::open(path) {
                Ok(library) => return Ok(library),
                Err(reason) => tried.push((path.to_owned(), reason)),
            }
        }
        Err(tried)
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open(path: &Path) -> Result<Self, String> {
        let file = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
        // SAFETY: the name is a C string. Loading runs the library's constructors; the caller names a library that is made to be
        // loaded at any time.
        let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(loader_error(path)) } else { Ok(Self { handle, path: path.to_owned() }) }
    }

    /// # Safety
    /// `F` is the type of the function of this name.
    pub unsafe fn function<F: Copy>(&self, symbol: &'static str) -> Result<F, MissingSymbol> {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        let name = CString::new(symbol).expect("a name without NUL");
        // SAFETY: the library is loaded, for good, and the name is a C string.
        let function = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if function.is_null() {
            return Err(MissingSymbol { library: self.path.clone(), symbol });
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

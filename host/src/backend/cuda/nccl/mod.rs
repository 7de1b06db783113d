//! Sums over the GPUs of one host by NVIDIA's NCCL, which is loaded at run time: no toolkit is needed to build, and a machine without it
//! is told so by an error.
//!
//! Every GPU is a *rank* of a group and has a [`Communicator`]. A sum is enqueued by every rank, each on a stream of its own context, in
//! the same order; on each GPU it is done when those of all ranks have come. So a rank that does not enqueue its part lets the others wait
//! for ever: who finds that one failed has every rank [abort](Communicator::abort) its communicator, which ends the waits.
//!
//! # Example
//!
//! ```no_run
//! use spinkv::backend::cuda::driver::{Device, DeviceBuffer, Stream};
//! use spinkv::backend::cuda::nccl::Nccl;
//!
//! let contexts = [Device::open(0)?, Device::open(1)?];
//! let communicators = Nccl::load()?.communicators(&contexts)?;
//! std::thread::scope(|scope| {
//!     for (communicator, context) in communicators.iter().zip(&contexts) {
//!         scope.spawn(move || {
//!             let stream = Stream::new(context)?;
//!             let buffer = DeviceBuffer::from_slice(&stream, &[1.0_f32; 8])?;
//!             communicator.all_reduce_sum(&stream, &buffer, 8)?;
//!             assert_eq!(buffer.to_vec(&stream)?, [2.0; 8]);
//!             Ok::<(), spinkv::backend::cuda::nccl::NcclError>(())
//!         });
//!     }
//! });
//! # Ok::<(), spinkv::backend::cuda::nccl::NcclError>(())
//! ```

mod error;
mod functions;

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

pub use error::{NcclError, Result};

use super::driver::{Context, DeviceBuffer, Stream, check_range};
use super::library::{Library, candidates};
use functions::{FLOAT32, Functions, Opaque, SUM};

/// The environment variable that can name NCCL's file. No other is tried then: who names one would not want another in silence.
pub const PATH_VARIABLE: &str = "SPINKV_NCCL";

/// The file that the system's loader is asked for.
pub const LIBRARY: &str = "libnccl.so.2";

/// NCCL, loaded.
#[derive(Clone, Debug)]
pub struct Nccl {
    functions: Arc<Functions>,
    path: PathBuf,
}

/// A rank's part in the sums of its group.
#[derive(Debug)]
pub struct Communicator {
    rank: usize,
    context: Context,
    functions: Arc<Functions>,
    /// `None` once it is aborted.
    raw: Mutex<Option<Raw>>,
}

/// `ncclComm_t`.
#[derive(Clone, Copy, Debug)]
struct Raw(Opaque);

// SAFETY: NCCL lets any thread use a communicator, one at a time, which the mutex around it sees to.
unsafe impl Send for Raw {}

impl Nccl {
    /// Loads NCCL from the file that [`PATH_VARIABLE`] names, or else as [`LIBRARY`].
    ///
    /// # Errors
    /// [`NcclError::Missing`] with every file that was tried, [`NcclError::MissingSymbol`].
    pub fn load() -> Result<Self> {
        Self::load_from(&candidates(PATH_VARIABLE, &[LIBRARY]))
    }

    /// Loads it from the first of `candidates` (paths, or names that the system's loader looks for) that can be loaded.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_from(candidates: &[impl AsRef<Path>]) -> Result<Self> {
        let library = Library::load(candidates).map_err(|tried| NcclError::Missing { tried })?;
        Ok(Self { functions: Arc::new(Functions::find(&library)?), path: library.path().to_owned() })
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The library's version, as 2.27.5.
    ///
    /// # Errors
    /// A result of the library.
    pub fn version(&self) -> Result<String> {
        let mut number = 0;
        // SAFETY: it writes one integer.
        self.functions.check("ncclGetVersion", unsafe { (self.functions.version)(&raw mut number) })?;
        Ok(format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100))
    }

    /// A group of these GPUs: the communicators of ranks 0, 1, 2, …
    ///
    /// # Errors
    /// [`NcclError::SameGpu`], or a result of the library.
    pub fn communicators(&self, contexts: &[Context]) -> Result<Vec<Communicator>> {
        let ordinals: Vec<u32> = contexts.iter().map(|context| context.device().ordinal).collect();
        for (second, ordinal) in ordinals.iter().enumerate() {
            if let Some(first) = ordinals[..second].iter().position(|other| other == ordinal) {
                return Err(NcclError::SameGpu { ordinal: *ordinal, first, second });
            }
        }
        let devices: Vec<c_int> = ordinals.iter().map(|ordinal| *ordinal as c_int).collect();
        let mut raw: Vec<Opaque> = vec![ptr::null_mut(); devices.len()];
        if let Some(first) = contexts.first() {
            first.make_current()?;
        }
        // SAFETY: it reads as many device numbers, and writes as many handles, as it is told; each handle is given back once, by
        // Communicator. Their primary contexts are retained by `contexts`, and stay so by each communicator's clone.
        let code =
            unsafe { (self.functions.init_all)(raw.as_mut_ptr(), devices.len() as c_int, devices.as_ptr()) };
        self.functions.check("ncclCommInitAll", code)?;
        let communicator = |(rank, (raw, context)): (usize, (Opaque, &Context))| Communicator {
            rank,
            context: context.clone(),
            functions: self.functions.clone(),
            raw: Mutex::new(Some(Raw(raw))),
        };
        Ok(raw.into_iter().zip(contexts).enumerate().map(communicator).collect())
    }
}

impl Communicator {
    /// Its number in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The GPU's context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Async: the first `len` elements of `buffer` become the sums of what all ranks have there, the same bits on all of them, once
    /// every rank has enqueued the same. The host may wait for the other ranks in a group's first sums. It may stand in a stream that is
    /// captured; run a sum of the same length once before, outside of the capture.
    ///
    /// # Errors
    /// [`DriverError`](super::driver::DriverError)s, wrapped, for fewer elements or another context; [`NcclError::Aborted`]; a result of
    /// the library. Nothing is enqueued then, so the other ranks must be told.
    pub fn all_reduce_sum(&self, stream: &Stream, buffer: &DeviceBuffer<f32>, len: usize) -> Result<()> {
        self.context.check_same(stream.context(), "NCCL")?;
        buffer.context().check_same(stream.context(), "all-reduce buffer")?;
        check_range("all-reduce", 0, len, buffer.len())?;
        let raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        let Raw(raw) = raw.ok_or(NcclError::Aborted { rank: self.rank })?;
        let address = buffer.address() as *mut c_void;
        self.context.make_current()?;
        // SAFETY: the communicator is alive and this thread's alone; the buffer has as many elements, and stays until the work is done,
        // since its drop waits for it; the stream is of the communicator's GPU.
        let code = unsafe {
            (self.functions.all_reduce)(address, address, len, FLOAT32, SUM, raw, stream.pointer())
        };
        self.functions.check("ncclAllReduce", code)
    }

    /// Ends the waits of this rank's sums, whose results are then worth nothing; there are no further ones. Every rank's communicator is to
    /// be aborted, each by the thread that enqueues its sums. Graphs that hold sums must be gone before.
    pub fn abort(&self) {
        let raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.give_back(raw, self.functions.abort);
    }

    fn give_back(&self, raw: Option<Raw>, by: unsafe extern "C" fn(Opaque) -> u32) {
        if let (Some(Raw(raw)), Ok(())) = (raw, self.context.make_current()) {
            // SAFETY: made by init_all and given back once, since it was taken. A failure has no one left to tell.
            let _ = unsafe { by(raw) };
        }
    }
}

impl Drop for Communicator {
    /// Graphs that hold sums must be gone before, or the library waits for them.
    fn drop(&mut self) {
        let raw = self.raw.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.give_back(raw, self.functions.destroy);
    }
}

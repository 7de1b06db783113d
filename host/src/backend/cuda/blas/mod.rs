//! Dense products of activations and weights by NVIDIA's cuBLASLt, which is loaded at run time: no toolkit is needed to build, and a
//! machine without it is told so by an error.
//!
//! # Example
//!
//! ```no_run
//! use spinkv::backend::cuda::blas::{BlasLt, Product, ProductOut};
//! use spinkv::backend::cuda::driver::{Device, DeviceBuffer, Stream};
//! use spinkv::memory::Word;
//!
//! let context = Device::open(0)?;
//! let stream = Stream::new(&context)?;
//! let blas = BlasLt::load(&context)?;
//! let (tokens, n, k) = (7, 512, 256);
//! let x = DeviceBuffer::<Word>::zeroed(&stream, tokens * k / 8)?;
//! let weights = DeviceBuffer::<Word>::zeroed(&stream, n * k / 8)?;
//! let out = DeviceBuffer::<f32>::zeroed(&stream, tokens * n)?;
//! let product = Product {
//!     tokens,
//!     n,
//!     k,
//!     x: &x,
//!     x_first_token: 0,
//!     weights: &weights,
//!     out: ProductOut::F32(&out),
//!     out_first_token: 0,
//! };
//! blas.product(&stream, &product)?;
//! # Ok::<(), spinkv::backend::cuda::blas::BlasError>(())
//! ```

mod error;
mod functions;
mod owned;

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

pub use error::{BlasError, Result};

use super::driver::{Context, DeviceBuffer, Stream, check_multiple, check_operand, check_range};
use super::library::{Library, candidates};
use crate::memory::Word;
use functions::{
    Algorithm, COMPUTE_F32, DESC_TRANSPOSE_A, Functions, Heuristic, PREFERENCE_ALIGNMENTS,
    PREFERENCE_REDUCTION, PREFERENCE_WORKSPACE, REDUCTION_F32, SUCCESS, TRANSPOSED, TYPE_BF16, TYPE_F32,
};
use owned::Owned;

/// The environment variable that can name cuBLASLt's file. No other is tried then: who names one would not want another in silence.
pub const PATH_VARIABLE: &str = "SPINKV_CUBLASLT";

/// The files that the system's loader is asked for, in this order.
pub const LIBRARIES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// Bytes of GPU memory that [`BlasLt::load`] gives algorithms for their partial sums: what NVIDIA advises for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// bf16 elements of a [`Word`]. Rows are whole words, so every row begins where 16 bytes may be loaded at once.
const WORD_ELEMENTS: usize = 8;

/// Algorithms that a shape is asked for; the first that works is taken.
const CANDIDATES: usize = 8;

/// cuBLASLt, with a workspace in one context.
///
/// The workspace is one, so products may run on **one stream at a time**: those of two streams need events between them, or a
/// [`BlasLt`] each.
#[derive(Debug)]
pub struct BlasLt {
    /// By tokens, n, k and the output's elements. A few hundred bytes each; they are kept, since shapes come back.
    plans: Mutex<HashMap<Shape, Arc<Plan>>>,
    /// For all products: the first operand transposed, sums in f32.
    descriptor: Owned,
    preference: Owned,
    workspace: DeviceBuffer<Word>,
    handle: Owned,
    path: PathBuf,
    context: Context,
}

/// `out[tokens, n] = x[tokens, k] * weights[n, k]^T`, all row-major, summed in f32.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// Tokens; none launch nothing.
    pub tokens: usize,
    /// Outputs of a token, a multiple of 8.
    pub n: usize,
    /// Inputs of a token, a multiple of 8.
    pub k: usize,
    /// `[.., k]` bf16.
    pub x: &'a DeviceBuffer<Word>,
    /// The token of `x` that is the first.
    pub x_first_token: usize,
    /// `[n, k]` bf16.
    pub weights: &'a DeviceBuffer<Word>,
    /// `[.., n]`; no part of it may be an operand.
    pub out: ProductOut<'a>,
    /// The token of `out` that is the first.
    pub out_first_token: usize,
}

/// Where a product goes.
#[derive(Clone, Copy, Debug)]
pub enum ProductOut<'a> {
    /// Rounded to bf16.
    Bf16(&'a DeviceBuffer<Word>),
    /// In f32.
    F32(&'a DeviceBuffer<f32>),
    /// Added to what is there, in f32.
    AddF32(&'a DeviceBuffer<f32>),
}

/// The elements of a product's output, which is all that an algorithm depends on beside the sizes: adding takes the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutElements {
    /// bf16.
    Bf16,
    /// f32.
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    tokens: usize,
    n: usize,
    k: usize,
    elements: OutElements,
}

/// What a product of one shape is run by.
#[derive(Debug)]
struct Plan {
    weights: Owned,
    x: Owned,
    out: Owned,
    algorithm: Algorithm,
}

impl ProductOut<'_> {
    /// Of what elements.
    pub fn elements(&self) -> OutElements {
        match self {
            Self::Bf16(_) => OutElements::Bf16,
            Self::F32(_) | Self::AddF32(_) => OutElements::F32,
        }
    }

    /// Its context, address and length, and the elements of its type that `n` outputs are.
    fn parts(&self, n: usize) -> (&Context, u64, usize, usize) {
        match self {
            Self::Bf16(buffer) => (buffer.context(), buffer.address(), buffer.len(), n / WORD_ELEMENTS),
            Self::F32(buffer) | Self::AddF32(buffer) => (buffer.context(), buffer.address(), buffer.len(), n),
        }
    }
}

impl BlasLt {
    /// Loads cuBLASLt, from the file that [`PATH_VARIABLE`] names or else from the first of [`LIBRARIES`] that there is, with a
    /// workspace of [`WORKSPACE_BYTES`].
    ///
    /// # Errors
    /// [`BlasError::Missing`] with every file that was tried, [`BlasError::MissingSymbol`], a status of the library, or
    /// no GPU memory for the workspace.
    pub fn load(context: &Context) -> Result<Self> {
        Self::load_from(context, &candidates(PATH_VARIABLE, &LIBRARIES), WORKSPACE_BYTES)
    }

    /// Loads it from the first of `candidates` (paths, or names that the system's loader looks for) that can be loaded, with a workspace
    /// of `workspace_bytes`, rounded up to words.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub fn load_from(
        context: &Context,
        candidates: &[impl AsRef<Path>],
        workspace_bytes: usize,
    ) -> Result<Self> {
        let library = Library::load(candidates).map_err(|tried| BlasError::Missing { tried })?;
        let (functions, path) = (Arc::new(Functions::find(&library)?), library.path().to_owned());
        let workspace = DeviceBuffer::uninit(context, workspace_bytes.div_ceil(size_of::<Word>()))?;
        context.make_current()?;
        // SAFETY: each writes one handle, which Owned gives back.
        let (handle, descriptor, preference) = unsafe {
            (
                Owned::new(&functions, functions.destroy, "cublasLtCreate", |handle| {
                    (functions.create)(handle)
                })?,
                Owned::new(
                    &functions,
                    functions.descriptor_destroy,
                    "cublasLtMatmulDescCreate",
                    |descriptor| (functions.descriptor_create)(descriptor, COMPUTE_F32, TYPE_F32),
                )?,
                Owned::new(
                    &functions,
                    functions.preference_destroy,
                    "cublasLtMatmulPreferenceCreate",
                    |preference| (functions.preference_create)(preference),
                )?,
            )
        };
        let transposed = TRANSPOSED.to_ne_bytes();
        const SET: &str = "cublasLtMatmulDescSetAttribute";
        descriptor.set(functions.descriptor_set, SET, DESC_TRANSPOSE_A, &transposed)?;
        let set = |attribute, value: &[u8]| {
            const SET: &str = "cublasLtMatmulPreferenceSetAttribute";
            preference.set(functions.preference_set, SET, attribute, value)
        };
        set(PREFERENCE_WORKSPACE, &workspace.bytes().to_ne_bytes())?;
        set(PREFERENCE_REDUCTION, &REDUCTION_F32.to_ne_bytes())?;
        for attribute in PREFERENCE_ALIGNMENTS {
            // The library takes for granted 256, which a token within a buffer does not have.
            set(attribute, &(size_of::<Word>() as u32).to_ne_bytes())?;
        }
        let (plans, context) = (Mutex::default(), context.clone());
        Ok(Self { plans, descriptor, preference, workspace, handle, path, context })
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The library's version, such as 130100 for 13.1.0.
    pub fn version(&self) -> usize {
        // SAFETY: it takes nothing.
        unsafe { (self.functions().version)() }
    }

    /// Chooses the algorithm for a shape, unless that was done. [`product`](Self::product) does so itself; asking takes tens of
    /// microseconds on the host, so ask ahead for what must begin at once.
    ///
    /// # Errors
    /// As for [`product`](Self::product).
    pub fn plan(&self, tokens: usize, n: usize, k: usize, elements: OutElements) -> Result<()> {
        check_sizes(tokens, n, k)?;
        if tokens > 0 {
            self.planned(Shape { tokens, n, k, elements })?;
        }
        Ok(())
    }

    /// Async: the output is there when `stream` has come this far.
    ///
    /// It may stand in a stream that is captured: nothing but the launch touches the stream. But run the same shape once
    /// before, outside of the capture, since a kernel's code is loaded when it is first launched.
    ///
    /// # Errors
    /// [`DriverError`](super::driver::DriverError)s, wrapped, for sizes that are 0 or no multiple of 8, buffers that are too short
    /// (counted in their own elements: words of 8, or f32) or of another context; [`BlasError::NoAlgorithm`]; a status of the library.
    pub fn product(&self, stream: &Stream, product: &Product<'_>) -> Result<()> {
        let Product { tokens, n, k, x, x_first_token, weights, out, out_first_token } = *product;
        let shape = Shape { tokens, n, k, elements: out.elements() };
        check_sizes(tokens, n, k)?;
        let (out_context, out_address, out_len, out_row) = out.parts(n);
        for (context, what) in [
            (&self.context, "cuBLASLt"),
            (x.context(), "product x"),
            (weights.context(), "product weights"),
            (out_context, "product out"),
        ] {
            context.check_same(stream.context(), what)?;
        }
        let row = k / WORD_ELEMENTS;
        let (x_start, out_start) =
            (x_first_token.saturating_mul(row), out_first_token.saturating_mul(out_row));
        check_range("product x", x_start, tokens * row, x.len())?;
        check_range("product weights", 0, n * row, weights.len())?;
        check_range("product out", out_start, tokens * out_row, out_len)?;
        if tokens == 0 {
            return Ok(());
        }
        let plan = self.planned(shape)?;
        let element_bytes =
            if shape.elements == OutElements::F32 { size_of::<f32>() } else { size_of::<Word>() };
        let x = x.address() + (x_start * size_of::<Word>()) as u64;
        let out_address = (out_address + (out_start * element_bytes) as u64) as *mut c_void;
        let (alpha, beta) = (1f32, if matches!(out, ProductOut::AddF32(_)) { 1f32 } else { 0f32 });
        self.context.make_current()?;
        // SAFETY: handle, descriptor, layouts and algorithm are alive and belong together. The layouts describe tokens of x, all of the
        // weights and tokens of the output, which the buffers have, as was checked; their drops wait for the work. The
        // factors are read before it returns, since the descriptor's pointers are the host's.
        let code = unsafe {
            (self.functions().matmul)(
                self.handle.raw,
                self.descriptor.raw,
                (&raw const alpha).cast(),
                weights.address() as *const c_void,
                plan.weights.raw,
                x as *const c_void,
                plan.x.raw,
                (&raw const beta).cast(),
                out_address,
                plan.out.raw,
                out_address,
                plan.out.raw,
                &raw const plan.algorithm,
                self.workspace.address() as *mut c_void,
                self.workspace.bytes() as usize,
                stream.pointer(),
            )
        };
        self.functions().check("cublasLtMatmul", code)
    }

    fn functions(&self) -> &Functions {
        &self.handle.functions
    }

    fn planned(&self, shape: Shape) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(self.choose(shape)?);
        plans.insert(shape, plan.clone());
        Ok(plan)
    }

    /// The library's matrices are column-major, and ours read so are transposed: `out^T[n, tokens] = weights x^T`, where the weights
    /// are `[k, n]` to it and must be transposed, x is `[k, tokens]` and the output `[n, tokens]`.
    fn choose(&self, shape: Shape) -> Result<Plan> {
        let Shape { tokens, n, k, elements } = shape;
        let functions = &self.handle.functions;
        self.context.make_current()?;
        let layout = |element: c_int, rows: usize, columns: usize| {
            // SAFETY: it writes one layout, which Owned gives back.
            unsafe {
                Owned::new(functions, functions.layout_destroy, "cublasLtMatrixLayoutCreate", |layout| {
                    (functions.layout_create)(layout, element, rows as u64, columns as u64, rows as i64)
                })
            }
        };
        let element = if elements == OutElements::F32 { TYPE_F32 } else { TYPE_BF16 };
        let (weights, x) = (layout(TYPE_BF16, k, n)?, layout(TYPE_BF16, k, tokens)?);
        let out = layout(element, n, tokens)?;
        let mut results = [Heuristic::default(); CANDIDATES];
        let mut found = 0;
        // SAFETY: everything is alive; it writes at most as many results as there is room for, and their number.
        let code = unsafe {
            (functions.heuristic)(
                self.handle.raw,
                self.descriptor.raw,
                weights.raw,
                x.raw,
                out.raw,
                out.raw,
                self.preference.raw,
                CANDIDATES as c_int,
                results.as_mut_ptr(),
                &raw mut found,
            )
        };
        functions.check("cublasLtMatmulAlgoGetHeuristic", code)?;
        let found = &results[..usize::try_from(found).unwrap_or(0).min(CANDIDATES)];
        let fits = |result: &&Heuristic| {
            result.state == SUCCESS && result.workspace_bytes as u64 <= self.workspace.bytes()
        };
        let chosen = found.iter().find(fits).ok_or(BlasError::NoAlgorithm { tokens, n, k })?;
        Ok(Plan { weights, x, out, algorithm: chosen.algorithm })
    }
}

/// Sizes whose products two of are far from overflow, and whose rows are whole words.
fn check_sizes(tokens: usize, n: usize, k: usize) -> Result<()> {
    let most = i32::MAX as u64;
    check_operand("product tokens", tokens as u64, 0..=most)?;
    for (what, size) in [("product n", n as u64), ("product k", k as u64)] {
        check_operand(what, size, 1..=most)?;
        check_multiple(what, size, WORD_ELEMENTS as u64)?;
    }
    Ok(())
}

impl Drop for BlasLt {
    /// Its handle may go when nothing runs that it launched; the plans' layouts are read by no one then.
    fn drop(&mut self) {
        let mut destroyed = false;
        self.context.free_after_all_work(|| destroyed = true);
        if !destroyed {
            self.handle.raw = ptr::null_mut();
        }
    }
}

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cust::sys::CUfunction_attribute_enum::{
    CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
    CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, CU_FUNC_ATTRIBUTE_NUM_REGS, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
};
use cust::sys::CUjit_option_enum::{
    CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, CU_JIT_GENERATE_LINE_INFO,
};

use super::error::code_name;
use super::ptx::kernel_parameters;
use super::raw::{self, Code, FunctionHandle, Handle, ModuleHandle, call};
use super::{Context, DriverError, Result};

/// Room for what the driver's compiler says about a refused module.
const LOG_BYTES: usize = 16 << 10;

/// Kernels, compiled for the device. A clone is the same module.
///
/// When all clones and [`Function`]s are dropped it is unloaded, after all work of the context.
#[derive(Clone, Debug)]
pub struct Module(Arc<Loaded>);

struct Loaded {
    handle: ModuleHandle,
    context: Context,
    /// Of the text's kernels.
    parameters: HashMap<String, Vec<usize>>,
    functions: Mutex<HashMap<String, Arc<Kernel>>>,
}

/// A kernel of a module. A clone is the same kernel.
#[derive(Clone, Debug)]
pub struct Function {
    kernel: Arc<Kernel>,
    module: Module,
}

#[derive(Debug)]
struct Kernel {
    name: String,
    handle: FunctionHandle,
    attributes: FunctionAttributes,
    /// Bytes of each, if the text could be understood.
    parameters: Option<Vec<usize>>,
    /// The most dynamic shared memory that a launch may have now.
    shared_limit: AtomicU32,
}

/// What the driver's compiler made of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionAttributes {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread; above 0 if registers are spilled or arrays indexed at run time.
    pub local_bytes: u32,
    /// Bytes of static shared memory of a block.
    pub static_shared_bytes: u32,
    /// The most threads that a block may have, given the registers.
    pub max_threads: u32,
}

impl Module {
    /// Compiles a PTX text for the device, with line information for profilers.
    ///
    /// # Errors
    /// [`DriverError::InvalidModule`] with the compiler's log.
    pub fn from_ptx(context: &Context, text: &str) -> Result<Self> {
        let invalid =
            |code: Code, log| DriverError::InvalidModule { code: code.0, name: code_name(code), log };
        let image = CString::new(text).map_err(|error| {
            let log = format!("a NUL byte at {}", error.nul_position());
            invalid(Code::INVALID_PTX, log)
        })?;
        let mut log = vec![0u8; LOG_BYTES];
        let mut options = [
            CU_JIT_GENERATE_LINE_INFO as u32,
            CU_JIT_ERROR_LOG_BUFFER as u32,
            CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES as u32,
        ];
        // Numbers are passed as pointers.
        let number = std::ptr::without_provenance_mut::<c_void>;
        let mut values = [number(1), log.as_mut_ptr().cast(), number(LOG_BYTES)];
        context.make_current()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a C string. As many options as values; the log has the size that is given. It writes one
        // handle, which drop gives back, and the log.
        let code = unsafe {
            raw::cuModuleLoadDataEx(
                &raw mut module,
                image.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        if code != Code::SUCCESS {
            let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
            return Err(invalid(code, log.trim_end().to_owned()));
        }
        Ok(Self(Arc::new(Loaded {
            handle: Handle(module),
            context: context.clone(),
            parameters: kernel_parameters(text),
            functions: Mutex::default(),
        })))
    }

    /// The kernel of a name. It is looked up once.
    ///
    /// # Errors
    /// [`DriverError::UnknownFunction`], or a refused call.
    pub fn function(&self, name: &str) -> Result<Function> {
        let mut functions = self.0.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = match functions.get(name) {
            Some(kernel) => kernel.clone(),
            None => {
                let kernel = Arc::new(self.look_up(name)?);
                functions.insert(name.to_owned(), kernel.clone());
                kernel
            }
        };
        Ok(Function { kernel, module: self.clone() })
    }

    fn look_up(&self, name: &str) -> Result<Kernel> {
        let unknown = || DriverError::UnknownFunction { name: name.to_owned() };
        let c_name = CString::new(name).map_err(|_| unknown())?;
        self.0.context.make_current()?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded and the name a C string; it writes one handle, which lives as long as the module.
        let code = unsafe { raw::cuModuleGetFunction(&raw mut function, self.0.handle.0, c_name.as_ptr()) };
        if code == Code::NOT_FOUND {
            return Err(unknown());
        }
        super::error::check("cuModuleGetFunction", code)?;
        let get = |attribute| -> Result<u32> {
            let mut value = 0;
            // SAFETY: the function is the module's; it writes one integer.
            unsafe { call!(cuFuncGetAttribute(&raw mut value, attribute, function)) }?;
            Ok(value.max(0) as u32)
        };
        Ok(Kernel {
            name: name.to_owned(),
            handle: Handle(function),
            attributes: FunctionAttributes {
                registers: get(CU_FUNC_ATTRIBUTE_NUM_REGS as u32)?,
                local_bytes: get(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES as u32)?,
                static_shared_bytes: get(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as u32)?,
                max_threads: get(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK as u32)?,
            },
            parameters: self.0.parameters.get(name).cloned(),
            shared_limit: AtomicU32::new(get(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32)?),
        })
    }
}

impl Function {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.kernel.name
    }

    /// What the driver's compiler made of it.
    pub fn attributes(&self) -> FunctionAttributes {
        self.kernel.attributes
    }

    /// The context that it belongs to.
    pub fn context(&self) -> &Context {
        &self.module.0.context
    }

    /// Lets launches have up to `bytes` of dynamic shared memory, beyond the 48 KiB that all kernels may have.
    ///
    /// # Errors
    /// [`DriverError::SharedMemory`] if the device has less, or a refused call.
    pub fn allow_shared_bytes(&self, bytes: u32) -> Result<()> {
        let device = self.context().device().limits.opt_in_shared_bytes;
        let limit = device.saturating_sub(self.kernel.attributes.static_shared_bytes);
        if bytes > limit {
            return Err(DriverError::SharedMemory { function: self.name().to_owned(), wanted: bytes, limit });
        }
        self.context().make_current()?;
        let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
        // SAFETY: the function is alive, since its module is; bytes are below 2^31, the device's limit being an integer.
        unsafe { call!(cuFuncSetAttribute(self.kernel.handle.0, attribute, bytes as i32)) }?;
        self.kernel.shared_limit.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// The most dynamic shared memory that a launch may have now.
    pub fn shared_limit(&self) -> u32 {
        self.kernel.shared_limit.load(Ordering::Relaxed)
    }

    /// Blocks of `threads` threads and `shared_bytes` of dynamic shared memory that run on a multiprocessor at once.
    ///
    /// # Errors
    /// A refused call.
    pub fn occupancy(&self, threads: u32, shared_bytes: u32) -> Result<u32> {
        self.context().make_current()?;
        let mut blocks = 0;
        let threads = i32::try_from(threads).unwrap_or(i32::MAX);
        // SAFETY: the function is alive, since its module is; it writes one integer.
        unsafe {
            call!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut blocks,
                self.kernel.handle.0,
                threads,
                shared_bytes as usize,
            ))
        }?;
        Ok(blocks.max(0) as u32)
    }

    /// Bytes of each parameter, if the module's text could be understood.
    pub(super) fn parameters(&self) -> Option<&[usize]> {
        self.kernel.parameters.as_deref()
    }

    pub(super) fn raw(&self) -> cust::sys::CUfunction {
        self.kernel.handle.0
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.context.free_after_all_work(|| {
            // SAFETY: loaded by from_ptx, unloaded once. No Function is left, and none of its kernels runs.
            let _ = unsafe { call!(cuModuleUnload(self.handle.0)) };
        });
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module").field("kernels", &self.parameters.keys()).finish_non_exhaustive()
    }
}

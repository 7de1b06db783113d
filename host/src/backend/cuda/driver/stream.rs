use cust::sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING;

use super::raw::{self, Code, Handle, StreamHandle, call};
use super::{Context, Event, Result};

/// Work for the GPU that runs in the order in which it is given.
///
/// It does not wait for the device's default stream, nor that for it.
#[derive(Debug)]
pub struct Stream {
    handle: StreamHandle,
    context: Context,
}

/// Which stream's blocks go first when both have some waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// As all streams are by default.
    #[default]
    Normal,
    /// Before those.
    High,
}

impl Stream {
    /// A stream of normal priority.
    ///
    /// # Errors
    /// A refused call.
    pub fn new(context: &Context) -> Result<Self> {
        Self::with_priority(context, Priority::Normal)
    }

    /// A stream of a priority.
    ///
    /// # Errors
    /// A refused call.
    pub fn with_priority(context: &Context, priority: Priority) -> Result<Self> {
        context.make_current()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: it writes two integers.
        unsafe { call!(cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest)) }?;
        let priority = if priority == Priority::High { greatest } else { least };
        let mut stream = std::ptr::null_mut();
        // SAFETY: it writes one handle, which drop gives back.
        unsafe {
            call!(cuStreamCreateWithPriority(&raw mut stream, CU_STREAM_NON_BLOCKING as u32, priority))
        }?;
        Ok(Self { handle: Handle(stream), context: context.clone() })
    }

    /// The context that it belongs to.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Lets later work of this stream wait for an event, without the host waiting. An event that was never recorded is
    /// not waited for.
    ///
    /// # Errors
    /// [`DriverError::OtherContext`](super::DriverError::OtherContext), or a refused call.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.context.check_same(event.context(), "the event")?;
        self.context.make_current()?;
        // SAFETY: both handles are alive, and of the current context.
        unsafe { call!(cuStreamWaitEvent(self.handle.0, event.raw(), 0)) }
    }

    /// Whether all its work is done.
    ///
    /// # Errors
    /// A refused call; the code of work that failed.
    pub fn is_idle(&self) -> Result<bool> {
        self.context.make_current()?;
        // SAFETY: the handle is alive.
        let code = unsafe { raw::cuStreamQuery(self.handle.0) };
        if code == Code::NOT_READY {
            Ok(false)
        } else {
            super::error::check("cuStreamQuery", code).map(|()| true)
        }
    }

    /// Waits until all its work is done.
    ///
    /// # Errors
    /// A refused call; the code of work that failed.
    pub fn synchronize(&self) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: the handle is alive.
        unsafe { call!(cuStreamSynchronize(self.handle.0)) }
    }

    /// What libraries on the driver know it by: a `cudaStream_t`.
    pub(in crate::backend::cuda) fn pointer(&self) -> *mut std::ffi::c_void {
        self.handle.0.cast()
    }

    pub(super) fn raw(&self) -> cust::sys::CUstream {
        self.handle.0
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by with_priority, destroyed once. Work under way goes on; what it uses waits for it.
            let _ = unsafe { call!(cuStreamDestroy_v2(self.handle.0)) };
        }
    }
}

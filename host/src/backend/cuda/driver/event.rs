use cust::sys::CUevent_flags_enum::{CU_EVENT_DEFAULT, CU_EVENT_DISABLE_TIMING};

use super::raw::{self, Code, EventHandle, Handle, call};
use super::{Context, Result, Stream};

/// A point in a stream's work.
///
/// Work that a stream takes up after [`Stream::wait`] starts when the event's point is reached, and sees all that was
/// written before it.
#[derive(Debug)]
pub struct Event {
    handle: EventHandle,
    context: Context,
}

impl Event {
    /// An event that knows its time.
    ///
    /// # Errors
    /// A refused call.
    pub fn new(context: &Context) -> Result<Self> {
        Self::with_flags(context, CU_EVENT_DEFAULT as u32)
    }

    /// An event for order alone, which costs less.
    ///
    /// # Errors
    /// A refused call.
    pub fn untimed(context: &Context) -> Result<Self> {
        Self::with_flags(context, CU_EVENT_DISABLE_TIMING as u32)
    }

    fn with_flags(context: &Context, flags: u32) -> Result<Self> {
        context.make_current()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: it writes one handle, which drop gives back.
        unsafe { call!(cuEventCreate(&raw mut event, flags)) }?;
        Ok(Self { handle: Handle(event), context: context.clone() })
    }

    /// Puts the event behind all work that the stream has now. An event that was recorded before moves.
    ///
    /// # Errors
    /// [`DriverError::OtherContext`](super::DriverError::OtherContext), or a refused call.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.context.check_same(stream.context(), "the event")?;
        self.context.make_current()?;
        // SAFETY: both handles are alive, and of the current context.
        unsafe { call!(cuEventRecord(self.handle.0, stream.raw())) }
    }

    /// The same in a stream that is captured: each replay of the graph records it anew, with its time. [`record`](Self::record) would only
    /// order what is captured.
    ///
    /// # Errors
    /// As for [`record`](Self::record).
    pub fn record_in_graph(&self, stream: &Stream) -> Result<()> {
        /// `CU_EVENT_RECORD_EXTERNAL`.
        const EXTERNAL: u32 = 1;
        self.context.check_same(stream.context(), "the event")?;
        self.context.make_current()?;
        // SAFETY: both handles are alive, and of the current context.
        unsafe { call!(cuEventRecordWithFlags(self.handle.0, stream.raw(), EXTERNAL)) }
    }

    /// Whether its point was reached; true if it was never recorded.
    ///
    /// # Errors
    /// A refused call; the code of work that failed.
    pub fn is_reached(&self) -> Result<bool> {
        self.context.make_current()?;
        // SAFETY: the handle is alive.
        let code = unsafe { raw::cuEventQuery(self.handle.0) };
        if code == Code::NOT_READY {
            Ok(false)
        } else {
            super::error::check("cuEventQuery", code).map(|()| true)
        }
    }

    /// Waits until its point is reached; returns at once if it was never recorded.
    ///
    /// # Errors
    /// A refused call; the code of work that failed.
    pub fn synchronize(&self) -> Result<()> {
        self.context.make_current()?;
        // SAFETY: the handle is alive.
        unsafe { call!(cuEventSynchronize(self.handle.0)) }
    }

    /// Milliseconds from this event to a later one, to about half a microsecond. Both were reached.
    ///
    /// # Errors
    /// A refused call: 600 if one was not reached yet, 400 if one is untimed or was never recorded.
    pub fn elapsed_ms(&self, later: &Self) -> Result<f32> {
        self.context.check_same(&later.context, "the later event")?;
        self.context.make_current()?;
        let mut ms = 0.0;
        // SAFETY: both handles are alive; it writes one number.
        unsafe { call!(cuEventElapsedTime(&raw mut ms, self.handle.0, later.handle.0)) }?;
        Ok(ms)
    }

    pub(super) fn raw(&self) -> cust::sys::CUevent {
        self.handle.0
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by new, destroyed once; the driver keeps it until work under way has passed it.
            let _ = unsafe { call!(cuEventDestroy_v2(self.handle.0)) };
        }
    }
}

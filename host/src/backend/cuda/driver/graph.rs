use std::ptr;

use cust::sys::{CUgraph_st, CUgraphExec_st};

use super::raw::{Handle, call};
use super::{Context, Result, Stream};

/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: calls of this thread that cannot be captured are refused.
const THREAD_LOCAL: u32 = 1;

/// Work that was captured from a stream, to be replayed as often as wanted with one call.
///
/// Only the order of launches and their parameters are captured, not what lies in memory: lists and counts that the kernels read
/// from there are those of the replay.
#[derive(Debug)]
pub struct Graph {
    handle: Handle<CUgraphExec_st>,
    context: Context,
}

impl Graph {
    /// Captures what `work` gives `stream`, which does not run then.
    ///
    /// # Errors
    /// The first refusal of `work`, or of the capture: work that cannot be captured, such as an allocation or a wait of the
    /// host, makes it invalid. `stream` is an ordinary stream again in any case.
    pub fn capture(stream: &Stream, work: impl FnOnce(&Stream) -> Result<()>) -> Result<Self> {
        let context = stream.context().clone();
        context.make_current()?;
        // SAFETY: the stream's handle is alive.
        unsafe { call!(cuStreamBeginCapture_v2(stream.raw(), THREAD_LOCAL)) }?;
        let capturing = Capturing(stream);
        let worked = work(stream);
        let captured = capturing.end();
        worked?;
        let captured = captured?;
        let mut graph = ptr::null_mut();
        // SAFETY: the captured graph is alive; it writes one handle, which drop gives back.
        unsafe { call!(cuGraphInstantiateWithFlags(&raw mut graph, captured.0.0, 0)) }?;
        let graph = Self { handle: Handle(graph), context };
        // SAFETY: both handles are alive, and of the current context.
        unsafe { call!(cuGraphUpload(graph.handle.0, stream.raw())) }?;
        Ok(graph)
    }

    /// Async: replays the work.
    ///
    /// # Errors
    /// [`DriverError::OtherContext`](super::DriverError::OtherContext), or a refused call.
    ///
    /// # Safety
    /// All that the captured launches touch is still there, their [`Function`](super::Function)s too, and stays until `stream` has come
    /// this far; and what each launch asks of its caller holds now.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        self.context.check_same(stream.context(), "the graph")?;
        self.context.make_current()?;
        // SAFETY: both handles are alive, and of the current context; the rest is the caller's part.
        unsafe { call!(cuGraphLaunch(self.handle.0, stream.raw())) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by capture, destroyed once; the driver lets replays under way end.
            let _ = unsafe { call!(cuGraphExecDestroy(self.handle.0)) };
        }
    }
}

/// A stream that captures: until this is dropped, also by a panic.
struct Capturing<'a>(&'a Stream);

impl Capturing<'_> {
    fn end(self) -> Result<Captured> {
        let ended = self.end_capture();
        std::mem::forget(self);
        ended
    }

    fn end_capture(&self) -> Result<Captured> {
        let mut captured = ptr::null_mut();
        self.0.context().make_current()?;
        // SAFETY: the stream captures; it writes one handle.
        let ended = unsafe { call!(cuStreamEndCapture(self.0.raw(), &raw mut captured)) };
        // Also where the capture failed there may be something to give back.
        let captured = Captured(Handle(captured));
        ended.map(|()| captured)
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        // Only while a panic unwinds; what was captured is of no use then.
        let _ = self.end_capture();
    }
}

/// What a capture gave, until it is made ready to run.
struct Captured(Handle<CUgraph_st>);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.0.is_null() {
            // SAFETY: it came from the end of a capture, destroyed once.
            let _ = unsafe { call!(cuGraphDestroy(self.0.0)) };
        }
    }
}

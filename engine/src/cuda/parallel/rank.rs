use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use spinkv::backend::cuda::driver::{DeviceBuffer, Event, Stream};
use spinkv::backend::cuda::nccl::Communicator;

use super::lockstep::Lockstep;
use crate::error::{Error, Result};

/// A GPU's link to the others that share its model. Used by one thread at a time.
#[derive(Debug)]
pub(in crate::cuda) struct Rank {
    communicator: Communicator,
    lockstep: Arc<Lockstep>,
    /// Between an agreement and the last sum that it was for: who stops here leaves others waiting.
    inside: AtomicBool,
    /// Behind what is waited for.
    reached: Event,
}

impl Rank {
    pub(super) fn new(communicator: Communicator, lockstep: Arc<Lockstep>) -> Result<Self> {
        let reached = Event::untimed(communicator.context())?;
        Ok(Self { communicator, lockstep, inside: AtomicBool::new(false), reached })
    }

    /// Whether it is the rank that keeps the residual stream in sums.
    pub fn is_first(&self) -> bool {
        self.communicator.rank() == 0
    }

    /// Before sums are enqueued: waits until all ranks have come here, and goes on if all are `ready`.
    ///
    /// # Errors
    /// What `ready` says; [`Error::OtherRank`] if it is another that is not.
    pub fn enter(&self, ready: Result<()>) -> Result<()> {
        let agreed = self.lockstep.agree(ready.is_ok());
        ready?;
        if !agreed {
            return Err(Error::OtherRank);
        }
        self.inside.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Behind the last of those sums.
    pub fn exit(&self) {
        self.inside.store(false, Ordering::Relaxed);
    }

    /// Async: sums the first `len` elements over all ranks, in place.
    pub fn sum(&self, stream: &Stream, buffer: &DeviceBuffer<f32>, len: usize) -> Result<()> {
        Ok(self.communicator.all_reduce_sum(stream, buffer, len)?)
    }

    /// Waits for all that the stream has now, as long as no rank fails.
    pub fn wait(&self, stream: &Stream) -> Result<()> {
        self.reached.record(stream)?;
        self.wait_for(&self.reached)
    }

    /// Waits for an event, as long as no rank fails: the driver's own wait could not be broken off.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        loop {
            if self.lockstep.has_failed() {
                return Err(Error::OtherRank);
            }
            match event.is_reached() {
                Ok(true) => return Ok(()),
                Ok(false) => thread::yield_now(),
                // Its sums never end, and so no other rank's.
                Err(error) => {
                    self.lockstep.fail(self.communicator.rank(), error.to_string());
                    return Err(error.into());
                }
            }
        }
    }

    /// The end of a piece of work, with its outcome.
    pub fn leave(&self, outcome: std::result::Result<(), &Error>) {
        let inside = self.inside.swap(false, Ordering::Relaxed);
        match outcome {
            Err(error) if inside && !matches!(error, Error::OtherRank) => {
                self.lockstep.fail(self.communicator.rank(), error.to_string());
            }
            _ => {}
        }
        self.lockstep.leave();
    }

    /// A panic in the middle of a piece of work.
    pub fn leave_in_panic(&self) {
        self.lockstep.fail(self.communicator.rank(), "its thread panicked".to_owned());
        self.lockstep.leave();
    }

    /// Ends the waits of its sums, for good. No graph that holds some may be there any more.
    pub fn abort(&self) {
        self.communicator.abort();
    }
}

//! The GPU's own clock as a Criterion measurement.
//!
//! It times what lies between two events of a stream: the GPU writes down when it gets to each, so neither the host's way to the
//! launch nor its wait for the end is in the time. A clock of the host would add both, which is as much as a short kernel takes.
//! An event's time is exact to about half a microsecond, and what the stream idles between the events counts: a launch that the
//! host gives late is timed long. Launches behind an untimed flush of the L2 (see `measure`) do not wait for the host.
//!
//! What must not be timed, such as restoring the inputs and making the L2 cold, goes to the stream before [`CudaEvents::start`], inside
//! `iter_custom`.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use criterion::measurement::{Measurement, ValueFormatter};
use spinkv::backend::cuda::driver::{DriverError, Event, Result, Stream};
use spinkv_benches::units::MicrosecondsAndGigabytes;

/// Nanoseconds that a stream's work takes. Clones share the stream, and the first failure.
#[derive(Clone)]
pub struct CudaEvents {
    stream: Arc<Stream>,
    failure: Rc<RefCell<Option<DriverError>>>,
}

/// A recorded start, and the event for the end, made beforehand: nothing but its record stands behind the work.
pub struct Started {
    start: Event,
    end: Event,
}

impl CudaEvents {
    pub fn new(stream: Arc<Stream>) -> Self {
        Self { stream, failure: Rc::default() }
    }

    /// Times `work` of the stream after `before`, which is not timed. Criterion knows no errors: after the first, which
    /// [`take_failure`](Self::take_failure) gives, nothing more runs and all times are 1 ns.
    pub fn time(
        &self,
        before: impl FnOnce(&Stream) -> Result<()>,
        work: impl FnOnce(&Stream) -> Result<()>,
    ) -> f64 {
        if self.failure.borrow().is_some() {
            return 1.0;
        }
        let started = before(&self.stream).and_then(|()| {
            let started = self.start()?;
            work(&self.stream)?;
            Ok(started)
        });
        self.end(started)
    }

    /// The first failure since the last call.
    pub fn take_failure(&self) -> Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn elapsed_ns(&self, Started { start, end }: &Started) -> Result<f64> {
        end.record(&self.stream)?;
        end.synchronize()?;
        Ok(f64::from(start.elapsed_ms(end)?) * 1e6)
    }
}

impl Measurement for CudaEvents {
    type Intermediate = Result<Started>;
    type Value = f64;

    fn start(&self) -> Self::Intermediate {
        let context = self.stream.context();
        let started = Started { start: Event::new(context)?, end: Event::new(context)? };
        started.start.record(&self.stream)?;
        Ok(started)
    }

    fn end(&self, started: Self::Intermediate) -> f64 {
        started.and_then(|started| self.elapsed_ns(&started)).unwrap_or_else(|error| {
            self.failure.borrow_mut().get_or_insert(error);
            1.0
        })
    }

    fn add(&self, one: &f64, other: &f64) -> f64 {
        one + other
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, ns: &f64) -> f64 {
        *ns
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &MicrosecondsAndGigabytes
    }
}

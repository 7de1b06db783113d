use std::sync::Arc;

use cust::sys::CUdevice;

use super::raw::{ContextHandle, Handle, call};
use super::{Device, DriverError, DriverVersion, Result, driver_version};

/// A GPU that was opened: the device's primary context, which all libraries of the process share.
///
/// A clone is the same context, and so is the same device opened again. It is given back when all of them, and everything
/// made in it, are dropped.
#[derive(Clone, Debug)]
pub struct Context(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    handle: ContextHandle,
    raw_device: CUdevice,
    device: Device,
    driver: DriverVersion,
}

/// Bytes of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuMemory {
    /// Not in use, by any process.
    pub free_bytes: u64,
    /// All of it.
    pub total_bytes: u64,
}

impl Context {
    /// Opens a device.
    ///
    /// # Errors
    /// [`DriverError::UnsupportedDevice`] below compute capability 8.0, [`DriverError::NoSharedAddresses`] where
    /// pinned memory has another address on the GPU, or a refused call.
    pub fn new(device: Device) -> Result<Self> {
        device.ptx_arch()?;
        if !device.host_pointers_work()? {
            return Err(DriverError::NoSharedAddresses { name: device.name });
        }
        let driver = driver_version()?;
        let raw_device = device.cust()?.as_raw();
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver is started and the device its own; it writes one handle, which Shared gives back.
        unsafe { call!(cuDevicePrimaryCtxRetain(&raw mut context, raw_device)) }?;
        Ok(Self(Arc::new(Shared { handle: Handle(context), raw_device, device, driver })))
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The driver that it runs under.
    pub fn driver_version(&self) -> DriverVersion {
        self.0.driver
    }

    /// The device's memory, now.
    ///
    /// # Errors
    /// A refused call.
    pub fn memory(&self) -> Result<GpuMemory> {
        self.make_current()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: it writes two sizes, for the current context.
        unsafe { call!(cuMemGetInfo_v2(&raw mut free, &raw mut total)) }?;
        Ok(GpuMemory { free_bytes: free as u64, total_bytes: total as u64 })
    }

    /// Waits for all work on all streams.
    ///
    /// # Errors
    /// A refused call; the code of work that failed.
    pub fn synchronize(&self) -> Result<()> {
        self.make_current()?;
        // SAFETY: it takes nothing.
        unsafe { call!(cuCtxSynchronize()) }
    }

    /// Makes the context current on this thread, before every other call in it. Another library may have changed that at
    /// any time, so it is not remembered.
    pub(in crate::backend::cuda) fn make_current(&self) -> Result<()> {
        // SAFETY: the handle is retained as long as self is.
        unsafe { call!(cuCtxSetCurrent(self.0.handle.0)) }
    }

    /// Waits for all work and then runs `free`, for destructors. If waiting fails, work may still be using what is to be
    /// freed (the context is broken then, or a capture is under way): it is left to the end of the process.
    pub(in crate::backend::cuda) fn free_after_all_work(&self, free: impl FnOnce()) {
        if self.synchronize().is_ok() {
            free();
        }
    }

    /// Refuses operands of different contexts.
    pub(in crate::backend::cuda) fn check_same(&self, other: &Self, what: &'static str) -> Result<()> {
        if self.id() == other.id() { Ok(()) } else { Err(DriverError::OtherContext { what }) }
    }

    /// A number that tells contexts apart while they live.
    pub(super) fn id(&self) -> usize {
        self.0.handle.0 as usize
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: retained once in Context::new. Everything made in the context holds a clone, so is gone. A failure has no
        // one left to tell.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.raw_device)) };
    }
}

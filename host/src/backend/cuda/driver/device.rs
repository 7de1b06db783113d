use std::fmt;

use cust::device::{Device as CustDevice, DeviceAttribute};
use cust::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM as HOST_POINTERS,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MAX_SHARED_OPT_IN,
};

use super::raw::{self, Code, call};
use super::{Context, DriverError, Result};

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number, from 0; `CUDA_VISIBLE_DEVICES` chooses and orders.
    pub ordinal: u32,
    /// What its maker calls it.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory, in use or not.
    pub memory_bytes: u64,
    /// What a launch may ask for.
    pub limits: LaunchLimits,
}

/// The most that a launch may ask for on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchLimits {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Threads of a block altogether.
    pub threads_per_block: u32,
    /// Bytes of shared memory of a block, static and dynamic, unless its kernel asked for more.
    pub shared_bytes: u32,
    /// Bytes of shared memory of a block whose kernel
    /// [asked for more](super::Function::allow_shared_bytes).
    pub opt_in_shared_bytes: u32,
}

impl Device {
    /// All GPUs of this machine, at least one.
    ///
    /// # Errors
    /// [`DriverError::NoDriver`], [`DriverError::NoDevice`], or a refused call.
    pub fn all() -> Result<Vec<Self>> {
        (0..count()?).map(Self::describe).collect()
    }

    /// The GPU of a number.
    ///
    /// # Errors
    /// As for [`all`](Self::all), and [`DriverError::UnknownDevice`].
    pub fn get(ordinal: u32) -> Result<Self> {
        let count = count()?;
        if ordinal >= count {
            return Err(DriverError::UnknownDevice { ordinal, count });
        }
        Self::describe(ordinal)
    }

    /// Opens the GPU of a number.
    ///
    /// # Errors
    /// As for [`get`](Self::get) and [`Context::new`].
    pub fn open(ordinal: u32) -> Result<Context> {
        Context::new(Self::get(ordinal)?)
    }

    /// The kernels to load on it.
    ///
    /// # Errors
    /// [`DriverError::UnsupportedDevice`] for a compute capability below 8.0.
    pub fn ptx_arch(&self) -> Result<PtxArch> {
        PtxArch::of(self.compute_capability).ok_or_else(|| DriverError::UnsupportedDevice {
            name: self.name.clone(),
            capability: self.compute_capability,
        })
    }

    /// Whether host memory that was pinned after it was allocated has the same address on the GPU.
    pub(super) fn host_pointers_work(&self) -> Result<bool> {
        Ok(attribute(&self.cust()?, HOST_POINTERS as u32)? != 0)
    }

    pub(super) fn cust(&self) -> Result<CustDevice> {
        CustDevice::get_device(self.ordinal).map_err(DriverError::cust("cuDeviceGet"))
    }

    fn describe(ordinal: u32) -> Result<Self> {
        let device = CustDevice::get_device(ordinal).map_err(DriverError::cust("cuDeviceGet"))?;
        let get = |attribute| -> Result<u32> {
            let value = device.get_attribute(attribute).map_err(DriverError::cust("cuDeviceGetAttribute"))?;
            Ok(value.max(0) as u32)
        };
        Ok(Self {
            ordinal,
            name: device.name().map_err(DriverError::cust("cuDeviceGetName"))?,
            compute_capability: (
                get(DeviceAttribute::ComputeCapabilityMajor)?,
                get(DeviceAttribute::ComputeCapabilityMinor)?,
            ),
            multiprocessors: get(DeviceAttribute::MultiprocessorCount)?,
            memory_bytes: device.total_memory().map_err(DriverError::cust("cuDeviceTotalMem"))? as u64,
            limits: LaunchLimits {
                grid: [
                    get(DeviceAttribute::MaxGridDimX)?,
                    get(DeviceAttribute::MaxGridDimY)?,
                    get(DeviceAttribute::MaxGridDimZ)?,
                ],
                block: [
                    get(DeviceAttribute::MaxBlockDimX)?,
                    get(DeviceAttribute::MaxBlockDimY)?,
                    get(DeviceAttribute::MaxBlockDimZ)?,
                ],
                threads_per_block: get(DeviceAttribute::MaxThreadsPerBlock)?,
                shared_bytes: get(DeviceAttribute::MaxSharedMemoryPerBlock)?,
                opt_in_shared_bytes: attribute(&device, MAX_SHARED_OPT_IN as u32)?,
            },
        })
    }
}

/// An attribute that `cust` has no name for.
fn attribute(device: &CustDevice, attribute: u32) -> Result<u32> {
    let mut value = 0;
    // SAFETY: the device was got from the driver; it writes one integer.
    unsafe { call!(cuDeviceGetAttribute(&raw mut value, attribute, device.as_raw())) }?;
    Ok(value.max(0) as u32)
}

/// Loads and starts the driver, and counts the GPUs.
fn count() -> Result<u32> {
    start()?;
    match CustDevice::num_devices().map_err(DriverError::cust("cuDeviceGetCount"))? {
        0 => Err(DriverError::NoDevice { code: 0, name: "0 devices".to_owned() }),
        count => Ok(count),
    }
}

/// Loads and starts the driver; cheap if that was done before.
fn start() -> Result<()> {
    spinkv_libcuda::load()
        .map_err(|error| DriverError::NoDriver { library: spinkv_libcuda::LIBRARY, reason: error.reason })?;
    // SAFETY: it may be called at any time and any number of times.
    let code = unsafe { raw::cuInit(0) };
    match super::error::check("cuInit", code) {
        Err(DriverError::Call { code, name, .. }) if code == Code::NO_DEVICE.0 => {
            Err(DriverError::NoDevice { code, name })
        }
        started => started,
    }
}

/// The newest CUDA that the driver of this machine understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DriverVersion {
    /// 13 of 13.0.
    pub major: u32,
    /// 0 of 13.0.
    pub minor: u32,
}

impl DriverVersion {
    /// From the driver's number, 13000 for 13.0.
    fn from_number(number: i32) -> Self {
        let number = number.max(0) as u32;
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The version of this machine's driver.
///
/// # Errors
/// [`DriverError::NoDriver`], [`DriverError::NoDevice`], or a refused call.
pub fn driver_version() -> Result<DriverVersion> {
    start()?;
    let mut number = 0;
    // SAFETY: it writes one integer.
    unsafe { call!(cuDriverGetVersion(&raw mut number)) }?;
    Ok(DriverVersion::from_number(number))
}

/// What kernels are compiled for. The `a` architectures run on their own generation alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PtxArch {
    /// Ampere, and everything newer that has no kernels of its own.
    Sm80,
    /// Hopper.
    Sm90a,
    /// Blackwell of compute capability 10.0.
    Sm100a,
}

impl PtxArch {
    /// The kernels for a compute capability, `None` below 8.0.
    pub fn of(compute_capability: (u32, u32)) -> Option<Self> {
        match compute_capability {
            (10, 0) => Some(Self::Sm100a),
            (9, 0) => Some(Self::Sm90a),
            (8.., _) => Some(Self::Sm80),
            _ => None,
        }
    }

    /// As compilers spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
            Self::Sm100a => "sm_100a",
        }
    }
}

impl fmt::Display for PtxArch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_suit_the_compute_capability() {
        let name = |capability| PtxArch::of(capability).map(PtxArch::name);
        assert_eq!(name((7, 5)), None);
        assert_eq!(name((8, 0)), Some("sm_80"));
        assert_eq!(name((8, 9)), Some("sm_80"));
        assert_eq!(name((9, 0)), Some("sm_90a"));
        assert_eq!(name((10, 0)), Some("sm_100a"));
        // sm_100a code runs on 10.0 alone.
        assert_eq!(name((10, 3)), Some("sm_80"));
        assert_eq!(name((12, 0)), Some("sm_80"));
    }

    #[test]
    fn driver_versions_read_like_cuda_versions() {
        assert_eq!(DriverVersion::from_number(13000).to_string(), "13.0");
        assert_eq!(DriverVersion::from_number(12040).to_string(), "12.4");
    }
}

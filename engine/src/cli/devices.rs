use std::fmt::{self, Write};
use std::process::ExitCode;

use clap::Args;
use indicatif::HumanBytes;
use serde::Serialize;
use spinkv_engine::Result;

use super::output::Output;
use super::say;

/// What `spinkv devices` takes.
#[derive(Debug, Args)]
pub(crate) struct DevicesArguments {
    /// Print one JSON object, also if there are none
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Devices {
    /// The newest CUDA that the driver understands.
    cuda: Option<String>,
    devices: Vec<Device>,
    /// NCCL's version, with which several of them share a model.
    nccl: Option<String>,
    /// Why there is no NCCL.
    nccl_missing: Option<String>,
    /// Why there are no devices.
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct Device {
    /// 0 is the first; `CUDA_VISIBLE_DEVICES` chooses and orders.
    ordinal: u32,
    name: String,
    compute_capability: String,
    multiprocessors: u32,
    memory_bytes: u64,
    /// The kernels that it gets; `None` if it is too old for all of them.
    ptx_arch: Option<&'static str>,
}

/// Runs `spinkv devices`.
pub(crate) fn run(arguments: &DevicesArguments) -> Result<ExitCode> {
    let found = Devices::find();
    let mut output = Output::default();
    let text = if arguments.json {
        serde_json::to_string_pretty(&found).expect("a list of devices is plain data") + "\n"
    } else {
        found.to_string()
    };
    let _ = output.write(&text);
    output.finish()?;
    let Some(reason) = found.reason else { return Ok(ExitCode::SUCCESS) };
    say(&format!("spinkv: {reason}\n"));
    Ok(ExitCode::from(2))
}

impl Devices {
    #[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn find() -> Self {
        use spinkv::backend::cuda::driver;
        use spinkv::backend::cuda::nccl::Nccl;

        let list = || -> driver::Result<Self> {
            let devices = driver::Device::all()?.into_iter().map(Device::new).collect();
            let cuda = Some(driver::driver_version()?.to_string());
            let (nccl, nccl_missing) = match Nccl::load().and_then(|nccl| nccl.version()) {
                Ok(version) => (Some(version), None),
                Err(error) => (None, Some(error.to_string())),
            };
            Ok(Self { cuda, devices, nccl, nccl_missing, reason: None })
        };
        list().unwrap_or_else(|error| Self { reason: Some(error.to_string()), ..Self::default() })
    }

    #[cfg(not(all(
        feature = "cuda",
        target_os = "linux",
        any(target_arch = "x86_64", target_arch = "aarch64")
    )))]
    fn find() -> Self {
        let reason = "this binary was built without GPU support, which is the feature \"cuda\" on 64-bit x86 and Arm Linux";
        Self { reason: Some(reason.to_owned()), ..Self::default() }
    }
}

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
impl Device {
    fn new(device: spinkv::backend::cuda::driver::Device) -> Self {
        let (major, minor) = device.compute_capability;
        Self {
            ptx_arch: device.ptx_arch().ok().map(|arch| arch.name()),
            ordinal: device.ordinal,
            compute_capability: format!("{major}.{minor}"),
            multiprocessors: device.multiprocessors,
            memory_bytes: device.memory_bytes,
            name: device.name,
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(cuda) = &self.cuda {
            writeln!(f, "driver for CUDA {cuda}")?;
        }
        for device in &self.devices {
            let mut kernels = String::new();
            match device.ptx_arch {
                Some(arch) => write!(kernels, "kernels {arch}")?,
                None => kernels.push_str("too old: kernels need 8.0"),
            }
            writeln!(
                f,
                "{:>3}  {}: compute capability {}, {} SMs, {}, {kernels}",
                device.ordinal,
                device.name,
                device.compute_capability,
                device.multiprocessors,
                HumanBytes(device.memory_bytes),
            )?;
        }
        match (&self.nccl, &self.nccl_missing) {
            (Some(version), _) => writeln!(f, "NCCL {version}, for a model over several GPUs (--gpus)")?,
            (None, Some(reason)) => writeln!(f, "a model runs on one GPU: {reason}")?,
            (None, None) => {}
        }
        Ok(())
    }
}

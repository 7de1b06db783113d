//! The GPU's tests: `cargo xtask test-gpu`. Without a GPU every test is listed as ignored and says why.
//!
//! | variable | meaning |
//! |---|---|
//! | `SPINKV_GPU_SHAPES` | random shapes for each kernel, 200 by default |
//! | `SPINKV_GPU_SEED` | seed of the first shape, random by default; a failure names the seed that shows it |
//! | `SPINKV_REQUIRE_GPU` | set: a missing GPU is a failure |

mod attend;
mod backend;
mod blas;
mod cluster;
mod conformance;
mod drift;
mod driver;
mod engine;
mod estimate;
mod fill_random;
mod gate;
mod index;
mod kernels;
mod linear;
mod low_rank;
mod model;
mod offload;
mod outliers;
mod parallel;
mod prefill;
mod replay;
mod resolve;
mod restore;
mod select;

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use libtest_mimic::{Arguments, Failed, Trial};
use spinkv::backend::cuda::driver::{Context, Device, DriverError, Module, Stream};
use spinkv::backend::cuda::kernels::Kernels;

/// What the tests run on.
struct Machine {
    context: Context,
    stream: Stream,
    kernels: Kernels,
    /// The kernels that test `cuda_std`, by architecture, once a test has loaded them.
    conformance: Mutex<HashMap<&'static str, Module>>,
    /// Random shapes for each kernel.
    shapes: u64,
    /// The seed of the first.
    seed: u64,
}

type Outcome = Result<(), Failed>;
type Test = (String, Box<dyn FnOnce(&Machine) -> Outcome + Send>);

/// Why there is no machine.
enum Missing {
    /// It has no GPU that the kernels run on.
    Gpu(String),
    /// It has one, and something is wrong.
    Fault(String),
}

impl From<DriverError> for Missing {
    fn from(error: DriverError) -> Self {
        use DriverError::{NoDevice, NoDriver, UnsupportedDevice};
        let text = error.to_string();
        let absent = matches!(error, NoDriver { .. } | NoDevice { .. } | UnsupportedDevice { .. });
        if absent { Self::Gpu(text) } else { Self::Fault(text) }
    }
}

impl Machine {
    fn open() -> Result<Self, Missing> {
        let number = |name: &str, default: u64| match std::env::var(name) {
            Err(_) => Ok(default),
            Ok(value) => {
                value.parse().map_err(|_| Missing::Fault(format!("{name} is {value:?}, not a number")))
            }
        };
        let clock =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let (shapes, seed) = (number("SPINKV_GPU_SHAPES", 200)?, number("SPINKV_GPU_SEED", clock >> 10)?);
        let context = Device::open(0)?;
        let kernels = Kernels::load(&context)?;
        let stream = Stream::new(&context)?;
        Ok(Self { context, stream, kernels, conformance: Mutex::default(), shapes, seed })
    }

    /// Runs `check` on the random shapes' seeds; a failure names its seed.
    fn on_seeds(&self, mut check: impl FnMut(u64) -> Outcome) -> Outcome {
        for seed in self.seed..self.seed + self.shapes {
            check(seed).map_err(|failure| {
                let reason = failure.message().unwrap_or("failed");
                format!("{reason}\nagain with SPINKV_GPU_SEED={seed} SPINKV_GPU_SHAPES=1")
            })?;
        }
        Ok(())
    }
}

fn ensure(holds: bool, what: impl Into<String>) -> Outcome {
    if holds { Ok(()) } else { Err(what.into().into()) }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One GPU, and messages that belong to one test.
    arguments.test_threads.get_or_insert(1);
    let tests = [
        attend::tests(),
        blas::tests(),
        cluster::tests(),
        drift::tests(),
        engine::tests(),
        estimate::tests(),
        fill_random::tests(),
        gate::tests(),
        index::tests(),
        kernels::tests(),
        linear::tests(),
        low_rank::tests(),
        model::tests(),
        offload::tests(),
        outliers::tests(),
        prefill::tests(),
        replay::tests(),
        resolve::tests(),
        restore::tests(),
        select::tests(),
        backend::tests(),
        conformance::tests(),
        driver::tests(),
        parallel::tests(),
    ];
    let tests = tests.into_iter().flatten();
    let trials: Vec<Trial> = match Machine::open() {
        Ok(machine) => {
            let device = machine.context.device();
            println!(
                "{}, compute capability {}.{}, kernels for {}, driver {}; {} shapes a kernel from seed {}",
                device.name,
                device.compute_capability.0,
                device.compute_capability.1,
                device.ptx_arch().expect("kernels are loaded"),
                machine.context.driver_version(),
                machine.shapes,
                machine.seed
            );
            let machine = Arc::new(machine);
            let trial = |(name, test): Test| {
                let machine = machine.clone();
                Trial::test(name, move || test(&machine))
            };
            tests.map(trial).collect()
        }
        Err(Missing::Fault(reason)) => {
            eprintln!("the GPU cannot be tested: {reason}");
            return ExitCode::FAILURE;
        }
        Err(Missing::Gpu(reason)) if std::env::var_os("SPINKV_REQUIRE_GPU").is_some() => {
            eprintln!("no GPU to test on: {reason}");
            return ExitCode::from(2);
        }
        Err(Missing::Gpu(reason)) => {
            println!("skipped, all of them: {reason}");
            let ignored = |(name, _): Test| {
                let reason = reason.clone();
                // To ask for it nonetheless (`--ignored`) fails.
                Trial::test(name, move || Err(reason.into())).with_ignored_flag(true)
            };
            tests.map(ignored).collect()
        }
    };
    if let Some(filter) =
        arguments.filter.as_ref().filter(|filter| !trials.iter().any(|trial| trial.name().contains(*filter)))
    {
        eprintln!("no test's name holds {filter:?}");
        return ExitCode::FAILURE;
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A named test.
fn test(name: impl Into<String>, run: impl FnOnce(&Machine) -> Outcome + Send + 'static) -> Test {
    (name.into(), Box::new(run))
}

use std::path::PathBuf;
use std::sync::Arc;
use std::{io, panic, thread};

use rayon::{ThreadPool, ThreadPoolBuilder};
use spinkv::Shard;
use spinkv::backend::cuda::driver::{Context, Device, Stream};
use spinkv::backend::cuda::kernels::Kernels;
use spinkv::backend::cuda::nccl::Nccl;

use super::lockstep::Lockstep;
use super::rank::Rank;
use crate::config::ModelConfig;
use crate::cuda::DeviceWeights;
use crate::error::{Error, Result};

/// Where a GPU's weights come from.
#[derive(Clone, Debug)]
pub enum WeightSource {
    /// A checkpoint's directory.
    Checkpoint(PathBuf),
    /// Random ones, of this seed.
    Random(u64),
}

/// The GPUs that share a model: ranks 0, 1, 2, … One GPU alone needs nothing of this.
#[derive(Debug)]
pub struct GpuGroup {
    contexts: Vec<Context>,
    /// What ties them together, if there are several.
    pub(super) ties: Option<Ties>,
}

/// What ties several GPUs together.
#[derive(Debug)]
pub(super) struct Ties {
    pub ranks: Vec<Arc<Rank>>,
    pub lockstep: Arc<Lockstep>,
    /// A thread for each rank.
    pub pool: ThreadPool,
    /// NCCL's version and file.
    pub nccl: String,
}

impl GpuGroup {
    /// The first `gpus` GPUs of this machine; several are tied together by NCCL.
    ///
    /// # Errors
    /// [`Error::GpuCount`]; [`Error::Nccl`] without NCCL; a refused call of the driver.
    pub fn open(gpus: usize) -> Result<Self> {
        if gpus == 1 {
            return Ok(Self::single(Device::open(0)?));
        }
        let devices = Device::all()?;
        if gpus == 0 || gpus > devices.len() {
            return Err(Error::GpuCount { wanted: gpus, found: devices.len() });
        }
        let contexts = devices.into_iter().take(gpus).map(|device| Ok(Context::new(device)?));
        Self::tied(contexts.collect::<Result<_>>()?, &Nccl::load()?)
    }

    /// One GPU.
    pub fn single(context: Context) -> Self {
        Self { contexts: vec![context], ties: None }
    }

    /// Several GPUs, tied together by this NCCL.
    ///
    /// # Errors
    /// What NCCL or the driver refuses.
    pub fn tied(contexts: Vec<Context>, nccl: &Nccl) -> Result<Self> {
        let lockstep = Arc::new(Lockstep::new(contexts.len()));
        let communicators = nccl.communicators(&contexts)?.into_iter();
        let ranks = communicators.map(|one| Ok(Arc::new(Rank::new(one, lockstep.clone())?)));
        let ranks = ranks.collect::<Result<_>>()?;
        let threads = ThreadPoolBuilder::new().num_threads(contexts.len());
        let pool = threads.thread_name(|rank| format!("rank {rank}")).build().map_err(|error| Error::Io {
            path: "the threads of the GPUs".into(),
            source: io::Error::other(error.to_string()),
        })?;
        let nccl = format!("NCCL {} ({})", nccl.version()?, nccl.path().display());
        Ok(Self { contexts, ties: Some(Ties { ranks, lockstep, pool, nccl }) })
    }

    /// How many there are.
    pub fn gpus(&self) -> usize {
        self.contexts.len()
    }

    /// Their contexts, by rank.
    pub fn contexts(&self) -> &[Context] {
        &self.contexts
    }

    /// What they are called, and how several are tied together.
    pub fn description(&self) -> String {
        let name = &self.contexts[0].device().name;
        match &self.ties {
            None => name.clone(),
            Some(ties) => format!("{} x {name} by {}", self.gpus(), ties.nccl),
        }
    }

    /// The weights of a model, of which each rank reads or makes its part alone. `progress` hears of rank 0's (done, total) bytes.
    ///
    /// # Errors
    /// Those of [`DeviceWeights::open_shard`] and [`DeviceWeights::random_shard`].
    pub fn weights(
        &self,
        config: &ModelConfig,
        source: &WeightSource,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Vec<DeviceWeights>> {
        let load = |shard: Shard, progress: &mut dyn FnMut(u64, u64)| {
            let stream = Stream::new(&self.contexts[shard.rank()])?;
            match source {
                WeightSource::Checkpoint(dir) => {
                    DeviceWeights::open_shard(&stream, dir, config, shard, progress)
                }
                WeightSource::Random(seed) => {
                    let kernels = Kernels::load(stream.context())?;
                    DeviceWeights::random_shard(&stream, &kernels, config, shard, *seed)
                }
            }
        };
        self.in_threads(|shard| load(shard, &mut |_, _| {}), |shard| load(shard, &mut progress))
    }

    /// Runs `work` for each rank on a thread, and `first` for rank 0 on this one.
    pub(super) fn in_threads<T: Send>(
        &self,
        work: impl Fn(Shard) -> Result<T> + Sync,
        first: impl FnOnce(Shard) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut shards = Shard::all(self.gpus());
        let own = shards.next().expect("at least one");
        thread::scope(|scope| {
            let work = &work;
            let others: Vec<_> = shards.map(|shard| scope.spawn(move || work(shard))).collect();
            let first = first(own);
            let others =
                others.into_iter().map(|one| one.join().unwrap_or_else(|panic| panic::resume_unwind(panic)));
            [first].into_iter().chain(others.collect::<Vec<_>>()).collect()
        })
    }
}

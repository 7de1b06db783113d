use spinkv::backend::BackendKind;
use spinkv::backend::cpu::CpuBackend;
use spinkv::pipeline::Pipeline;
use spinkv_engine::Result;
use spinkv_engine::model::Model;
use spinkv_engine::runner::CpuRunner;
use spinkv_engine::serve::{Engine, Scheduler};
use spinkv_engine::tokenizer::Tokenizer;

use super::settings::{PrefixLimit, Settings};

/// Loads the model and serves until told to end; on the engine's thread.
pub(super) fn run_engine(engine: Engine, settings: Settings, tokenizer: Tokenizer) -> Result<()> {
    match settings.backend {
        BackendKind::Cpu => {
            let directory = settings.source.directory().expect("the cpu backend has no random weights");
            let loaded = Model::open(directory, settings.config.clone(), |_, _| {});
            let made = loaded.and_then(|model| Ok((model, cpu_backend(&settings)?)));
            let (model, backend) = match made {
                Ok(made) => made,
                Err(error) => {
                    engine.abandon(&error);
                    return Err(error);
                }
            };
            let pipeline = Pipeline::new(backend).with_buffering(settings.buffering);
            let runner = CpuRunner::new(&model, pipeline);
            tracing::info!("ready");
            engine.run(
                Scheduler::new(runner, Some(tokenizer), settings.scheduling),
                settings.kv.host_layout().page_bytes(),
            );
        }
        #[cfg(all(
            feature = "cuda",
            target_os = "linux",
            any(target_arch = "x86_64", target_arch = "aarch64")
        ))]
        BackendKind::Cuda => {
            let page_bytes = settings.kv.host_layout().page_bytes();
            let scheduling = settings.scheduling;
            let model = match cuda_model(settings) {
                Ok(model) => model,
                Err(error) => {
                    engine.abandon(&error);
                    return Err(error);
                }
            };
            tracing::info!(gpus = model.group().description(), products = model.products(), "ready");
            engine.run(Scheduler::new(model, Some(tokenizer), scheduling), page_bytes);
        }
    }
    Ok(())
}

fn cpu_backend(settings: &Settings) -> Result<CpuBackend> {
    let mut backend = CpuBackend::new(settings.kv.clone(), settings.limits);
    if let Some(PrefixLimit(limit)) = settings.prefixes {
        backend = backend.with_prefixes(limit)?;
    }
    if settings.reserve_host_bytes == 0 {
        return Ok(backend);
    }
    Ok(backend.with_reserved_host(settings.reserve_host_bytes, &mut |_| {})?)
}

#[cfg(all(feature = "cuda", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cuda_model(settings: Settings) -> Result<spinkv_engine::cuda::TensorParallel> {
    use std::sync::Arc;

    use spinkv::backend::cuda::CudaLimits;
    use spinkv_engine::cuda::{
        BlasUse, CudaOptions, GpuGroup, Overlap, TensorParallel, WeightSource, parallel,
    };

    use super::settings::{RANDOM_SEED, Source};

    let Settings { config, kv, limits, buffering, source, gpus, prefixes, .. } = settings;
    let limits = CudaLimits {
        requests: settings.scheduling.max_batch,
        max_tokens: config.max_position_embeddings,
        buffering,
        gpu_pages: limits.gpu_pages,
        host_bytes: limits.host_bytes,
    };
    let kv = parallel::shards(&kv, gpus)?;
    parallel::check(&kv, &limits)?;
    let group = Arc::new(GpuGroup::open(gpus)?);
    let source = match source {
        Source::Checkpoint(directory) => WeightSource::Checkpoint(directory),
        Source::Random(_) => WeightSource::Random(RANDOM_SEED),
    };
    let weights = group.weights(&config, &source, |_, _| {})?;
    let blas = match settings.cublaslt.as_str() {
        "require" => BlasUse::Required,
        "off" => BlasUse::Never,
        _ => BlasUse::IfPresent,
    };
    let mut model = TensorParallel::new(&group, config, weights, kv, &CudaOptions { limits, blas })?;
    model.set_overlap(match settings.overlap.as_str() {
        "off" => Overlap::Off,
        "halves" => Overlap::Halves,
        _ => Overlap::Attention,
    })?;
    if let Some(PrefixLimit(limit)) = prefixes {
        model.share_prefixes(limit)?;
    }
    if settings.reserve_host_bytes > 0 {
        model.reserve_host(settings.reserve_host_bytes, &mut |_| {})?;
    }
    Ok(model)
}

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use spinkv::KvConfig;
use spinkv::backend::BackendKind;
use spinkv::backend::cuda::CudaLimits;
use spinkv::backend::cuda::driver::Device;
use spinkv::memory::RequestPlan;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::cuda::{
    BlasUse, CudaOptions, GpuGroup, GpuReport, TensorParallel, WeightSource, parallel,
};
use spinkv_engine::generate::{Event, GenerateOptions, Prepared, generate_with};
use spinkv_engine::tokenizer::Tokenizer;
use spinkv_engine::{Error, Result};

use super::generate::{Console, GenerateArguments, Prompt};
use super::report;
use super::{check_gpus, demo};

/// Runs `spinkv generate --backend cuda`.
pub(super) fn run(arguments: &GenerateArguments, options: &GenerateOptions) -> Result<()> {
    for (given, what) in [
        (options.limits.gpu_bytes.is_some(), "limit its memory by --gpu-mib: --gpu-pages does"),
        (options.record_trace, "record what steps select"),
    ] {
        if given {
            return Err(Error::UnsupportedByBackend { backend: "cuda", what });
        }
    }
    match (&arguments.random_weights, arguments.prompt_tokens) {
        (Some(name), Some(tokens)) => random(arguments, options, name, tokens),
        _ => checkpoint(arguments, options),
    }
}

fn checkpoint(arguments: &GenerateArguments, options: &GenerateOptions) -> Result<()> {
    // Without a GPU nothing is read; it stays open, since opening takes time.
    let _context = Device::open(0)?;
    let directory = arguments.model.clone().unwrap_or_else(demo::model);
    let prompt = arguments.read_prompt(&directory)?;
    let (config, tokenizer) = (ModelConfig::open(&directory)?, Tokenizer::open(&directory)?);
    let prepared = Prepared::new(&config, &tokenizer, &prompt.text, options)?;
    let source = WeightSource::Checkpoint(directory.clone());
    let name = directory.display().to_string();
    generate(arguments, options, (config, prepared, source), Some(&tokenizer), name, &prompt, |console| {
        console.introduce(&directory, &prompt)
    })
}

fn random(arguments: &GenerateArguments, options: &GenerateOptions, name: &str, tokens: usize) -> Result<()> {
    let mut config = ModelConfig::preset(name)?;
    if let Some(layers) = arguments.layers {
        config = config.with_layers(layers)?;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(arguments.seed);
    let ids = (0..tokens).map(|_| rng.next_u32() % config.vocab_size as u32).collect();
    let prepared = Prepared::from_tokens(&config, ids, options)?;
    let prompt = Prompt { text: String::new(), question: None };
    let name = format!("{name}, {} layers, random weights", config.layers);
    let source = WeightSource::Random(arguments.seed);
    generate(arguments, options, (config, prepared, source), None, name, &prompt, |_| ())
}

/// How much the backend is made for, once it is clear that it can be made of `kv`, by rank.
fn limits(options: &GenerateOptions, prepared: &Prepared, kv: &[KvConfig]) -> Result<CudaLimits> {
    let ((limits, buffering), max_tokens) = (prepared.memory(), prepared.max_context());
    let plan = RequestPlan::new(prepared.kv(), max_tokens, buffering)?;
    let needed = plan.limits(prepared.kv()).host_bytes.unwrap_or(0);
    // Without a limit the arena has room for what is needed, or for what is reserved if that is more.
    let reserved = Some(options.reserve_host_bytes).filter(|bytes| *bytes > needed);
    let limits = CudaLimits {
        requests: 1,
        max_tokens,
        buffering,
        gpu_pages: limits.gpu_pages,
        host_bytes: limits.host_bytes.or(reserved),
    };
    parallel::check(kv, &limits)?;
    Ok(limits)
}

fn generate(
    arguments: &GenerateArguments,
    options: &GenerateOptions,
    (config, prepared, source): (ModelConfig, Prepared, WeightSource),
    tokenizer: Option<&Tokenizer>,
    name: String,
    prompt: &Prompt,
    introduce: impl FnOnce(&Console<'_>),
) -> Result<()> {
    check_gpus(BackendKind::Cuda, arguments.gpus, &config)?;
    let kv = parallel::shards(prepared.kv(), arguments.gpus)?;
    let limits = limits(options, &prepared, &kv)?;
    let gpus = Arc::new(GpuGroup::open(arguments.gpus)?);
    let mut console = Console::new(arguments);
    let weights = gpus.weights(&config, &source, |done, total| console.show("loading", done, total))?;
    introduce(&console);
    let blas = match arguments.cublaslt.as_str() {
        "require" => BlasUse::Required,
        "off" => BlasUse::Never,
        _ => BlasUse::IfPresent,
    };
    let mut model = TensorParallel::new(&gpus, config, weights, kv, &CudaOptions { limits, blas })?;
    if options.reserve_host_bytes > 0 {
        model.reserve_host(options.reserve_host_bytes, &mut |progress| {
            let (done, total) = (progress.ready_bytes as usize, progress.total_bytes as usize);
            // Who breaks off is heard at the first part of the prompt.
            let _ = console.hear(Event::Reserve { done, total });
        })?;
    }
    let generation = generate_with(&mut model, tokenizer, prepared, |event| console.hear(event))?;
    let GpuReport { before, weights, activations, prompt: of_prompt, kv, in_use } =
        model.memory()?.into_iter().sum();
    let device = report::Device {
        name: gpus.description(),
        products: model.products(),
        before,
        // A method's gates are weights, too.
        weights: weights + kv.operators,
        activations,
        prompt: of_prompt,
        kv_pages: kv.pages,
        kv_tables: kv.tables,
        kv_summaries: kv.summaries + kv.key_factors,
        kv_lists: kv.lists,
        in_use,
    };
    console.close(options, generation, name, prompt, Some(device))
}

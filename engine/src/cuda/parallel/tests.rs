//! Over the stand-ins for the driver and NCCL: that all ranks ask for the same, and that nobody waits for one that does not.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use spinkv::algorithms::{Dense, HeadRule, PerRow, RowRules, ShadowKv};
use spinkv::backend::cuda::CudaLimits;
use spinkv::backend::cuda::driver::Device;
use spinkv::backend::cuda::nccl::NcclError;
use spinkv::memory::{KvDtype, PageLayout};
use spinkv::pipeline::{Budget, Method, RequestId, SteadyZone};
use spinkv::{KvConfig, KvShape};

use super::*;
use crate::cuda::BlasUse;
use crate::cuda::stand_in::{StandInNccl, driver};
use crate::model::DecodeToken;
use crate::runner::Runner;
use crate::sampling::{Sampler, SamplingParams};

const LAYERS: usize = 2;
const HIDDEN: usize = 24;

fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("llama-3.1-8b").unwrap().with_layers(LAYERS).unwrap();
    (config.vocab_size, config.hidden_size, config.intermediate_size) = (40, HIDDEN, 64);
    (config.query_heads, config.kv_heads, config.head_dim) = (4, 2, 64);
    config
}

fn kv(method: impl Method + 'static) -> KvConfig {
    let config = config();
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim).unwrap();
    KvConfig::new(shape, PageLayout::new(8, 64, KvDtype::Bf16).unwrap(), Arc::new(method)).unwrap()
}

fn model(nccl: &StandInNccl) -> TensorParallel {
    let contexts = [0, 1].map(|ordinal| Device::open(ordinal).unwrap()).to_vec();
    let group = Arc::new(GpuGroup::tied(contexts, &nccl.load()).unwrap());
    let weights = group.weights(&config(), &WeightSource::Random(1), |_, _| {}).unwrap();
    let limits =
        CudaLimits { requests: 2, max_tokens: 900, buffering: 1.0, gpu_pages: None, host_bytes: None };
    let steady = SteadyZone { sinks: 4, window: 32 };
    let method = ShadowKv { budget: Budget::Tokens(64), steady, outliers: 0 };
    let options = CudaOptions { limits, blas: BlasUse::Never };
    TensorParallel::new(&group, config(), weights, shards(&kv(method), 2).unwrap(), &options).unwrap()
}

fn go(_: usize, _: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn prompt(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|id| id % 40).collect()
}

fn is_empty(model: &TensorParallel) -> bool {
    model.on_ranks(|_, model| Ok(model.pipeline().backend().is_empty())).unwrap() == [true, true]
}

fn step(model: &mut TensorParallel, requests: &[RequestId]) -> Result<Vec<u32>> {
    let batch: Vec<_> = requests.iter().map(|request| DecodeToken { request: *request, token: 3 }).collect();
    let mut samplers = vec![Sampler::new(SamplingParams::greedy()).unwrap(); requests.len()];
    let drawn = model.next_tokens(&batch, &mut samplers.iter_mut().collect::<Vec<_>>(), false)?;
    Ok(drawn.tokens.into_iter().map(|token| token.unwrap_or(u32::MAX)).collect())
}

#[test]
fn a_layer_is_summed_twice_in_prompts_and_steps() {
    let driver = driver();
    let nccl = driver.nccl();
    let mut model = model(nccl);
    assert_eq!(nccl.log(), ["init 2"]);
    let request = model.admit(800).unwrap();
    let mut parts = Vec::new();
    let logits = model
        .prefill(request, &prompt(700), &mut |done, total| {
            parts.push((done, total));
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((logits.len(), parts), (40, vec![(1, 2), (2, 2)]));
    let of_tokens = |tokens: usize| vec![format!("sum {}", tokens * HIDDEN); 2 * LAYERS];
    assert_eq!(nccl.log(), of_tokens(700));
    let other = model.admit(100).unwrap();
    model.prefill(other, &prompt(9), &mut go).unwrap();
    assert_eq!(nccl.log(), of_tokens(9));
    // Rehearsed and captured; the stand-in replays nothing.
    assert_eq!(step(&mut model, &[request, other]).unwrap().len(), 2);
    assert_eq!(nccl.log(), [of_tokens(2), of_tokens(2)].concat());
    step(&mut model, &[request, other]).unwrap();
    assert_eq!(nccl.log(), [""; 0], "a graph is captured once");
    assert_eq!(model.decode(&[DecodeToken { request, token: 3 }]).unwrap().len(), 40);

    // What is told of the whole is that of both.
    let plan = Runner::plan(&model, request).unwrap();
    let [first, second] =
        [0, 1].map(|rank: usize| *lock(&model.models[rank]).pipeline().admitted(request).unwrap());
    assert_eq!((plan.rows, first), (LAYERS * 2, second));
    assert_eq!(plan.gpu_pages(), 2 * first.gpu_pages());
    let usage = |rank: usize| lock(&model.models[rank]).usage();
    assert_eq!(model.usage(), usage(0) + usage(1));
    assert_eq!(model.memory().unwrap().len(), 2);
    let counters = Runner::counters(&mut model).unwrap();
    assert_eq!(counters.offloaded_pages, (700 / 8 + 9 / 8) * LAYERS as u64 * 2);
    model.release(request);
    model.release(other);
    assert!(is_empty(&model));
    nccl.log();
    drop(model);
    assert_eq!(nccl.log(), ["destroy 0", "destroy 1"]);
}

#[test]
fn who_breaks_off_or_is_refused_leaves_all_ranks_alike() {
    let driver = driver();
    let mut model = model(driver.nccl());
    let request = model.admit(300).unwrap();
    let broken = model.prefill(request, &prompt(200), &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(broken, Err(Error::Cancelled)));
    model.release(request);
    assert!(is_empty(&model));
    assert!(matches!(model.admit(901), Err(Error::Kv(_))));
    assert!(matches!(Runner::check(&model, 901), Err(Error::Kv(_))));

    // Memory that one rank alone has not got.
    let taken = model.on_ranks(|rank, model| {
        let request = model.pipeline_mut().admit(100)?;
        if rank == 0 {
            model.pipeline_mut().release(request);
        }
        Ok(request)
    });
    let taken = taken.unwrap()[1];
    let first = model.admit(100).unwrap();
    assert!(matches!(model.admit(100), Err(Error::Kv(spinkv::Error::BatchTooLarge { .. }))));
    model.release(taken);
    model.prefill(first, &prompt(50), &mut go).unwrap();
    let second = model.admit(100).unwrap();
    model.prefill(second, &prompt(50), &mut go).unwrap();

    // A request that one rank alone does not know: its step is refused before any rank takes it.
    model
        .on_ranks(|rank, model| {
            if rank == 1 {
                model.pipeline_mut().release(second);
            }
            Ok(())
        })
        .unwrap();
    let refused = step(&mut model, &[first, second]).unwrap_err();
    assert!(matches!(refused, Error::Kv(spinkv::Error::UnknownRequest(id)) if id == second), "{refused}");
    for _ in 0..3 {
        step(&mut model, &[first]).unwrap();
    }
    let tokens = model.on_ranks(|_, model| Ok(model.pipeline().tokens(first)?)).unwrap();
    assert_eq!(tokens, [53, 53]);
    model.release(second);
    model.release(first);
    assert!(is_empty(&model));
}

#[test]
fn prompts_that_begin_alike_share_each_rank_s_pages() {
    let driver = driver();
    let nccl = driver.nccl();
    let mut model = model(nccl);
    model.share_prefixes(Some(1 << 20)).unwrap();
    // Blocks of 16 pages of 8 tokens.
    let (whole, rest) = (prompt(300), 300 - 256);
    let cached = |model: &mut TensorParallel| -> Result<(RequestId, usize)> {
        let request = model.admit(400)?;
        let mut prompt = match model.begin_prompt(request, &whole) {
            Ok(prompt) => prompt,
            Err(error) => {
                model.release(request);
                return Err(error);
            }
        };
        let cached = model.cached_tokens(&prompt);
        while model.prompt_layer(&mut prompt, &mut go)?.is_none() {}
        Ok((request, cached))
    };
    let (first, found) = cached(&mut model).unwrap();
    assert_eq!(found, 0);
    nccl.log();
    let (second, found) = cached(&mut model).unwrap();
    assert_eq!(found, 256);
    assert_eq!(nccl.log(), vec![format!("sum {}", rest * HIDDEN); 2 * LAYERS], "the rest alone is computed");
    let of_rank = |model: &TensorParallel, rank: usize| lock(&model.models[rank]).prefixes().unwrap();
    let usage = Runner::prefixes(&model).unwrap();
    assert_eq!((usage.blocks, usage.cached_tokens, usage.prompt_tokens), (2, 256, 600));
    assert_eq!(usage.bytes, of_rank(&model, 0).bytes + of_rank(&model, 1).bytes);
    assert_eq!(step(&mut model, &[first, second]).unwrap().len(), 2);
    model.release(second);

    // What one rank alone has forgotten: nobody goes on with it, and all are alike again.
    lock(&model.models[1]).pipeline_mut().backend_mut().clear_prefixes();
    let unequal = cached(&mut model).unwrap_err();
    assert!(matches!(unequal, Error::UnequalPrefixes { rank: 1, found: 0, expected: 256 }), "{unequal}");
    assert_eq!([0, 1].map(|rank| of_rank(&model, rank).blocks), [0, 0]);
    let (third, found) = cached(&mut model).unwrap();
    assert_eq!(found, 0);
    model.release(third);
    let (fourth, found) = cached(&mut model).unwrap();
    assert_eq!(found, 256);
    step(&mut model, &[first, fourth]).unwrap();
    model.release(first);
    model.release(fourth);
    assert!(!is_empty(&model), "blocks are kept");
    model.clear_prefixes();
    assert!(is_empty(&model));

    // A limit is that of all together: half of it is too little for the second block.
    let block = usage.bytes / 2 / usage.blocks as u64;
    model.share_prefixes(Some(2 * 2 * block - 1)).unwrap();
    let (request, _) = cached(&mut model).unwrap();
    assert_eq!(Runner::prefixes(&model).unwrap().blocks, 1);
    model.release(request);
}

#[test]
fn a_rank_that_fails_in_the_middle_fails_the_model_and_nobody_waits() {
    let driver = driver();
    let nccl = driver.nccl();
    // In the first and the last sum of a prompt, in a rehearsal, in a capture.
    for (rank, call) in [(0, 0), (1, 3), (1, 4), (0, 7), (1, 9), (0, 11)] {
        let mut model = model(nccl);
        nccl.log();
        nccl.fail(rank, call);
        let run = |model: &mut TensorParallel| -> Result<()> {
            let request = model.admit(200)?;
            model.prefill(request, &prompt(100), &mut go)?;
            step(model, &[request]).map(|_| ())
        };
        let failed = run(&mut model).unwrap_err();
        let code = 3;
        assert!(
            matches!(&failed, Error::Nccl(NcclError::Result { code: found, .. }) if *found == code),
            "rank {rank}, call {call}: {failed}"
        );
        let mut ended: Vec<_> = nccl.log().into_iter().filter(|line| !line.starts_with("sum")).collect();
        ended.sort_unstable();
        assert_eq!(ended, ["abort 0", "abort 1"]);
        let after = model.admit(200).unwrap_err().to_string();
        assert!(
            after.starts_with(&format!("the GPU of rank {rank} failed, and the model with it")),
            "{after}"
        );
        drop(model);
        assert_eq!(nccl.log(), [""; 0], "each was given back once");
    }
}

#[test]
fn a_rank_that_panics_is_not_waited_for() {
    let driver = driver();
    let mut model = model(driver.nccl());
    let request = model.admit(200).unwrap();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        model.on_ranks(|rank, model| {
            assert!(rank == 0, "a bug");
            model.prefill(request, &prompt(100), go)
        })
    }));
    assert!(panicked.is_err());
    let after = model.admit(200).unwrap_err();
    assert!(matches!(after, Error::RankFailed { rank: 1, .. }), "{after}");
}

#[test]
fn what_cannot_be_shared_out_is_refused() {
    let driver = driver();
    let wanted = |gpus| GpuGroup::open(gpus).unwrap_err().to_string();
    assert_eq!(wanted(3), "3 GPUs asked for; this machine has 1 to 2");
    assert_eq!(wanted(0), "0 GPUs asked for; this machine has 1 to 2");
    let dense = kv(Dense::default());
    assert!(shards(&dense, 2).is_ok());
    let refused = shards(&dense, 3).unwrap_err().to_string();
    assert_eq!(refused, "kv_heads is 2, which 3 GPUs cannot share out evenly");
    let steady = |heads: &[usize]| {
        let rule = |kv_head: &usize| HeadRule { layer: None, kv_head: *kv_head };
        let rules = RowRules { dense_layers: 0, steady_heads: heads.iter().map(rule).collect() };
        shards(&kv(PerRow::new(Arc::new(Dense::default()), rules)), 2)
    };
    assert!(steady(&[0, 1]).is_ok());
    let unequal = steady(&[1]).unwrap_err();
    assert!(matches!(unequal, Error::UnequalRanks { rank: 1, found: LAYERS, expected: 0 }), "{unequal}");
    drop(driver);
}

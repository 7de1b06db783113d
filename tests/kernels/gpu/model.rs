//! A model's elementwise kernels against f64; and the emulator's bits where only arithmetic of known bits is used.

use libtest_mimic::Failed;
use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{Argmax, Embed, HeadNorms, Positions, RmsNorm, Rotate, Sample, Swiglu};
use spinkv_kernel_tests::model::{
    ArgmaxCase, EmbedCase, RmsNormCase, RotateCase, Rotated, SampleCase, SwigluCase,
};

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("embed::random_shapes", |machine| {
            machine.on_seeds(|seed| embed(machine, &EmbedCase::random(seed)))
        }),
        test("rms_norm::random_shapes", |machine| {
            machine.on_seeds(|seed| rms_norm(machine, &RmsNormCase::random(seed)))
        }),
        test("rotate::random_shapes", |machine| {
            machine.on_seeds(|seed| rotate(machine, &RotateCase::random(seed)).map(drop))
        }),
        test("rotate::same_bits_as_the_emulator", |machine| {
            for seed in 0..20 {
                let case = RotateCase::random(seed);
                let emulated = case.emulate(0).map_err(|fault| format!("seed {seed}: {fault}"))?;
                if rotate(machine, &case)? != emulated {
                    return Err(Failed::from(format!("seed {seed}: not the emulator's bits")));
                }
            }
            Ok(())
        }),
        test("swiglu::random_shapes", |machine| {
            machine.on_seeds(|seed| swiglu(machine, &SwigluCase::random(seed)))
        }),
        test("argmax::random_shapes", |machine| {
            machine.on_seeds(|seed| argmax(machine, &ArgmaxCase::random(seed)))
        }),
        test("sample::random_shapes", |machine| {
            machine.on_seeds(|seed| {
                sample(machine, &SampleCase::even(seed))?;
                sample(machine, &SampleCase::random(seed)).map(drop)
            })
        }),
        test("sample::large_vocabulary", |machine| {
            (0..16).try_for_each(|round| sample(machine, &SampleCase::large(machine.seed + round)).map(drop))
        }),
        test("sample::same_ids_as_the_emulator", |machine| {
            for seed in 0..20 {
                let case = SampleCase::random(seed);
                let emulated = case.emulate(0).map_err(|fault| format!("seed {seed}: {fault}"))?;
                if sample(machine, &case)? != emulated {
                    return Err(Failed::from(format!("seed {seed}: not the emulator's ids")));
                }
            }
            Ok(())
        }),
        test("argmax::large_vocabulary", |machine| {
            (0..8).try_for_each(|round| argmax(machine, &ArgmaxCase::large(machine.seed + round)))
        }),
    ]
}

fn embed(machine: &Machine, case: &EmbedCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let residual = DeviceBuffer::from_slice(stream, &case.residual())?;
    let launch = Embed {
        ids: &DeviceBuffer::from_slice(stream, &case.ids)?,
        tokens: case.ids.len() as u32,
        embedding: &DeviceBuffer::from_slice(stream, &case.embedding())?,
        hidden: case.hidden as u32,
        residual: &residual,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&residual.to_vec(stream)?)?)
}

fn rms_norm(machine: &Machine, case: &RmsNormCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let normed = DeviceBuffer::from_slice(stream, &case.normed())?;
    let launch = RmsNorm {
        residual: &DeviceBuffer::from_slice(stream, &case.residual)?,
        weight: &DeviceBuffer::from_slice(stream, &case.weight)?,
        first_token: case.first_token as u32,
        tokens: case.tokens as u32,
        eps: case.eps,
        normed: &normed,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&normed.to_vec(stream)?)?)
}

fn rotate(machine: &Machine, case: &RotateCase) -> Result<Rotated, Failed> {
    let Machine { stream, kernels, .. } = machine;
    let before = case.outputs();
    let queries = DeviceBuffer::from_slice(stream, &before.queries)?;
    let keys = DeviceBuffer::from_slice(stream, &before.keys)?;
    let values = DeviceBuffer::from_slice(stream, &before.values)?;
    let entries =
        case.entries.as_ref().map(|entries| DeviceBuffer::from_slice(stream, entries)).transpose()?;
    let norm =
        |of: usize| case.norms.as_ref().map(|norms| DeviceBuffer::from_slice(stream, &norms[of])).transpose();
    let (query_norm, key_norm) = (norm(0)?, norm(1)?);
    let launch = Rotate {
        projected: &DeviceBuffer::from_slice(stream, &case.projected())?,
        tokens: case.tokens as u32,
        query_heads: case.query_heads as u32,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        positions: entries.as_ref().map_or(Positions::From(case.first_position), Positions::Entries),
        frequencies: &DeviceBuffer::from_slice(stream, &case.frequencies)?,
        factor: case.factor,
        norms: query_norm.as_ref().zip(key_norm.as_ref()).map(|(queries, keys)| HeadNorms {
            queries,
            keys,
            eps: case.eps,
        }),
        queries: &queries,
        first_token: case.first_token as u32,
        keys: &keys,
        values: &values,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    let found = Rotated {
        queries: queries.to_vec(stream)?,
        keys: keys.to_vec(stream)?,
        values: values.to_vec(stream)?,
    };
    case.check(&found)?;
    Ok(found)
}

fn swiglu(machine: &Machine, case: &SwigluCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let activated = DeviceBuffer::from_slice(stream, &case.activated())?;
    let launch = Swiglu {
        gate_up: &DeviceBuffer::from_slice(stream, &case.gate_up())?,
        tokens: case.tokens as u32,
        width: case.width as u32,
        activated: &activated,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&activated.to_vec(stream)?)?)
}

fn argmax(machine: &Machine, case: &ArgmaxCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let logits = DeviceBuffer::from_slice(stream, &case.logits)?;
    let greatest = DeviceBuffer::<u64>::zeroed(stream, case.batch)?;
    let arrivals = DeviceBuffer::<u32>::zeroed(stream, case.batch)?;
    // Twice: the second time on what the first left of the scratch.
    for _ in 0..2 {
        let ids = DeviceBuffer::<u32>::zeroed(stream, case.batch)?;
        let launch = Argmax {
            logits: &logits,
            batch: case.batch as u32,
            vocab: case.vocab as u32,
            stride: case.stride as u32,
            greatest: &greatest,
            arrivals: &arrivals,
            ids: &ids,
        };
        // SAFETY: the scratch is 0 at first and after each launch; nothing else uses the buffers.
        unsafe { launch.launch(kernels, stream)? };
        case.check(&ids.to_vec(stream)?)?;
    }
    Ok(())
}

fn sample(machine: &Machine, case: &SampleCase) -> Result<Vec<u32>, Failed> {
    let Machine { stream, kernels, .. } = machine;
    let ids = DeviceBuffer::<u32>::zeroed(stream, case.batch())?;
    let launch = Sample {
        logits: &DeviceBuffer::from_slice(stream, &case.logits)?,
        batch: case.batch() as u32,
        vocab: case.vocab as u32,
        stride: case.stride as u32,
        params: &DeviceBuffer::from_slice(stream, &case.params)?,
        ids: &ids,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    let ids = ids.to_vec(stream)?;
    case.check(&ids)?;
    Ok(ids)
}

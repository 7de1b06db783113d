//! Attention against f64.

use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::Attend;
use spinkv_kernel_tests::attend::AttendCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("attend::random_shapes", |machine| {
            machine.on_seeds(|seed| attend(machine, &AttendCase::random(seed)))
        }),
        test("attend::long_contexts", |machine| {
            (0..8).try_for_each(|round| attend(machine, &AttendCase::large(machine.seed + round)))
        }),
    ]
}

fn attend(machine: &Machine, case: &AttendCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let biases = if case.biases.is_empty() { &[0.0][..] } else { &case.biases };
    let biases = DeviceBuffer::from_slice(stream, biases)?;
    let steady = if case.steady.is_empty() { &[0][..] } else { &case.steady };
    let arrivals = DeviceBuffer::<u32>::zeroed(stream, case.units())?;
    let outputs = DeviceBuffer::from_slice(stream, &case.outputs())?;
    let lse = DeviceBuffer::from_slice(stream, &case.lse())?;
    let launch = Attend {
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        kv_heads: case.kv_heads as u32,
        group: case.group as u32,
        layer: case.layer as u32,
        head_words: case.head_words as u32,
        pages: &DeviceBuffer::from_slice(stream, &case.pages)?,
        page_counts: &DeviceBuffer::from_slice(stream, &case.page_counts)?,
        steady: &DeviceBuffer::from_slice(stream, steady)?,
        biases: (!case.biases.is_empty()).then_some(&biases),
        pool: &DeviceBuffer::from_slice(stream, &case.pool)?,
        page_tokens: case.page_tokens as u32,
        queries: &DeviceBuffer::from_slice(stream, &case.queries)?,
        scale: case.scale,
        awaited: None,
        splits: case.splits as u32,
        partials: &DeviceBuffer::from_slice(stream, &vec![spinkv_kernel_tests::POISON; case.partials()])?,
        arrivals: &arrivals,
        outputs: &outputs,
        lse: &lse,
    };
    // SAFETY: the case's lists name pages of its pool; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    case.check(&outputs.to_vec(stream)?, &lse.to_vec(stream)?)?;
    match arrivals.to_vec(stream)?.iter().position(|count| *count != 0) {
        Some(unit) => Err(format!("unit {unit}: arrivals are not 0 again").into()),
        None => Ok(()),
    }
}

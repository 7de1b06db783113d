//! Every kernel against its CPU reference on random ragged shapes; outputs hold poison before.

use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena, PtxArch};
use spinkv::backend::cuda::kernels::{Gather, GatherVariant};
use spinkv_kernel_tests::gather::GatherCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("gather::random_shapes", |machine| {
            machine.on_seeds(|seed| gather(machine, GatherVariant::ZeroCopy, &GatherCase::random(seed)))
        }),
        test("gather::thousands_of_pages", |machine| {
            gather(machine, GatherVariant::ZeroCopy, &GatherCase::large(machine.seed))
        }),
        test("gather_coded::random_shapes", |machine| {
            machine.on_seeds(|seed| gather(machine, GatherVariant::Coded, &GatherCase::coded(seed)))
        }),
        test("gather_coded::thousands_of_pages", |machine| {
            gather(machine, GatherVariant::Coded, &GatherCase::large_coded(machine.seed))
        }),
        test("gather_bulk::random_shapes", |machine| {
            machine.on_seeds(|seed| gather(machine, GatherVariant::Bulk, &GatherCase::random(seed)))
        }),
        test("gather_bulk::pages_of_several_stages", |machine| {
            gather(machine, GatherVariant::Bulk, &GatherCase::ring())
        }),
        test("gather_bulk::thousands_of_pages", |machine| {
            gather(machine, GatherVariant::Bulk, &GatherCase::large(machine.seed))
        }),
        test("no_kernel_uses_local_memory", |machine| {
            for function in machine.kernels.functions() {
                let attributes = function.attributes();
                if attributes.local_bytes != 0 {
                    return Err(format!("{}: {attributes:?}", function.name()).into());
                }
            }
            Ok(())
        }),
    ]
}

fn gather(machine: &Machine, variant: GatherVariant, case: &GatherCase) -> Outcome {
    let Machine { context, stream, kernels, .. } = machine;
    if variant == GatherVariant::Bulk && context.device().ptx_arch()? == PtxArch::Sm80 {
        println!("skipped: the PTX for this GPU has no gather_bulk");
        return Ok(());
    }
    let bytes: &[u8] = bytemuck::cast_slice(&case.host_pages);
    let mut arena = PinnedArena::reserve(context, bytes.len(), |_| {})?;
    arena.write(0, bytes)?;
    let pool = DeviceBuffer::from_slice(stream, &case.pool())?;
    let arrived = DeviceBuffer::zeroed(stream, case.counts.len())?;
    let launch = Gather {
        copies: &DeviceBuffer::from_slice(stream, &case.copies)?,
        counts: &DeviceBuffer::from_slice(stream, &case.counts)?,
        host_pages: &arena,
        device_pages: &pool,
        page_words: case.page_words as u32,
        device_words: case.device_words as u32,
        code: case.code,
        blocks: case.grid,
        arrived: Some(&arrived),
    };
    // SAFETY: the case names pages that exist, each pool page once; nothing else uses them.
    unsafe { launch.launch_as(variant, kernels, stream)? };
    Ok(case.check(&pool.to_vec(stream)?, &arrived.to_vec(stream)?)?)
}

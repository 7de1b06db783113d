//! Keys in low rank against f64 and the CPU's; and the emulator's bits where only arithmetic of known bits is used.

use libtest_mimic::Failed;
use spinkv::backend::cuda::driver::DeviceBuffer;
use spinkv::backend::cuda::kernels::{
    BasisScratch, CompleteBasis, Gram, InverseFactor, LowRankBasis, ProjectKeys, RebuildKeys, RowProduct,
    Unrotate, Weights,
};
use spinkv_kernel_tests::low_rank::{
    Basis, BasisCase, CompleteCase, FactorCase, GramCase, ProductCase, ProjectCase, Projected, RebuildCase,
    UnrotateCase,
};

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("unrotate::random_shapes", |machine| {
            machine.on_seeds(|seed| unrotate(machine, &UnrotateCase::random(seed)).map(drop))
        }),
        test("unrotate::same_bits_as_the_emulator", |machine| {
            for seed in 0..20 {
                let case = UnrotateCase::random(seed);
                let emulated = case.emulate(0).map_err(|fault| format!("seed {seed}: {fault}"))?;
                if unrotate(machine, &case)? != emulated {
                    return Err(Failed::from(format!("seed {seed}: not the emulator's bits")));
                }
            }
            Ok(())
        }),
        test("gram::random_shapes", |machine| {
            machine.on_seeds(|seed| gram(machine, &GramCase::random(seed)))
        }),
        test("gram::long_and_wide", |machine| {
            gram(machine, &GramCase::long(machine.seed))?;
            gram(machine, &GramCase::large(machine.seed))
        }),
        test("row_products::random_shapes", |machine| {
            machine.on_seeds(|seed| product(machine, &ProductCase::random(seed)))
        }),
        test("row_products::of_an_iteration", |machine| {
            (0..4).try_for_each(|round| product(machine, &ProductCase::large(machine.seed + round)))
        }),
        test("inverse_factor::random_vectors", |machine| {
            machine.on_seeds(|seed| factor(machine, &FactorCase::random(seed)))
        }),
        test("inverse_factor::large_ranks", |machine| {
            [96, 160, 224]
                .into_iter()
                .try_for_each(|rank| factor(machine, &FactorCase::large(machine.seed, rank)))
        }),
        test("complete_basis::random_rows", |machine| {
            machine.on_seeds(|seed| complete(machine, &CompleteCase::random(seed)))
        }),
        test("complete_basis::of_a_short_prompt", |machine| {
            complete(machine, &CompleteCase::wide())?;
            complete(machine, &CompleteCase::large(machine.seed))
        }),
        test("project_keys::random_entries", |machine| {
            machine.on_seeds(|seed| project(machine, &ProjectCase::random(seed)))
        }),
        test("project_keys::of_a_batch", |machine| {
            (0..4).try_for_each(|round| project(machine, &ProjectCase::large(machine.seed + round)))
        }),
        test("low_rank_basis::random_keys", |machine| {
            machine.on_seeds(|seed| basis(machine, &BasisCase::random(seed)).map(drop))
        }),
        test("low_rank_basis::of_a_layer", |machine| {
            for round in 0..3 {
                let case = BasisCase::large(machine.seed + round);
                let (first, again) = (basis(machine, &case)?, basis(machine, &case)?);
                if first != again {
                    return Err(Failed::from("not the same bits each time"));
                }
            }
            Ok(())
        }),
        test("rebuild_keys::random_lists", |machine| {
            machine.on_seeds(|seed| rebuild(machine, &RebuildCase::random(seed)))
        }),
        test("rebuild_keys::of_a_batch", |machine| {
            (0..4).try_for_each(|round| rebuild(machine, &RebuildCase::large(machine.seed + round)))
        }),
    ]
}

fn unrotate(machine: &Machine, case: &UnrotateCase) -> Result<Vec<u128>, Failed> {
    let Machine { stream, kernels, .. } = machine;
    let plain = DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.plain()))?;
    let launch = Unrotate {
        keys: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.keys))?,
        tokens: case.tokens as u32,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        first_position: case.first_position,
        frequencies: &DeviceBuffer::from_slice(stream, &case.frequencies)?,
        magnitude: case.magnitude,
        plain: &plain,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    let plain = bytemuck::pod_collect_to_vec(&plain.to_vec(stream)?);
    case.check(&plain)?;
    Ok(plain)
}

fn gram(machine: &Machine, case: &GramCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let (tokens, width) = (case.tokens as u32, case.width as u32);
    let gram = DeviceBuffer::from_slice(stream, &case.gram())?;
    let sums = DeviceBuffer::zeroed(stream, Gram::sums(kernels, width))?;
    sums.fill_bytes(stream, 0..sums.len(), 0xff)?;
    let keys = DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.keys))?;
    // SAFETY: nothing else uses the buffers.
    unsafe { Gram { keys: &keys, tokens, width, sums: &sums, gram: &gram }.launch(kernels, stream)? };
    Ok(case.check(&gram.to_vec(stream)?)?)
}

fn product(machine: &Machine, case: &ProductCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let all = DeviceBuffer::from_slice(stream, &case.out())?;
    let launch = RowProduct {
        a: &DeviceBuffer::from_slice(stream, &case.a)?,
        b: &DeviceBuffer::from_slice(stream, &case.b)?,
        weights: if case.sums { Weights::Sums } else { Weights::Dots },
        rows: case.rows as u32,
        columns: case.columns as u32,
        inner: case.inner as u32,
        out: &all.part(0..case.rows * case.columns)?,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&all.to_vec(stream)?)?)
}

fn factor(machine: &Machine, case: &FactorCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let factor = DeviceBuffer::from_slice(stream, &case.factor())?;
    let products = DeviceBuffer::from_slice(stream, &case.products)?;
    let (rank, small) = (case.rank as u32, case.small);
    // SAFETY: nothing else uses the buffers.
    unsafe { InverseFactor { products: &products, rank, small, factor: &factor }.launch(kernels, stream)? };
    Ok(case.check(&factor.to_vec(stream)?)?)
}

fn complete(machine: &Machine, case: &CompleteCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let vectors = DeviceBuffer::from_slice(stream, &case.vectors)?;
    let (rank, width) = (case.rank as u32, case.width as u32);
    // SAFETY: nothing else uses the vectors.
    unsafe { CompleteBasis { vectors: &vectors, rank, width }.launch(kernels, stream)? };
    Ok(case.check(&vectors.to_vec(stream)?)?)
}

fn project(machine: &Machine, case: &ProjectCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let before = case.before();
    let coefficients = DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&before.coefficients))?;
    let copies = DeviceBuffer::from_slice(stream, &before.copies)?;
    let keys = DeviceBuffer::from_slice(stream, &before.keys)?;
    let counts = DeviceBuffer::from_slice(stream, &before.counts)?;
    let launch = ProjectKeys {
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        steady: &DeviceBuffer::from_slice(stream, &case.steady)?,
        pool: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.pool))?,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        layer: case.layer as u32,
        layers: case.layers as u32,
        page_tokens: case.page_tokens as u32,
        frequencies: &DeviceBuffer::from_slice(stream, &case.frequencies)?,
        magnitude: case.magnitude,
        bases: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.bases))?,
        rank: 8 * case.rank_words as u32,
        directories: &DeviceBuffer::from_slice(stream, &case.directories)?,
        coefficients: &coefficients,
        copies: &copies,
        copy_keys: &keys,
        counts: &counts,
    };
    // SAFETY: entries' leaving pages are steady, within the pool, and as many as lists have room for; nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&Projected {
        coefficients: bytemuck::pod_collect_to_vec(&coefficients.to_vec(stream)?),
        copies: copies.to_vec(stream)?,
        keys: keys.to_vec(stream)?,
        counts: counts.to_vec(stream)?,
    })?)
}

fn basis(machine: &Machine, case: &BasisCase) -> Result<Basis, Failed> {
    let Machine { stream, kernels, .. } = machine;
    let before = case.basis();
    let rows = DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&before.rows))?;
    let bases = DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&before.bases))?;
    let launch = LowRankBasis {
        keys: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.keys))?,
        tokens: case.tokens as u32,
        scratch: &BasisScratch::new(kernels, stream, case.rank as u32, case.width as u32)?,
        rows: &rows,
        place: case.place as u32,
        bases: &bases,
    };
    // SAFETY: nothing else uses the buffers.
    unsafe { launch.launch(kernels, stream)? };
    let words = |buffer: &DeviceBuffer<_>| -> Result<Vec<u128>, Failed> {
        Ok(bytemuck::pod_collect_to_vec(&buffer.to_vec(stream)?))
    };
    let basis = Basis { rows: words(&rows)?, bases: words(&bases)? };
    case.check(&basis)?;
    Ok(basis)
}

fn rebuild(machine: &Machine, case: &RebuildCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let pool = DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.pool()))?;
    let launch = RebuildKeys {
        copies: &DeviceBuffer::from_slice(stream, &case.copies)?,
        copy_keys: &DeviceBuffer::from_slice(stream, &case.copy_keys)?,
        counts: &DeviceBuffer::from_slice(stream, &case.counts)?,
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        layer: case.layer as u32,
        layers: case.layers as u32,
        directories: &DeviceBuffer::from_slice(stream, &case.directories)?,
        coefficients: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.coefficients))?,
        rank: 8 * case.rank_words as u32,
        bases: &DeviceBuffer::from_slice(stream, bytemuck::cast_slice(&case.bases))?,
        frequencies: &DeviceBuffer::from_slice(stream, &case.frequencies)?,
        magnitude: case.magnitude,
        page_tokens: case.page_tokens as u32,
        pool: &pool,
        blocks: case.blocks,
    };
    // SAFETY: lists name pages of the pool, each once, whose segments are in the directories.
    unsafe { launch.launch(kernels, stream)? };
    Ok(case.check(&bytemuck::pod_collect_to_vec(&pool.to_vec(stream)?))?)
}

//! Offload against its CPU reference; the host's pages are pinned memory.

use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena};
use spinkv::backend::cuda::kernels::{Append, OffloadPages, StorePrompt, ValidBits, WriteBack};
use spinkv::memory::Word;
use spinkv_kernel_tests::offload::{OffloadCase, Pages};
use spinkv_kernel_tests::write_back::WriteBackCase;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![
        test("append::random_shapes", |machine| {
            machine.on_seeds(|seed| offload(machine, &OffloadCase::append(seed)))
        }),
        test("store_prompt::random_shapes", |machine| {
            machine.on_seeds(|seed| offload(machine, &OffloadCase::prompts(seed)))
        }),
        test("store_prompt::long_prompts", |machine| {
            offload(machine, &OffloadCase::large_prompts(machine.seed))
        }),
        test("write_back::random_shapes", |machine| {
            machine.on_seeds(|seed| write_back(machine, &WriteBackCase::random(seed)))
        }),
        test("write_back::thousands_of_pages", |machine| {
            write_back(machine, &WriteBackCase::large(machine.seed))
        }),
    ]
}

/// Pinned memory that holds `words`, and at least `least` of them.
fn arena(machine: &Machine, words: &[u128], least: usize) -> Result<PinnedArena, libtest_mimic::Failed> {
    let bytes: &[u8] = bytemuck::cast_slice(words);
    let mut arena = PinnedArena::reserve(&machine.context, bytes.len().max(16 * least), |_| {})?;
    arena.write(0, bytes)?;
    Ok(arena)
}

/// The first `words` words of an arena, once the stream's work is done.
fn contents(arena: &PinnedArena, words: usize) -> Result<Vec<u128>, libtest_mimic::Failed> {
    let mut contents = vec![0_u128; words];
    arena.read(0, bytemuck::cast_slice_mut(&mut contents))?;
    Ok(contents)
}

fn offload(machine: &Machine, case: &OffloadCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let page_words = 2 * case.page_tokens * case.head_words;
    // A batch may write no page at all; a launch wants room for one.
    let padded = |words: &[u128], least: usize| {
        let mut words = words.to_vec();
        words.resize(words.len().max(least), 0);
        words
    };
    let table = |places: &[u32]| if places.is_empty() { vec![0] } else { places.to_vec() };
    let pool = DeviceBuffer::<Word>::from_slice(stream, &padded(&case.before.pool, page_words))?;
    let host_pages = arena(machine, &case.before.host_pages, 16 * page_words)?;
    let host_valid = DeviceBuffer::from_slice(stream, &table(&case.before.host_valid))?;
    let pages = OffloadPages {
        entries: &DeviceBuffer::from_slice(stream, &case.entries)?,
        steady: &DeviceBuffer::from_slice(stream, &table(&case.steady))?,
        pool: &pool,
        host_slabs: &DeviceBuffer::from_slice(stream, &table(&case.host_slabs))?,
        host_valid: &host_valid,
        host_pages: &host_pages,
        first_row: case.first_row as u32,
        kv_heads: case.kv_heads as u32,
        head_words: case.head_words as u32,
        page_tokens: case.page_tokens as u32,
        on_host: case.on_host,
        host_words: case.host_words() as u32,
        code: case.host().code(),
    };
    let keys = DeviceBuffer::<Word>::from_slice(stream, &padded(&case.keys, 1))?;
    let values = DeviceBuffer::<Word>::from_slice(stream, &padded(&case.values, 1))?;
    if case.is_prompt() {
        let launch = StorePrompt {
            pages,
            keys: &keys,
            values: &values,
            first_token: &DeviceBuffer::from_slice(stream, &case.first_token)?,
            first_page: &DeviceBuffer::from_slice(stream, &case.first_page)?,
            batch_pages: *case.first_page.last().unwrap(),
            blocks: case.grid,
        };
        // SAFETY: the case's tables name pages that exist, each once; nothing else uses them.
        unsafe { launch.launch(kernels, stream)? };
    } else {
        // SAFETY: as above.
        unsafe { Append { pages, keys: &keys, values: &values }.launch(kernels, stream)? };
    }
    // Reading the pool waits for the stream, and so for the host's pages.
    let mut found = Pages {
        pool: pool.to_vec(stream)?,
        host_pages: contents(&host_pages, case.before.host_pages.len())?,
        host_valid: host_valid.to_vec(stream)?,
    };
    found.pool.truncate(case.before.pool.len());
    found.host_valid.truncate(case.before.host_valid.len());
    Ok(case.check(&found)?)
}

fn write_back(machine: &Machine, case: &WriteBackCase) -> Outcome {
    let Machine { stream, kernels, .. } = machine;
    let host_pages = arena(machine, &case.host(), 1)?;
    let host_valid = DeviceBuffer::from_slice(stream, &case.host_valid)?;
    let places = case.places.as_ref().map(|places| DeviceBuffer::from_slice(stream, places)).transpose()?;
    let launch = WriteBack {
        copies: &DeviceBuffer::from_slice(stream, &case.copies)?,
        count: &DeviceBuffer::from_slice(stream, &[case.count])?,
        device_pages: &DeviceBuffer::from_slice(stream, &case.pool)?,
        host_pages: &host_pages,
        page_words: case.page_words as u32,
        valid: places.as_ref().map(|places| ValidBits { places, host_valid: &host_valid }),
        blocks: case.grid,
    };
    // SAFETY: the case names pages that exist, each host page once; nothing else uses them.
    unsafe { launch.launch(kernels, stream)? };
    let bits = host_valid.to_vec(stream)?;
    Ok(case.check(&contents(&host_pages, case.host().len())?, &bits)?)
}

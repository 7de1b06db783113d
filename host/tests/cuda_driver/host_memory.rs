//! Pinned memory as the host tier of the memory manager.

use spinkv::Error;
use spinkv::backend::cuda::driver::PinnedArena;
use spinkv::memory::{
    HostArena, HostMemory, HostPage, HostProgress, KvDtype, PageLayout, SLAB_PAGES, SlabId, Word,
};

use super::driver;

/// Pages of 4 KiB: a slab has 64 KiB.
fn layout() -> PageLayout {
    PageLayout::new(8, 128, KvDtype::Bf16).unwrap()
}

const SLAB_BYTES: usize = 64 << 10;
const MIB: usize = 1 << 20;

#[test]
fn every_page_lies_where_kernels_compute_it() {
    let driver = driver();
    let (context, _) = driver.open();
    let memory = PinnedArena::with_capacity(&context, 16 * MIB).unwrap();
    let base = memory.device_address();
    assert_eq!(driver.log(), [""; 0], "addresses cost nothing");
    let mut arena = HostArena::new(layout(), 2, None, memory);
    // Extensions of 2, 2 and 40 slabs; the second lies in what was pinned with the first.
    let mut slabs: Vec<SlabId> = arena.take(0, 1).unwrap();
    slabs.extend(arena.take(0, 1).unwrap());
    slabs.extend(arena.take(1, 22).unwrap());
    assert_eq!(driver.log(), ["register 2097152 flags 3", "register 2097152 flags 3"]);
    for (number, slab) in slabs.iter().enumerate() {
        for index in 0..SLAB_PAGES {
            let words = vec![(number * SLAB_PAGES + index) as Word + 1; layout().page_words()];
            arena.write(HostPage { slab: *slab, index }, &words);
        }
    }
    assert_eq!(arena.memory().device_address(), base, "growing moves nothing");
    let mut found = Vec::new();
    for page in 0..arena.memory().len() / layout().page_bytes() {
        // SAFETY: a page within the arena, which nothing writes meanwhile. On the stand-in's GPU the address is the same.
        found.push(unsafe { *((base as usize + page * layout().page_bytes()) as *const Word) });
    }
    let mut words = vec![0; layout().page_words()];
    for (number, slab) in slabs.iter().enumerate() {
        for index in 0..SLAB_PAGES {
            let mark = (number * SLAB_PAGES + index) as Word + 1;
            let page = HostPage { slab: *slab, index };
            assert_eq!(found[arena.first_word(page) / layout().page_words()], mark);
            arena.read(page, &mut words);
            assert!(words.iter().all(|word| *word == mark));
        }
    }
    drop(arena);
    assert_eq!(driver.log(), ["synchronize", "unregister", "unregister"]);
}

#[test]
fn reserving_tells_of_each_chunk() {
    let driver = driver();
    let (context, _) = driver.open();
    let memory = PinnedArena::with_capacity(&context, 400 * MIB).unwrap();
    let mut arena = HostArena::new(layout(), 2, None, memory);
    let mut seen = Vec::new();
    let slabs = 300 * MIB / SLAB_BYTES / 2;
    arena.reserve(slabs, &mut |progress| seen.push(progress)).unwrap();
    let total_bytes = (300 * MIB) as u64;
    let steps = [(256 * MIB) as u64, total_bytes];
    assert_eq!(seen, steps.map(|ready_bytes| HostProgress { ready_bytes, total_bytes }));
    assert_eq!(driver.log(), ["register 268435456 flags 3", "register 46137344 flags 3"]);
    arena.take(1, slabs).unwrap();
    assert_eq!(driver.log(), [""; 0], "what was reserved is there");
}

#[test]
fn a_refusal_is_the_memory_managers_error_and_changes_nothing() {
    let driver = driver();
    let (context, _) = driver.open();
    // The stand-in refuses a last chunk of this length.
    const CAPACITY: usize = 258 * MIB + 4096 + 13;
    let mut memory = PinnedArena::with_capacity(&context, CAPACITY).unwrap();
    memory.extend(16, &mut |_| {}).unwrap();
    let before = (memory.len(), memory.device_address());
    driver.log();

    let bytes = 258 * MIB;
    let refused = memory.extend(bytes / size_of::<Word>(), &mut |_| {}).unwrap_err();
    let what = || "pinned host KV pages".to_owned();
    assert_eq!(refused, Error::AllocationFailed { what: what(), bytes: bytes as u64 });
    assert_eq!((memory.len(), memory.device_address()), before);
    assert_eq!(driver.log(), ["register 268435456 flags 3", "unregister"]);
    let needed = 258 * MIB + 4096;
    let refused = memory.extend(needed / size_of::<Word>(), &mut |_| {}).unwrap_err();
    let (needed, free, limit) = (needed as u64, (CAPACITY - 256) as u64, CAPACITY as u64);
    assert_eq!(refused, Error::OutOfHostMemory { what: what(), needed, free, limit });
    assert_eq!(driver.log(), [""; 0]);

    // What is there goes on, and less can still be had.
    let mut back = [1; 16];
    HostMemory::read(&memory, 0, &mut back);
    assert_eq!(back, [0; 16]);
    memory.extend(MIB / size_of::<Word>(), &mut |_| {}).unwrap();
    HostMemory::write(&mut memory, 16, &[7; 16]);
    HostMemory::read(&memory, 16, &mut back);
    assert_eq!(back, [7; 16]);
}

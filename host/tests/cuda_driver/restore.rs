//! What a restore gives to the copy engine.

use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena, Stream};
use spinkv::backend::cuda::{Restore, Restored};
use spinkv::memory::Word;
use spinkv_kernels::abi::PageCopy;

use super::driver;

const PAGE_WORDS: usize = 4;

fn copies(pairs: &[(u32, u32)]) -> Vec<PageCopy> {
    pairs.iter().map(|&(host_page, device_page)| PageCopy { host_page, device_page }).collect()
}

#[test]
fn runs_are_copied_and_pages_out_of_range_refused_before_any() {
    let driver = driver();
    let (context, stream) = driver.open();
    let mut arena = PinnedArena::reserve(&context, 8 * PAGE_WORDS * size_of::<Word>(), |_| {}).unwrap();
    let words: Vec<Word> = (0..8 * PAGE_WORDS).map(|word| word as Word + 1).collect();
    arena.write(0, bytemuck::cast_slice(&words)).unwrap();
    let pool = DeviceBuffer::<Word>::zeroed(&stream, 6 * PAGE_WORDS + 3).unwrap();
    let restore = Restore { host_pages: &arena, device_pages: &pool, page_words: PAGE_WORDS };
    driver.log();

    let range = |what, start, limit| Err(DriverError::OutOfRange { what, start, len: 1, limit });
    let host = restore.enqueue(&copies(&[(1, 1), (8, 2)]), &stream);
    assert_eq!(host, range("restore host page", 8, 8));
    let device = restore.enqueue(&copies(&[(1, 1), (2, 6)]), &stream);
    assert_eq!(device, range("restore device page", 6, 6), "a part of a page is none");
    let no_words = Restore { page_words: 0, ..restore }.enqueue(&[], &stream);
    let max = u32::MAX.into();
    assert_eq!(no_words, Err(DriverError::Operand { what: "restore page_words", value: 0, min: 1, max }));
    assert_eq!(driver.log(), [""; 0], "nothing was copied");
    assert_eq!(restore.enqueue(&[], &stream), Ok(Restored::default()));
    assert_eq!(driver.log(), [""; 0], "nothing to copy");

    let list = copies(&[(7, 0), (3, 3), (2, 2), (5, 5), (4, 4)]);
    let restored = restore.enqueue(&list, &stream).unwrap();
    assert_eq!(restored, Restored { runs: 2, bytes: 5 * 64 });
    assert_eq!(driver.log(), ["copy 256", "copy 64"], "no call waits");
    check(&pool, &stream, &list);
}

fn check(pool: &DeviceBuffer<Word>, stream: &Stream, list: &[PageCopy]) {
    let found = pool.to_vec(stream).unwrap();
    for (word, found) in found.iter().enumerate() {
        let copy = list.iter().find(|copy| copy.device_page as usize == word / PAGE_WORDS);
        let expected = copy.map_or(0, |copy| copy.host_page as usize * PAGE_WORDS + word % PAGE_WORDS + 1);
        assert_eq!(*found, expected as Word, "word {word}");
    }
}

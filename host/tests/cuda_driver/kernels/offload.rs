use spinkv::backend::cuda::driver::{DeviceBuffer, PinnedArena};
use spinkv::backend::cuda::kernels::{Append, Kernels, OffloadPages, StorePrompt, ValidBits, WriteBack};
use spinkv_kernels::abi::page_code::PageCode;
use spinkv_kernels::abi::{Entry, PageCopy, WORD_BYTES, append, store_prompt, write_back};

use super::{ANY, length, operand, short};
use crate::driver;

#[test]
fn offloads_are_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::zeroed(&stream, len).unwrap();
    let (steady, slabs, valid, first_token, first_page) = (table(9), table(6), table(6), table(2), table(3));
    let entries = |count| DeviceBuffer::from_slice(&stream, &vec![Entry::default(); count]).unwrap();
    let (entries, no_entries, keys, values, long) = (entries(2), entries(0), words(24), words(24), words(32));
    // Pages of 4 tokens of 2 heads of 6 words: 48 words, 768 in a slab.
    let pool = words(48);
    let host_pages = PinnedArena::reserve(&context, 768 * WORD_BYTES, |_| {}).unwrap();
    let pages = OffloadPages {
        entries: &entries,
        steady: &steady,
        pool: &pool,
        host_slabs: &slabs,
        host_valid: &valid,
        host_pages: &host_pages,
        first_row: 2,
        kv_heads: 2,
        head_words: 6,
        page_tokens: 4,
        on_host: true,
        host_words: 48,
        code: None,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let append = |append: Append<'_>| unsafe { append.launch(&kernels, &stream) };
    // SAFETY: as above.
    let store = |prompt: StorePrompt<'_>| unsafe { prompt.launch(&kernels, &stream) };
    let right = Append { pages, keys: &keys, values: &values };
    let prompt = StorePrompt {
        pages,
        keys: &keys,
        values: &values,
        first_token: &first_token,
        first_page: &first_page,
        batch_pages: 7,
        blocks: 3,
    };

    for (what, pages) in [
        ("offload requests", OffloadPages { entries: &no_entries, ..pages }),
        ("offload kv_heads", OffloadPages { kv_heads: 0, ..pages }),
        ("offload head_words", OffloadPages { head_words: 0, ..pages }),
        ("offload page_tokens", OffloadPages { page_tokens: 0, ..pages }),
    ] {
        assert_eq!(append(Append { pages, ..right }), Err(operand(what, 0, 1, ANY)));
        assert_eq!(store(StorePrompt { pages, ..prompt }), Err(operand(what, 0, 1, ANY)));
    }
    let other_bits = OffloadPages { host_valid: &steady, ..pages };
    assert_eq!(append(Append { pages: other_bits, ..right }), Err(length("offload host_valid", 6, 9)));
    let wide = OffloadPages { page_tokens: 1 << 30, ..pages };
    let refused = operand("offload page words", 12 << 30, 2, 1 << 31);
    assert_eq!(append(Append { pages: wide, ..right }), Err(refused));
    let no_page = OffloadPages { page_tokens: 5, ..pages };
    assert_eq!(append(Append { pages: no_page, ..right }), Err(short("offload pool words", 60, 48)));
    for host_words in [0, 49] {
        let refused = operand("offload host_words", host_words.into(), 1, 48);
        assert_eq!(append(Append { pages: OffloadPages { host_words, ..pages }, ..right }), Err(refused));
    }
    let code = Some(PageCode::Int8);
    let refused = operand("offload host_words", 48, 25, 25);
    assert_eq!(append(Append { pages: OffloadPages { code, ..pages }, ..right }), Err(refused));
    let odd = OffloadPages { code, head_words: 5, host_words: 21, ..pages };
    assert_eq!(append(Append { pages: odd, ..right }), Err(operand("offload head_words % 2", 1, 0, 0)));
    let no_slab = OffloadPages { page_tokens: 5, host_words: 60, pool: &words(60), ..pages };
    driver.log();
    assert_eq!(append(Append { pages: no_slab, ..right }), Err(short("offload arena words", 960, 768)));
    assert_eq!(append(Append { keys: &long, ..right }), Err(length("append keys", 24, 32)));
    assert_eq!(append(Append { values: &long, ..right }), Err(length("append values", 24, 32)));
    let rows = append(Append { pages: OffloadPages { kv_heads: u32::MAX, ..pages }, ..right });
    let max = append::MAX_ROWS.into();
    assert_eq!(rows, Err(operand("append requests * kv_heads", 2 * ANY, 1, max)));

    let other = store(StorePrompt { values: &long, ..prompt });
    assert_eq!(other, Err(length("store_prompt values", 24, 32)));
    let tokens = store(StorePrompt { first_token: &first_page, ..prompt });
    assert_eq!(tokens, Err(length("store_prompt first_token", 2, 3)));
    let firsts = store(StorePrompt { first_page: &first_token, ..prompt });
    assert_eq!(firsts, Err(length("store_prompt first_page", 3, 2)));
    let max = store_prompt::MAX_BLOCKS;
    for blocks in [0, max + 1] {
        let refused = operand("store_prompt blocks", blocks.into(), 1, max.into());
        assert_eq!(store(StorePrompt { blocks, ..prompt }), Err(refused));
    }
    let max = store_prompt::MAX_PAGES.into();
    let many = store(StorePrompt { batch_pages: u32::MAX, ..prompt });
    assert_eq!(many, Err(operand("store_prompt pages * kv_heads", 2 * ANY, 0, max)));
    assert_eq!(driver.log().iter().filter(|line| line.starts_with("launch")).count(), 0);

    append(right).unwrap();
    let [steady, slabs, valid] = [&steady, &slabs, &valid].map(DeviceBuffer::address);
    let [token, page] = [&first_token, &first_page].map(DeviceBuffer::address);
    let [keys, values, pool] = [&keys, &values, &pool].map(DeviceBuffer::address);
    let entries = entries.address();
    let host = host_pages.device_address();
    let places = format!("{steady:#x} {pool:#x} {slabs:#x} {valid:#x} {host:#x}");
    let parameters = format!("{entries:#x} {keys:#x} {values:#x} {places} 2 2 2 6 4 1 48 0");
    assert_eq!(driver.log(), [format!("overlapping launch append 1 1 1, 128 1 1, 0: {parameters}")]);
    store(prompt).unwrap();
    let parameters =
        format!("{keys:#x} {values:#x} {entries:#x} {token:#x} {page:#x} {places} 2 2 2 6 4 1 48 0");
    assert_eq!(driver.log(), [format!("launch store_prompt 3 1 1, 256 1 1, 0: {parameters}")]);
    let coded = OffloadPages { code, host_words: 25, ..pages };
    append(Append { pages: coded, ..right }).unwrap();
    store(StorePrompt { pages: coded, ..prompt }).unwrap();
    assert!(driver.log().iter().all(|line| line.ends_with(" 25 2")), "whole numbers are code 2");
    store(StorePrompt { batch_pages: 0, ..prompt }).unwrap();
    assert_eq!(driver.log(), [""; 0], "no page, no launch");
}

#[test]
fn a_write_back_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let copies = DeviceBuffer::from_slice(&stream, &[PageCopy::default(); 3]).unwrap();
    let (count, places, two_places, host_valid) = (table(1), table(3), table(2), table(5));
    let host_pages = PinnedArena::reserve(&context, 4 * 16 * WORD_BYTES, |_| {}).unwrap();
    let device_pages = DeviceBuffer::zeroed(&stream, 2 * 16).unwrap();
    let bits = ValidBits { places: &places, host_valid: &host_valid };
    let right = WriteBack {
        copies: &copies,
        count: &count,
        device_pages: &device_pages,
        host_pages: &host_pages,
        page_words: 16,
        valid: Some(bits),
        blocks: 4,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |write_back: WriteBack<'_>| unsafe { write_back.launch(&kernels, &stream) };

    assert_eq!(launch(WriteBack { count: &places, ..right }), Err(length("write_back count", 1, 3)));
    let other = ValidBits { places: &two_places, ..bits };
    assert_eq!(launch(WriteBack { valid: Some(other), ..right }), Err(length("write_back places", 3, 2)));
    for page_words in [0, (1 << 31) + 1] {
        let refused = operand("write_back page_words", page_words.into(), 1, 1 << 31);
        assert_eq!(launch(WriteBack { page_words, ..right }), Err(refused));
    }
    const MAX_BLOCKS: u32 = 2_097_151;
    assert_eq!(write_back::MAX_BLOCKS, MAX_BLOCKS);
    for blocks in [0, MAX_BLOCKS + 1] {
        let refused = operand("write_back blocks", blocks.into(), 1, MAX_BLOCKS.into());
        assert_eq!(launch(WriteBack { blocks, ..right }), Err(refused));
    }
    let less = short("write_back arena words", 65, 64);
    assert_eq!(launch(WriteBack { page_words: 65, ..right }), Err(less));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    launch(right).unwrap();
    launch(WriteBack { valid: None, ..right }).unwrap();
    let [count, places, valid] = [&count, &places, &host_valid].map(DeviceBuffer::address);
    let (list, pool, host) = (copies.address(), device_pages.address(), host_pages.device_address());
    let line = |marked: u32, places, valid| {
        format!(
            "launch write_back 4 1 1, 512 1 1, 0: {list:#x} {count:#x} 3 {pool:#x} {host:#x} 16 {marked} {places:#x} {valid:#x}"
        )
    };
    assert_eq!(driver.log(), [line(1, places, valid), line(0, count, count)]);
}

use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena};
use spinkv::backend::cuda::kernels::{Gather, GatherVariant, Kernels, KvTables, PartitionPages, Resolve};
use spinkv_kernels::abi::page_code::PageCode;
use spinkv_kernels::abi::{Entry, PageCopy, WORD_BYTES, gather, gather_bulk, resolve};

use super::{ANY, length, multiple, operand, short};
use crate::driver;

#[test]
fn a_gather_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let list = |copies| DeviceBuffer::from_slice(&stream, &vec![PageCopy::default(); copies]).unwrap();
    let (copies, none, counts) = (list(3), list(0), DeviceBuffer::zeroed(&stream, 2).unwrap());
    let count = DeviceBuffer::zeroed(&stream, 1).unwrap();
    let host_pages = PinnedArena::reserve(&context, 4 * 16 * WORD_BYTES, |_| {}).unwrap();
    let device_pages = DeviceBuffer::zeroed(&stream, 2 * 16).unwrap();
    let right = Gather {
        copies: &copies,
        counts: &count,
        host_pages: &host_pages,
        device_pages: &device_pages,
        page_words: 16,
        device_words: 16,
        code: None,
        blocks: 24,
        arrived: None,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |gather: Gather<'_>| unsafe { gather.launch(&kernels, &stream) };

    let counted = Gather { arrived: Some(&counts), ..right };
    let uncounted = DriverError::Length { what: "gather arrived", expected: 1, found: 2 };
    assert_eq!(launch(counted), Err(uncounted));
    let length = DriverError::Length { what: "gather copies", expected: 2, found: 3 };
    assert_eq!(launch(Gather { counts: &counts, ..right }), Err(length));
    let no_list = DeviceBuffer::zeroed(&stream, 0).unwrap();
    assert_eq!(launch(Gather { counts: &no_list, ..right }), Err(operand("gather lists", 0, 1, 8192)));
    driver.log();
    let no_words = operand("gather page_words", 0, 1, ANY);
    assert_eq!(launch(Gather { page_words: 0, ..right }), Err(no_words));
    let no_room = operand("gather device_words", 15, 16, ANY);
    assert_eq!(launch(Gather { device_words: 15, ..right }), Err(no_room));
    const MAX_BLOCKS: u32 = 2_097_151;
    assert_eq!(gather::MAX_BLOCKS, MAX_BLOCKS);
    for blocks in [0, MAX_BLOCKS + 1, 1 << 30, u32::MAX] {
        let refused = operand("gather blocks", blocks.into(), 1, MAX_BLOCKS.into());
        assert_eq!(launch(Gather { blocks, ..right }), Err(refused));
    }
    // 16 words are 8 of codes, and scales.
    let coded = Gather { code: Some(PageCode::E4m3), page_words: 9, ..right };
    for page_words in [8, 10, 16] {
        let refused = operand("gather page_words", page_words.into(), 9, 9);
        assert_eq!(launch(Gather { page_words, ..coded }), Err(refused));
    }
    let odd = operand("gather device_words % 4", 2, 0, 0);
    assert_eq!(launch(Gather { device_words: 18, page_words: 10, ..coded }), Err(odd));
    // SAFETY: as above.
    let launch_as = |gather: Gather<'_>, variant| unsafe { gather.launch_as(variant, &kernels, &stream) };
    assert_eq!(launch_as(coded, GatherVariant::ZeroCopy), Err(operand("gather code", 0, 1, 1)));
    assert_eq!(launch_as(right, GatherVariant::Coded), Err(operand("gather code", 1, 0, 0)));
    let long = operand("gather copies", 3, 0, 1);
    let of_codes = Gather { page_words: (1 << 30) + 1, device_words: 1 << 31, ..coded };
    assert_eq!(launch(of_codes), Err(long.clone()), "of GPU pages");
    assert_eq!(launch(Gather { page_words: 1 << 31, device_words: 1 << 31, ..right }), Err(long));
    let less_than_a_page = short("gather arena words", 65, 64);
    assert_eq!(launch(Gather { page_words: 65, device_words: 65, ..right }), Err(less_than_a_page.clone()));
    let message = "gather arena words: 65 elements from 0 on are beyond the end at 64";
    assert_eq!(less_than_a_page.to_string(), message);
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let line = |gather: Gather<'_>| {
        let list = gather.copies;
        let [copies, count, host, pool] =
            [list.address(), count.address(), host_pages.device_address(), device_pages.address()];
        let (capacity, shared) = (list.len(), gather::shared_bytes(1));
        let Gather { blocks, page_words, device_words, .. } = gather;
        // Beside its one list's block each has one of 132 multiprocessors.
        let overlaps = if blocks < 132 { "overlapping " } else { "" };
        format!(
            "{overlaps}launch gather {blocks} 1 1, 512 1 1, {shared}: {copies:#x} {count:#x} 1 {capacity} {host:#x} {pool:#x} {page_words} {device_words} {count:#x} 0"
        )
    };
    let many = Gather { blocks: MAX_BLOCKS, page_words: 64, device_words: 64, ..right };
    for accepted in [right, many, Gather { blocks: 131, ..right }, Gather { blocks: 132, ..right }] {
        launch(accepted).unwrap();
        assert_eq!(driver.log(), [line(accepted)]);
    }
    launch(coded).unwrap();
    let codes = line(right).replace("launch gather", "launch gather_coded").replace(" 16 16 ", " 9 16 ");
    assert_eq!(driver.log(), [codes + " 1"]);
    launch(Gather { copies: &none, ..right }).unwrap();
    assert_eq!(driver.log().len(), 1, "an empty list is a list");

    // Pages of 4 KiB, and a list of as many as one block has rings.
    let host_pages = PinnedArena::reserve(&context, 256 * WORD_BYTES, |_| {}).unwrap();
    let large = Gather { host_pages: &host_pages, page_words: 256, device_words: 256, blocks: 1, ..right };
    driver.log();
    assert_eq!(large.variant(&kernels), GatherVariant::Bulk);
    launch(large).unwrap();
    let [list, count, pool] = [copies.address(), count.address(), device_pages.address()];
    let parameters =
        format!("{list:#x} {count:#x} 1 3 {:#x} {pool:#x} 256 256 {count:#x} 0", host_pages.device_address());
    let shared = gather_bulk::shared_bytes(1);
    assert_eq!(
        shared,
        16 * 4096 + 16 * 8 + 16 * 4 + 4 * (4 + 2),
        "stages, barriers, targets, sums and starts"
    );
    assert_eq!(
        driver.log(),
        [format!("overlapping launch gather_bulk 1 1 1, 64 1 1, {shared}: {parameters}")]
    );
    assert_eq!(Gather { blocks: 2, ..large }.variant(&kernels), GatherVariant::ZeroCopy);
    assert_eq!(right.variant(&kernels), GatherVariant::ZeroCopy);
    // SAFETY: the stand-in's kernels touch nothing.
    unsafe { large.launch_as(GatherVariant::ZeroCopy, &kernels, &stream).unwrap() };
    assert_eq!(
        driver.log(),
        [format!("launch gather 1 1 1, 512 1 1, {}: {parameters}", gather::shared_bytes(1))]
    );
}

#[test]
fn a_resolve_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let entries = DeviceBuffer::from_slice(&stream, &[Entry::default(); 3]).unwrap();
    let segments = DeviceBuffer::zeroed(&stream, 4 * 512).unwrap();
    let (ids, pages, rows, slots, states) = (table(6 * 7), table(6 * 5), table(6), table(64), table(16));
    let copies = DeviceBuffer::from_slice(&stream, &[PageCopy::default(); 30]).unwrap();
    let tables = KvTables {
        directories: &rows,
        segments: &segments,
        owners: &slots,
        physical: &slots,
        states: &states,
        steady: &rows,
        host_slabs: &rows,
        host_valid: &rows,
        request_rows: 4,
    };
    let right = Resolve {
        entries: &entries,
        kv_heads: 2,
        layer: 1,
        ids: &ids,
        id_counts: &rows,
        partitions: PartitionPages::Shared(8),
        tables,
        slot_capacity: 32,
        segment_capacity: 3,
        pages: &pages,
        misses_last: true,
        page_counts: &rows,
        copies: &copies,
        copy_keys: None,
        copy_counts: &rows,
        arrived: &rows,
        faults: &rows,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |resolve: Resolve<'_>| unsafe { resolve.launch(&kernels, &stream) };

    for (what, value, min, max, wrong) in [
        ("resolve kv_heads", 0, 1, ANY, Resolve { kv_heads: 0, ..right }),
        ("resolve layer", 2, 0, 1, Resolve { layer: 2, ..right }),
        ("resolve partitions", 0, 1, ANY, Resolve { partitions: PartitionPages::Pages(0), ..right }),
        ("resolve slot_capacity", 0, 1, 65532, Resolve { slot_capacity: 0, ..right }),
        ("resolve slot_capacity", 65536, 1, 65532, Resolve { slot_capacity: 65536, ..right }),
        ("resolve segment_capacity", 0, 1, 32768, Resolve { segment_capacity: 0, ..right }),
        ("resolve pages of a row", 0, 1, 65535, Resolve { pages: &table(5), ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    let uneven = launch(Resolve { slot_capacity: 30, ..right }).unwrap_err();
    assert_eq!(uneven, multiple("resolve slot_capacity", 30));
    assert_eq!(uneven.to_string(), "resolve slot_capacity is 30, which is no multiple of 4");
    for (what, expected, found, wrong) in [
        ("resolve ids", 36, 41, Resolve { ids: &table(41), ..right }),
        ("resolve id_counts", 6, 7, Resolve { id_counts: &table(7), ..right }),
        ("resolve pages", 30, 31, Resolve { pages: &table(31), ..right }),
        ("resolve copy_keys", 30, 31, Resolve { copy_keys: Some(&table(31)), ..right }),
        ("resolve copy_counts", 6, 5, Resolve { copy_counts: &table(5), ..right }),
        ("resolve arrived", 6, 5, Resolve { arrived: &table(5), ..right }),
        ("resolve faults", 6, 5, Resolve { faults: &table(5), ..right }),
        ("resolve states", 16, 15, Resolve { tables: KvTables { states: &table(15), ..tables }, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(length(what, expected, found)));
    }
    driver.log();
    launch(right).unwrap();
    let shared = resolve::shared_bytes(32, 3, 5);
    let start = format!(
        "overlapping launch resolve 6 1 1, 256 1 1, {shared}: {:#x} 2 1 4 {:#x}",
        entries.address(),
        ids.address()
    );
    let log = driver.log();
    assert!(log.len() == 1 && log[0].starts_with(&start), "{log:?} and not {start}");
    let lists = |keys: &DeviceBuffer<u32>, keyed: u32| {
        let [copies, keys, counts] = [copies.address(), keys.address(), rows.address()];
        format!(" {copies:#x} {keys:#x} {keyed} {counts:#x} {counts:#x} {counts:#x}")
    };
    assert!(log[0].ends_with(&lists(&rows, 0)), "{log:?}");
    let keys = table(30);
    launch(Resolve { copy_keys: Some(&keys), ..right }).unwrap();
    let log = driver.log();
    assert!(log.last().is_some_and(|line| line.ends_with(&lists(&keys, 1))), "{log:?}");
}

use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError};
use spinkv::backend::cuda::kernels::{
    BasisScratch, CompleteBasis, Gram, InverseFactor, Kernels, LowRankBasis, ProjectKeys, RebuildKeys,
    RowProduct, SmallPivots, StoreBasis, Unrotate, Weights,
};
use spinkv::memory::Word;
use spinkv_kernels::abi::low_rank::{
    complete_basis, gram, inverse_factor, product, project_keys, rebuild_keys,
};
use spinkv_kernels::abi::{Entry, PageCopy};

use super::{ANY, length, operand, short};
use crate::driver;

fn of_eight(what: &'static str, value: u64) -> DriverError {
    DriverError::Multiple { what, value, of: 8 }
}

#[test]
fn keys_are_turned_back() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let words = |len| DeviceBuffer::<Word>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let (keys, plain, frequencies) = (words(5 * 32), words(5 * 32), floats(64));
    let (few, few_frequencies) = (words(5 * 32 - 1), floats(63));
    let right = Unrotate {
        keys: &keys,
        tokens: 5,
        kv_heads: 2,
        head_words: 16,
        first_position: 7,
        frequencies: &frequencies,
        magnitude: 2.0,
        plain: &plain,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |unrotate: Unrotate<'_>| unsafe { unrotate.launch(&kernels, &stream) };
    assert!(matches!(launch(Unrotate { head_words: 12, ..right }), Err(DriverError::Choice { .. })));
    assert!(matches!(launch(Unrotate { magnitude: 0.0, ..right }), Err(DriverError::Positive { .. })));
    let most = ANY / 32;
    assert_eq!(launch(Unrotate { kv_heads: 0, ..right }), Err(operand("unrotate kv_heads", 0, 1, most)));
    let beyond = Unrotate { first_position: u32::MAX, ..right };
    assert_eq!(launch(beyond), Err(operand("unrotate positions", ANY + 5, 0, ANY)));
    assert_eq!(launch(Unrotate { keys: &few, ..right }), Err(short("unrotate keys", 160, 159)));
    assert_eq!(launch(Unrotate { plain: &few, ..right }), Err(short("unrotate plain", 160, 159)));
    let wrong = Unrotate { frequencies: &few_frequencies, ..right };
    assert_eq!(launch(wrong), Err(length("unrotate frequencies", 64, 63)));
    launch(Unrotate { tokens: 0, ..right }).unwrap();
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    launch(right).unwrap();
    let [keys, frequencies, plain] = [keys.address(), frequencies.address(), plain.address()];
    let line =
        format!("launch unrotate 2 1 1, 128 1 1, 0: {keys:#x} 5 2 16 7 {frequencies:#x} 0.50 {plain:#x}");
    assert_eq!(driver.log(), [line]);
}

#[test]
fn a_gram_matrix_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let words = |len| DeviceBuffer::<Word>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    // One tile; the stand-in's 132 multiprocessors would have more shares of it than are allowed, and 7 of those of 1,024 elements.
    let (width, sums) = (72, Gram::sums(&kernels, 72));
    assert_eq!((sums, Gram::sums(&kernels, 1024)), (16 * 128 * 128, 7 * 36 * 128 * 128));
    let (keys, matrix, scratch) = (words(9 * 9), floats(72 * 72), floats(sums));
    let (few_keys, few_matrix, few_scratch) = (words(9 * 9 - 1), floats(72 * 72 - 1), floats(sums - 1));
    let right = Gram { keys: &keys, tokens: 9, width, sums: &scratch, gram: &matrix };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |gram: Gram<'_>| unsafe { gram.launch(&kernels, &stream) };
    assert_eq!(launch(Gram { width: 0, ..right }), Err(operand("gram width", 0, 1, 65535)));
    assert_eq!(launch(Gram { width: 132, ..right }), Err(of_eight("gram width", 132)));
    let tokens = u32::MAX;
    assert_eq!(launch(Gram { tokens, ..right }), Err(operand("gram words of keys", 9 * ANY, 0, ANY)));
    assert_eq!(launch(Gram { keys: &few_keys, ..right }), Err(short("gram keys", 81, 80)));
    assert_eq!(launch(Gram { sums: &few_scratch, ..right }), Err(short("gram sums", sums, sums - 1)));
    assert_eq!(launch(Gram { gram: &few_matrix, ..right }), Err(length("gram matrix", 5184, 5183)));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    launch(right).unwrap();
    let [keys, scratch, matrix] = [keys.address(), scratch.address(), matrix.address()];
    let shared = gram::SHARED_BYTES;
    assert_eq!(shared, 96 << 10);
    assert_eq!(
        driver.log(),
        [
            format!("launch gram 16 1 1, 128 1 1, {shared}: {keys:#x} 9 9 16 {scratch:#x}"),
            format!("launch gram_sum 16 1 1, 256 1 1, 0: {scratch:#x} 72 16 {matrix:#x}"),
        ]
    );
}

#[test]
fn an_iterations_launches_are_checked() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let words = |len| DeviceBuffer::<Word>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let (a, b, out, few) = (floats(5 * 8), floats(12 * 8), floats(5 * 12), floats(5 * 8 - 1));
    let weights = Weights::Dots;
    let right = RowProduct { a: &a, b: &b, weights, rows: 5, columns: 12, inner: 8, out: &out };
    let (square, factor, few_square) = (floats(36), floats(36), floats(35));
    let small = SmallPivots::Raised;
    let of_factor = InverseFactor { products: &square, rank: 6, small, factor: &factor };
    let (vectors, rows, bases) = (floats(8 * 16), words(16), words(48));
    let basis = StoreBasis { vectors: &vectors, rank: 8, width: 16, rows: &rows, place: 2, bases: &bases };
    let (few_rows, few_vectors) = (words(15), floats(127));
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let multiply = |product: RowProduct<'_>| unsafe { product.launch(&kernels, &stream) };
    // SAFETY: as above.
    let invert = |factor: InverseFactor<'_>| unsafe { factor.launch(&kernels, &stream) };
    // SAFETY: as above.
    let store = |basis: StoreBasis<'_>| unsafe { basis.launch(&kernels, &stream) };

    for (what, wrong) in [
        ("product rows", RowProduct { rows: 0, ..right }),
        ("product columns", RowProduct { columns: 0, ..right }),
        ("product inner", RowProduct { inner: 0, ..right }),
    ] {
        assert_eq!(multiply(wrong), Err(operand(what, 0, 1, ANY)));
    }
    assert_eq!(multiply(RowProduct { columns: 10, ..right }), Err(super::multiple("product columns", 10)));
    assert_eq!(multiply(RowProduct { inner: 6, ..right }), Err(super::multiple("product inner", 6)));
    assert_eq!(multiply(RowProduct { a: &few, ..right }), Err(length("product a", 40, 39)));
    assert_eq!(multiply(RowProduct { b: &few, ..right }), Err(length("product b", 96, 39)));
    assert_eq!(multiply(RowProduct { out: &few, ..right }), Err(length("product out", 60, 39)));
    for rank in [0, 225] {
        let refused = operand("inverse_factor rank", rank.into(), 1, 224);
        assert_eq!(invert(InverseFactor { rank, ..of_factor }), Err(refused));
    }
    let wrong = InverseFactor { products: &few_square, ..of_factor };
    assert_eq!(invert(wrong), Err(length("inverse_factor products", 36, 35)));
    let wrong = InverseFactor { factor: &few_square, ..of_factor };
    assert_eq!(invert(wrong), Err(length("inverse_factor factor", 36, 35)));
    assert_eq!(store(StoreBasis { rank: 12, ..basis }), Err(of_eight("store_basis rank", 12)));
    assert_eq!(store(StoreBasis { width: 0, ..basis }), Err(operand("store_basis width", 0, 1, 65535)));
    let wrong = StoreBasis { vectors: &few_vectors, ..basis };
    assert_eq!(store(wrong), Err(length("store_basis vectors", 128, 127)));
    assert_eq!(store(StoreBasis { rows: &few_rows, ..basis }), Err(short("store_basis rows", 16, 15)));
    let beyond = DriverError::OutOfRange { what: "store_basis bases", start: 48, len: 16, limit: 48 };
    assert_eq!(store(StoreBasis { place: 3, ..basis }), Err(beyond));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");

    let line = |name: &str| {
        let [a, b, out] = [a.address(), b.address(), out.address()];
        format!("launch {name} 1 1 1, 256 1 1, {}: {a:#x} {b:#x} 5 12 8 {out:#x}", product::SHARED_BYTES)
    };
    multiply(right).unwrap();
    multiply(RowProduct { weights: Weights::Sums, ..right }).unwrap();
    assert_eq!(driver.log(), [line("row_dots"), line("row_sums")]);
    invert(of_factor).unwrap();
    invert(InverseFactor { small: SmallPivots::Dropped, ..of_factor }).unwrap();
    let line = |drops: u32| {
        let [products, factor, shared] =
            [square.address(), factor.address(), inverse_factor::shared_bytes(6).into()];
        format!("launch inverse_factor 1 1 1, 1024 1 1, {shared}: {products:#x} 6 {drops} {factor:#x}")
    };
    assert_eq!(driver.log(), [line(0), line(1)]);
    store(basis).unwrap();
    let [vectors, rows, bases] = [vectors.address(), rows.address(), bases.address()];
    let line = format!("launch store_basis 1 1 1, 256 1 1, 0: {vectors:#x} 8 16 {rows:#x} 2 {bases:#x}");
    assert_eq!(driver.log(), [line]);
}

#[test]
fn a_basis_is_found_in_the_order_of_the_cpu() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let words = |len| DeviceBuffer::<Word>::zeroed(&stream, len).unwrap();
    for (rank, refused) in [
        (0, operand("low-rank basis rank", 0, 1, 224)),
        (256, operand("low-rank basis rank", 256, 1, 224)),
        (40, DriverError::Multiple { what: "low-rank basis rank", value: 40, of: 32 }),
        (96, operand("low-rank basis width", 64, 96, 65535)),
    ] {
        assert_eq!(BasisScratch::new(&kernels, &stream, rank, 64).unwrap_err(), refused);
    }
    let scratch = BasisScratch::new(&kernels, &stream, 32, 64).unwrap();
    let floats = 3 * 32 * 64 + 2 * 32 * 32 + Gram::sums(&kernels, 64) + 64 * 64;
    assert_eq!(scratch.bytes(), 4 * floats as u64);
    let (keys, rows, bases) = (words(10 * 8), words(256), words(512));
    driver.log();
    let basis =
        LowRankBasis { keys: &keys, tokens: 10, scratch: &scratch, rows: &rows, place: 1, bases: &bases };
    // SAFETY: the stand-in's kernels touch nothing.
    unsafe { basis.launch(&kernels, &stream).unwrap() };
    let log = driver.log();
    let names: Vec<&str> = log.iter().map(|line| line.split(' ').nth(1).unwrap()).collect();
    let orthogonalise = ["row_dots", "inverse_factor", "row_sums"];
    let mut expected = vec!["gram", "gram_sum"];
    for _ in 0..8 {
        expected.push("row_dots");
        expected.extend(orthogonalise);
    }
    expected.extend(orthogonalise.repeat(2));
    expected.extend(["complete_basis", "store_basis"]);
    assert_eq!(names, expected);
    // What is stored is what the last product wrote.
    let words_of = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let [last, complete, store] = [3, 2, 1].map(|back| words_of(&log[log.len() - back]));
    assert_eq!(last.last().unwrap(), &store[9], "{last:?} {store:?}");
    let shared = complete_basis::shared_bytes(32, 64);
    assert_eq!(complete[2..].join(" "), format!("1 1 1, 1024 1 1, {shared}: {} 32 64", store[9]));
}

#[test]
fn a_rebuilding_of_keys_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::<Word>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let list = |len| DeviceBuffer::from_slice(&stream, &vec![PageCopy::default(); len]).unwrap();
    let entries = DeviceBuffer::from_slice(&stream, &[Entry::default(); 3]).unwrap();
    let (copies, copy_keys, counts, directories) = (list(6 * 5), table(6 * 5), table(6), table(4));
    // Two segments of three layers, pages of a token, rank 96; two bases of 2 heads of 64.
    let (coefficients, bases) = (words(2 * 3 * 512 * 12), words(2 * 3 * 2 * 64 * 12));
    let (frequencies, pool) = (floats(32), words(10 * 2 * 8));
    let right = RebuildKeys {
        copies: &copies,
        copy_keys: &copy_keys,
        counts: &counts,
        entries: &entries,
        kv_heads: 2,
        head_words: 8,
        layer: 2,
        layers: 3,
        directories: &directories,
        coefficients: &coefficients,
        rank: 96,
        bases: &bases,
        frequencies: &frequencies,
        magnitude: 1.0,
        page_tokens: 1,
        pool: &pool,
        blocks: RebuildKeys::blocks(&kernels),
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |rebuild: RebuildKeys<'_>| unsafe { rebuild.launch(&kernels, &stream) };
    assert!(matches!(launch(RebuildKeys { head_words: 4, ..right }), Err(DriverError::Choice { .. })));
    assert!(matches!(
        launch(RebuildKeys { magnitude: f32::NAN, ..right }),
        Err(DriverError::Positive { .. })
    ));
    for (what, value, min, max, wrong) in [
        ("rebuild_keys rank", 0, 1, 224, RebuildKeys { rank: 0, ..right }),
        ("rebuild_keys rank", 256, 1, 224, RebuildKeys { rank: 256, ..right }),
        ("rebuild_keys kv_heads", 0, 1, ANY, RebuildKeys { kv_heads: 0, ..right }),
        ("rebuild_keys layers", 0, 1, ANY, RebuildKeys { layers: 0, ..right }),
        ("rebuild_keys layer", 3, 0, 2, RebuildKeys { layer: 3, ..right }),
        ("rebuild_keys page_tokens", 0, 1, 65536, RebuildKeys { page_tokens: 0, ..right }),
        ("rebuild_keys blocks", 0, 1, 0x7fff_ffff, RebuildKeys { blocks: 0, ..right }),
        ("rebuild_keys lists", 3 * 2731, 1, 8192, RebuildKeys { kv_heads: 2731, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    let uneven = DriverError::Multiple { what: "rebuild_keys rank", value: 80, of: 32 };
    assert_eq!(launch(RebuildKeys { rank: 80, ..right }), Err(uneven));
    for (what, expected, found, wrong) in [
        ("rebuild_keys copies", 30, 31, RebuildKeys { copies: &list(31), ..right }),
        ("rebuild_keys copy_keys", 30, 29, RebuildKeys { copy_keys: &table(29), ..right }),
        ("rebuild_keys counts", 6, 7, RebuildKeys { counts: &table(7), ..right }),
        ("rebuild_keys coefficients", 36_864, 36_865, RebuildKeys { coefficients: &words(36_865), ..right }),
        ("rebuild_keys bases", 4608, 4609, RebuildKeys { bases: &words(4609), ..right }),
        ("rebuild_keys pool", 160, 161, RebuildKeys { pool: &words(161), ..right }),
        ("rebuild_keys frequencies", 32, 31, RebuildKeys { frequencies: &floats(31), ..right }),
    ] {
        assert_eq!(launch(wrong), Err(length(what, expected, found)));
    }
    driver.log();
    launch(right).unwrap();
    let shared = rebuild_keys::shared_bytes(64, 12, 6);
    let [copies, keys, counts, of_entries] =
        [copies.address(), copy_keys.address(), counts.address(), entries.address()];
    let start = format!(
        "launch rebuild_keys_64 264 1 1, 128 1 1, {shared}: {copies:#x} {keys:#x} {counts:#x} 6 5 {of_entries:#x} 2 2 3 {:#x} {:#x} 12 {:#x} {:#x} ",
        directories.address(),
        coefficients.address(),
        bases.address(),
        frequencies.address()
    );
    let log = driver.log();
    let end = format!(" 1.00 1 {:#x}", pool.address());
    assert!(log.len() == 1 && log[0].starts_with(&start) && log[0].ends_with(&end), "{log:?}, {start}");
    let (wide, wide_pool) = (words(2 * 3 * 2 * 128 * 12), words(10 * 2 * 16));
    let frequencies = floats(64);
    driver.log();
    launch(RebuildKeys {
        head_words: 16,
        bases: &wide,
        frequencies: &frequencies,
        pool: &wide_pool,
        ..right
    })
    .unwrap();
    assert!(driver.log()[0].starts_with("launch rebuild_keys_128 264 1 1, 128 1 1, "));
}

#[test]
fn a_completion_is_checked() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let (vectors, few) = (floats(5 * 6), floats(5 * 6 - 1));
    let right = CompleteBasis { vectors: &vectors, rank: 5, width: 6 };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |complete: CompleteBasis<'_>| unsafe { complete.launch(&kernels, &stream) };
    for (what, value, min, max, wrong) in [
        ("complete_basis rank", 0, 1, 224, CompleteBasis { rank: 0, ..right }),
        ("complete_basis rank", 225, 1, 224, CompleteBasis { rank: 225, ..right }),
        ("complete_basis width", 4, 5, 65535, CompleteBasis { width: 4, ..right }),
        ("complete_basis width", 65536, 5, 65535, CompleteBasis { width: 65536, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    let wrong = CompleteBasis { vectors: &few, ..right };
    assert_eq!(launch(wrong), Err(length("complete_basis vectors", 30, 29)));
    assert_eq!(driver.log(), [""; 0], "nothing was launched");
    launch(right).unwrap();
    let (vectors, shared) = (vectors.address(), complete_basis::shared_bytes(5, 6));
    assert_eq!(driver.log(), [format!("launch complete_basis 1 1 1, 1024 1 1, {shared}: {vectors:#x} 5 6")]);
}

#[test]
fn a_projection_of_keys_is_checked_and_launched() {
    let driver = driver();
    let (context, stream) = driver.open();
    let kernels = Kernels::load(&context).unwrap();
    let table = |len| DeviceBuffer::<u32>::zeroed(&stream, len).unwrap();
    let words = |len| DeviceBuffer::<Word>::zeroed(&stream, len).unwrap();
    let floats = |len| DeviceBuffer::<f32>::zeroed(&stream, len).unwrap();
    let list = |len| DeviceBuffer::from_slice(&stream, &vec![PageCopy::default(); len]).unwrap();
    let entries = DeviceBuffer::from_slice(&stream, &[Entry::default(); 3]).unwrap();
    let (copies, copy_keys, counts) = (list(6 * 5), table(6 * 5), table(6));
    let (directories, steady) = (table(4), table(30));
    // As for a rebuilding: two segments of three layers, pages of a token, rank 96; two bases of 2 heads of 64.
    let (coefficients, bases) = (words(2 * 3 * 512 * 12), words(2 * 3 * 2 * 64 * 12));
    let (frequencies, pool) = (floats(32), words(10 * 2 * 8));
    let right = ProjectKeys {
        entries: &entries,
        steady: &steady,
        pool: &pool,
        kv_heads: 2,
        head_words: 8,
        layer: 2,
        layers: 3,
        page_tokens: 1,
        frequencies: &frequencies,
        magnitude: 2.0,
        bases: &bases,
        rank: 96,
        directories: &directories,
        coefficients: &coefficients,
        copies: &copies,
        copy_keys: &copy_keys,
        counts: &counts,
    };
    driver.log();
    // SAFETY: the stand-in's kernels touch nothing.
    let launch = |project: ProjectKeys<'_>| unsafe { project.launch(&kernels, &stream) };
    assert!(matches!(launch(ProjectKeys { head_words: 4, ..right }), Err(DriverError::Choice { .. })));
    assert!(matches!(launch(ProjectKeys { magnitude: 0.0, ..right }), Err(DriverError::Positive { .. })));
    for (what, value, min, max, wrong) in [
        ("project_keys rank", 0, 1, 224, ProjectKeys { rank: 0, ..right }),
        ("project_keys rank", 256, 1, 224, ProjectKeys { rank: 256, ..right }),
        ("project_keys kv_heads", 0, 1, 65535, ProjectKeys { kv_heads: 0, ..right }),
        ("project_keys layers", 0, 1, 65535, ProjectKeys { layers: 0, ..right }),
        ("project_keys layer", 3, 0, 2, ProjectKeys { layer: 3, ..right }),
        ("project_keys page_tokens", 0, 1, 65535, ProjectKeys { page_tokens: 0, ..right }),
    ] {
        assert_eq!(launch(wrong), Err(operand(what, value, min, max)));
    }
    let uneven = DriverError::Multiple { what: "project_keys rank", value: 80, of: 32 };
    assert_eq!(launch(ProjectKeys { rank: 80, ..right }), Err(uneven));
    for (what, expected, found, wrong) in [
        ("project_keys copies", 30, 31, ProjectKeys { copies: &list(31), ..right }),
        ("project_keys copy_keys", 30, 29, ProjectKeys { copy_keys: &table(29), ..right }),
        ("project_keys counts", 6, 7, ProjectKeys { counts: &table(7), ..right }),
        ("project_keys coefficients", 36_864, 36_865, ProjectKeys { coefficients: &words(36_865), ..right }),
        ("project_keys bases", 4608, 4609, ProjectKeys { bases: &words(4609), ..right }),
        ("project_keys frequencies", 32, 31, ProjectKeys { frequencies: &floats(31), ..right }),
    ] {
        assert_eq!(launch(wrong), Err(length(what, expected, found)));
    }
    driver.log();
    launch(right).unwrap();
    let [of_entries, steady, pool, frequencies] =
        [entries.address(), steady.address(), pool.address(), frequencies.address()];
    let [bases, directories, coefficients] = [bases.address(), directories.address(), coefficients.address()];
    let [copies, keys, counts] = [copies.address(), copy_keys.address(), counts.address()];
    // A block for each entry and 32 of the rank.
    let shared = project_keys::shared_bytes(128);
    let line = format!(
        "launch project_keys 9 1 1, 256 1 1, {shared}: {of_entries:#x} {steady:#x} {pool:#x} 2 2 3 8 1 {frequencies:#x} 0.50 {bases:#x} 12 {directories:#x} {coefficients:#x} {copies:#x} {keys:#x} {counts:#x} 5"
    );
    assert_eq!(driver.log(), [line]);
}

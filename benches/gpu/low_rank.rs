//! Keys in low rank: what a layer's index costs, and rebuilding the keys of missed pages.

use std::error::Error;

use half::bf16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::low_rank::ITERATIONS;
use spinkv::backend::cuda::driver::{DeviceBuffer, Stream};
use spinkv::backend::cuda::kernels::{
    BasisScratch, Gram, InverseFactor, Kernels, Linear, LinearOutput, LowRankBasis, RebuildKeys, RowProduct,
    SmallPivots, Unrotate, Weights,
};
use spinkv::memory::Word;
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS, WORD_BYTES, WORD_ELEMENTS};

use crate::attend::random_word;
use crate::measure::{Bench, Shape};

/// Qwen3-14B: 8 KV heads of 128.
const KV_HEADS: u32 = 8;
const HEAD_WORDS: u32 = 16;
const WIDTH: u32 = KV_HEADS * HEAD_WORDS * WORD_ELEMENTS as u32;
const RANK: u32 = 160;
const RANK_WORDS: u32 = RANK / WORD_ELEMENTS as u32;
/// Tokens of a prompt.
const TOKENS: u32 = 32_768;
const PAGE_TOKENS: u32 = 8;
/// Of a step: 16 requests of 8 KV heads, each of which misses so many pages.
const REQUESTS: u32 = 16;
const MISSES: u32 = 26;

pub fn run(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    index(bench)?;
    rebuild(bench)
}

fn random(stream: &Stream, words: u32) -> Result<DeviceBuffer<Word>, Box<dyn Error>> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    // No multiple of a row.
    let run: Vec<[bf16; WORD_ELEMENTS]> = (0..1_000_003).map(|_| random_word(&mut rng)).collect();
    let tensor = DeviceBuffer::uninit(stream.context(), words as usize)?;
    for at in (0..words as usize).step_by(run.len()) {
        tensor.write(stream, at, bytemuck::cast_slice(&run[..run.len().min(words as usize - at)]))?;
    }
    Ok(tensor)
}

/// Angles a position, as a model of theta 1e6 has them.
fn frequencies(stream: &Stream) -> Result<DeviceBuffer<f32>, Box<dyn Error>> {
    let half = HEAD_WORDS as usize * WORD_ELEMENTS / 2;
    let of: Vec<f32> = (0..half).map(|at| 1e6_f32.powf(-(at as f32) / half as f32)).collect();
    Ok(DeviceBuffer::from_slice(stream, &of)?)
}

fn index(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    let (stream, kernels) = (bench.stream.clone(), bench.kernels.clone());
    bench.group("low_rank: index of a layer, 32K tokens, 8 heads of 128, rank 160; bytes: each matrix once");
    let width_words = WIDTH / WORD_ELEMENTS as u32;
    let keys = random(&stream, TOKENS * width_words)?;
    let plain = DeviceBuffer::<Word>::zeroed(&stream, keys.len())?;
    let frequencies = frequencies(&stream)?;
    let scratch = BasisScratch::new(&kernels, &stream, RANK, WIDTH)?;
    let rows = DeviceBuffer::<Word>::zeroed(&stream, (RANK * width_words) as usize)?;
    let bases = DeviceBuffer::<Word>::zeroed(&stream, (RANK * width_words) as usize)?;
    let coefficients = DeviceBuffer::<Word>::zeroed(&stream, (TOKENS * RANK_WORDS) as usize)?;
    let partials = DeviceBuffer::zeroed(&stream, Linear::partials(&kernels))?;
    let arrivals = DeviceBuffer::zeroed(&stream, Linear::arrivals(RANK))?;
    let unrotate = Unrotate {
        keys: &keys,
        tokens: TOKENS,
        kv_heads: KV_HEADS,
        head_words: HEAD_WORDS,
        first_position: 0,
        frequencies: &frequencies,
        magnitude: 1.0,
        plain: &plain,
    };
    let basis = LowRankBasis {
        keys: &plain,
        tokens: TOKENS,
        scratch: &scratch,
        rows: &rows,
        place: 0,
        bases: &bases,
    };
    let project = Linear {
        weights: &rows,
        x: &plain,
        tokens: TOKENS,
        n: RANK,
        k_words: width_words,
        output: LinearOutput::Bf16(&coefficients),
        partials: &partials,
        arrivals: &arrivals,
        overlaps: false,
    };
    // SAFETY: launches on one stream follow each other, here and below; arrivals are 0 between them.
    unsafe {
        unrotate.launch(&kernels, &stream)?;
        basis.launch(&kernels, &stream)?;
    }
    check_basis(&stream, &rows)?;

    let bytes = |buffers: &[&DeviceBuffer<Word>]| buffers.iter().map(|buffer| buffer.bytes()).sum::<u64>();
    let of_keys = bytes(&[&keys]);
    // SAFETY: as above.
    bench.row("unrotate", "", 2 * of_keys, None, |_| unsafe { unrotate.launch(&kernels, &stream) })?;
    let (side, tokens) = (u64::from(WIDTH), u64::from(TOKENS));
    let sums = DeviceBuffer::zeroed(&stream, Gram::sums(&kernels, WIDTH))?;
    let matrix = DeviceBuffer::zeroed(&stream, (WIDTH * WIDTH) as usize)?;
    let gram = Gram { keys: &plain, tokens: TOKENS, width: WIDTH, sums: &sums, gram: &matrix };
    // A symmetric matrix is half the work of another.
    let shape = Shape::new("gram, gram_sum").flops(tokens * side * side);
    let moved = of_keys + matrix.bytes();
    // SAFETY: as above.
    bench.row("gram", shape, moved, None, |_| unsafe { gram.launch(&kernels, &stream) })?;
    steps(bench, &kernels, &matrix)?;
    let shape = format!("{} launches", 2 + 4 * ITERATIONS + 6 + 1);
    // SAFETY: as above.
    bench.row("basis", shape, of_keys, None, |_| unsafe { basis.launch(&kernels, &stream) })?;
    let shape = Shape::new("coefficients").flops(2 * tokens * side * u64::from(RANK));
    let of_product = bytes(&[&plain, &rows, &coefficients]);
    // SAFETY: as above.
    bench.row("project", shape, of_product, None, |_| unsafe { project.launch(&kernels, &stream) })?;
    bench.row("index", "all of it", 2 * of_keys, None, |_| {
        // SAFETY: as above.
        unsafe {
            unrotate.launch(&kernels, &stream)?;
            basis.launch(&kernels, &stream)?;
            project.launch(&kernels, &stream)
        }
    })?;
    Ok(())
}

/// One iteration's launches, each alone.
fn steps(bench: &mut Bench, kernels: &Kernels, matrix: &DeviceBuffer<f32>) -> Result<(), Box<dyn Error>> {
    let stream = bench.stream.clone();
    let floats = |len: u32| DeviceBuffer::<f32>::from_slice(&stream, &vec![0.01; len as usize]);
    let (vectors, images) = (floats(RANK * WIDTH)?, floats(RANK * WIDTH)?);
    let (products, factor) = (floats(RANK * RANK)?, floats(RANK * RANK)?);
    let (rank, width, dots) = (RANK, WIDTH, Weights::Dots);
    let product =
        |a, b, weights, columns, inner, out| RowProduct { a, b, weights, rows: rank, columns, inner, out };
    let launches = [
        ("row_dots", "vectors x Gram matrix", product(&vectors, matrix, dots, width, width, &images)),
        ("row_dots", "vectors x vectors", product(&images, &images, dots, rank, width, &products)),
        ("row_sums", "factor x vectors", product(&factor, &images, Weights::Sums, width, rank, &vectors)),
    ];
    for (what, text, launch) in launches {
        let flops = 2 * u64::from(launch.rows) * u64::from(launch.columns) * u64::from(launch.inner);
        let bytes = launch.a.bytes() + launch.b.bytes() + launch.out.bytes();
        // SAFETY: as above.
        bench.row(what, Shape::new(text).flops(flops), bytes, None, |_| unsafe {
            launch.launch(kernels, &stream)
        })?;
    }
    let launch = InverseFactor { products: &products, rank, small: SmallPivots::Raised, factor: &factor };
    let bytes = products.bytes() + factor.bytes();
    // SAFETY: as above.
    bench.row("inverse_factor", "rank 160", bytes, None, |_| unsafe { launch.launch(kernels, &stream) })?;
    Ok(())
}

/// Refuses to time a basis that is none: its vectors have length 1 and are orthogonal but for rounding.
fn check_basis(stream: &Stream, rows: &DeviceBuffer<Word>) -> Result<(), Box<dyn Error>> {
    let elements: Vec<bf16> = bytemuck::pod_collect_to_vec(&rows.to_vec(stream)?);
    let vector = |at: usize| &elements[at * WIDTH as usize..(at + 1) * WIDTH as usize];
    for (a, b) in [(0, 0), (0, 1), (80, 80), (80, 159), (159, 159)] {
        let dot: f64 = vector(a).iter().zip(vector(b)).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
        let off = (dot - f64::from(u8::from(a == b))).abs();
        if off.is_nan() || off >= 5e-3 {
            return Err(format!("the product of basis vectors {a} and {b} is {dot}").into());
        }
    }
    Ok(())
}

fn rebuild(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    let (stream, kernels) = (bench.stream.clone(), bench.kernels.clone());
    bench.group("rebuild_keys: 16 requests of 8 heads of 128, 26 missed pages of 8 tokens, rank 160; bytes: coefficients, keys, each basis once");
    let (lists, segments_of) = (REQUESTS * KV_HEADS, TOKENS / PAGE_TOKENS / SEGMENT_KEYS);
    let coefficients = random(&stream, REQUESTS * TOKENS * RANK_WORDS)?;
    let bases = random(&stream, REQUESTS * WIDTH * RANK_WORDS)?;
    let directories: Vec<u32> = (0..REQUESTS * segments_of).rev().collect();
    let entries: Vec<Entry> = (0..REQUESTS)
        .map(|request| Entry {
            tokens: TOKENS,
            directory: request * segments_of,
            basis: request,
            ..Entry::default()
        })
        .collect();
    let pages_of = TOKENS / PAGE_TOKENS;
    let copy_keys: Vec<u32> = (0..lists)
        .flat_map(|list| (0..MISSES).map(move |miss| (miss * 157 + list * 13) % pages_of))
        .collect();
    let copies: Vec<PageCopy> =
        (0..lists * MISSES).map(|device_page| PageCopy { host_page: 0, device_page }).collect();
    let page_words = 2 * PAGE_TOKENS * HEAD_WORDS;
    let pool = DeviceBuffer::<Word>::zeroed(&stream, (lists * MISSES * page_words) as usize)?;
    let launch = RebuildKeys {
        copies: &DeviceBuffer::from_slice(&stream, &copies)?,
        copy_keys: &DeviceBuffer::from_slice(&stream, &copy_keys)?,
        counts: &DeviceBuffer::from_slice(&stream, &vec![MISSES; lists as usize])?,
        entries: &DeviceBuffer::from_slice(&stream, &entries)?,
        kv_heads: KV_HEADS,
        head_words: HEAD_WORDS,
        layer: 0,
        layers: 1,
        directories: &DeviceBuffer::from_slice(&stream, &directories)?,
        coefficients: &coefficients,
        rank: RANK,
        bases: &bases,
        frequencies: &frequencies(&stream)?,
        magnitude: 1.0,
        page_tokens: PAGE_TOKENS,
        pool: &pool,
        blocks: RebuildKeys::blocks(&kernels),
    };
    let tokens = u64::from(lists * MISSES * PAGE_TOKENS);
    let key_bytes = u64::from(HEAD_WORDS) * WORD_BYTES as u64;
    let bytes = tokens * (u64::from(RANK_WORDS) * WORD_BYTES as u64 + key_bytes) + bases.bytes();
    let flops = 2 * tokens * u64::from(RANK) * u64::from(HEAD_WORDS) * WORD_ELEMENTS as u64;
    for blocks in [launch.blocks / 2, launch.blocks, 2 * launch.blocks] {
        let launch = RebuildKeys { blocks, ..launch };
        let shape = Shape::new(format!("{blocks} blocks")).flops(flops);
        // SAFETY: lists name pages of the pool, each once, whose segments are in the directories.
        bench.row("rebuild_keys", shape, bytes, None, |_| unsafe { launch.launch(&kernels, &stream) })?;
    }
    Ok(())
}

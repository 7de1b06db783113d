//! Cases of learned gates: `gate_key` for prompts, `gate_key_step`, `gate_query`.

use cuda_std::emulator::{Buffer, Fault, Launch};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;
use spinkv::gates::{GATE_EPS, Gates, LayerGate};
use spinkv::pipeline::Place;
use spinkv::{KvShape, Rotary};
use spinkv_kernels::abi::{Entry, WORD_ELEMENTS, gate};
use spinkv_kernels::{index, select};

use super::emulated::{to_words, words};
use super::{POISON, WILD, entry_words, pick, wild_entry};

/// Layers of a case; the launch is of one.
const LAYERS: usize = 3;

/// A random gate, as the reference has it and as kernels read it.
#[derive(Debug)]
pub struct GateCase {
    /// The weights; all of them bf16 numbers.
    pub gates: Gates,
    /// The layer of the launch.
    pub layer: usize,
}

impl GateCase {
    fn random(rng: &mut impl Rng, kv_heads: usize, group: usize, head_words: usize) -> Self {
        let head_dim = head_words * WORD_ELEMENTS;
        let shape = KvShape::new(LAYERS, kv_heads * group, kv_heads, head_dim).expect("a valid shape");
        let rank = pick(rng, &[16, 32, 64, 80, 128, 128, 256]);
        let norms = rng.random_bool(0.5);
        // At times so small that a norm's epsilon is much of what it divides by.
        let width = pick(rng, &[0.2, 0.0005]);
        let mut weights = |elements: usize, width: f32| -> Vec<f32> {
            (0..elements).map(|_| bf16::from_f32(rng.random_range(-width..width)).to_f32()).collect()
        };
        let layers = (0..LAYERS).map(|_| LayerGate {
            query: weights(kv_heads * rank * group * head_dim, width),
            key: weights(kv_heads * rank * 3 * head_dim, width),
            query_norm: norms.then(|| weights(rank, 2.0)),
            key_norm: norms.then(|| weights(rank, 2.0)),
        });
        let layers = layers.collect();
        let rotary = |head_dim: usize, theta: f32, magnitude: f32| {
            let frequencies = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f32 / head_dim as f32));
            Rotary::new(frequencies.collect(), magnitude)
        };
        let (model, gate) = (rotary(head_dim, 1e6, 1.25), rotary(rank, 1e4, 0.75));
        let gates = Gates::new(shape, rank, model, gate, layers).expect("valid gates");
        Self { gates, layer: rng.random_range(0..LAYERS) }
    }

    /// Words of a head.
    pub fn head_words(&self) -> usize {
        self.gates.shape().head_dim / WORD_ELEMENTS
    }

    /// Words of what a gate makes.
    pub fn rank_words(&self) -> usize {
        self.gates.rank() / WORD_ELEMENTS
    }

    /// The projection of keys or of queries, `[layers * kv_heads, input words, rank]`, and its norm, `[layers, rank]`.
    pub fn projection(&self, of_keys: bool) -> (Vec<u128>, Option<Vec<f32>>) {
        let (rank, kv_heads) = (self.gates.rank(), self.gates.shape().kv_heads);
        let (mut all, mut norms) = (Vec::new(), Vec::new());
        for layer in self.gates.layers() {
            let (weights, norm) =
                if of_keys { (&layer.key, &layer.key_norm) } else { (&layer.query, &layer.query_norm) };
            norms.extend(norm.iter().flatten());
            let inputs = weights.len() / kv_heads / rank;
            for (head, word) in (0..kv_heads).flat_map(|head| (0..inputs / 8).map(move |word| (head, word))) {
                for output in 0..rank {
                    let row = (head * rank + output) * inputs + 8 * word;
                    let eight: [bf16; 8] = std::array::from_fn(|at| bf16::from_f32(weights[row + at]));
                    all.push(bytemuck::cast(eight));
                }
            }
        }
        (all, (!norms.is_empty()).then_some(norms))
    }

    /// Whether `found` is `expected`, as far as the order of sums and a rounding go.
    fn close(&self, found: &[u128], expected: &[f32], what: impl Fn() -> String) -> Result<(), String> {
        let found = bytemuck::cast_slice::<u128, bf16>(found).to_f32_vec();
        let greatest = expected.iter().fold(0.0_f32, |greatest, x| greatest.max(x.abs()));
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            let off = (found - expected).abs();
            if off.is_nan() || off > expected.abs() / 256.0 + greatest * 1e-4 {
                return Err(format!("{}, element {at}: {found} where {expected} was expected", what()));
            }
        }
        Ok(())
    }

    /// What all kernels of gates take, as buffers of the emulator.
    fn buffers(&self, of_keys: bool) -> Operands {
        let (weights, norm) = self.projection(of_keys);
        let (model, gate) = (self.gates.model_rotary(), self.gates.gate_rotary());
        Operands {
            frequencies: Buffer::from_slice(model.frequencies()),
            shrink: 1.0 / model.magnitude(),
            weights: words(&weights),
            rank: self.gates.rank() as u32,
            norms: norm.is_some().into(),
            norm: Buffer::from_slice(&norm.unwrap_or_default()),
            gate_frequencies: Buffer::from_slice(gate.frequencies()),
            gate_magnitude: gate.magnitude(),
        }
    }
}

struct Operands {
    frequencies: Buffer<f32>,
    shrink: f32,
    weights: Buffer<cuda_std::U32x4>,
    rank: u32,
    norm: Buffer<f32>,
    norms: u32,
    gate_frequencies: Buffer<f32>,
    gate_magnitude: f32,
}

/// A launch of `gate_key` on a ragged batch of prompts, and of `gate_key_step` on the same keys in pages.
#[derive(Debug)]
pub struct GateKeyCase {
    /// The gate.
    pub gate: GateCase,
    /// One a request: `directory`, `new_partition`, `new_partitions`, the steady list's numbers; the rest is wild.
    pub entries: Vec<Entry>,
    /// Segments of all requests.
    pub directories: Vec<u32>,
    /// Segments.
    pub segments: usize,
    /// Tokens of a partition.
    pub chunk_tokens: usize,
    /// Partitions of a segment.
    pub segment_partitions: usize,
    /// `[tokens, kv_heads, head_words]`: bf16 keys; NaN where nothing may be read.
    pub keys: Vec<u128>,
    /// `[requests]`.
    pub first_token: Vec<u32>,
    /// `[requests + 1]`.
    pub first_chunk: Vec<u32>,
    /// Steady lists; wild but for the pages that are read.
    pub steady: Vec<u32>,
    /// `[pages, 2, page_tokens, head_words]`; NaN where nothing may be read.
    pub pool: Vec<u128>,
    /// Tokens of a page.
    pub page_tokens: usize,
}

impl GateKeyCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let sizes =
            [rng.random_range(1..=3), pick(&mut rng, &[8, 16]), pick(&mut rng, &[1, 3, 8, 16, 24, 64])];
        let (requests, most) = (rng.random_range(1..=3), 2);
        Self::sized(&mut rng, sizes, requests, most)
    }

    /// Prompts of up to 8K tokens, 8 heads of 128, blocks of 64.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), [8, 16, 64], 3, 128)
    }

    fn sized(
        rng: &mut impl Rng,
        [kv_heads, head_words, chunk_tokens]: [usize; 3],
        requests: usize,
        most: usize,
    ) -> Self {
        let group = rng.random_range(1..=3);
        let gate = GateCase::random(rng, kv_heads, group, head_words);
        let page_tokens = pick(rng, &[1, 2, 8, 16, 64]);
        let segment_partitions = pick(rng, &[1, 3, 64]);
        let (first_row, rows, width) = (gate.layer * kv_heads, LAYERS * kv_heads, kv_heads * head_words);
        let mut case = Self {
            gate,
            entries: Vec::new(),
            directories: vec![WILD; rng.random_range(0..3)],
            segments: 0,
            chunk_tokens,
            segment_partitions,
            keys: Vec::new(),
            first_token: Vec::new(),
            first_chunk: vec![0],
            steady: vec![WILD; rng.random_range(0..3)],
            pool: Vec::new(),
            page_tokens,
        };
        let (mut segments, mut places) = (Vec::new(), Vec::new());
        for _ in 0..requests {
            let chunks = rng.random_range(0..=most);
            // Far enough for fast channels to turn often.
            let first = rng.random_range(0..60);
            let end = first + chunks;
            case.first_token.push((case.keys.len() / width) as u32);
            case.first_chunk.push(case.first_chunk.last().unwrap() + chunks as u32);
            case.keys.extend(std::iter::repeat_n(nan(), first * chunk_tokens * width));
            case.keys.extend((0..chunks * chunk_tokens * width).map(|_| {
                let scale = rng.random_range(-2.0..3.0_f32).exp2();
                bytemuck::cast::<[bf16; WORD_ELEMENTS], u128>(std::array::from_fn(|_| {
                    bf16::from_f32(scale * rng.random_range(-1.0..1.0_f32))
                }))
            }));
            let pages = (first * chunk_tokens / page_tokens)..(end * chunk_tokens).div_ceil(page_tokens);
            let sink_pages = rng.random_range(0..4);
            let entry = Entry {
                tokens: WILD,
                directory: case.directories.len() as u32,
                new_partition: first as u32,
                new_partitions: chunks as u32,
                first_steady: case.steady.len() as u32,
                sink_pages,
                ring_pages: pages.len() as u32 + rng.random_range(1..3),
                ..wild_entry()
            };
            let used = first / segment_partitions..end.div_ceil(segment_partitions);
            for segment in 0..if chunks > 0 { used.end } else { 0 } {
                segments.extend(used.contains(&segment).then_some(case.directories.len()));
                case.directories.push(WILD);
            }
            let list = (entry.sink_pages + entry.ring_pages) as usize;
            case.steady.extend(std::iter::repeat_n(WILD, rows * list));
            for (head, page) in (0..kv_heads).flat_map(|head| pages.clone().map(move |page| (head, page))) {
                if chunks > 0 {
                    let row = (first_row + head) as u32;
                    places.push((
                        entry.steady_place(row, page as u32) as usize,
                        case.entries.len(),
                        head,
                        page,
                    ));
                }
            }
            // One without a chunk may be there only to fill the batch.
            case.entries.push(if chunks == 0 && rng.random_bool(0.5) { wild_entry() } else { entry });
        }
        case.directories.push(WILD);
        case.segments = segments.len() + 1;
        let mut ids: Vec<u32> = (0..case.segments as u32).collect();
        ids.shuffle(rng);
        segments.iter().zip(ids).for_each(|(place, id)| case.directories[*place] = id);

        // Pages in any order, each with the keys of its tokens.
        places.shuffle(rng);
        let page_words = page_tokens * head_words;
        case.pool = vec![nan(); (places.len() + 1) * 2 * page_words];
        for (number, (place, request, head, page)) in places.into_iter().enumerate() {
            case.steady[place] = number as u32;
            let entry = &case.entries[request];
            let end = (entry.new_partition + entry.new_partitions) as usize * chunk_tokens;
            for token in page * page_tokens..end.min((page + 1) * page_tokens) {
                let from = (case.first_token[request] as usize + token) * width + head * head_words;
                let to = 2 * number * page_words + token % page_tokens * head_words;
                let key = case.keys[from..from + head_words].to_vec();
                case.pool[to..to + head_words].copy_from_slice(&key);
            }
        }
        case
    }

    /// Partitions of the batch.
    pub fn chunks(&self) -> usize {
        *self.first_chunk.last().unwrap() as usize
    }

    /// Row of KV head 0, and rows of a request.
    pub fn rows(&self) -> (usize, usize) {
        let kv_heads = self.gate.gates.shape().kv_heads;
        (self.gate.layer * kv_heads, LAYERS * kv_heads)
    }

    /// Summaries before the launch: poison.
    pub fn summaries(&self) -> Vec<u128> {
        vec![POISON; self.segments * self.rows().1 * self.segment_partitions * self.gate.rank_words()]
    }

    /// Whether summaries are what the CPU reference makes of the keys, and nothing else was written.
    ///
    /// # Errors
    /// The first element that differs.
    pub fn check(&self, summaries: &[u128]) -> Result<(), String> {
        let (GateCase { gates, layer }, width) = (&self.gate, self.gate.rank_words());
        let (kv_heads, head_words) = (gates.shape().kv_heads, self.gate.head_words());
        let (first_row, rows) = self.rows();
        let mut untouched = self.summaries();
        for (request, entry) in self.entries.iter().enumerate().filter(|(_, entry)| entry.tokens > 0) {
            for (chunk, head) in
                (0..entry.new_partitions).flat_map(|chunk| (0..kv_heads).map(move |head| (chunk, head)))
            {
                let partition = (entry.new_partition + chunk) as usize;
                let first = partition * self.chunk_tokens;
                let keys = (first..first + self.chunk_tokens).flat_map(|token| {
                    let row = (self.first_token[request] as usize + token) * kv_heads + head;
                    &self.keys[row * head_words..][..head_words]
                });
                let keys: Vec<u128> = keys.copied().collect();
                let mut expected = vec![0.0; gates.rank()];
                let keys = bytemuck::cast_slice::<_, bf16>(&keys).to_f32_vec();
                let place = Place { layer: *layer, kv_head: head };
                cpu::gate_key(gates, place, first, &keys, &mut expected);
                let segment =
                    self.directories[entry.directory as usize + partition / self.segment_partitions];
                let row = segment as usize * rows + first_row + head;
                let at = (row * self.segment_partitions + partition % self.segment_partitions) * width;
                let what = || format!("request {request}, partition {partition}, KV head {head}");
                self.gate.close(&summaries[at..at + width], &expected, what)?;
                untouched[at..at + width].copy_from_slice(&summaries[at..at + width]);
            }
        }
        if untouched == summaries { Ok(()) } else { Err("something else was written".to_owned()) }
    }

    /// The summaries after `gate_key` ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        if self.chunks() == 0 {
            return Ok(self.summaries());
        }
        let (keys, summaries) = (pairs(&self.keys), words(&self.summaries()));
        let entries = words(&entry_words(&self.entries));
        let directories = Buffer::from_slice(&self.directories);
        let (first_token, first_chunk) =
            (Buffer::from_slice(&self.first_token), Buffer::from_slice(&self.first_chunk));
        let (of, kv_heads) = (self.gate.buffers(true), self.gate.gates.shape().kv_heads as u32);
        let (first_row, rows) = self.rows();
        Launch::new(self.chunks() as u32 * kv_heads, gate::BLOCK)
            .shared(gate::SHARED_BYTES as usize)
            .seed(schedule)
            .run(|| {
                // SAFETY: the emulator checks every access.
                unsafe {
                    index::gate_key(
                        keys.view(),
                        entries.view(),
                        first_token.view(),
                        first_chunk.view(),
                        directories.view(),
                        self.entries.len() as u32,
                        first_row as u32,
                        rows as u32,
                        kv_heads,
                        self.gate.head_words() as u32,
                        self.chunk_tokens as u32,
                        self.segment_partitions as u32,
                        of.frequencies.view(),
                        of.shrink,
                        of.weights.view(),
                        of.rank,
                        of.norm.view(),
                        of.norms,
                        GATE_EPS,
                        of.gate_frequencies.view(),
                        of.gate_magnitude,
                        summaries.view_mut(),
                    );
                }
            })?;
        Ok(to_words(&summaries))
    }

    /// The summaries after `gate_key_step` ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_step(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let (pool, summaries) = (pairs(&self.pool), words(&self.summaries()));
        let entries = words(&entry_words(&self.entries));
        let (directories, steady) = (Buffer::from_slice(&self.directories), Buffer::from_slice(&self.steady));
        let (of, kv_heads) = (self.gate.buffers(true), self.gate.gates.shape().kv_heads as u32);
        let (first_row, rows) = self.rows();
        Launch::new(self.entries.len() as u32 * kv_heads, gate::BLOCK)
            .shared(gate::SHARED_BYTES as usize)
            .seed(schedule)
            .run(|| {
                // SAFETY: the emulator checks every access.
                unsafe {
                    index::gate_key_step(
                        entries.view(),
                        steady.view(),
                        pool.view(),
                        directories.view(),
                        first_row as u32,
                        rows as u32,
                        kv_heads,
                        self.gate.head_words() as u32,
                        self.page_tokens as u32,
                        self.chunk_tokens as u32,
                        self.segment_partitions as u32,
                        of.frequencies.view(),
                        of.shrink,
                        of.weights.view(),
                        of.rank,
                        of.norm.view(),
                        of.norms,
                        GATE_EPS,
                        of.gate_frequencies.view(),
                        of.gate_magnitude,
                        summaries.view_mut(),
                    );
                }
            })?;
        Ok(to_words(&summaries))
    }
}

/// A launch of `gate_query` for a batch.
#[derive(Debug)]
pub struct GateQueryCase {
    /// The gate.
    pub gate: GateCase,
    /// `[batch]`: `tokens`; the rest is wild.
    pub entries: Vec<Entry>,
    /// `[batch, kv_heads * group, head_words]`: bf16; NaN for entries without tokens.
    pub queries: Vec<u128>,
}

impl GateQueryCase {
    /// The case of a seed: groups of up to 16, entries that only fill the batch included.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (kv_heads, group) = (rng.random_range(1..=3), pick(&mut rng, &[1, 2, 3, 4, 5, 8, 16]));
        let head_words = pick(&mut rng, &[8, 16]);
        let gate = GateCase::random(&mut rng, kv_heads, group, head_words);
        let (mut entries, mut queries) = (Vec::new(), Vec::new());
        for _ in 0..rng.random_range(1..=4) {
            let idle = rng.random_bool(0.25);
            let tokens = pick(&mut rng, &[1, 2, 65, 1000, 32_768, 131_072]);
            entries.push(if idle { wild_entry() } else { Entry { tokens, ..wild_entry() } });
            queries.extend((0..kv_heads * group * head_words).map(|_| {
                let eight = std::array::from_fn(|_| bf16::from_f32(rng.random_range(-3.0..3.0_f32)));
                if idle { nan() } else { bytemuck::cast::<[bf16; WORD_ELEMENTS], u128>(eight) }
            }));
        }
        Self { gate, entries, queries }
    }

    /// Gate queries before the launch: poison.
    pub fn gate_queries(&self) -> Vec<u128> {
        vec![POISON; self.entries.len() * self.gate.gates.shape().kv_heads * self.gate.rank_words()]
    }

    /// Whether gate queries are those of the CPU reference, and none was written for an entry without tokens.
    ///
    /// # Errors
    /// The first element that differs.
    pub fn check(&self, found: &[u128]) -> Result<(), String> {
        let (GateCase { gates, layer }, width) = (&self.gate, self.gate.rank_words());
        let kv_heads = gates.shape().kv_heads;
        let of_row = gates.shape().group() * self.gate.head_words();
        for (row, found) in found.chunks_exact(width).enumerate() {
            let (entry, kv_head) = (&self.entries[row / kv_heads], row % kv_heads);
            let what = || format!("entry {}, KV head {kv_head}", row / kv_heads);
            if entry.tokens == 0 {
                let poison = found.iter().all(|word| *word == POISON);
                poison.then_some(()).ok_or_else(|| format!("{}: written", what()))?;
                continue;
            }
            let queries =
                bytemuck::cast_slice::<_, bf16>(&self.queries[row * of_row..][..of_row]).to_f32_vec();
            let mut expected = vec![0.0; gates.rank()];
            let place = Place { layer: *layer, kv_head };
            cpu::gate_query(gates, place, entry.tokens as usize - 1, &queries, &mut expected);
            self.gate.close(found, &expected, what)?;
        }
        Ok(())
    }

    /// The gate queries after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let (queries, gate_queries) = (words(&self.queries), words(&self.gate_queries()));
        let entries = words(&entry_words(&self.entries));
        let (of, shape) = (self.gate.buffers(false), self.gate.gates.shape());
        let (kv_heads, group) = (shape.kv_heads as u32, shape.group() as u32);
        Launch::new(self.entries.len() as u32 * kv_heads, gate::BLOCK)
            .shared(gate::SHARED_BYTES as usize)
            .seed(schedule)
            .run(|| {
                // SAFETY: the emulator checks every access.
                unsafe {
                    select::gate_query(
                        entries.view(),
                        queries.view(),
                        self.gate.layer as u32 * kv_heads,
                        kv_heads,
                        group,
                        self.gate.head_words() as u32,
                        of.frequencies.view(),
                        of.shrink,
                        of.weights.view(),
                        of.rank,
                        of.norm.view(),
                        of.norms,
                        GATE_EPS,
                        of.gate_frequencies.view(),
                        of.gate_magnitude,
                        gate_queries.view_mut(),
                    );
                }
            })?;
        Ok(to_words(&gate_queries))
    }
}

/// Words as pairs of bf16.
fn pairs(words: &[u128]) -> Buffer<u32> {
    Buffer::from_slice(bytemuck::cast_slice(words))
}

/// A word that makes everything that it comes into NaN.
fn nan() -> u128 {
    bytemuck::cast([bf16::NAN; WORD_ELEMENTS])
}

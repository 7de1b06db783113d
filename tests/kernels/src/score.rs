//! Cases of `score`.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::bound;
use spinkv_kernels::abi::score::{MAX_GROUP, TILE_UNIT, tile, tiles};
use spinkv_kernels::abi::{Entry, WORD_ELEMENTS};

use super::{WILD, pick};

/// What outputs hold before.
const POISON: f32 = -1.25e30;

/// A launch of `score` on a ragged batch of random summaries.
#[derive(Debug)]
pub struct ScoreCase {
    /// `[batch]`; some only fill the batch.
    pub entries: Vec<Entry>,
    /// All requests' directories; wild where no partition of a request lies.
    pub directories: Vec<u32>,
    /// `[segments, request_rows, segment_partitions, summary_words]`: NaN where no partition may be read.
    pub summaries: Vec<u128>,
    /// `[batch, kv_heads * group, head_words]`.
    pub queries: Vec<u128>,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Words of a query.
    pub head_words: usize,
    /// Whether summaries are bounds.
    pub bounds: bool,
    /// Partitions of a segment.
    pub segment_partitions: usize,
    /// Layers of a request.
    pub layers: usize,
    /// Whose summaries.
    pub layer: usize,
    /// Factor of the logits.
    pub scale: f32,
    /// Room for a row's logits.
    pub stride: usize,
    /// Tiles of a row.
    pub tiles: u32,
    /// `[rows of all requests, 2]`: how many partitions rows have, before and after a run. Empty where the entries say it.
    pub row_pages: Vec<u32>,
    /// `[rows of all requests, mark_words]`: bits of partitions that are read in any case. Empty for none.
    pub always: Vec<u32>,
    /// Words of a row's.
    pub mark_words: usize,
}

impl ScoreCase {
    /// The case of a seed: groups of 1 to 16, any head width from 8 to 256, bounds, lengths around tiles' borders, entries that only
    /// fill the batch.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let group = pick(&mut rng, &[1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 12, 16]);
        let head_words = pick(&mut rng, &[1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 16, 16, 17, 20, 31, 32]);
        let segment_partitions = pick(&mut rng, &[1, 3, 16, 64, 100, 512]);
        let lengths = [0, 1, 7, 8, 9, 15, 16, 17, 100, 128, 129, 511, 512, 513, 600];
        let most = if head_words > 16 { 200 } else { 600 };
        let batch = rng.random_range(1..=3);
        let kv_heads = rng.random_range(1..=3);
        let lengths = (0..batch).map(|_| pick(&mut rng, &lengths).min(most)).collect::<Vec<_>>();
        Self::sized(&mut rng, &lengths, [kv_heads, group, head_words, segment_partitions])
    }

    /// A small case of a few tiles.
    pub fn small(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), &[37, 530], [1, 5, 4, 64])
    }

    /// Requests of up to 64K tokens in chunks of 8, 8 heads of 128, groups of 5.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), &[8192, 5000, 1, 0, 3333], [8, 5, 16, 512])
    }

    fn sized(
        rng: &mut impl Rng,
        lengths: &[usize],
        [kv_heads, group, head_words, segment_partitions]: [usize; 4],
    ) -> Self {
        let layers = rng.random_range(1..=3_usize);
        let bounds = rng.random_bool(0.3);
        let mut case = Self {
            entries: Vec::new(),
            directories: vec![WILD; rng.random_range(0..3)],
            summaries: Vec::new(),
            queries: words(rng, lengths.len() * kv_heads * group * head_words, 0.0),
            kv_heads,
            group,
            head_words,
            bounds,
            segment_partitions,
            layers,
            layer: rng.random_range(0..layers),
            scale: 1.0 / ((head_words * WORD_ELEMENTS) as f32).sqrt(),
            row_pages: Vec::new(),
            always: Vec::new(),
            mark_words: 0,
            tiles: 0,
            stride: (lengths.iter().max().unwrap() + rng.random_range(0..20)).max(1).next_multiple_of(4),
        };
        case.tiles = (case.stride as u32).div_ceil(TILE_UNIT * pick(rng, &[1, 2, 3, 4, 8]));
        for &partitions in lengths {
            let first_partition = rng.random_range(0..2 * segment_partitions);
            let end = first_partition + partitions;
            let filler = partitions > 0 && rng.random_bool(0.1);
            case.entries.push(Entry {
                tokens: if filler { 0 } else { 9 },
                directory: if filler { WILD } else { case.directories.len() as u32 },
                first_partition: first_partition as u32,
                partitions: partitions as u32,
                ..Entry::default()
            });
            let segments = if partitions == 0 { 0 } else { end.div_ceil(segment_partitions) };
            for segment in 0..if filler { 0 } else { segments } {
                let used = (segment + 1) * segment_partitions > first_partition;
                case.directories.push(if used { 0 } else { WILD });
            }
        }
        if rng.random_bool(0.3) {
            let rows = lengths.len() * layers * kv_heads;
            let most = 2 * *lengths.iter().max().unwrap() as u32;
            case.row_pages = (0..2 * rows).map(|_| rng.random_range(0..=most)).collect();
            case.entries
                .iter_mut()
                .for_each(|entry| entry.new_partitions = rng.random_range(0..=layers as u32));
        }
        if rng.random_bool(0.3) {
            let rows = lengths.len() * layers * kv_heads;
            case.mark_words = case.stride.div_ceil(32) + rng.random_range(0..2);
            let odds = pick(rng, &[0.05, 0.5, 1.0]);
            let word = |rng: &mut _| {
                (0..32).fold(0, |word, bit| word | u32::from(Rng::random_bool(rng, odds)) << bit)
            };
            case.always = (0..rows * case.mark_words).map(|_| word(rng)).collect();
        }
        for (request, entry) in case.entries.iter_mut().enumerate() {
            entry.first_marks = (request * layers * kv_heads) as u32;
        }
        // Segments in an order of their own.
        let used = case.directories.iter().filter(|segment| **segment != WILD).count();
        let mut segments: Vec<u32> = (0..used as u32).collect();
        segments.shuffle(rng);
        for place in case.directories.iter_mut().filter(|segment| **segment != WILD) {
            *place = segments.pop().unwrap();
        }
        let nan = bytemuck::cast([bf16::NAN; WORD_ELEMENTS]);
        let block = layers * kv_heads * segment_partitions * case.summary_words();
        case.summaries = vec![nan; used * block];
        for request in 0..lengths.len() {
            for (head, at) in case.places(request) {
                let place = case.summary(request, head, at) * case.summary_words();
                let mut summary = words(rng, case.summary_words(), 0.5);
                if bounds {
                    let elements: &mut [bf16] = bytemuck::cast_slice_mut(&mut summary);
                    let (least, greatest) = elements.split_at_mut(head_words * WORD_ELEMENTS);
                    for (low, high) in least.iter_mut().zip(greatest) {
                        (*low, *high) = (low.min(*high), low.max(*high));
                    }
                }
                case.summaries[place..][..summary.len()].copy_from_slice(&summary);
            }
        }
        case
    }

    /// The same with the tiles that its launch on a GPU has.
    pub fn tiled_as_launched(self) -> Self {
        Self { tiles: tiles(self.rows() as u64, self.stride as u32), ..self }
    }

    /// Words of a summary.
    pub fn summary_words(&self) -> usize {
        self.head_words << usize::from(self.bounds)
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.entries.len() * self.kv_heads
    }

    /// Head and place of each partition of a request.
    fn places(&self, request: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let heads = (0..self.kv_heads).map(|head| (head, self.partitions(request, head)));
        let heads = heads.collect::<Vec<_>>().into_iter();
        heads.flat_map(|(head, partitions)| (0..partitions).map(move |at| (head, at)))
    }

    /// Partitions of a row.
    fn partitions(&self, request: usize, head: usize) -> usize {
        let entry = self.entries[request];
        if entry.tokens == 0 {
            return 0;
        }
        let place = entry.first_marks as usize + self.layer * self.kv_heads + head;
        let last = usize::from(self.layer as u32 >= entry.new_partitions);
        let pages = self.row_pages.get(2 * place + last);
        pages.map_or(entry.partitions, |pages| entry.partitions.min(*pages)) as usize
    }

    /// Whether partition `at` of a row is read in any case.
    fn is_always(&self, request: usize, head: usize, at: usize) -> bool {
        let row = self.entries[request].first_marks as usize + self.layer * self.kv_heads + head;
        self.always.get(row * self.mark_words + at / 32).is_some_and(|word| word >> (at % 32) & 1 != 0)
    }

    /// Which summary partition `at` of a request's row has.
    fn summary(&self, request: usize, head: usize, at: usize) -> usize {
        let entry = self.entries[request];
        let partition = entry.first_partition as usize + at;
        let segment = self.directories[entry.directory as usize + partition / self.segment_partitions];
        let row = self.layer * self.kv_heads + head;
        let block = segment as usize * self.layers * self.kv_heads + row;
        block * self.segment_partitions + partition % self.segment_partitions
    }

    /// The logits before the launch.
    pub fn logits(&self) -> Vec<f32> {
        vec![POISON; self.rows() * self.group * self.stride]
    }

    /// The statistics before the launch.
    pub fn statistics(&self) -> Vec<f32> {
        vec![POISON; self.rows() * self.group * self.tiles as usize * 2]
    }

    /// Whether logits and statistics are right.
    ///
    /// A logit may differ from its f64 value by what f32 sums of exact products can be off in any order, which is the number of
    /// summands times 2^-23 (the tensor cores truncate, so a whole unit in the last place each) of the sum of the summands'
    /// magnitudes. Statistics are compared with those of the logits found: the greatest exactly, the sum to 2^-15, since each
    /// exponential is off by 2^-22 and by 2^-24 of its argument in units of log2, which is below 2^6 where it counts.
    ///
    /// # Errors
    /// The first number that is wrong, or a write beyond a row.
    pub fn check(&self, logits: &[f32], statistics: &[f32]) -> Result<(), String> {
        assert!(self.group <= MAX_GROUP as usize);
        let width = self.summary_words() * WORD_ELEMENTS;
        let head_dim = self.head_words * WORD_ELEMENTS;
        let summaries = bytemuck::cast_slice::<_, bf16>(&self.summaries).to_f32_vec();
        let queries = bytemuck::cast_slice::<_, bf16>(&self.queries).to_f32_vec();
        let tiles = self.tiles as usize;
        for row in 0..self.rows() {
            let (request, head) = (row / self.kv_heads, row % self.kv_heads);
            let partitions = self.partitions(request, head);
            for member in 0..self.group {
                let of_head = row * self.group + member;
                let query = &queries[of_head * head_dim..][..head_dim];
                let found = &logits[of_head * self.stride..][..self.stride];
                if found[partitions..].iter().any(|logit| *logit != POISON) {
                    return Err(format!("row {row}, head {member}: written beyond {partitions} partitions"));
                }
                for (at, found) in found[..partitions].iter().enumerate() {
                    let summary = &summaries[self.summary(request, head, at) * width..][..width];
                    let (expected, magnitude) = self.logit(query, summary);
                    let tolerance = magnitude * (width as f64 + 2.0) * 2_f64.powi(-23);
                    if (f64::from(*found) - expected).abs() > tolerance || found.is_nan() {
                        return Err(format!(
                            "row {row}, head {member}, partition {at}: {found} where {expected} +- {tolerance:e} was expected"
                        ));
                    }
                }
                let width = tile(partitions as u32, self.tiles) as usize;
                for tile in 0..tiles {
                    let first = (tile * width).min(partitions);
                    let of_tile = first..partitions.min(first + width);
                    let any = !of_tile.is_empty();
                    let counted = of_tile.filter(|at| !self.is_always(request, head, *at));
                    let of_tile: Vec<f32> = counted.map(|at| found[at]).collect();
                    let place = (of_head * tiles + tile) * 2;
                    let (greatest, sum) = (statistics[place], f64::from(statistics[place + 1]));
                    let nothing = if any { f32::NEG_INFINITY } else { POISON };
                    let expected = of_tile.iter().copied().reduce(f32::max).unwrap_or(nothing);
                    let exps = of_tile.iter().map(|logit| (f64::from(*logit) - f64::from(expected)).exp());
                    let expected_sum = if any { exps.sum() } else { f64::from(POISON) };
                    let off = if sum == expected_sum {
                        0.0
                    } else {
                        (sum - expected_sum).abs() / expected_sum.abs()
                    };
                    if greatest != expected || off.is_nan() || off > 2_f64.powi(-15) {
                        return Err(format!(
                            "row {row}, head {member}, tile {tile}: {greatest} and {sum} where {expected} and {expected_sum} were \
                             expected"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// A logit, and the sum of its summands' magnitudes.
    fn logit(&self, query: &[f32], summary: &[f32]) -> (f64, f64) {
        let scale = f64::from(self.scale);
        let product = |(q, s): (&f32, &f32)| f64::from(*q) * f64::from(*s);
        let magnitude: f64 = query.iter().cycle().zip(summary).map(product).map(f64::abs).sum();
        let sum = if self.bounds {
            // The reference is in f32: of its own rounding there is as much again as of the kernel's.
            let (least, greatest) = summary.split_at(query.len());
            let exact: f64 = (query.iter().zip(least).map(product))
                .zip(query.iter().zip(greatest).map(product))
                .map(|(a, b)| a.max(b))
                .sum();
            assert!((exact - f64::from(bound(query, summary))).abs() <= magnitude * 1e-4);
            exact
        } else {
            query.iter().zip(summary).map(product).sum()
        };
        (scale * sum, scale * magnitude)
    }
}

/// Random bf16, about `mean`.
fn words(rng: &mut impl Rng, count: usize, mean: f32) -> Vec<u128> {
    let element = |rng: &mut _| bf16::from_f32(mean + Rng::random_range(rng, -2.0..2.0_f32));
    (0..count)
        .map(|_| bytemuck::cast::<[bf16; WORD_ELEMENTS], _>(std::array::from_fn(|_| element(rng))))
        .collect()
}

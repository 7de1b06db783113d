//! Cases of the kernels that cluster a run of tokens, stage by stage.
//!
//! A stage takes the state that it finds to the one that the reference makes of it, so a stage is checked in bits even where one before it
//! chose between two centroids that are equally good.

mod emulate;
mod reference;

use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::cluster::{max_pages, start_token, sums};
use spinkv_kernels::abi::{SLAB_PAGES, WORD_ELEMENTS};

use super::{POISON, WILD, pick};

/// A launch, or two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `cluster_sums`.
    Sums,
    /// `cluster_start`.
    Start,
    /// `cluster_assign_64` or `_128`, of spans.
    Assign,
    /// `cluster_update`.
    Update,
    /// `cluster_assign_64` or `_128`, of all centroids, which are counted.
    AssignAll,
    /// `cluster_pages`.
    Pages,
    /// `cluster_list`.
    List,
    /// `cluster_means`.
    Means,
    /// `cluster_store`.
    Store,
}

/// All that the kernels write.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// `[parts, kv_heads, 2 * head_words]` words of f32.
    pub sums: Vec<u128>,
    /// `[kv_heads, 2 * head_words]` words of f32.
    pub means: Vec<u128>,
    /// `[kv_heads, clusters, head_words]`.
    pub centroids: Vec<u128>,
    /// `[kv_heads, clusters]`.
    pub biases: Vec<f32>,
    /// `[kv_heads, tokens, rounded up to 4]`.
    pub assigned: Vec<u32>,
    /// `[kv_heads, clusters]`.
    pub sizes: Vec<u32>,
    /// `[rows of all requests, 2]`: pages before the run and after it.
    pub row_pages: Vec<u32>,
    /// `[kv_heads, clusters]`.
    pub firsts: Vec<u32>,
    /// `[segments, request_rows, segment_partitions]`.
    pub partition_tokens: Vec<u32>,
    /// `[segments, request_rows, segment_partitions, head_words]`.
    pub summaries: Vec<u128>,
    /// As above.
    pub value_means: Vec<u128>,
    /// `[kv_heads, member_pages, page_tokens]`.
    pub members: Vec<u32>,
    /// `[slabs, 16, 2, page_tokens, head_words]`.
    pub host_pages: Vec<u128>,
    /// A u32 for each place of the host table.
    pub host_valid: Vec<u32>,
}

/// A run of tokens of one layer of one request.
#[derive(Clone, Debug)]
pub struct ClusterCase {
    /// `[first + tokens and more, kv_heads, head_words]`; tokens beyond the run make everything that they come into NaN.
    pub keys: Vec<u128>,
    /// As the keys.
    pub values: Vec<u128>,
    /// The run's first token.
    pub first: usize,
    /// Its tokens.
    pub tokens: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Words of a key, 8 or 16.
    pub head_words: usize,
    /// Spans of the run.
    pub spans: usize,
    /// Centroids of a span.
    pub span_centroids: usize,
    /// Iterations before the last pass.
    pub iterations: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Segments of partitions; wild but for the request's.
    pub directories: Vec<u32>,
    /// Where the request's begin.
    pub directory: usize,
    /// Segments that there are.
    pub segments: usize,
    /// Row of KV head 0.
    pub first_row: usize,
    /// Rows of the request.
    pub request_rows: usize,
    /// Partitions of a segment.
    pub segment_partitions: usize,
    /// Partitions that the request has room for.
    pub capacity: usize,
    /// Of each row, by earlier runs: pages.
    pub before: Vec<u32>,
    /// The place of the request's row 0 among the rows of all requests.
    pub first_place: usize,
    /// Host table; wild but for the slabs of pages that may be written.
    pub host_slabs: Vec<u32>,
    /// Slabs that there are.
    pub slabs: usize,
    /// Where the request's rows begin in the host table.
    pub first_slab: usize,
    /// Slabs between rows.
    pub slab_stride: usize,
    /// Blocks of `cluster_means` and `cluster_store`.
    pub grid: u32,
}

/// What a case's keys are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keys {
    /// Some kinds with noise, and an offset that they share.
    Mixed,
    /// As many kinds as there are centroids in a span, in turn, so that each kind starts one; little noise.
    InTurn,
    /// Small whole numbers: every sum of a product is exact.
    Whole,
}

impl ClusterCase {
    /// The case of a seed: spans of unequal length, of fewer centroids than a tile has and of more, all sizes of pages, earlier runs.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let spans = pick(&mut rng, &[1, 1, 2, 3]);
        let span_centroids = pick(&mut rng, &[8, 16, 24, 64, 72, 136]);
        let tokens = spans * span_centroids + rng.random_range(0..300);
        let sizes = [tokens, rng.random_range(1..=3), pick(&mut rng, &[8, 16]), spans, span_centroids];
        Self::sized(&mut rng, Keys::Mixed, sizes)
    }

    /// One long span, of several lists for each cluster and of more partial sums than are added at a time.
    pub fn long(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let head_words = pick(&mut rng, &[8, 16]);
        Self { iterations: 1, ..Self::sized(&mut rng, Keys::Mixed, [8300, 1, head_words, 1, 8]) }
    }

    /// 9,000 tokens of 8 heads of 128, in two spans of as many centroids as RetroInfer has for them.
    pub fn large(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let case = Self::sized(&mut rng, Keys::Mixed, [9011, 8, 16, 2, 280]);
        Self { iterations: 3, ..case }
    }

    /// Eight kinds of keys in turn, and as many centroids.
    pub fn kinds(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let head_words = pick(&mut rng, &[8, 16]);
        // Centroid i starts as token 9 i + 4: each as another kind.
        Self { iterations: 3, ..Self::sized(&mut rng, Keys::InTurn, [72, 2, head_words, 1, 8]) }
    }

    /// Keys of small whole numbers, with a state before `Assign` whose centroids are too, many of them twice: the one answer that there is does not
    /// depend on the order of sums.
    pub fn whole(seed: u64) -> (Self, State) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (spans, span_centroids) =
            (pick(&mut rng, &[1, 2, 3]), pick(&mut rng, &[8, 24, 64, 72, 128, 200]));
        let tokens = spans * span_centroids + rng.random_range(0..300);
        let sizes = [tokens, rng.random_range(1..=3), pick(&mut rng, &[8, 16]), spans, span_centroids];
        let case = Self::sized(&mut rng, Keys::Whole, sizes);
        let mut state = case.state();
        let mut centroids: Vec<Vec<u128>> = Vec::new();
        for place in 0..case.kv_heads * case.clusters() {
            let twice = !centroids.is_empty() && rng.random_bool(0.5);
            let other = if twice { rng.random_range(0..centroids.len()) } else { 0 };
            let own = (0..case.head_words).map(|_| whole(&mut rng)).collect();
            centroids.push(if twice { centroids[other].clone() } else { own });
            state.biases[place] = if twice { state.biases[other] } else { rng.random_range(-4..=4) as f32 };
        }
        state.centroids = centroids.concat();
        state.sizes.fill(0);
        (case, state)
    }

    fn sized(
        rng: &mut ChaCha8Rng,
        keys: Keys,
        [tokens, kv_heads, head_words, spans, span_centroids]: [usize; 5],
    ) -> Self {
        let clusters = spans * span_centroids;
        let page_tokens = pick(rng, &[1, 2, 3, 4, 8, 8, 16]);
        let layers = rng.random_range(1..=2);
        let first_row = rng.random_range(0..layers) * kv_heads;
        let before: Vec<u32> =
            (0..kv_heads).map(|_| if rng.random_bool(0.5) { 0 } else { rng.random_range(0..40) }).collect();
        let most = before.iter().max().copied().unwrap() as usize;
        let pages = most + max_pages(tokens as u32, clusters as u32, page_tokens as u32) as usize;
        let capacity = pages + rng.random_range(0..20);
        let segment_partitions = pick(rng, &[1, 7, 64, 512]);
        let request_segments = capacity.div_ceil(segment_partitions);
        let directory = rng.random_range(0..3);
        let segments = request_segments + 1;
        let mut ids: Vec<u32> = (0..segments as u32).collect();
        ids.shuffle(rng);
        let mut directories = vec![WILD; directory];
        directories.extend(&ids[..request_segments]);
        directories.push(WILD);

        let row_slabs = pages.div_ceil(SLAB_PAGES as usize);
        let slab_stride = row_slabs + rng.random_range(0..2);
        let first_slab = rng.random_range(0..3);
        let slabs = kv_heads * row_slabs + 1;
        let mut ids: Vec<u32> = (0..slabs as u32).collect();
        ids.shuffle(rng);
        let mut host_slabs = vec![WILD; first_slab + layers * kv_heads * slab_stride + 1];
        for head in 0..kv_heads {
            for slab in 0..row_slabs {
                host_slabs[first_slab + (first_row + head) * slab_stride + slab] = ids.pop().unwrap();
            }
        }
        let first = rng.random_range(0..9);
        let mut case = Self {
            keys: Vec::new(),
            values: Vec::new(),
            first,
            tokens,
            kv_heads,
            head_words,
            spans,
            span_centroids,
            iterations: 2,
            page_tokens,
            directories,
            directory,
            segments,
            first_row,
            request_rows: layers * kv_heads,
            segment_partitions,
            capacity,
            before,
            first_place: rng.random_range(0..5),
            host_slabs,
            slabs,
            first_slab,
            slab_stride,
            grid: rng.random_range(1..=5),
        };
        case.fill(rng, keys);
        case
    }

    fn fill(&mut self, rng: &mut ChaCha8Rng, keys: Keys) {
        let channels = self.head_words * WORD_ELEMENTS;
        let kinds = if keys == Keys::InTurn { self.span_centroids } else { rng.random_range(1..40) };
        let noise = if keys == Keys::InTurn { 0.05 } else { 0.5 };
        // Of each head: an offset that is large in some channels, and the kinds' directions.
        let heads: Vec<(Vec<f32>, Vec<Vec<f32>>)> = (0..self.kv_heads)
            .map(|_| {
                let offset =
                    |rng: &mut ChaCha8Rng| normal(rng) * if rng.random_bool(0.1) { 6.0 } else { 0.3 };
                let offset = (0..channels).map(|_| offset(rng)).collect();
                (offset, (0..kinds).map(|_| (0..channels).map(|_| normal(rng)).collect()).collect())
            })
            .collect();
        let nowhere: Vec<u128> =
            vec![bytemuck::cast([bf16::NAN; WORD_ELEMENTS]); self.kv_heads * self.head_words];
        for _ in 0..self.first {
            self.keys.extend(&nowhere);
        }
        for token in 0..self.tokens {
            for (offset, directions) in &heads {
                let kind = if keys == Keys::InTurn { token % kinds } else { rng.random_range(0..kinds) };
                let key: Vec<bf16> = (0..channels)
                    .map(|at| bf16::from_f32(offset[at] + directions[kind][at] + noise * normal(rng)))
                    .collect();
                if keys == Keys::Whole {
                    self.keys.extend((0..self.head_words).map(|_| whole(rng)));
                } else {
                    self.keys.extend_from_slice(&bytemuck::pod_collect_to_vec::<_, u128>(&key));
                }
            }
        }
        self.keys.extend(&nowhere);
        // What is added between two of the large ones that cancel loses bits, so the order of a sum shows.
        let number = |rng: &mut ChaCha8Rng| match rng.random_range(0..200) {
            0 => bf16::from_f32(4_194_304.0),
            1 => bf16::from_f32(-4_194_304.0),
            _ => bf16::from_f32(normal(rng)),
        };
        let run = self.first * nowhere.len()..(self.first + self.tokens) * nowhere.len();
        self.values = self.keys.clone();
        for word in &mut self.values[run] {
            *word = bytemuck::cast::<[bf16; WORD_ELEMENTS], _>(std::array::from_fn(|_| number(rng)));
        }
    }

    /// Clusters of a row.
    pub fn clusters(&self) -> usize {
        self.spans * self.span_centroids
    }

    /// Pages of a row that the list of members has room for.
    pub fn member_pages(&self) -> usize {
        max_pages(self.tokens as u32, self.clusters() as u32, self.page_tokens as u32) as usize
    }

    /// All stages, in order.
    pub fn stages(&self) -> Vec<Stage> {
        let mut stages = vec![Stage::Sums, Stage::Start];
        for _ in 0..self.iterations {
            stages.extend([Stage::Assign, Stage::Update]);
        }
        stages.extend([Stage::AssignAll, Stage::Pages, Stage::List, Stage::Means, Stage::Store]);
        stages
    }

    /// Before the first stage: poison, but for sizes of 0, the pages of earlier runs and some valid bits.
    pub fn state(&self) -> State {
        let Self { kv_heads, head_words, tokens, .. } = *self;
        let clusters = kv_heads * self.clusters();
        let partitions = self.segments * self.request_rows * self.segment_partitions;
        let words = |words: usize| vec![POISON; words];
        let poison = POISON as u32;
        // What is behind the last token may look like a cluster.
        let mut assigned = vec![self.clusters() as u32 - 1; tokens.next_multiple_of(4)];
        assigned[..tokens].fill(poison);
        let mut row_pages = vec![poison; 2 * (self.first_place + self.request_rows) + 2];
        let first_place = 2 * (self.first_place + self.first_row);
        self.before.iter().enumerate().for_each(|(row, pages)| row_pages[first_place + 2 * row + 1] = *pages);
        State {
            sums: words(sums::parts(tokens as u32) as usize * kv_heads * 2 * head_words),
            means: words(kv_heads * 2 * head_words),
            centroids: words(clusters * head_words),
            biases: vec![f32::from_bits(poison); clusters],
            assigned: assigned.repeat(kv_heads),
            sizes: vec![0; clusters],
            row_pages,
            firsts: vec![poison; clusters],
            partition_tokens: vec![poison; partitions],
            summaries: words(partitions * head_words),
            value_means: words(partitions * head_words),
            members: vec![poison; kv_heads * self.member_pages() * self.page_tokens],
            host_pages: words(self.slabs * SLAB_PAGES as usize * 2 * self.page_tokens * head_words),
            host_valid: (0..self.host_slabs.len()).map(|place| (place % 3 == 0).into()).collect(),
        }
    }

    /// Whether the clusters of [`kinds`](Self::kinds) are the kinds: of each head, the tokens of a kind in the cluster that started as one of them.
    ///
    /// # Errors
    /// The first token that is elsewhere.
    pub fn check_kinds(&self, state: &State) -> Result<(), String> {
        let kind = |cluster: u32| {
            start_token(self.tokens as u32, self.span_centroids as u32, cluster) as usize
                % self.span_centroids
        };
        for (head, assigned) in state.assigned.chunks(self.tokens.next_multiple_of(4)).enumerate() {
            for (token, cluster) in assigned[..self.tokens].iter().enumerate() {
                let (kind, found) = (token % self.span_centroids, kind(*cluster));
                if found != kind {
                    return Err(format!(
                        "head {head}, token {token}: kind {kind} in a cluster of kind {found}"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// A word of small whole numbers.
fn whole(rng: &mut impl Rng) -> u128 {
    bytemuck::cast::<[bf16; WORD_ELEMENTS], _>(std::array::from_fn(|_| {
        bf16::from_f32(rng.random_range(-2..=2) as f32)
    }))
}

/// About normal.
fn normal(rng: &mut impl Rng) -> f32 {
    let sum: f32 = (0..4).map(|_| rng.random_range(-0.5..0.5_f32)).sum();
    sum * 3.0_f32.sqrt()
}

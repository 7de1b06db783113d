//! Cases of `attend_64` and `attend_128`.

use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::attend::{PAGE_TOKENS, blocks_of_group, partial_words};
use spinkv_kernels::abi::{Entry, WORD_ELEMENTS};

use super::{WILD, pick};

/// Elements of a word.
pub(super) type Elements = [bf16; WORD_ELEMENTS];

/// What outputs hold before.
const POISON: u128 = 0xdead_beef_dead_beef_dead_beef_dead_beef;

/// How keys and queries lie: what a softmax makes of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Peaks {
    /// As random numbers have it.
    Random,
    /// A few tokens have nearly all of the weight.
    Sharp,
    /// One token has all of it, and logits are so far apart that e^(logit - another) is beyond f32.
    Steep,
    /// All tokens weigh nearly the same.
    Flat,
    /// Queries are zero: all tokens weigh the same, so that the logarithm of the sum counts them.
    Census,
}

impl Peaks {
    /// How large keys and queries are.
    pub(super) fn scales(self) -> (f32, f32) {
        match self {
            Self::Random => (1.0, 1.0),
            Self::Sharp => (3.0, 3.0),
            Self::Steep => (12.0, 12.0),
            Self::Flat => (0.05, 0.5),
            Self::Census => (1.0, 0.0),
        }
    }
}

/// A launch on a ragged batch.
#[derive(Debug)]
pub struct AttendCase {
    /// `[batch]`; some only fill the batch.
    pub entries: Vec<Entry>,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Layers of a request.
    pub layers: usize,
    /// Whose steady pages.
    pub layer: usize,
    /// Words of a head: 8 or 16.
    pub head_words: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// `[rows, list_capacity]`.
    pub pages: Vec<u32>,
    /// `[rows]`.
    pub page_counts: Vec<u32>,
    /// Room for a row's selection.
    pub list_capacity: usize,
    /// All steady lists.
    pub steady: Vec<u32>,
    /// `[rows, list_capacity * page_tokens]`, or empty.
    pub biases: Vec<f32>,
    /// `[pages, 2, page_tokens, head_words]`: NaN where no token lies.
    pub pool: Vec<u128>,
    /// `[batch, kv_heads * group, head_words]`.
    pub queries: Vec<u128>,
    /// Factor of the logits.
    pub scale: f32,
    /// Blocks that share a row.
    pub splits: usize,
    /// Of each row its tokens, in order, each as its place in the pool and its bias.
    tokens: Vec<Vec<(usize, f32)>>,
}

impl AttendCase {
    /// The case of a seed: all page sizes, groups of 1 to 16, both head widths, contexts from one token on, selections from none to all,
    /// biases or none, one split and more, of which some have nothing.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_tokens = pick(&mut rng, &PAGE_TOKENS) as usize;
        let group = pick(&mut rng, &[1, 2, 3, 4, 5, 5, 6, 7, 8, 16, 11]);
        let head_words = pick(&mut rng, &[8, 16]);
        let batch = rng.random_range(1..=3);
        let lengths: Vec<usize> =
            (0..batch).map(|_| pick(&mut rng, &[0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 200, 333])).collect();
        // More than eight are put together in several turns.
        let splits = pick(&mut rng, &[1, 1, 2, 3, 7, 9, 20]);
        let peaks = pick(
            &mut rng,
            &[Peaks::Random, Peaks::Random, Peaks::Sharp, Peaks::Steep, Peaks::Flat, Peaks::Census],
        );
        let kv_heads = rng.random_range(1..=2);
        Self::sized(&mut rng, &lengths, [kv_heads, group, head_words, page_tokens, splits], peaks)
    }

    /// A case whose blocks and warps all have something to do.
    pub fn small(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), &[300], [1, 5, 8, 8, 2], Peaks::Random)
    }

    /// Rows of which a warp looks up pages three times: of 16 tiles each, in every fourth of 16 tokens.
    pub fn long(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_tokens = pick(&mut rng, &PAGE_TOKENS) as usize;
        let peaks = pick(&mut rng, &[Peaks::Random, Peaks::Steep, Peaks::Census]);
        let group = pick(&mut rng, &[1, 2, 8]);
        Self::sized(&mut rng, &[2300, 1500], [1, group, 8, page_tokens, 1], peaks)
    }

    /// Selections of 2,048 tokens and more, 8 heads of 128 in groups of 5.
    pub fn large(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_tokens = pick(&mut rng, &PAGE_TOKENS) as usize;
        let splits = pick(&mut rng, &[1, 4, 16]);
        let peaks = pick(&mut rng, &[Peaks::Random, Peaks::Sharp, Peaks::Steep, Peaks::Flat, Peaks::Census]);
        Self::sized(&mut rng, &[2048, 5000, 1, 0, 3333], [8, 5, 16, page_tokens, splits], peaks)
    }

    fn sized(
        rng: &mut impl Rng,
        lengths: &[usize],
        [kv_heads, group, head_words, page_tokens, splits]: [usize; 5],
        peaks: Peaks,
    ) -> Self {
        let layers = rng.random_range(1..=2_usize);
        let longest = lengths.iter().max().unwrap().div_ceil(page_tokens);
        // Mostly room for all; else selections often fill it.
        let list_capacity = match rng.random_range(0..4) {
            0 => rng.random_range(1..=longest.max(1)),
            _ => longest.max(1) + rng.random_range(0..3),
        };
        let rows = lengths.len() * kv_heads;
        let biased = rng.random_bool(0.3);
        let (of_keys, of_queries) = peaks.scales();
        let mut case = Self {
            entries: Vec::new(),
            kv_heads,
            group,
            layers,
            layer: rng.random_range(0..layers),
            head_words,
            page_tokens,
            pages: vec![WILD; rows * list_capacity],
            page_counts: vec![0; rows],
            list_capacity,
            steady: vec![WILD; rng.random_range(0..4)],
            biases: Vec::new(),
            pool: Vec::new(),
            queries: (0..rows * group * head_words).map(|_| word(rng, of_queries)).collect(),
            scale: 1.0 / ((head_words * WORD_ELEMENTS) as f32).sqrt(),
            splits,
            tokens: vec![Vec::new(); rows],
        };
        if biased {
            case.biases =
                (0..rows * list_capacity * page_tokens).map(|_| rng.random_range(-2.0..3.0)).collect();
        }
        // More pages than are used, in an order of their own.
        let mut free: Vec<u32> = (0..(rows * (longest + 2) + 3) as u32).collect();
        free.shuffle(rng);
        let page_words = 2 * page_tokens * head_words;
        let nan = bytemuck::cast::<Elements, _>([bf16::NAN; WORD_ELEMENTS]);
        case.pool = vec![nan; free.len() * page_words];

        for (request, &length) in lengths.iter().enumerate() {
            let filler = length > 0 && rng.random_bool(0.1);
            let held = length.div_ceil(page_tokens);
            let sink_pages = rng.random_range(0..=2_usize);
            // Where the tail begins; in a short context with the first page that no sink has. Now and then nothing steady is there
            // at all: an entry whose selection is attended to alone.
            let no_steady = rng.random_bool(0.1);
            let sink_pages = if no_steady { 0 } else { sink_pages };
            let tail = if no_steady || held <= sink_pages {
                held.max(sink_pages)
            } else {
                rng.random_range(sink_pages..held)
            };
            let ring_pages = held.saturating_sub(tail).max(1) + rng.random_range(0..2);
            let leaving = rng.random_range(0..=(tail - sink_pages).min(2));
            let entry = Entry {
                tokens: if filler { 0 } else { length as u32 },
                first_steady: case.steady.len() as u32,
                sink_pages: sink_pages as u32,
                ring_pages: ring_pages as u32,
                leaving_key: (tail - leaving) as u32,
                leaving: leaving as u32,
                ..Entry::default()
            };
            case.entries.push(entry);
            let in_list = sink_pages + ring_pages;
            case.steady.extend(vec![WILD; layers * kv_heads * in_list]);
            for head in 0..kv_heads {
                let row = request * kv_heads + head;
                if filler || length == 0 {
                    case.page_counts[row] = pick(rng, &[0, WILD]);
                    continue;
                }
                let between = if held <= sink_pages { 0 } else { tail - sink_pages };
                // Of the pages between sinks and tail any number, in ascending order; where nothing is steady only full ones.
                let full = if no_steady { length / page_tokens } else { between };
                let selected = rng.random_range(0..=full).min(list_capacity);
                // A count beyond the list's room is as good.
                let full_list = selected == list_capacity && rng.random_bool(0.5);
                case.page_counts[row] = if full_list { WILD } else { selected as u32 };
                let mut add = |case: &mut Self, tokens: usize, biased: Option<usize>| {
                    let page = free.pop().unwrap();
                    for token in 0..tokens {
                        let bias = biased
                            .map_or(0.0, |first| case.biases.get(first + token).copied().unwrap_or(0.0));
                        let key = page as usize * page_words + token * head_words;
                        for at in 0..head_words {
                            case.pool[key + at] = word(rng, of_keys);
                            case.pool[key + page_words / 2 + at] = word(rng, 1.0);
                        }
                        case.tokens[row].push((key, bias));
                    }
                    page
                };
                let tokens_of = |key: usize| (length - key * page_tokens).min(page_tokens);
                for key in 0..sink_pages.min(held) {
                    let page = add(&mut case, tokens_of(key), None);
                    let place = entry.steady_place((case.layer * kv_heads + head) as u32, key as u32);
                    case.steady[place as usize] = page;
                }
                for at in 0..selected {
                    let place = row * list_capacity + at;
                    case.pages[place] = add(&mut case, page_tokens, Some(place * page_tokens));
                }
                for key in tail..held {
                    let page = add(&mut case, tokens_of(key), None);
                    let place = entry.steady_place((case.layer * kv_heads + head) as u32, key as u32);
                    case.steady[place as usize] = page;
                }
            }
        }
        case
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.entries.len() * self.kv_heads
    }

    /// Rows, and of groups of more than eight twice as many.
    pub fn units(&self) -> usize {
        self.rows() * blocks_of_group(self.group as u32) as usize
    }

    /// Words of the partial results.
    pub fn partials(&self) -> usize {
        if self.splits == 1 {
            1
        } else {
            self.units() * self.splits * partial_words(self.head_words as u32) as usize
        }
    }

    /// Outputs before the launch.
    pub fn outputs(&self) -> Vec<u128> {
        vec![POISON; self.rows() * self.group * self.head_words]
    }

    /// Tokens that a row attends to.
    pub fn row_tokens(&self, row: usize) -> usize {
        self.tokens[row].len()
    }

    /// Logarithms of sums before the launch.
    pub fn lse(&self) -> Vec<f32> {
        vec![-1.25e30; self.rows() * self.group]
    }

    /// Whether outputs and logarithms of sums are right: [`check_head`].
    ///
    /// # Errors
    /// The first head that is wrong.
    pub fn check(&self, outputs: &[u128], lse: &[f32]) -> Result<(), String> {
        let outputs: &[bf16] = bytemuck::cast_slice(outputs);
        let (pool, queries): (&[bf16], &[bf16]) =
            (bytemuck::cast_slice(&self.pool), bytemuck::cast_slice(&self.queries));
        let dim = self.head_words * WORD_ELEMENTS;
        let values = self.page_tokens * dim;
        for row in 0..self.rows() {
            let token = |&(key, bias): &(usize, f32)| {
                let key = key * WORD_ELEMENTS;
                Token { key: &pool[key..][..dim], value: &pool[key + values..][..dim], bias }
            };
            let tokens: Vec<_> = self.tokens[row].iter().map(token).collect();
            for head in row * self.group..(row + 1) * self.group {
                let (found, found_lse) = (&outputs[head * dim..][..dim], lse[head]);
                if self.entries[row / self.kv_heads].tokens == 0 {
                    let poison: [bf16; WORD_ELEMENTS] = bytemuck::cast(POISON);
                    if found_lse != -1.25e30 || found.chunks_exact(WORD_ELEMENTS).any(|word| word != poison) {
                        return Err(format!("row {row}: written for an entry that only fills the batch"));
                    }
                    continue;
                }
                check_head(&queries[head * dim..][..dim], self.scale, &tokens, found, found_lse)
                    .map_err(|wrong| format!("row {row}, head {head}: {wrong}"))?;
            }
        }
        Ok(())
    }
}

/// A token that a head attends to.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// `[head_dim]`.
    pub key: &'a [bf16],
    /// `[head_dim]`.
    pub value: &'a [bf16],
    /// Added to its logit.
    pub bias: f32,
}

/// Whether a head's output `[head_dim]` and logarithm of its sum are those of attention in f64: the norm of the difference at most 5e-3
/// of the output's, no element off by more than 2e-2 of the greatest, the logarithm by 1e-5 of what it is the sum of, or of 1.
///
/// # Errors
/// What is wrong, and by how much.
pub fn check_head(
    query: &[bf16],
    scale: f32,
    tokens: &[Token<'_>],
    found: &[bf16],
    found_lse: f32,
) -> Result<(), String> {
    let dot = |key: &[bf16]| -> f64 {
        query.iter().zip(key).map(|(q, k)| f64::from(q.to_f32()) * f64::from(k.to_f32())).sum()
    };
    let logit = |token: &Token<'_>| dot(token.key) * f64::from(scale) + f64::from(token.bias);
    let logits: Vec<f64> = tokens.iter().map(logit).collect();
    let greatest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    let mut expected = vec![0.0; query.len()];
    for (logit, token) in logits.iter().zip(tokens) {
        let weight = (logit - greatest).exp();
        sum += weight;
        for (sum, value) in expected.iter_mut().zip(token.value) {
            *sum += weight * f64::from(value.to_f32());
        }
    }
    let (mut off, mut norm, mut most, mut furthest) = (0.0, 0.0, 0.0_f64, 0.0_f64);
    for (found, sum_of_values) in found.iter().zip(&expected) {
        let expected = if sum > 0.0 { sum_of_values / sum } else { 0.0 };
        let difference = f64::from(found.to_f32()) - expected;
        off += difference * difference;
        norm += expected * expected;
        most = most.max(expected.abs());
        furthest = if difference.is_nan() { f64::NAN } else { furthest.max(difference.abs()) };
    }
    let (off, norm) = (off.sqrt(), norm.sqrt());
    let right = off <= 5e-3 * norm && furthest <= 2e-2 * most;
    if !right {
        return Err(format!(
            "{} tokens: off by {off:e} of {norm:e}, an element by {furthest:e} of {most:e}",
            tokens.len()
        ));
    }
    let expected = greatest + sum.ln();
    let difference = (f64::from(found_lse) - expected).abs();
    let right = if sum == 0.0 {
        found_lse == f32::NEG_INFINITY
    } else {
        difference <= 1e-5 * greatest.abs().max(sum.ln()).max(1.0)
    };
    if right { Ok(()) } else { Err(format!("lse {found_lse} where {expected} was expected")) }
}

/// Eight random bf16, up to `scale` and a bit more.
pub(super) fn word(rng: &mut impl Rng, scale: f32) -> u128 {
    let element = |_| bf16::from_f32(scale * rng.random_range(-1.7..1.7_f32));
    bytemuck::cast::<Elements, _>(std::array::from_fn(element))
}

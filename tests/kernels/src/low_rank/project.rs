use half::bf16;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::{Entry, PageCopy, SEGMENT_KEYS};

use super::{check_head, frequencies, normal, numbers_of, turned, words_of};
use crate::{POISON, WILD, pick, wild_entry};

/// A launch of `project_keys`.
#[derive(Debug)]
pub struct ProjectCase {
    /// `[batch]`; some only fill the batch, of some nothing leaves.
    pub entries: Vec<Entry>,
    /// Physical pages.
    pub steady: Vec<u32>,
    /// `[pages, 2, page_tokens, head_words]`.
    pub pool: Vec<u128>,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Head dim / 8.
    pub head_words: usize,
    /// The layer.
    pub layer: usize,
    /// Layers.
    pub layers: usize,
    /// Rank / 8.
    pub rank_words: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Room in the lists of a row.
    pub capacity: usize,
    /// Segment numbers.
    pub directories: Vec<u32>,
    /// Segments.
    pub segments: usize,
    /// `[bases, layers, kv_heads, head_dim, rank_words]`.
    pub bases: Vec<u128>,
    /// `[head_dim / 2]`.
    pub frequencies: Vec<f32>,
    /// Of sines and cosines.
    pub magnitude: f32,
}

/// What a launch writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projected {
    /// `[segments, layers, 512 * page_tokens, rank_words]`.
    pub coefficients: Vec<u128>,
    /// `[batch * kv_heads, capacity]`.
    pub copies: Vec<PageCopy>,
    /// As the copies.
    pub keys: Vec<u32>,
    /// `[batch * kv_heads]`.
    pub counts: Vec<u32>,
}

impl ProjectCase {
    /// The case of a seed.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_tokens = pick(&mut rng, &[1, 3, 8, 8, 16]);
        let rank_words = pick(&mut rng, if page_tokens > 8 { &[4] } else { &[4, 8, 12] });
        let batch = rng.random_range(1..4);
        Self::sized(&mut rng, [batch, 3, 2], page_tokens, rank_words)
    }

    /// A case for a GPU: 16 requests of 8 KV heads, pages of 8 tokens, rank 160.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), [16, 8, 2], 8, 20)
    }

    fn sized(
        rng: &mut impl Rng,
        [batch, most_heads, layers]: [usize; 3],
        page_tokens: usize,
        rank_words: usize,
    ) -> Self {
        let (kv_heads, head_words) = (rng.random_range(1..=most_heads), pick(rng, &[8, 16]));
        let (head_dim, layer, capacity) = (8 * head_words, rng.random_range(0..layers), 3);
        let mut segments: Vec<u32> = (0..2 * batch as u32 + 1).collect();
        segments.shuffle(rng);
        let mut bases: Vec<u32> = (0..batch as u32 + 1).collect();
        bases.shuffle(rng);
        let (mut steady, mut pages) = (Vec::new(), 0);
        let entries: Vec<Entry> = (0..batch)
            .map(|request| {
                if rng.random_range(0..5) == 0 {
                    return wild_entry();
                }
                let sink_pages = rng.random_range(0..3);
                let leaving = rng.random_range(0..=capacity as u32);
                let ring_pages = leaving + rng.random_range(1..3);
                let leaving_key = pick(rng, &[sink_pages, 100, 510, 511, 512, 1020]);
                let first_steady = steady.len() as u32;
                let list = (sink_pages + ring_pages) as usize;
                steady.resize(steady.len() + layers * kv_heads * list, WILD);
                let entry = Entry {
                    tokens: (leaving_key + leaving + 1) * page_tokens as u32,
                    directory: 2 * request as u32,
                    first_steady,
                    sink_pages,
                    ring_pages,
                    leaving_key,
                    leaving,
                    basis: bases[request],
                    ..wild_entry()
                };
                for (head, page) in (0..kv_heads).flat_map(|head| (0..leaving).map(move |page| (head, page)))
                {
                    steady[Self::place(&entry, layer * kv_heads + head, leaving_key + page)] = pages;
                    pages += 1;
                }
                entry
            })
            .collect();
        let spare = rng.random_range(1..3);
        let mut ids: Vec<u32> = (0..pages + spare).collect();
        ids.shuffle(rng);
        steady.iter_mut().filter(|page| **page != WILD).for_each(|page| *page = ids[*page as usize]);
        let mut random = |len: usize, scale: f32| -> Vec<u128> {
            words_of(&(0..len).map(|_| scale * normal(rng)).collect::<Vec<_>>())
        };
        let pool = random(ids.len() * 2 * page_tokens * head_dim, 1.0);
        let of_bases = random(bases.len() * layers * kv_heads * head_dim * 8 * rank_words, 0.1);
        Self {
            entries,
            steady,
            pool,
            kv_heads,
            head_words,
            layer,
            layers,
            rank_words,
            page_tokens,
            capacity,
            directories: segments[..2 * batch].to_vec(),
            segments: segments.len(),
            bases: of_bases,
            frequencies: frequencies(rng, head_dim),
            magnitude: pick(rng, &[1.0, 1.0, 1.2]),
        }
    }

    /// The place of page `key` in the steady lists.
    fn place(entry: &Entry, row: usize, key: u32) -> usize {
        let list = entry.first_steady as usize + row * (entry.sink_pages + entry.ring_pages) as usize;
        let ring = key.checked_sub(entry.sink_pages).map(|key| entry.sink_pages + key % entry.ring_pages);
        list + ring.unwrap_or(key) as usize
    }

    /// What is there before the launch.
    pub fn before(&self) -> Projected {
        let tokens = self.segments * self.layers * SEGMENT_KEYS as usize * self.page_tokens;
        let lists = self.entries.len() * self.kv_heads;
        Projected {
            coefficients: vec![POISON; tokens * self.rank_words],
            copies: vec![PageCopy { host_page: WILD, device_page: WILD }; lists * self.capacity],
            keys: vec![WILD; lists * self.capacity],
            counts: vec![WILD; lists],
        }
    }

    /// Whether leaving tokens have their coefficients, the pages are listed, and all else is as it was.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, found: &Projected) -> Result<(), String> {
        let Self { kv_heads, head_words, layer, layers, rank_words, page_tokens, capacity, .. } = *self;
        let (head_dim, mut lists, mut rest) = (8 * head_words, self.before(), found.coefficients.clone());
        for (index, entry) in self.entries.iter().enumerate() {
            let pages = if entry.tokens > 0 { entry.leaving } else { 0 };
            for head in 0..kv_heads {
                let list = index * kv_heads + head;
                lists.counts[list] = pages;
                for page in 0..pages {
                    let (at, key) = (list * capacity + page as usize, entry.leaving_key + page);
                    let device_page = self.steady[Self::place(entry, layer * kv_heads + head, key)];
                    lists.copies[at] = PageCopy { host_page: 0, device_page };
                    lists.keys[at] = key;
                }
            }
            for (page, token) in
                (0..pages).flat_map(|page| (0..page_tokens as u32).map(move |token| (page, token)))
            {
                let key = entry.leaving_key + page;
                let mut right = vec![0.0; 8 * rank_words];
                for head in 0..kv_heads {
                    let page = self.steady[Self::place(entry, layer * kv_heads + head, key)] as usize;
                    let at = (page * 2 * page_tokens + token as usize) * head_words;
                    let head_of = numbers_of(&self.pool[at..at + head_words]);
                    let head_of: Vec<f64> = head_of.into_iter().map(f64::from).collect();
                    let position = key * page_tokens as u32 + token;
                    let plain =
                        turned(&head_of, position, true, &self.frequencies, 1.0 / f64::from(self.magnitude));
                    let plain = plain.into_iter().map(|element| f64::from(bf16::from_f64(element)));
                    let of_head = (entry.basis as usize * layers + layer) * kv_heads + head;
                    for (channel, plain) in plain.enumerate() {
                        let at = (of_head * head_dim + channel) * rank_words;
                        for (sum, basis) in right.iter_mut().zip(numbers_of(&self.bases[at..at + rank_words]))
                        {
                            *sum += plain * f64::from(basis);
                        }
                    }
                }
                let directory = entry.directory + key / SEGMENT_KEYS;
                let of_segment = self.directories[directory as usize] as usize * layers + layer;
                let of_page = of_segment * SEGMENT_KEYS as usize + (key % SEGMENT_KEYS) as usize;
                let at = (of_page * page_tokens + token as usize) * rank_words;
                let what = format!("entry {index}, page key {key}, token {token}");
                check_projected(&what, &numbers_of(&found.coefficients[at..at + rank_words]), &right)?;
                rest[at..at + rank_words].fill(POISON);
            }
        }
        if rest != lists.coefficients {
            return Err("written beyond the coefficients of leaving tokens".to_owned());
        }
        let same = (&found.copies, &found.keys, &found.counts) == (&lists.copies, &lists.keys, &lists.counts);
        if same { Ok(()) } else { Err("the lists of pages are others".to_owned()) }
    }
}

/// Whether coefficients are those of f64 but for their own rounding, and for plain keys that f32 rounds to the other neighbour in bf16.
fn check_projected(what: &str, found: &[f32], right: &[f64]) -> Result<(), String> {
    let norm = right.iter().map(|element| element * element).sum::<f64>().sqrt();
    match found.iter().zip(right).position(|(found, right)| {
        let off = (f64::from(*found) - right).abs();
        off.is_nan() || off > right.abs() / 255.0 + 2e-3 * norm
    }) {
        Some(at) => check_head(&format!("{what}, coefficient {at}"), &found[at..=at], &right[at..=at]),
        None => Ok(()),
    }
}

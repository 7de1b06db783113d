//! Blocks of prompts against a naive model: whole sequences of tokens, each with its slabs.

use std::collections::BTreeMap;

use proptest::prelude::*;
use spinkv::algorithms::{self, MethodOptions, OwnOptions};
use spinkv::memory::{
    HostArena, HostLayout, HostPage, KvDtype, PageLayout, PlainMemory, PrefixCache, SlabId,
};
use spinkv::{Error, KvConfig, KvShape, Rotary};

const LAYERS: usize = 2;
const KV_HEADS: usize = 2;
const BLOCK: usize = 16;

fn shape() -> KvShape {
    KvShape::new(LAYERS, 2, KV_HEADS, 16).unwrap()
}

fn config(method: &str, options: &MethodOptions, layout: impl Into<HostLayout>) -> KvConfig {
    KvConfig::new(shape(), layout, algorithms::by_name(method, options).unwrap()).unwrap()
}

fn layout() -> PageLayout {
    PageLayout::new(1, 16, KvDtype::Bf16).unwrap()
}

fn dense() -> KvConfig {
    config("dense", &MethodOptions::default(), layout())
}

/// What the model knows of a block: its name is all tokens up to its end.
#[derive(Clone, Debug)]
struct ModelBlock {
    slabs: Vec<SlabId>,
    used: u64,
    number: u64,
}

/// A request's tokens and its slabs by block.
#[derive(Clone, Debug)]
struct Held {
    prompt: Vec<u32>,
    slabs: Vec<Vec<SlabId>>,
}

#[derive(Debug)]
struct Bench {
    cache: PrefixCache,
    arena: HostArena,
    blocks: BTreeMap<Vec<u32>, ModelBlock>,
    requests: Vec<Held>,
    most: usize,
    room: usize,
    clock: u64,
    number: u64,
    cached: u64,
    evicted: u64,
}

/// What the first page of each slab of a block holds.
fn mark(name: &[u32], row: usize) -> u128 {
    name.iter()
        .fold(row as u128 + 1, |mark, token| mark.wrapping_mul(31).wrapping_add(u128::from(*token) + 1))
}

impl Bench {
    /// At most `most` blocks are kept, and the arena has `room` slabs for each row.
    fn new(most: usize, room: usize) -> Self {
        let config = dense();
        let slab = config.host_layout().slab_bytes();
        let rows = (LAYERS * KV_HEADS) as u64;
        let limit = room as u64 * rows * slab;
        Self {
            // Half a block is none.
            cache: PrefixCache::new(&config, Some(most as u64 * rows * slab + slab)).unwrap(),
            arena: HostArena::new(layout(), LAYERS, Some(limit), PlainMemory::default()),
            blocks: BTreeMap::new(),
            requests: Vec::new(),
            most,
            room,
            clock: 0,
            number: 0,
            cached: 0,
            evicted: 0,
        }
    }

    fn in_use(&self, slab: SlabId) -> bool {
        self.requests.iter().flat_map(|request| &request.slabs).any(|block| block.contains(&slab))
    }

    /// Blocks of slabs that somebody has.
    fn used(&self) -> usize {
        let of_requests = self.requests.iter().flat_map(|request| &request.slabs).map(|block| block[0]);
        let mut first: Vec<_> = of_requests.chain(self.blocks.values().map(|block| block.slabs[0])).collect();
        first.sort_unstable();
        first.dedup();
        first.len()
    }

    fn model_evict(&mut self) -> bool {
        let followed = |name: &Vec<u32>| {
            self.blocks.keys().any(|other| other.len() == name.len() + BLOCK && other.starts_with(name))
        };
        let leaves = self.blocks.iter().filter(|(name, _)| !followed(name));
        let order =
            |(_, block): &(&Vec<u32>, &ModelBlock)| (self.in_use(block.slabs[0]), block.used, block.number);
        let Some((name, _)) = leaves.min_by_key(order) else { return false };
        let name = name.clone();
        self.blocks.remove(&name);
        self.evicted += 1;
        true
    }

    /// A request that shares what it can, in multiples of `unit` blocks, and takes the rest; whether there was room.
    fn admit(&mut self, prompt: Vec<u32>, unit: usize) -> bool {
        self.clock += 1;
        let known = (1..=(prompt.len() - 1) / BLOCK).map(|count| prompt[..count * BLOCK].to_vec());
        let mut expected: Vec<_> = known.take_while(|name| self.blocks.contains_key(name)).collect();
        expected.truncate(expected.len() / unit * unit);
        for name in &expected {
            self.blocks.get_mut(name).unwrap().used = self.clock;
        }
        let shared = self.cache.share(&prompt, unit * BLOCK, &mut self.arena);
        assert_eq!(shared.tokens, expected.len() * BLOCK);
        let of_model: Vec<_> = expected.iter().map(|name| self.blocks[name].slabs.clone()).collect();
        assert_eq!(shared.slabs, of_model);
        self.cached += shared.tokens as u64;
        self.requests.push(Held { prompt: prompt.clone(), slabs: shared.slabs });

        let new = prompt.len().div_ceil(BLOCK) - expected.len();
        while self.used() + new > self.room && self.model_evict() {}
        let fits = self.used() + new <= self.room;
        let mut layers = Vec::new();
        for layer in 0..LAYERS {
            match PrefixCache::take_slabs(Some(&mut self.cache), layer, new * KV_HEADS, &mut self.arena) {
                Ok(slabs) => layers.push(slabs),
                Err(error) => {
                    assert!(matches!(error, Error::OutOfHostMemory { .. }) && !fits && layer == 0, "{error}");
                    self.release(self.requests.len() - 1);
                    return false;
                }
            }
        }
        assert!(fits, "nothing is left in the cache that could have made room");
        let request = self.requests.last_mut().unwrap();
        for block in 0..new {
            let rows = layers.iter().flat_map(|slabs| &slabs[block * KV_HEADS..][..KV_HEADS]);
            request.slabs.push(rows.copied().collect());
        }
        for (number, block) in request.slabs.iter().enumerate().skip(expected.len()) {
            let name = &prompt[..prompt.len().min((number + 1) * BLOCK)];
            for (row, slab) in block.iter().enumerate() {
                let words = vec![mark(name, row); layout().page_words()];
                self.arena.write(HostPage { slab: *slab, index: 0 }, &words);
            }
        }
        true
    }

    fn keep(&mut self, which: usize) {
        self.clock += 1;
        let Held { prompt, slabs } = self.requests[which].clone();
        let whole = prompt.len() / BLOCK * BLOCK;
        for count in 1..=whole / BLOCK {
            let name = prompt[..count * BLOCK].to_vec();
            let (number, clock) = (self.number, self.clock);
            let new = ModelBlock { slabs: slabs[count - 1].clone(), used: clock, number };
            let block = self.blocks.entry(name).or_insert_with(|| {
                self.number += 1;
                new
            });
            block.used = clock;
        }
        while self.blocks.len() > self.most {
            self.model_evict();
        }
        self.cache.keep(&prompt[..whole], |block| slabs[block].clone(), &mut self.arena);
    }

    fn release(&mut self, which: usize) {
        let request = self.requests.swap_remove(which);
        request.slabs.iter().flatten().for_each(|slab| self.arena.release(*slab));
    }

    fn check(&self) {
        let usage = self.cache.usage();
        assert_eq!((usage.blocks, usage.evicted_blocks), (self.blocks.len(), self.evicted));
        assert_eq!(usage.cached_tokens, self.cached);
        assert!(usage.blocks <= self.most);
        assert_eq!(usage.bytes, (self.blocks.len() * LAYERS * KV_HEADS) as u64 * self.arena.slab_bytes());
        assert_eq!(self.arena.used_slabs(), self.used() * LAYERS * KV_HEADS, "a slab of nobody, or one lost");
        let of_requests = self.requests.iter().flat_map(|request| request.slabs.iter().flatten());
        let mut references: BTreeMap<SlabId, u32> = BTreeMap::new();
        of_requests
            .chain(self.blocks.values().flat_map(|block| &block.slabs))
            .for_each(|slab| *references.entry(*slab).or_default() += 1);
        for (slab, count) in references {
            assert_eq!(self.arena.references(slab), count, "{slab:?}");
        }
        for Held { prompt, slabs } in &self.requests {
            for (number, block) in slabs.iter().enumerate() {
                let name = &prompt[..prompt.len().min((number + 1) * BLOCK)];
                for (row, slab) in block.iter().enumerate() {
                    let mut words = vec![0; layout().page_words()];
                    self.arena.read(HostPage { slab: *slab, index: 0 }, &mut words);
                    assert!(
                        words.iter().all(|word| *word == mark(name, row)),
                        "block {number} of {prompt:?}"
                    );
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Turn {
    /// Blocks by kind, tokens behind them, and the unit.
    Admit(Vec<u32>, usize, usize),
    Keep(prop::sample::Index),
    Release(prop::sample::Index),
    Evict,
}

/// Kinds 0 and 1 differ from their first token on, 2 from 0 in its last alone.
fn prompt(kinds: &[u32], rest: usize) -> Vec<u32> {
    let block = |kind: &u32| {
        let mut tokens = vec![kind % 2; BLOCK];
        tokens[BLOCK - 1] = *kind;
        tokens
    };
    let mut tokens: Vec<u32> = kinds.iter().flat_map(block).collect();
    tokens.extend(vec![7; rest]);
    tokens
}

fn turn() -> impl Strategy<Value = Turn> {
    let kinds = prop::collection::vec(0..3u32, 0..4);
    prop_oneof![
        4 => (kinds, 0..BLOCK, 1..3usize).prop_map(|(kinds, rest, unit)| Turn::Admit(kinds, rest, unit)),
        3 => any::<prop::sample::Index>().prop_map(Turn::Keep),
        2 => any::<prop::sample::Index>().prop_map(Turn::Release),
        1 => Just(Turn::Evict),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_shared_kept_and_evicted_as_the_model_says(
        most in 0..8usize,
        room in 3..14usize,
        turns in prop::collection::vec(turn(), 1..60),
    ) {
        let mut bench = Bench::new(most, room);
        for turn in turns {
            match turn {
                Turn::Admit(kinds, rest, unit) => {
                    let prompt = prompt(&kinds, rest);
                    if !prompt.is_empty() {
                        bench.admit(prompt, unit);
                    }
                }
                Turn::Keep(which) if !bench.requests.is_empty() => bench.keep(which.index(bench.requests.len())),
                Turn::Release(which) if !bench.requests.is_empty() => {
                    bench.release(which.index(bench.requests.len()));
                }
                Turn::Keep(_) | Turn::Release(_) => {}
                Turn::Evict => prop_assert_eq!(bench.cache.evict(&mut bench.arena), bench.model_evict()),
            }
            bench.check();
        }
        while !bench.requests.is_empty() {
            bench.release(0);
        }
        while bench.cache.evict(&mut bench.arena) {}
        prop_assert_eq!((bench.arena.used_slabs(), bench.cache.usage().bytes), (0, 0));
    }
}

/// Two requests that computed the same at the same time: the second one's last block hangs behind a block of the first. However little of that is
/// in use, it must not stand in the way of a request.
#[test]
fn a_block_in_use_keeps_no_unused_one_from_going() {
    let mut bench = Bench::new(9, 6);
    assert!(bench.admit(prompt(&[0], 1), 1) && bench.admit(prompt(&[0, 1], 1), 1));
    bench.keep(0);
    bench.keep(1);
    bench.release(0);
    // The block of the first is nobody's, the one behind it the second request's.
    assert!(bench.admit(prompt(&[1, 2], 1), 1), "two blocks of six are free, one more can be");
    bench.check();
    assert_eq!(bench.cache.usage().evicted_blocks, 2);
}

#[test]
fn where_pages_are_not_what_a_prompt_reads_they_are_not_shared() {
    let usual = MethodOptions::default();
    let mut own = OwnOptions::default();
    own.add("rank=16").unwrap();
    let low_rank =
        MethodOptions { rotary: Some(Rotary::new(vec![0.5; 8], 1.0).into()), own, ..usual.clone() };
    let eight = PageLayout::new(8, 16, KvDtype::Bf16).unwrap();
    let coded = HostLayout::new(eight, "fp8".parse().unwrap()).unwrap();
    for (config, reason) in [
        (config("retroinfer", &usual, eight), "clusters"),
        (config("shadowkv", &low_rank, eight), "values alone"),
        (config("dense", &usual, coded), "fp8"),
    ] {
        let error = PrefixCache::new(&config, None).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains(config.method().name()), "{error}");
    }
}

//! Cases of Offload: `append` and `store_prompt`.

use cuda_std::atomic::{Order, Scope};
use cuda_std::emulator::{Buffer, Fault, Launch};
use cuda_std::{Global, U32x4, thread};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::{OffloadPages, OffloadTables};
use spinkv::memory::{HostFormat, HostLayout, KvDtype, PageLayout};
use spinkv_kernels::abi::page_code::{NO_CODE, PageCode};
use spinkv_kernels::abi::{self, Entry, SLAB_PAGES, WORD_ELEMENTS};
use spinkv_kernels::offload;

use super::emulated::{to_words, words};
use super::{POISON, WILD, entry_words, pick, wild_entry};

/// Pages on both tiers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    /// `[pages, 2, page_tokens, head_words]`.
    pub pool: Vec<u128>,
    /// `[slabs, 16, host_words]`.
    pub host_pages: Vec<u128>,
    /// A u32 for each place of the host tables.
    pub host_valid: Vec<u32>,
}

/// A launch of `append` or `store_prompt` on random keys and values.
#[derive(Debug)]
pub struct OffloadCase {
    /// One a request; what is not read is wild.
    pub entries: Vec<Entry>,
    /// `[batch, kv_heads, head_words]` or `[tokens, kv_heads, head_words]`.
    pub keys: Vec<u128>,
    /// As the keys.
    pub values: Vec<u128>,
    /// Steady lists; wild but for the pages that are written.
    pub steady: Vec<u32>,
    /// Host tables; wild but for the slabs of pages that are written.
    pub host_slabs: Vec<u32>,
    /// Before the launch. Of the pool random bits, elsewhere poison; some valid bits of other pages.
    pub before: Pages,
    /// Row of KV head 0.
    pub first_row: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Words of a key.
    pub head_words: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Whether full pages go to the host.
    pub on_host: bool,
    /// What the host holds of a page.
    pub format: HostFormat,
    /// Of prompts: `[requests]`.
    pub first_token: Vec<u32>,
    /// Of prompts: `[requests + 1]`.
    pub first_page: Vec<u32>,
    /// Of prompts: blocks to launch.
    pub grid: u32,
}

/// Makes numbers of moderate size of random bits, so that none is an infinity or a NaN, and some zeros.
fn tame(words: &mut [u128]) {
    for bits in bytemuck::cast_slice_mut::<_, u16>(words) {
        let exponent = *bits >> 7 & 0xff;
        *bits = if exponent < 8 { 0 } else { *bits & 0x807f | (100 + exponent % 40) << 7 };
    }
}

impl OffloadCase {
    /// A decode step: any page size, first tokens, pages just full or just begun, rings that have gone round, slabs beyond the first,
    /// entries without tokens.
    pub fn append(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut case = Self::sized(&mut rng);
        for _ in 0..rng.random_range(1..=4) {
            let page = rng.random_range(0..3 * SLAB_PAGES as usize) * case.page_tokens;
            let tokens = match rng.random_range(0..6) {
                0 => 0,
                1 => 1,
                2 => page + 1,
                3 => page + rng.random_range(1..=case.page_tokens),
                _ => page + case.page_tokens,
            };
            let last = tokens.saturating_sub(1) / case.page_tokens;
            let complete = tokens / case.page_tokens;
            case.add(tokens, if tokens == 0 { 0..0 } else { last..last + 1 }, complete, 0..0, &mut rng);
        }
        let words = case.entries.len() * case.kv_heads * case.head_words;
        case.keys = random(words, &mut rng);
        case.values = random(words, &mut rng);
        case.finish(&mut rng)
    }

    /// A ragged batch of prompts: empty ones, short ones, with and without retrievable pages, last pages full or not.
    pub fn prompts(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut case = Self::sized(&mut rng);
        let most_pages = if case.page_tokens * case.head_words > 64 { 3 } else { 20 };
        let requests = rng.random_range(1..=3);
        case.add_prompts(requests, most_pages, &mut rng);
        case.finish(&mut rng)
    }

    /// Prompts of up to 8K tokens, 8 heads of 128, pages of 8 tokens.
    pub fn large_prompts(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut case = Self {
            kv_heads: 8,
            head_words: 16,
            page_tokens: 8,
            format: HostFormat::Full,
            grid: 16,
            ..Self::sized(&mut rng)
        };
        case.first_row = 8;
        case.add_prompts(3, 1024, &mut rng);
        case.finish(&mut rng)
    }

    fn sized(rng: &mut impl Rng) -> Self {
        let page_tokens = pick(rng, &[1, 1, 3, 8, 8, 16, 32, 64]);
        let head_words = if page_tokens > 8 {
            pick(rng, &[1, 2, 3, 16])
        } else {
            pick(rng, &[1, 2, 3, 8, 12, 16, 31, 33])
        };
        let kv_heads = rng.random_range(1..=if page_tokens * head_words > 256 { 2 } else { 5 });
        let coded = [PageCode::E4m3, PageCode::Int8].map(HostFormat::Coded);
        let formats = [HostFormat::Full, HostFormat::Values, coded[0], coded[1]];
        // Codes of a key are whole words.
        let format = formats[rng.random_range(0..if head_words % 2 == 0 { 4 } else { 2 })];
        Self {
            format,
            entries: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
            steady: vec![WILD; rng.random_range(0..3)],
            host_slabs: vec![WILD; rng.random_range(0..3)],
            before: Pages { pool: Vec::new(), host_pages: Vec::new(), host_valid: Vec::new() },
            first_row: rng.random_range(0..2) * kv_heads,
            kv_heads,
            head_words,
            page_tokens,
            on_host: rng.random_bool(0.8),
            first_token: Vec::new(),
            first_page: vec![0],
            grid: rng.random_range(1..=3),
        }
    }

    fn add_prompts(&mut self, requests: usize, most_pages: usize, rng: &mut impl Rng) {
        let width = self.kv_heads * self.head_words;
        for _ in 0..requests {
            let full = rng.random_range(0..=most_pages);
            let tokens =
                full * self.page_tokens + rng.random_range(0..2) * rng.random_range(0..self.page_tokens);
            let pages = tokens.div_ceil(self.page_tokens);
            let start = rng.random_range(0..=full);
            let leaving =
                if rng.random_range(0..3) == 0 { 0..0 } else { start..rng.random_range(start..=full) };
            let other = rng.random_range(0..3);
            self.keys.extend(random(other * width, rng));
            self.first_token.push((self.keys.len() / width) as u32);
            self.first_page.push(self.first_page.last().unwrap() + pages as u32);
            self.keys.extend(random(tokens * width, rng));
            self.add(tokens, 0..pages, full, leaving, rng);
        }
        self.values = random(self.keys.len(), rng);
    }

    /// An entry of which the launch writes pages `keys`: those below `complete` on the host, all but `leaving` on the GPU.
    fn add(
        &mut self,
        tokens: usize,
        keys: std::ops::Range<usize>,
        complete: usize,
        leaving: std::ops::Range<usize>,
        rng: &mut impl Rng,
    ) {
        if keys.is_empty() {
            self.entries.push(wild_entry());
            return;
        }
        // The ring holds the tail at least. Pages that leave have no place of their own.
        let sink_pages = if leaving.is_empty() { rng.random_range(0..4) } else { leaving.start };
        let tail_start = if leaving.is_empty() { keys.start.max(sink_pages) } else { leaving.end };
        let tail = keys.end.saturating_sub(tail_start);
        let ring_pages = tail.max(1) + rng.random_range(0..3);
        let (list, rows) = (sink_pages + ring_pages, self.first_row + self.kv_heads + rng.random_range(0..2));
        let slab_stride = complete.div_ceil(SLAB_PAGES as usize) + rng.random_range(0..3);
        let (first_steady, first_slab) = (self.steady.len(), self.host_slabs.len());
        self.steady.resize(first_steady + rows * list, WILD);
        self.host_slabs.resize(first_slab + rows * slab_stride, WILD);
        for row in self.first_row..self.first_row + self.kv_heads {
            for key in keys.clone() {
                if !leaving.contains(&key) {
                    let place =
                        if key < sink_pages { key } else { sink_pages + (key - sink_pages) % ring_pages };
                    // Marked; `finish` gives them pages.
                    let steady = &mut self.steady[first_steady + row * list + place];
                    assert_eq!(*steady, WILD, "each page has its place");
                    *steady = 0;
                }
                if key < complete {
                    self.host_slabs[first_slab + row * slab_stride + key / SLAB_PAGES as usize] = 0;
                }
            }
        }
        self.entries.push(Entry {
            tokens: tokens as u32,
            first_steady: first_steady as u32,
            sink_pages: sink_pages as u32,
            ring_pages: ring_pages as u32,
            first_slab: first_slab as u32,
            slab_stride: slab_stride as u32,
            leaving_key: if leaving.is_empty() { WILD } else { leaving.start as u32 },
            leaving: leaving.len() as u32,
            ..wild_entry()
        });
    }

    /// Gives the marked places their pages and slabs.
    fn finish(mut self, rng: &mut impl Rng) -> Self {
        let page_words = 2 * self.page_tokens * self.head_words;
        let mut number = |places: &mut [u32]| {
            let used = places.iter_mut().filter(|place| **place != WILD);
            let mut used: Vec<&mut u32> = used.collect();
            used.shuffle(rng);
            let spare = rng.random_range(0..2);
            used.iter_mut().zip(spare..).for_each(|(place, id)| **place = id);
            (used.len() as u32 + spare) as usize
        };
        let (pages, slabs) = (number(&mut self.steady), number(&mut self.host_slabs));
        let valid = |_| rng.random::<u32>() & rng.random::<u32>() & 0xffff;
        self.before.host_valid = (0..self.host_slabs.len()).map(valid).collect();
        self.before.pool = random(pages * page_words, rng);
        self.before.host_pages = vec![POISON; slabs * SLAB_PAGES as usize * self.host_words()];
        if self.code() != NO_CODE {
            [&mut self.keys, &mut self.values, &mut self.before.pool]
                .into_iter()
                .for_each(|words| tame(words));
        }
        self
    }

    /// The host's pages.
    ///
    /// # Panics
    /// Never: cases are of pages that there are.
    pub fn host(&self) -> HostLayout {
        let page = PageLayout::new(self.page_tokens, self.head_words * WORD_ELEMENTS, KvDtype::Bf16);
        HostLayout::new(page.expect("a page of tokens"), self.format).expect("heads that can be coded")
    }

    /// Words of a host page.
    pub fn host_words(&self) -> usize {
        self.host().page_words()
    }

    /// The kernels' parameter.
    fn code(&self) -> u32 {
        self.host().code().map_or(NO_CODE, |code| code as u32)
    }

    /// The sizes that both kernels take.
    fn sizes(&self) -> [u32; 5] {
        [self.first_row, self.kv_heads, self.head_words, self.page_tokens, self.host().page_words()]
            .map(|size| size as u32)
    }

    /// Whether it is a launch of `store_prompt`.
    pub fn is_prompt(&self) -> bool {
        self.first_page.len() > 1
    }

    /// The pages after the launch, by the CPU reference.
    fn expected(&self) -> Pages {
        let tables = OffloadTables {
            entries: &self.entries,
            steady: &self.steady,
            host_slabs: &self.host_slabs,
            first_row: self.first_row,
            kv_heads: self.kv_heads,
            head_words: self.head_words,
            page_tokens: self.page_tokens,
            on_host: self.on_host,
            host: self.host(),
        };
        let mut expected = self.before.clone();
        let mut pages = OffloadPages {
            pool: &mut expected.pool,
            host_pages: &mut expected.host_pages,
            host_valid: &mut expected.host_valid,
        };
        if self.is_prompt() {
            tables.store_prompt(&self.keys, &self.values, &self.first_token, &mut pages);
        } else {
            tables.append(&self.keys, &self.values, &mut pages);
        }
        expected
    }

    /// The host pages that the launch publishes.
    fn published(&self) -> Vec<Published> {
        let valid = self.expected().host_valid.into_iter().zip(&self.before.host_valid).enumerate();
        let bits = valid.flat_map(|(place, (after, before))| {
            let set = after & !before;
            (0..SLAB_PAGES).filter(move |bit| set >> bit & 1 == 1).map(move |bit| (place, bit))
        });
        bits.map(|(place, bit)| Published {
            place,
            bit,
            page: (self.host_slabs[place] * SLAB_PAGES + bit) as usize,
        })
        .collect()
    }

    /// Whether pages are what the CPU reference makes of them.
    ///
    /// # Errors
    /// The first word that differs.
    pub fn check(&self, found: &Pages) -> Result<(), String> {
        let expected = self.expected();
        let page_words = 2 * self.page_tokens * self.head_words;
        for (tier, page_words, found, expected) in [
            ("GPU", page_words, &found.pool, &expected.pool),
            ("host", self.host_words(), &found.host_pages, &expected.host_pages),
        ] {
            assert_eq!(found.len(), expected.len());
            if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
                return Err(format!(
                    "{tier} page {}, word {} of {page_words}: {:#034x} where {:#034x} was expected",
                    at / page_words,
                    at % page_words,
                    found[at],
                    expected[at]
                ));
            }
        }
        let (found, expected) = (&found.host_valid, &expected.host_valid);
        assert_eq!(found.len(), expected.len());
        match (0..found.len()).find(|at| found[*at] != expected[*at]) {
            Some(at) => Err(format!(
                "valid bits of place {at}: {:#x} where {:#x} were expected",
                found[at], expected[at]
            )),
            None => Ok(()),
        }
    }

    /// The pages after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Pages, Fault> {
        self.emulate_watched(schedule, &[])
    }

    /// The same where a thread, once it has done its part, waits for each page's valid bit and reads the page: a race, unless bits
    /// come after bytes.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_with_reader(&self, schedule: u64) -> Result<Pages, Fault> {
        self.emulate_watched(schedule, &self.published())
    }

    fn emulate_watched(&self, schedule: u64, published: &[Published]) -> Result<Pages, Fault> {
        let (keys, values) = (words(&self.keys), words(&self.values));
        let entries = words(&entry_words(&self.entries));
        let (steady, host_slabs) = (Buffer::from_slice(&self.steady), Buffer::from_slice(&self.host_slabs));
        let (pool, host_pages) = (words(&self.before.pool), words(&self.before.host_pages));
        let host_valid = Buffer::from_slice(&self.before.host_valid);
        let requests = self.entries.len() as u32;
        let [first_row, kv_heads, head_words, page_tokens, host_words] = self.sizes();
        if self.is_prompt() {
            let first_token = Buffer::from_slice(&self.first_token);
            let first_page = Buffer::from_slice(&self.first_page);
            Launch::new(self.grid, abi::store_prompt::BLOCK).seed(schedule).run(|| {
                // SAFETY: the emulator checks every access.
                unsafe {
                    offload::store_prompt(
                        keys.view(),
                        values.view(),
                        entries.view(),
                        first_token.view(),
                        first_page.view(),
                        steady.view(),
                        pool.view_mut(),
                        host_slabs.view(),
                        host_valid.view_mut(),
                        host_pages.view_mut(),
                        requests,
                        first_row,
                        kv_heads,
                        head_words,
                        page_tokens,
                        self.on_host.into(),
                        host_words,
                        self.code(),
                    );
                    read_published(published, host_valid.view(), host_pages.view(), self.host_words());
                }
            })?;
        } else {
            let blocks = abi::append::grid(requests * kv_heads);
            Launch::new(blocks, abi::append::BLOCK).seed(schedule).run(|| {
                // SAFETY: the emulator checks every access.
                unsafe {
                    offload::append(
                        entries.view(),
                        keys.view(),
                        values.view(),
                        steady.view(),
                        pool.view_mut(),
                        host_slabs.view(),
                        host_valid.view_mut(),
                        host_pages.view_mut(),
                        requests,
                        first_row,
                        kv_heads,
                        head_words,
                        page_tokens,
                        self.on_host.into(),
                        host_words,
                        self.code(),
                    );
                    read_published(published, host_valid.view(), host_pages.view(), self.host_words());
                }
            })?;
        }
        Ok(Pages {
            pool: to_words(&pool),
            host_pages: to_words(&host_pages),
            host_valid: host_valid.to_vec(),
        })
    }
}

/// A host page that a launch publishes, and its valid bit.
pub(crate) struct Published {
    pub place: usize,
    pub bit: u32,
    pub page: usize,
}

/// The launch's first thread waits for each page's valid bit, and then reads the page.
pub(crate) unsafe fn read_published(
    published: &[Published],
    host_valid: Global<u32>,
    host_pages: Global<U32x4>,
    page_words: usize,
) {
    if thread::index_1d() != 0 {
        return;
    }
    for Published { place, bit, page } in published {
        // SAFETY: the emulator checks every access.
        unsafe {
            while host_valid.atomic_load(*place, Order::Acquire, Scope::System) >> bit & 1 == 0 {
                thread::nanosleep(100);
            }
            let page = host_pages.rows(page_words).row(*page);
            (0..page_words).for_each(|word| _ = page.load(word));
        }
    }
}

fn random(words: usize, rng: &mut impl Rng) -> Vec<u128> {
    (0..words).map(|_| rng.random()).collect()
}

//! Cases of `gather`, `gather_bulk` and `gather_coded`.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;
use spinkv::memory::{HostFormat, HostLayout, KvDtype, PageLayout};
use spinkv_kernels::abi::page_code::{PageCode, coded_words};
use spinkv_kernels::abi::{PageCopy, WORD_ELEMENTS};

use super::{POISON, WILD, pick};

/// A launch of either on random pages.
#[derive(Debug)]
pub struct GatherCase {
    /// `[lists, capacity]`, each list ascending in host page; entries beyond a list's count are wild.
    pub copies: Vec<PageCopy>,
    /// `[lists]`: copies to make of each; may exceed the capacity, and the list then is made whole.
    pub counts: Vec<u32>,
    /// Random bits, `[host pages, page_words]`.
    pub host_pages: Vec<u128>,
    /// Pages of the pool on the GPU.
    pub device_pages: usize,
    /// Words of a host page.
    pub page_words: usize,
    /// Words of a GPU page.
    pub device_words: usize,
    /// The code of host pages, which then are [`coded_words`] long.
    pub code: Option<PageCode>,
    /// Blocks to launch.
    pub grid: u32,
}

impl GatherCase {
    /// The case of a seed: any page size from one word, one list or many, empty lists, full lists and counts beyond the list
    /// included.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_words =
            pick(&mut rng, &[1, 2, 7, 16, 31, 32, 33, 48, 127, 128, 129, 160, 256, 257, 512, 700]);
        let lists = pick(&mut rng, &[1, 1, 2, 3, 8, 40, 600]);
        let capacity = if lists == 1 { rng.random_range(1..=40) } else { rng.random_range(1..=6) };
        let grid = rng.random_range(1..=3);
        Self::sized(&mut rng, page_words, lists, capacity, grid)
    }

    /// The case of a seed for `gather_coded`.
    pub fn coded(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let device_words = pick(&mut rng, &[4, 8, 20, 32, 64, 100, 256, 260, 512, 1024]);
        let lists = pick(&mut rng, &[1, 1, 2, 3, 8, 40]);
        let capacity = if lists == 1 { rng.random_range(1..=40) } else { rng.random_range(1..=6) };
        let grid = rng.random_range(1..=3);
        Self::sized(&mut rng, coded_words(device_words as u32) as usize, lists, capacity, grid)
            .with_code(device_words, &mut rng)
    }

    /// Thousands of pages of 4 KiB, of which half the bytes are moved.
    pub fn large_coded(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Self::sized(&mut rng, 129, 128, 160, 16).with_code(256, &mut rng)
    }

    /// With scales that are some, in the last words of host pages.
    fn with_code(mut self, device_words: usize, rng: &mut impl Rng) -> Self {
        for page in self.host_pages.chunks_exact_mut(self.page_words) {
            let mut scale = || (rng.random_range(-20..10) as f32).exp2().to_bits();
            page[self.page_words - 1] = bytemuck::cast([scale(), scale(), 0, 0]);
        }
        let code = pick(rng, &[PageCode::E4m3 as usize, PageCode::Int8 as usize]) as u32;
        Self { device_words, code: Some(PageCode::of(code)), ..self }
    }

    /// Thousands of pages of 4 KiB, as a step of a large batch has.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 256, 128, 160, 16)
    }

    /// 40 pages or more of two and a half stages of `gather_bulk`, so that rings go round a few times.
    pub fn ring() -> Self {
        let case = |seed| Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 640, 1, 44, 2);
        (0..).map(case).find(|case| case.counts[0] >= 40).expect("some seed's")
    }

    fn sized(rng: &mut impl Rng, page_words: usize, lists: usize, capacity: usize, grid: u32) -> Self {
        let mut count = || match rng.random_range(0..6) {
            0 => 0,
            1 => capacity,
            2 => capacity + rng.random_range(1..100),
            // Of many lists most are short, so that few pages make a case.
            _ if lists > 100 && lists * capacity * page_words > 1 << 20 && rng.random_bool(0.5) => 0,
            _ => rng.random_range(0..=capacity),
        };
        let counts: Vec<usize> = (0..lists).map(|_| count()).collect();
        let made: usize = counts.iter().map(|count| capacity.min(*count)).sum();
        let (host_pages, device_pages) = (made + rng.random_range(1..10), made + rng.random_range(0..5));

        let mut sources: Vec<u32> = (0..host_pages as u32).collect();
        sources.shuffle(rng);
        let mut targets: Vec<u32> = (0..device_pages as u32).collect();
        targets.shuffle(rng);
        let mut copies = vec![PageCopy { host_page: WILD, device_page: WILD }; lists * capacity];
        for (list, count) in copies.chunks_exact_mut(capacity).zip(&counts) {
            let made = capacity.min(*count);
            let mut own = sources.split_off(sources.len() - made);
            own.sort_unstable();
            for (copy, host_page) in list.iter_mut().zip(own) {
                *copy = PageCopy { host_page, device_page: targets.pop().expect("a target a source") };
            }
        }
        Self {
            copies,
            counts: counts.iter().map(|count| *count as u32).collect(),
            host_pages: (0..host_pages * page_words).map(|_| rng.random()).collect(),
            device_pages: device_pages.max(1),
            page_words,
            device_words: page_words + [0, 0, page_words, 1][rng.random_range(0..4)],
            code: None,
            grid,
        }
    }

    /// Copies of a list.
    pub fn capacity(&self) -> usize {
        self.copies.len() / self.counts.len()
    }

    /// The pool before the launch: poison.
    pub fn pool(&self) -> Vec<u128> {
        vec![POISON; self.device_pages * self.device_words]
    }

    /// Whether a pool is what the CPU reference makes of it.
    ///
    /// # Errors
    /// The first word that differs, or the first list of which not all is counted as arrived.
    pub fn check(&self, pool: &[u128], arrived: &[u32]) -> Result<(), String> {
        let words = if self.code.is_some() { self.device_words } else { self.page_words };
        let made = |count: &u32| words as u32 * (*count).min(self.capacity() as u32);
        let counted: Vec<u32> = self.counts.iter().map(made).collect();
        if let Some(list) = arrived.iter().zip(&counted).position(|(found, expected)| found != expected) {
            return Err(format!("list {list}: {} of {} words are counted", arrived[list], counted[list]));
        }
        let mut expected = self.pool();
        for (list, count) in self.copies.chunks_exact(self.capacity()).zip(&self.counts) {
            let made = &list[..list.len().min(*count as usize)];
            match self.code {
                Some(code) => {
                    // A page is one long token.
                    let page = PageLayout::new(1, self.device_words / 2 * WORD_ELEMENTS, KvDtype::Bf16);
                    let host = HostLayout::new(page.expect("a page"), HostFormat::Coded(code));
                    cpu::gather_coded(made, &self.host_pages, &mut expected, &host.expect("whole words"));
                }
                None => {
                    cpu::gather(made, &self.host_pages, &mut expected, self.page_words, self.device_words);
                }
            }
        }
        let Some(word) = pool.iter().zip(&expected).position(|(found, expected)| found != expected) else {
            assert_eq!(pool.len(), expected.len());
            return Ok(());
        };
        let (page, at) = (word / self.device_words, word % self.device_words);
        Err(format!(
            "page {page}, word {at}: {:#034x} where {:#034x} was expected",
            pool[word], expected[word]
        ))
    }
}

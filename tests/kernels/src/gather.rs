//! Cases of `gather`.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;
use spinkv_kernels::abi::PageCopy;

use super::{POISON, WILD, pick};

/// A launch of `gather` on random pages.
#[derive(Debug)]
pub struct GatherCase {
    /// The list, ascending in host page; entries from [`count`](Self::count) on are wild.
    pub copies: Vec<PageCopy>,
    /// Copies to make; may exceed the list, which then is made whole.
    pub count: u32,
    /// Random bits, `[host pages, page_words]`.
    pub host_pages: Vec<u128>,
    /// Pages of the pool on the GPU.
    pub device_pages: usize,
    /// Words of a page.
    pub page_words: usize,
    /// Blocks to launch.
    pub grid: u32,
}

impl GatherCase {
    /// The case of a seed: any page size from one word, empty lists, full lists and counts beyond the list included.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_words = pick(&mut rng, &[1, 2, 7, 16, 31, 32, 33, 48, 127, 128, 129, 160, 256, 512]);
        let host_pages = rng.random_range(1..=40_usize);
        let grid = rng.random_range(1..=3);
        Self::sized(&mut rng, page_words, host_pages, grid)
    }

    /// Thousands of pages of 4 KiB, as a step of a large batch has.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), 256, 20_000, 16)
    }

    fn sized(rng: &mut impl Rng, page_words: usize, host_pages: usize, grid: u32) -> Self {
        let capacity = rng.random_range(1..=host_pages);
        let count = match rng.random_range(0..6) {
            0 => 0,
            1 => capacity,
            2 => capacity + rng.random_range(1..100),
            _ => rng.random_range(0..=capacity),
        };
        let device_pages = capacity + rng.random_range(0..5);

        let mut sources: Vec<u32> = (0..host_pages as u32).collect();
        sources.shuffle(rng);
        sources.truncate(capacity);
        sources.sort_unstable();
        let mut targets: Vec<u32> = (0..device_pages as u32).collect();
        targets.shuffle(rng);
        let copies = sources.iter().zip(targets).enumerate().map(|(at, (&host_page, device_page))| {
            if at < count {
                PageCopy { host_page, device_page }
            } else {
                PageCopy { host_page: WILD, device_page: WILD }
            }
        });
        Self {
            copies: copies.collect(),
            count: count as u32,
            host_pages: (0..host_pages * page_words).map(|_| rng.random()).collect(),
            device_pages,
            page_words,
            grid,
        }
    }

    /// The pool before the launch: poison.
    pub fn pool(&self) -> Vec<u128> {
        vec![POISON; self.device_pages * self.page_words]
    }

    /// Whether a pool is what the CPU reference makes of it.
    ///
    /// # Errors
    /// The first word that differs.
    pub fn check(&self, pool: &[u128]) -> Result<(), String> {
        let mut expected = self.pool();
        let copies = &self.copies[..self.copies.len().min(self.count as usize)];
        cpu::gather(copies, &self.host_pages, &mut expected, self.page_words);
        let Some(word) = pool.iter().zip(&expected).position(|(found, expected)| found != expected) else {
            assert_eq!(pool.len(), expected.len());
            return Ok(());
        };
        let (page, at) = (word / self.page_words, word % self.page_words);
        Err(format!(
            "page {page}, word {at}: {:#034x} where {:#034x} was expected",
            pool[word], expected[word]
        ))
    }
}

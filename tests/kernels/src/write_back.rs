//! Cases of `write_back`.

use cuda_std::emulator::{Buffer, Fault, Launch};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;
use spinkv_kernels::abi::{self, PageCopy, SLAB_PAGES};
use spinkv_kernels::offload;

use super::emulated::{to_words, words};
use super::offload::{Published, read_published};
use super::{POISON, WILD, pick};

/// A launch of `write_back` on random pages.
#[derive(Debug)]
pub struct WriteBackCase {
    /// The list, ascending in host page; entries from [`count`](Self::count) on are wild.
    pub copies: Vec<PageCopy>,
    /// Copies to make; may exceed the list, which then is made whole.
    pub count: u32,
    /// Random bits, `[device pages, page_words]`.
    pub pool: Vec<u128>,
    /// Pages of the host.
    pub host_pages: usize,
    /// Words of a page.
    pub page_words: usize,
    /// A copy's place in the valid bits, wild as in the list; or nothing, if no bits are to be set.
    pub places: Option<Vec<u32>>,
    /// Valid bits before the launch, of other pages.
    pub host_valid: Vec<u32>,
    /// Blocks to launch.
    pub grid: u32,
}

impl WriteBackCase {
    /// The case of a seed: any page size from one word, empty lists, full lists and counts beyond the list included; with
    /// bits and without.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_words = pick(&mut rng, &[1, 2, 7, 16, 31, 32, 33, 48, 127, 128, 129, 160, 256, 512]);
        let most = if page_words < 16 { 400 } else { 40 };
        let host_pages = rng.random_range(1..=most);
        let grid = rng.random_range(1..=3);
        Self::sized(&mut rng, page_words, host_pages, grid)
    }

    /// Thousands of pages of 4 KiB.
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
        let mut distinct = |of: usize, take: usize| {
            let mut ids: Vec<u32> = (0..of as u32).collect();
            ids.shuffle(rng);
            ids.truncate(take);
            ids
        };
        let mut targets = distinct(host_pages, capacity);
        targets.sort_unstable();
        let sources = distinct(device_pages, capacity);
        let slabs = host_pages.div_ceil(SLAB_PAGES as usize);
        let places = distinct(slabs * SLAB_PAGES as usize, capacity);
        let wild = |at: usize, id: u32| if at < count { id } else { WILD };
        let copies = targets.iter().zip(&sources).enumerate().map(|(at, (&host_page, &device_page))| {
            PageCopy { host_page: wild(at, host_page), device_page: wild(at, device_page) }
        });
        let places: Vec<u32> = places.iter().enumerate().map(|(at, &place)| wild(at, place)).collect();
        Self {
            copies: copies.collect(),
            count: count as u32,
            pool: (0..device_pages * page_words).map(|_| rng.random()).collect(),
            host_pages,
            page_words,
            places: rng.random::<bool>().then_some(places),
            host_valid: (0..slabs).map(|_| rng.random::<u32>() & rng.random::<u32>() & 0xffff).collect(),
            grid,
        }
    }

    /// The host's pages before the launch: poison.
    pub fn host(&self) -> Vec<u128> {
        vec![POISON; self.host_pages * self.page_words]
    }

    /// Whether the host's pages and the valid bits are what the CPU reference makes of them.
    ///
    /// # Errors
    /// The first word that differs.
    pub fn check(&self, host_pages: &[u128], host_valid: &[u32]) -> Result<(), String> {
        let (mut expected, mut bits) = (self.host(), self.host_valid.clone());
        let made = self.copies.len().min(self.count as usize);
        let places = self.places.as_ref().map_or(&[][..], |places| &places[..made]);
        let copies = &self.copies[..made];
        cpu::write_back(copies, &self.pool, &mut expected, self.page_words, places, &mut bits);
        assert_eq!(host_pages.len(), expected.len());
        if let Some(word) = (0..expected.len()).find(|word| host_pages[*word] != expected[*word]) {
            let (page, at) = (word / self.page_words, word % self.page_words);
            return Err(format!(
                "page {page}, word {at}: {:#034x} where {:#034x} was expected",
                host_pages[word], expected[word]
            ));
        }
        if host_valid != bits {
            return Err(format!("valid bits: {host_valid:x?} where {bits:x?} were expected"));
        }
        Ok(())
    }

    /// The host's pages and the valid bits after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<u128>, Vec<u32>), Fault> {
        self.emulate_watched(schedule, false)
    }

    /// The same where a thread, once it has done its part, waits for each page's valid bit and reads the page: a race, unless bits
    /// come after bytes.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate_with_reader(&self, schedule: u64) -> Result<(Vec<u128>, Vec<u32>), Fault> {
        self.emulate_watched(schedule, true)
    }

    fn emulate_watched(&self, schedule: u64, with_reader: bool) -> Result<(Vec<u128>, Vec<u32>), Fault> {
        let copies = Buffer::from_slice(&self.copies);
        let count = Buffer::from_slice(&[self.count]);
        let (pool, host_pages) = (words(&self.pool), words(&self.host()));
        let host_valid = Buffer::from_slice(&self.host_valid);
        // Without bits there is no table of places.
        let places = Buffer::from_slice(self.places.as_deref().unwrap_or_default());
        let (capacity, page_words) = (self.copies.len() as u32, self.page_words as u32);
        let marked = u32::from(self.places.is_some());
        let made = self.copies.len().min(self.count as usize);
        let bits = self.places.iter().flat_map(|places| &places[..made]).zip(&self.copies);
        let published = bits.map(|(place, copy)| Published {
            place: (place / SLAB_PAGES) as usize,
            bit: place % SLAB_PAGES,
            page: copy.host_page as usize,
        });
        let published: Vec<Published> = if with_reader { published.collect() } else { Vec::new() };
        Launch::new(self.grid, abi::write_back::BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                offload::write_back(
                    copies.view(),
                    count.view(),
                    capacity,
                    pool.view(),
                    host_pages.view_mut(),
                    page_words,
                    marked,
                    places.view(),
                    host_valid.view_mut(),
                );
                read_published(&published, host_valid.view(), host_pages.view(), self.page_words);
            }
        })?;
        Ok((to_words(&host_pages), host_valid.to_vec()))
    }
}

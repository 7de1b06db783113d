use spinkv_kernels::abi::{Entry, PageCopy, SLAB_PAGES, valid_place};

use crate::memory::{HostLayout, Word};

/// What one layer's Offload works on: sizes, the requests' entries, and the tables that say where pages are.
#[derive(Clone, Copy, Debug)]
pub struct OffloadTables<'a> {
    /// One a request.
    pub entries: &'a [Entry],
    /// Physical pages: a row's list is `[sink_pages + ring_pages]`.
    pub steady: &'a [u32],
    /// Slabs: a row's list is by page key / 16.
    pub host_slabs: &'a [u32],
    /// Row of KV head 0: layer * `kv_heads`.
    pub first_row: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Words of a key.
    pub head_words: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Whether full pages go to the host: not those of the sequence where the host has clusters.
    pub on_host: bool,
    /// What the host holds of a page.
    pub host: HostLayout,
}

/// Where Offload writes.
#[derive(Debug)]
pub struct OffloadPages<'a> {
    /// `[pages, 2, page_tokens, head_words]`, on the GPU.
    pub pool: &'a mut [Word],
    /// `[slabs, 16]` host pages.
    pub host_pages: &'a mut [Word],
    /// Valid bits, a u32 for each of `host_slabs`.
    pub host_valid: &'a mut [u32],
}

impl OffloadTables<'_> {
    fn page_words(&self) -> usize {
        2 * self.page_tokens * self.head_words
    }

    /// The pool page of page `key` of a row.
    fn pool_page(&self, entry: &Entry, row: usize, key: usize) -> usize {
        let (sinks, ring) = (entry.sink_pages as usize, entry.ring_pages as usize);
        let list = entry.first_steady as usize + row * (sinks + ring);
        let place = if key < sinks { key } else { sinks + (key - sinks) % ring };
        self.steady[list + place] as usize
    }

    /// Copies one token's key and value into a page.
    fn write_token(&self, page: &mut [Word], token: usize, key: &[Word], value: &[Word]) {
        let (keys, values) = page.split_at_mut(self.page_tokens * self.head_words);
        let words = token * self.head_words..(token + 1) * self.head_words;
        keys[words.clone()].copy_from_slice(key);
        values[words].copy_from_slice(value);
    }

    /// Writes a complete page of a row to the host and sets its valid bit.
    fn publish(&self, pages: &mut OffloadPages<'_>, entry: &Entry, row: usize, key: usize, page: &[Word]) {
        let slab = entry.first_slab as usize + row * entry.slab_stride as usize + key / SLAB_PAGES as usize;
        let host_page = self.host_slabs[slab] as usize * SLAB_PAGES as usize + key % SLAB_PAGES as usize;
        let words = self.host.page_words();
        self.host.to_host(page, &mut pages.host_pages[host_page * words..][..words]);
        set_valid(pages.host_valid, valid_place(slab as u32, key as u32));
    }

    /// What the kernel `append` does: stores each entry's new token, `[batch, kv_heads, head_words]`, in its steady page; a page that
    /// is now full goes to the host.
    ///
    /// # Panics
    /// If a table leads out of its array.
    pub fn append(&self, keys: &[Word], values: &[Word], pages: &mut OffloadPages<'_>) {
        let words = self.page_words();
        for (index, entry) in self.entries.iter().enumerate().filter(|(_, entry)| entry.tokens > 0) {
            let token = entry.tokens as usize - 1;
            for head in 0..self.kv_heads {
                let (row, key) = (self.first_row + head, token / self.page_tokens);
                let new = (index * self.kv_heads + head) * self.head_words;
                let new = new..new + self.head_words;
                let page = self.pool_page(entry, row, key);
                let page = &mut pages.pool[page * words..][..words];
                self.write_token(page, token % self.page_tokens, &keys[new.clone()], &values[new]);
                if self.on_host && (token + 1).is_multiple_of(self.page_tokens) {
                    let full = page.to_vec();
                    self.host.round(page);
                    self.publish(pages, entry, row, key, &full);
                }
            }
        }
    }

    /// What the kernel `store_prompt` does: stores the prompts of all entries, whose token 0 is at `first_token` of `keys` and `values`,
    /// `[tokens, kv_heads, head_words]`. Complete pages go to the host, unless their valid bits say that they are there; pages other than the
    /// entry's leaving ones go to the GPU.
    ///
    /// # Panics
    /// If a table leads out of its array.
    pub fn store_prompt(
        &self,
        keys: &[Word],
        values: &[Word],
        first_token: &[u32],
        pages: &mut OffloadPages<'_>,
    ) {
        let words = self.page_words();
        for (entry, &first_token) in self.entries.iter().zip(first_token) {
            let tokens = entry.tokens as usize;
            let leaving = entry.leaving_key as usize..entry.leaving_key as usize + entry.leaving as usize;
            for (head, key) in (0..self.kv_heads)
                .flat_map(|head| (0..tokens.div_ceil(self.page_tokens)).map(move |key| (head, key)))
            {
                let row = self.first_row + head;
                let first = key * self.page_tokens;
                let end = tokens.min(first + self.page_tokens);
                let write = |page: &mut [Word]| {
                    for token in first..end {
                        let at = ((first_token as usize + token) * self.kv_heads + head) * self.head_words;
                        let at = at..at + self.head_words;
                        self.write_token(page, token - first, &keys[at.clone()], &values[at]);
                    }
                };
                let goes = self.on_host
                    && end == first + self.page_tokens
                    && !{
                        let slabs = SLAB_PAGES as usize;
                        let slab = entry.first_slab as usize + row * entry.slab_stride as usize + key / slabs;
                        pages.host_valid[slab] >> (key % slabs) & 1 == 1
                    };
                if !leaving.contains(&key) {
                    let page = self.pool_page(entry, row, key);
                    let page = &mut pages.pool[page * words..][..words];
                    write(page);
                    if goes {
                        self.host.round(page);
                    }
                }
                if goes {
                    let mut page = vec![0; words];
                    write(&mut page);
                    self.publish(pages, entry, row, key, &page);
                }
            }
        }
    }
}

/// What the kernel `write_back` does: copies the pages that the list names to the host, `page_words` words each, and sets the valid
/// bits at `places`, one a copy, if there are any.
///
/// # Panics
/// If a page lies outside `device_pages` or `host_pages`, `[pages, page_words]`, or a place outside `host_valid`.
pub fn write_back(
    copies: &[PageCopy],
    device_pages: &[Word],
    host_pages: &mut [Word],
    page_words: usize,
    places: &[u32],
    host_valid: &mut [u32],
) {
    for copy in copies {
        let page = |id: u32| id as usize * page_words..(id as usize + 1) * page_words;
        host_pages[page(copy.host_page)].copy_from_slice(&device_pages[page(copy.device_page)]);
    }
    places.iter().for_each(|place| set_valid(host_valid, *place));
}

fn set_valid(host_valid: &mut [u32], place: u32) {
    host_valid[(place / SLAB_PAGES) as usize] |= 1 << (place % SLAB_PAGES);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{KvDtype, PageLayout};

    /// One head of one word, pages of two tokens, one sink page and a ring of two; layer 1 of models with one head, so row 1.
    fn tables<'a>(entries: &'a [Entry], steady: &'a [u32], host_slabs: &'a [u32]) -> OffloadTables<'a> {
        OffloadTables {
            entries,
            steady,
            host_slabs,
            first_row: 1,
            kv_heads: 1,
            head_words: 1,
            page_tokens: 2,
            on_host: true,
            host: PageLayout::new(2, 8, KvDtype::Bf16).unwrap().into(),
        }
    }

    const STEADY: [u32; 6] = [99, 99, 99, 2, 0, 1];
    const SLABS: [u32; 2] = [99, 1];

    fn entry(tokens: u32) -> Entry {
        Entry { tokens, sink_pages: 1, ring_pages: 2, slab_stride: 1, ..Entry::default() }
    }

    #[test]
    fn tokens_come_to_their_page_and_full_pages_to_the_host() {
        let (mut pool, mut host, mut valid) = (vec![0; 3 * 4], vec![0; 2 * 16 * 4], [0; 2]);
        for tokens in 1..=8 {
            let entries = [entry(tokens)];
            let tables = tables(&entries, &STEADY, &SLABS);
            let mut pages = OffloadPages { pool: &mut pool, host_pages: &mut host, host_valid: &mut valid };
            tables.append(&[tokens.into()], &[Word::from(tokens) + 100], &mut pages);
            assert_eq!(valid, [0, (1 << (tokens / 2)) - 1], "after {tokens} tokens");
        }
        // Page 0 is the sink's; page 3 has the place of page 1.
        assert_eq!(pool, [7, 8, 107, 108, 5, 6, 105, 106, 1, 2, 101, 102]);
        let expected = [1, 2, 101, 102, 3, 4, 103, 104, 5, 6, 105, 106, 7, 8, 107, 108];
        assert_eq!(host[16 * 4..][..16], expected);
        assert!(host[..16 * 4].iter().chain(&host[16 * 4 + 16..]).all(|word| *word == 0));
    }

    #[test]
    fn a_prompt_is_stored_as_its_tokens_would_be() {
        let (mut pool, mut host, mut valid) = (vec![0; 3 * 4], vec![0; 2 * 16 * 4], [0; 2]);
        let entries = [Entry::default(), Entry { leaving_key: 1, leaving: 2, ..entry(7) }];
        let tables = tables(&entries, &STEADY, &SLABS);
        let keys: Vec<Word> = (0..9).collect();
        let values: Vec<Word> = (100..109).collect();
        let mut pages = OffloadPages { pool: &mut pool, host_pages: &mut host, host_valid: &mut valid };
        tables.store_prompt(&keys, &values, &[99, 1], &mut pages);
        // The sink's page and the last, of which there is one token; pages 1 and 2 are on the host alone.
        assert_eq!(pool, [7, 0, 107, 0, 0, 0, 0, 0, 1, 2, 101, 102]);
        assert_eq!(host[16 * 4..][..12], [1, 2, 101, 102, 3, 4, 103, 104, 5, 6, 105, 106]);
        assert_eq!(valid, [0, 0b111]);
        // What is there already is another's.
        host[16 * 4..].fill(9);
        valid[1] = 0b10;
        let mut pages = OffloadPages { pool: &mut pool, host_pages: &mut host, host_valid: &mut valid };
        tables.store_prompt(&keys, &values, &[99, 1], &mut pages);
        assert_eq!(host[16 * 4..][..12], [1, 2, 101, 102, 9, 9, 9, 9, 5, 6, 105, 106]);
        assert_eq!(valid, [0, 0b111]);
    }

    #[test]
    fn pages_are_written_back_by_a_list() {
        let copies = [PageCopy { host_page: 2, device_page: 0 }, PageCopy { host_page: 0, device_page: 1 }];
        let (mut host, mut valid) = ([0; 6], [0, 1]);
        write_back(&copies, &[1, 2, 3, 4], &mut host, 2, &[17, 15], &mut valid);
        assert_eq!(host, [3, 4, 0, 0, 1, 2]);
        assert_eq!(valid, [1 << 15, 0b11]);
        write_back(&copies[..1], &[5, 6], &mut host, 2, &[], &mut valid);
        assert_eq!((host, valid), ([3, 4, 0, 0, 5, 6], [1 << 15, 0b11]));
    }
}

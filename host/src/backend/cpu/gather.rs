use spinkv_kernels::abi::PageCopy;

use crate::memory::Word;

/// Copies the pages that the list names, `page_words` words each: what the kernel `gather` does.
///
/// # Panics
/// If a page lies outside `host_pages`, `[host pages, page_words]`, or `device_pages`, `[device pages, page_words]`.
pub fn gather(copies: &[PageCopy], host_pages: &[Word], device_pages: &mut [Word], page_words: usize) {
    for copy in copies {
        let page = |id: u32| id as usize * page_words..(id as usize + 1) * page_words;
        device_pages[page(copy.device_page)].copy_from_slice(&host_pages[page(copy.host_page)]);
    }
}

use spinkv_kernels::abi::PageCopy;

use crate::memory::Word;

/// Copies the pages that the list names, host pages of `page_words` words to the ends of GPU pages of `device_words`: what the kernel `gather`
/// does.
///
/// # Panics
/// If a page lies outside `host_pages`, `[host pages, page_words]`, or `device_pages`, `[device pages, device_words]`.
pub fn gather(
    copies: &[PageCopy],
    host_pages: &[Word],
    device_pages: &mut [Word],
    page_words: usize,
    device_words: usize,
) {
    for copy in copies {
        let source = copy.host_page as usize * page_words;
        let end = (copy.device_page as usize + 1) * device_words;
        device_pages[end - page_words..end].copy_from_slice(&host_pages[source..source + page_words]);
    }
}

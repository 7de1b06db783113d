use spinkv_kernels::abi::PageCopy;

use crate::memory::{HostLayout, Word};

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

/// What the kernel `gather_coded` does: the same of coded host pages, all of each GPU page.
///
/// # Panics
/// If a page lies outside `host_pages` or `device_pages`.
pub fn gather_coded(copies: &[PageCopy], host_pages: &[Word], device_pages: &mut [Word], host: &HostLayout) {
    let (host_words, device_words) = (host.page_words(), host.page().page_words());
    for copy in copies {
        let source = &host_pages[copy.host_page as usize * host_words..][..host_words];
        host.to_gpu(source, &mut device_pages[copy.device_page as usize * device_words..][..device_words]);
    }
}

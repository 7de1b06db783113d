use std::ops::Range;

use super::{PageLayout, SLAB_PAGES, Word};

/// What a host page holds of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostFormat {
    /// Keys and values: the bytes of the GPU page.
    #[default]
    Full,
    /// The values alone, as the GPU page has them. Its keys are [kept elsewhere](crate::pipeline::KeyStore).
    Values,
}

/// The bytes of a host page: those of a [`PageLayout`] in a [`HostFormat`]. Whatever differs between the tiers' pages is said here.
///
/// ```
/// use spinkv::memory::{HostFormat, HostLayout, KvDtype, PageLayout};
/// let page = PageLayout::new(8, 128, KvDtype::Bf16)?;
/// assert_eq!(HostLayout::new(page, HostFormat::Full).page_bytes(), 4096);
/// assert_eq!(HostLayout::new(page, HostFormat::Values).page_bytes(), 2048); // 8 * 128 * 2
/// # Ok::<(), spinkv::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLayout {
    page: PageLayout,
    format: HostFormat,
}

impl HostLayout {
    /// Host pages of `page` in `format`.
    pub fn new(page: PageLayout, format: HostFormat) -> Self {
        Self { page, format }
    }

    /// The GPU page.
    pub fn page(&self) -> &PageLayout {
        &self.page
    }

    /// What of it is on the host.
    pub fn format(&self) -> HostFormat {
        self.format
    }

    /// The words of a GPU page that its host page holds, one for one.
    pub fn kept(&self) -> Range<usize> {
        let words = self.page.page_words();
        match self.format {
            HostFormat::Full => 0..words,
            HostFormat::Values => words / 2..words,
        }
    }

    /// Words of a host page.
    pub fn page_words(&self) -> usize {
        self.kept().len()
    }

    /// Bytes of a host page.
    pub fn page_bytes(&self) -> usize {
        self.page_words() * size_of::<Word>()
    }

    /// Bytes of a slab.
    pub fn slab_bytes(&self) -> u64 {
        (SLAB_PAGES * self.page_bytes()) as u64
    }
}

/// Whole pages.
impl From<PageLayout> for HostLayout {
    fn from(page: PageLayout) -> Self {
        Self::new(page, HostFormat::Full)
    }
}

//! How KV pages are made.

use spinkv::Result;
use spinkv::memory::{HostFormat, HostLayout, KvDtype, PageLayout};

/// Size and formats of KV pages, for heads of any width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageOptions {
    /// Tokens of a page.
    pub tokens: usize,
    /// How pages store their elements.
    pub dtype: KvDtype,
    /// What the host holds of a page.
    pub host: HostFormat,
}

impl Default for PageOptions {
    /// 8 tokens in bf16, on both tiers.
    fn default() -> Self {
        Self { tokens: 8, dtype: KvDtype::Bf16, host: HostFormat::Full }
    }
}

impl PageOptions {
    /// The pages of heads of this width.
    ///
    /// # Errors
    /// Those of [`PageLayout::new`] and [`HostLayout::new`].
    pub fn layout(&self, head_dim: usize) -> Result<HostLayout> {
        HostLayout::new(PageLayout::new(self.tokens, head_dim, self.dtype)?, self.host)
    }

    /// The name of the element type, as users give it.
    pub fn dtype_name(&self) -> &'static str {
        match self.dtype {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
        }
    }
}

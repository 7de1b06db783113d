use half::bf16;
use half::slice::HalfFloatSliceExt;

use crate::{Error, Result};

/// The unit in which pages are stored: 16 bytes, the widest access of a GPU thread.
pub type Word = u128;

/// The largest page, in tokens. Far above any useful one; a page is what one miss costs.
pub const MAX_PAGE_TOKENS: usize = 1 << 16;

/// How the elements of a KV page are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// 32-bit floats: exact, for the CPU reference.
    F32,
    /// bfloat16, rounded to nearest even: what GPUs hold.
    #[default]
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// `value` as it reads back after being stored.
    #[inline]
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}

/// The bytes of a page: `page_tokens` tokens of one row, K then V, each `[page_tokens, head_dim]`
/// row-major. The same bytes on the host and on the GPU, so that one miss is one contiguous copy.
///
/// ```
/// use spinkv::memory::{KvDtype, PageLayout};
/// let layout = PageLayout::new(8, 128, KvDtype::Bf16)?;
/// assert_eq!(layout.page_bytes(), 4096); // 2 * 8 * 128 * 2
/// # Ok::<(), spinkv::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    page_tokens: usize,
    head_dim: usize,
    dtype: KvDtype,
}

impl PageLayout {
    /// Checks and builds a layout.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] if `page_tokens` is 0 or above [`MAX_PAGE_TOKENS`], or if `head_dim` is not a
    /// positive multiple of 8: 8 bf16 elements fill one [`Word`], and a token's K or V is a whole number of words.
    pub fn new(page_tokens: usize, head_dim: usize, dtype: KvDtype) -> Result<Self> {
        if page_tokens == 0 {
            return Err(Error::InvalidLayout {
                reason: "page size of 0 tokens; at least 1 is needed".into(),
            });
        }
        if page_tokens > MAX_PAGE_TOKENS {
            let reason = format!("page size of {page_tokens} tokens; at most {MAX_PAGE_TOKENS}");
            return Err(Error::InvalidLayout { reason });
        }
        if head_dim == 0 || !head_dim.is_multiple_of(8) {
            return Err(Error::InvalidLayout {
                reason: format!("head_dim {head_dim} is not a positive multiple of 8"),
            });
        }
        Ok(Self { page_tokens, head_dim, dtype })
    }

    /// Tokens of a page.
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Elements of one key or value.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The element type.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Bytes of a page, K and V together.
    pub fn page_bytes(&self) -> usize {
        2 * self.page_tokens * self.head_dim * self.dtype.bytes()
    }

    /// Words of a page.
    pub fn page_words(&self) -> usize {
        self.page_bytes() / size_of::<Word>()
    }

    /// Pages that `tokens` tokens touch.
    pub fn pages(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Stores the key and the value of the `token`-th token of a page.
    ///
    /// # Panics
    /// If `token` lies outside the page or a slice is not `head_dim` long.
    pub fn write_token(&self, page: &mut [Word], token: usize, key: &[f32], value: &[f32]) {
        assert!(token < self.page_tokens, "token {token} of a page of {}", self.page_tokens);
        let (keys, values) = page.split_at_mut(self.page_words() / 2);
        self.encode(keys, token, key);
        self.encode(values, token, value);
    }

    /// Stores the key of the `token`-th token of a page, and leaves its value.
    ///
    /// # Panics
    /// As for [`write_token`](Self::write_token).
    pub fn write_key(&self, page: &mut [Word], token: usize, key: &[f32]) {
        assert!(token < self.page_tokens, "token {token} of a page of {}", self.page_tokens);
        self.encode(&mut page[..self.page_words() / 2], token, key);
    }

    /// Reads the key of the `token`-th token of a page.
    pub fn read_key(&self, page: &[Word], token: usize, out: &mut [f32]) {
        let words = self.page_words() / 2 / self.page_tokens;
        self.decode(&page[token * words..(token + 1) * words], out);
    }

    /// Reads the keys of the first `out.len() / head_dim` tokens of a page into `out`, `[tokens, head_dim]`.
    pub fn read_keys(&self, page: &[Word], out: &mut [f32]) {
        self.decode(&page[..self.page_words() / 2], out);
    }

    /// Reads the value of a page's `token` into `out`, `[head_dim]`.
    pub fn read_value(&self, page: &[Word], token: usize, out: &mut [f32]) {
        let words = self.page_words() / 2 / self.page_tokens;
        self.decode(&page[self.page_words() / 2..][token * words..(token + 1) * words], out);
    }

    /// Reads the values of the first `out.len() / head_dim` tokens of a page into `out`,
    /// `[tokens, head_dim]`.
    pub fn read_values(&self, page: &[Word], out: &mut [f32]) {
        self.decode(&page[self.page_words() / 2..], out);
    }

    fn encode(&self, words: &mut [Word], token: usize, elements: &[f32]) {
        assert_eq!(elements.len(), self.head_dim);
        let range = token * self.head_dim..(token + 1) * self.head_dim;
        match self.dtype {
            KvDtype::F32 => bytemuck::cast_slice_mut(words)[range].copy_from_slice(elements),
            KvDtype::Bf16 => {
                bytemuck::cast_slice_mut::<_, bf16>(words)[range].convert_from_f32_slice(elements);
            }
        }
    }

    fn decode(&self, words: &[Word], out: &mut [f32]) {
        match self.dtype {
            KvDtype::F32 => out.copy_from_slice(&bytemuck::cast_slice(words)[..out.len()]),
            KvDtype::Bf16 => {
                bytemuck::cast_slice::<_, bf16>(words)[..out.len()].convert_to_f32_slice(out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// K and V sit where the doc says, computed by hand.
    #[test]
    fn bytes_are_k_then_v_token_major() {
        let layout = PageLayout::new(2, 8, KvDtype::F32).unwrap();
        assert_eq!((layout.page_bytes(), layout.page_words()), (128, 8));
        let mut page = vec![0; 8];
        let key: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let value: Vec<f32> = (100..108).map(|i| i as f32).collect();
        layout.write_token(&mut page, 1, &key, &value);
        let floats: &[f32] = bytemuck::cast_slice(&page);
        assert_eq!(floats[..8], [0.0; 8]);
        assert_eq!(floats[8..16], key);
        assert_eq!(floats[16..24], [0.0; 8]);
        assert_eq!(floats[24..32], value);
    }

    #[test]
    fn bf16_reads_back_rounded() {
        let layout = PageLayout::new(3, 16, KvDtype::Bf16).unwrap();
        let mut page = vec![0; layout.page_words()];
        let key: Vec<f32> = (0..16).map(|i| 1.0 + i as f32 * 0.001).collect();
        for token in 0..3 {
            layout.write_token(&mut page, token, &key, &key);
        }
        let mut out = vec![0.0; 2 * 16];
        layout.read_values(&page, &mut out);
        for (found, stored) in out.iter().zip(key.iter().cycle()) {
            assert_eq!(*found, KvDtype::Bf16.round(*stored));
        }
        assert_ne!(out[1], key[1], "0.001 is below bf16's resolution at 1.0");
    }

    #[test]
    fn sizes_that_cannot_be_addressed_are_refused() {
        for (page_tokens, head_dim) in [(0, 128), (8, 0), (8, 12)] {
            let error = PageLayout::new(page_tokens, head_dim, KvDtype::Bf16).unwrap_err();
            assert!(matches!(error, Error::InvalidLayout { .. }), "{error}");
        }
    }
}

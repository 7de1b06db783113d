use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use spinkv_kernels::abi::page_code::{CODED_ELEMENTS, PageCode};

use super::{PageLayout, SLAB_PAGES, Word};
use crate::{Error, Result};

/// What a host page holds of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostFormat {
    /// Keys and values: the bytes of the GPU page.
    #[default]
    Full,
    /// The values alone, as the GPU page has them. Its keys are [kept elsewhere](crate::pipeline::KeyStore).
    Values,
    /// Keys and values in a byte an element, with a scale for the page's keys and one for its values: half the bytes of bf16, and one
    /// [`Word`]. A page that is full reads as its codes say on both tiers, so what a step reads does not depend on where it was.
    Coded(PageCode),
}

/// The names that users give.
impl FromStr for HostFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "full" => Ok(Self::Full),
            "fp8" => Ok(Self::Coded(PageCode::E4m3)),
            "int8" => Ok(Self::Coded(PageCode::Int8)),
            _ => Err(Error::InvalidLayout { reason: format!("host pages in {name:?}: full, fp8 or int8") }),
        }
    }
}

impl fmt::Display for HostFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Values => "values",
            Self::Coded(PageCode::E4m3) => "fp8",
            Self::Coded(PageCode::Int8) => "int8",
        })
    }
}

/// The bytes of a host page: those of a [`PageLayout`] in a [`HostFormat`]. Whatever differs between the tiers' pages is said here.
///
/// ```
/// use spinkv::memory::{HostFormat, HostLayout, KvDtype, PageLayout};
/// let page = PageLayout::new(8, 128, KvDtype::Bf16)?;
/// assert_eq!(HostLayout::new(page, HostFormat::Full)?.page_bytes(), 4096);
/// assert_eq!(HostLayout::new(page, HostFormat::Values)?.page_bytes(), 2048); // 8 * 128 * 2
/// assert_eq!(HostLayout::new(page, "fp8".parse()?)?.page_bytes(), 2064); // 2 * 8 * 128, and the scales
/// # Ok::<(), spinkv::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLayout {
    page: PageLayout,
    format: HostFormat,
}

impl HostLayout {
    /// Host pages of `page` in `format`.
    ///
    /// # Errors
    /// [`Error::InvalidLayout`] for codes of heads of which a key is not whole words of them: a head dim that is not a multiple of 16.
    pub fn new(page: PageLayout, format: HostFormat) -> Result<Self> {
        let head_dim = page.head_dim();
        if matches!(format, HostFormat::Coded(_)) && !head_dim.is_multiple_of(CODED_ELEMENTS) {
            let reason =
                format!("host pages in {format}: head_dim {head_dim} is not a multiple of {CODED_ELEMENTS}");
            return Err(Error::InvalidLayout { reason });
        }
        Ok(Self { page, format })
    }

    /// The same pages with the values alone on the host.
    pub(crate) fn values(&self) -> Self {
        Self { page: self.page, format: HostFormat::Values }
    }

    /// The GPU page.
    pub fn page(&self) -> &PageLayout {
        &self.page
    }

    /// What of it is on the host.
    pub fn format(&self) -> HostFormat {
        self.format
    }

    /// The code of its elements, if they are coded.
    pub fn code(&self) -> Option<PageCode> {
        match self.format {
            HostFormat::Coded(code) => Some(code),
            HostFormat::Full | HostFormat::Values => None,
        }
    }

    /// Words of a host page.
    pub fn page_words(&self) -> usize {
        let words = self.page.page_words();
        match self.format {
            HostFormat::Full => words,
            HostFormat::Values => words / 2,
            HostFormat::Coded(_) => self.elements() / CODED_ELEMENTS + 1,
        }
    }

    /// Bytes of a host page.
    pub fn page_bytes(&self) -> usize {
        self.page_words() * size_of::<Word>()
    }

    /// Bytes of a slab.
    pub fn slab_bytes(&self) -> u64 {
        (SLAB_PAGES * self.page_bytes()) as u64
    }

    /// Makes the host page of a GPU page.
    ///
    /// # Panics
    /// If they are not a whole page each.
    pub fn to_host(&self, page: &[Word], host: &mut [Word]) {
        let Some(code) = self.code() else { return host.copy_from_slice(&page[self.kept()]) };
        let (scales, codes) = host.split_last_mut().expect("a page has words");
        let mut elements = vec![0.0; self.elements()];
        let (keys, values) = elements.split_at_mut(self.elements() / 2);
        self.page.read_keys(page, keys);
        self.page.read_values(page, values);
        let halves = elements.chunks_exact(self.elements() / 2);
        let codes = bytemuck::cast_slice_mut::<_, u8>(codes);
        let mut of_halves = [0.0; 4];
        for ((half, codes), of_half) in
            halves.zip(codes.chunks_exact_mut(self.elements() / 2)).zip(&mut of_halves)
        {
            let size = |element: &f32| element.to_bits() & 0x7fff_ffff;
            *of_half = code.scale(half.iter().map(size).max().unwrap_or(0));
            let inverse = 1.0 / *of_half;
            half.iter().zip(codes).for_each(|(element, byte)| *byte = code.encode(*element, inverse));
        }
        *scales = bytemuck::cast(of_halves);
    }

    /// Puts what a host page holds into its GPU page; the rest of that stays as it is.
    ///
    /// # Panics
    /// If they are not a whole page each.
    pub fn to_gpu(&self, host: &[Word], page: &mut [Word]) {
        let Some(code) = self.code() else { return page[self.kept()].copy_from_slice(host) };
        let (scales, codes) = host.split_last().expect("a page has words");
        let scales: [f32; 4] = bytemuck::cast(*scales);
        let codes = bytemuck::cast_slice::<_, u8>(codes);
        let (half, head_dim) = (self.elements() / 2, self.page.head_dim());
        let halves = codes.chunks_exact(half).zip(scales);
        let elements: Vec<f32> =
            halves.flat_map(|(half, scale)| half.iter().map(move |byte| code.decode(*byte, scale))).collect();
        let (keys, values) = elements.split_at(half);
        let tokens = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for (token, (key, value)) in tokens.enumerate() {
            self.page.write_token(page, token, key, value);
        }
    }

    /// Makes a GPU page that is full what it would be if it came from the host.
    pub fn round(&self, page: &mut [Word]) {
        if self.code().is_some() {
            let mut host = vec![0; self.page_words()];
            self.to_host(page, &mut host);
            self.to_gpu(&host, page);
        }
    }

    /// The words of a GPU page that its host page holds, one for one where they are not coded.
    pub(super) fn kept(&self) -> Range<usize> {
        let words = self.page.page_words();
        match self.format {
            HostFormat::Values => words / 2..words,
            HostFormat::Full | HostFormat::Coded(_) => 0..words,
        }
    }

    /// Elements of a page.
    fn elements(&self) -> usize {
        2 * self.page.page_tokens() * self.page.head_dim()
    }
}

/// Whole pages.
impl From<PageLayout> for HostLayout {
    fn from(page: PageLayout) -> Self {
        Self { page, format: HostFormat::Full }
    }
}

#[cfg(test)]
mod tests {
    use super::super::KvDtype;
    use super::*;

    /// A page whose keys are between -`key` and `key`, and values likewise.
    fn page(layout: &PageLayout, key: f32, value: f32) -> Vec<Word> {
        let mut page = vec![0; layout.page_words()];
        let mut next = 1u32;
        let mut draw = |size: f32| {
            next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (next as i32 as f32) / (i32::MAX as f32) * size
        };
        for token in 0..layout.page_tokens() {
            let of_token =
                [key, value].map(|size| (0..layout.head_dim()).map(|_| draw(size)).collect::<Vec<_>>());
            layout.write_token(&mut page, token, &of_token[0], &of_token[1]);
        }
        page
    }

    /// Each half by its own scale: a half's error is bounded by its own greatest element, and what came back once comes back the same.
    #[test]
    fn coded_pages_come_back_near_and_then_the_same() {
        for (dtype, name, step) in [
            (KvDtype::Bf16, "fp8", 1.0 / 16.0),
            (KvDtype::F32, "fp8", 1.0 / 16.0),
            (KvDtype::Bf16, "int8", 0.0),
        ] {
            let layout = PageLayout::new(4, 32, dtype).unwrap();
            let coded = HostLayout::new(layout, name.parse().unwrap()).unwrap();
            assert_eq!(coded.page_bytes(), 2 * 4 * 32 + 16);
            let original = page(&layout, 300.0, 0.01);
            let mut back = original.clone();
            coded.round(&mut back);
            assert_ne!(back, original);
            for (key, limit) in [(true, 300.0), (false, 0.01)] {
                let read = |page: &[Word]| {
                    let mut out = vec![0.0; 4 * 32];
                    if key {
                        layout.read_keys(page, &mut out)
                    } else {
                        layout.read_values(page, &mut out)
                    }
                    out
                };
                for (one, other) in read(&original).into_iter().zip(read(&back)) {
                    let bound = one.abs() * step + limit / 100.0;
                    assert!((one - other).abs() <= bound, "{name} {one} {other}");
                }
            }
            let mut again = back.clone();
            coded.round(&mut again);
            assert_eq!(again, back, "{name}");
        }
    }

    #[test]
    fn what_is_no_number_comes_back_as_none() {
        let layout = PageLayout::new(1, 16, KvDtype::Bf16).unwrap();
        let coded = HostLayout::new(layout, HostFormat::Coded(PageCode::E4m3)).unwrap();
        let mut page = vec![0; layout.page_words()];
        let mut key = vec![1.0; 16];
        key[3] = f32::INFINITY;
        layout.write_token(&mut page, 0, &key, &[1.5; 16]);
        coded.round(&mut page);
        let (mut keys, mut values) = (vec![0.0; 16], vec![0.0; 16]);
        layout.read_keys(&page, &mut keys);
        layout.read_values(&page, &mut values);
        assert!(keys.iter().all(|key| key.is_nan()), "{keys:?}");
        assert_eq!(values, [1.5; 16]);
    }

    #[test]
    fn unknown_formats_and_heads_that_are_no_whole_words_are_refused() {
        let error = "fp4".parse::<HostFormat>().unwrap_err().to_string();
        assert!(error.contains("\"fp4\"") && error.contains("fp8"), "{error}");
        for format in ["full", "fp8", "int8"] {
            assert_eq!(format.parse::<HostFormat>().unwrap().to_string(), format);
        }
        let page = PageLayout::new(8, 24, KvDtype::Bf16).unwrap();
        let error = HostLayout::new(page, "fp8".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("24") && error.contains("16"), "{error}");
    }
}

use spinkv_kernels::abi::model::rotate;
use spinkv_kernels::abi::{ENTRY_WORDS, Entry, WORD_ELEMENTS};

use super::super::super::driver::{
    Argument, DeviceBuffer, LaunchShape, Result, Stream, check_choice, check_length, check_operand,
    check_positive, check_range, launch_with,
};
use super::super::Kernels;
use crate::memory::Word;

/// The positions of a launch's tokens.
#[derive(Clone, Copy, Debug)]
pub enum Positions<'a> {
    /// A decode step: of each of `[tokens]` entries the last token. Of entries without tokens nothing is read or written.
    Entries(&'a DeviceBuffer<Entry>),
    /// A prompt: from this one on.
    From(u32),
}

/// Norms of a model that norms its heads.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms<'a> {
    /// `[head_dim]`: weights of the queries' norm.
    pub queries: &'a DeviceBuffer<f32>,
    /// `[head_dim]`: weights of the keys' norm.
    pub keys: &'a DeviceBuffer<f32>,
    /// Added to the mean square; above 0.
    pub eps: f32,
}

/// A launch of `rotate`: parts the product of tokens with the query, key and value projections into the three, after the norms of
/// query and key heads, if the model has them, and their rotary position embedding.
#[derive(Clone, Copy, Debug)]
pub struct Rotate<'a> {
    /// `[tokens, query_heads + 2 * kv_heads, head_words]` bf16 or more: a token's queries, its keys, its values.
    pub projected: &'a DeviceBuffer<Word>,
    /// Tokens.
    pub tokens: u32,
    /// Query heads.
    pub query_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Words of a head: 8 or 16, for 64 or 128 elements.
    pub head_words: u32,
    /// Where the tokens stand.
    pub positions: Positions<'a>,
    /// `[head_dim / 2]`, in radians a position. Angles are accurate up to 2^20.
    pub frequencies: &'a DeviceBuffer<f32>,
    /// Factor of sines and cosines; 1 but for YaRN.
    pub factor: f32,
    /// Of query and key heads, if the model has them.
    pub norms: Option<HeadNorms<'a>>,
    /// `[tokens, query_heads, head_words]` bf16 or more.
    pub queries: &'a DeviceBuffer<Word>,
    /// Where the first token's key and value go.
    pub first_token: u32,
    /// `[first_token + tokens, kv_heads, head_words]` bf16 or more.
    pub keys: &'a DeviceBuffer<Word>,
    /// As the keys.
    pub values: &'a DeviceBuffer<Word>,
}

impl Rotate<'_> {
    /// Async: queries, keys and values are there when `stream` has come this far. No token launches nothing.
    ///
    /// # Errors
    /// [`Choice`](super::super::super::driver::DriverError::Choice) for heads of neither 64 nor 128,
    /// [`Operand`](super::super::super::driver::DriverError::Operand) for no head, or heads, positions or warps beyond 32 bits,
    /// [`Positive`](super::super::super::driver::DriverError::Positive) for a `factor` or an `eps` that is no number above 0,
    /// [`Length`](super::super::super::driver::DriverError::Length) and
    /// [`OutOfRange`](super::super::super::driver::DriverError::OutOfRange) for a buffer that does not fit, or a failed launch.
    ///
    /// # Safety
    /// Until the launch has run nothing writes what it reads, and nothing uses what it writes.
    pub unsafe fn launch(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Self { tokens, query_heads, kv_heads, head_words, first_token, .. } = *self;
        let most = u64::from(u32::MAX);
        check_choice("rotate head_words", head_words, &rotate::HEAD_WORDS)?;
        check_operand("rotate query_heads", query_heads.into(), 1..=most)?;
        check_operand("rotate kv_heads", kv_heads.into(), 1..=most)?;
        check_positive("rotate factor", self.factor)?;
        let heads = u64::from(query_heads) + 2 * u64::from(kv_heads);
        // A warp counts on past the last of them.
        check_operand("rotate words of a token", heads * u64::from(head_words), 0..=most / 4)?;
        let (heads, head_dim) = (heads as u32, head_words as usize * WORD_ELEMENTS);
        let words = |tokens: u64, heads: u32| {
            usize::try_from(u128::from(tokens) * u128::from(heads) * u128::from(head_words))
                .unwrap_or(usize::MAX)
        };
        let kv_words = words(u64::from(first_token) + u64::from(tokens), kv_heads);
        check_range("rotate projected", 0, words(tokens.into(), heads), self.projected.len())?;
        check_range("rotate queries", 0, words(tokens.into(), query_heads), self.queries.len())?;
        check_range("rotate keys", 0, kv_words, self.keys.len())?;
        check_range("rotate values", 0, kv_words, self.values.len())?;
        check_length("rotate frequencies", head_dim / 2, self.frequencies.len())?;
        if let Some(HeadNorms { queries, keys, eps }) = self.norms {
            check_length("rotate norms queries", head_dim, queries.len())?;
            check_length("rotate norms keys", head_dim, keys.len())?;
            check_positive("rotate norms eps", eps)?;
        }
        let (entries, first_position): (Argument, u32) = match self.positions {
            Positions::Entries(entries) => {
                const { assert!(ENTRY_WORDS * size_of::<Word>() == size_of::<Entry>(), "read as words") };
                check_length("rotate entries", tokens as usize, entries.len())?;
                (entries.into(), 0)
            }
            Positions::From(first) => {
                check_operand("rotate positions", u64::from(first) + u64::from(tokens), 0..=most)?;
                // The product stands in for entries, which are not read.
                (self.projected.into(), first)
            }
        };
        let warps_of_token = rotate::warps_of_token(tokens, rotate::groups(heads, head_words));
        let warps = u64::from(tokens) * u64::from(warps_of_token);
        check_operand("rotate warps", warps, 0..=most / 2)?;
        if warps == 0 {
            return Ok(());
        }
        // Nor are norms, if there are none.
        let norms =
            self.norms.unwrap_or(HeadNorms { queries: self.frequencies, keys: self.frequencies, eps: 1.0 });
        let arguments: [Argument; 19] = [
            self.projected.into(),
            tokens.into(),
            query_heads.into(),
            kv_heads.into(),
            head_words.into(),
            entries,
            u32::from(matches!(self.positions, Positions::Entries(_))).into(),
            first_position.into(),
            self.frequencies.into(),
            self.factor.into(),
            norms.queries.into(),
            norms.keys.into(),
            u32::from(self.norms.is_some()).into(),
            norms.eps.into(),
            warps_of_token.into(),
            self.queries.into(),
            first_token.into(),
            self.keys.into(),
            self.values.into(),
        ];
        let shape = LaunchShape::linear(rotate::grid(warps) as u32, rotate::BLOCK);
        // SAFETY: order and types are the kernel's; the caller answers for who else uses the buffers.
        unsafe { launch_with(&kernels.model.rotate, &shape, stream, arguments) }
    }
}

//! Cases of `prefill_64`, `prefill_128` and their forms on products of a warpgroup.

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::WORD_ELEMENTS;
use spinkv_kernels::abi::prefill::query_tiles;

use super::attend::{Elements, Peaks, Token, check_head, word};
use super::{POISON, pick};

/// Tokens beyond the batch's: what is there is no number, and stays what it is.
const BEYOND: usize = 3;

/// What logarithms of sums are before.
const NO_LSE: f32 = -1.25e30;

/// A launch on a ragged batch.
#[derive(Debug)]
pub struct PrefillCase {
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Words of a head: 8 or 16.
    pub head_words: usize,
    /// `[requests + 1]`.
    pub first_query: Vec<u32>,
    /// `[requests + 1]`.
    pub first_key: Vec<u32>,
    /// `[requests + 1]`.
    pub first_tile: Vec<u32>,
    /// Tiles to launch: those that there are, or more.
    pub tiles: u32,
    /// `[tokens, kv_heads * group, head_words]`.
    pub queries: Vec<u128>,
    /// `[tokens, kv_heads, head_words]`.
    pub keys: Vec<u128>,
    /// `[tokens, kv_heads, head_words]`.
    pub values: Vec<u128>,
    /// Factor of the logits.
    pub scale: f32,
}

impl PrefillCase {
    /// The case of a seed: groups of 1 to 16, both head widths, chunks of none to two tiles and a token, with a past and without.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let group = pick(&mut rng, &[1, 2, 3, 4, 5, 5, 6, 7, 8, 16, 11]);
        let head_words = pick(&mut rng, &[8, 16]);
        let kv_heads = if group > 4 { 1 } else { rng.random_range(1..=2) };
        let requests = rng.random_range(1..=3);
        // Mostly small: the work is of blocks times tiles.
        let chunks: Vec<[usize; 2]> = (0..requests)
            .map(|_| {
                let tokens = pick(&mut rng, &[0, 1, 1, 7, 31, 33, 63, 64, 65, 100, 127, 128, 129]);
                [pick(&mut rng, &[0, 0, 0, 1, 15, 63, 64, 65, 127, 128, 200]), tokens]
            })
            .collect();
        let peaks = pick(
            &mut rng,
            &[Peaks::Random, Peaks::Random, Peaks::Sharp, Peaks::Steep, Peaks::Flat, Peaks::Census],
        );
        Self::sized(&mut rng, &chunks, [kv_heads, group, head_words], peaks)
    }

    /// A case of few blocks, of one with a past and one without.
    pub fn small(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Self::sized(&mut rng, &[[70, 40], [0, 130]], [1, 1, 8], Peaks::Random)
    }

    /// Rows whose greatest logit comes late, and in every tile another: weights are rescaled again and again.
    pub fn rising(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let head_words = pick(&mut rng, &[8, 16]);
        let mut case = Self::sized(&mut rng, &[[300, 90], [0, 257]], [1, 2, head_words], Peaks::Sharp);
        // Elements grow with the token, by up to 4 in all; queries agree with keys, so that logits do too.
        let rows = case.keys.len() / head_words;
        for (row, words) in case.keys.chunks_exact_mut(head_words).enumerate().take(rows - BEYOND) {
            let element = bf16::from_f32(0.5 + 3.5 * row as f32 / rows as f32);
            words.fill(bytemuck::cast::<Elements, _>([element; WORD_ELEMENTS]));
        }
        let within = case.queries.len() - BEYOND * 2 * head_words;
        case.queries[..within].iter_mut().for_each(|word| {
            *word = bytemuck::cast(
                bytemuck::cast::<_, Elements>(*word).map(|element| bf16::from_f32(element.to_f32().abs())),
            );
        });
        case
    }

    /// A case for a GPU: long prompts and chunks, of which some rows are checked.
    pub fn large(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let group = pick(&mut rng, &[4, 5, 8]);
        let head_words = pick(&mut rng, &[8, 16]);
        let peaks = pick(&mut rng, &[Peaks::Random, Peaks::Sharp, Peaks::Steep, Peaks::Flat, Peaks::Census]);
        let chunks = [[0, 3000], [5000, 300], [0, 0], [0, 1], [777, 1024]];
        Self::sized(&mut rng, &chunks, [4, group, head_words], peaks)
    }

    /// `chunks` have a past and new tokens.
    fn sized(
        rng: &mut impl Rng,
        chunks: &[[usize; 2]],
        [kv_heads, group, head_words]: [usize; 3],
        peaks: Peaks,
    ) -> Self {
        let sums = |of: &dyn Fn([usize; 2]) -> usize| {
            let mut sums = vec![0];
            for chunk in chunks {
                sums.push(sums[sums.len() - 1] + of(*chunk) as u32);
            }
            sums
        };
        let first_query = sums(&|[_, tokens]| tokens);
        let first_key = sums(&|[past, tokens]| past + tokens);
        let first_tile = sums(&|[_, tokens]| query_tiles(tokens as u32) as usize);
        let (of_keys, of_queries) = peaks.scales();
        let nan = bytemuck::cast::<Elements, _>([bf16::NAN; WORD_ELEMENTS]);
        let mut tensor = |tokens: u32, heads: usize, scale: f32| -> Vec<u128> {
            let words = (0..tokens as usize * heads * head_words).map(|_| word(rng, scale));
            words.chain(std::iter::repeat_n(nan, BEYOND * heads * head_words)).collect()
        };
        let (query_tokens, key_tokens) = (first_query[chunks.len()], first_key[chunks.len()]);
        Self {
            queries: tensor(query_tokens, kv_heads * group, of_queries),
            keys: tensor(key_tokens, kv_heads, of_keys),
            values: tensor(key_tokens, kv_heads, 1.0),
            tiles: (first_tile[chunks.len()] + rng.random_range(0..2_u32)).max(1),
            kv_heads,
            group,
            head_words,
            first_query,
            first_key,
            first_tile,
            scale: 1.0 / ((head_words * WORD_ELEMENTS) as f32).sqrt(),
        }
    }

    /// Outputs before the launch.
    pub fn outputs(&self) -> Vec<u128> {
        vec![POISON; self.queries.len()]
    }

    /// Logarithms of sums before the launch.
    pub fn lse(&self) -> Vec<f32> {
        vec![NO_LSE; self.queries.len() / self.head_words]
    }

    /// Whether outputs and logarithms of sums are right, as [`check_head`] has it. Of long cases some tokens are looked at; what lies
    /// beyond the batch must be as it was.
    ///
    /// # Errors
    /// The first token that is wrong.
    pub fn check(&self, outputs: &[u128], lse: &[f32]) -> Result<(), String> {
        let heads = self.kv_heads * self.group;
        let tokens = self.first_query[self.first_query.len() - 1] as usize;
        if outputs[tokens * heads * self.head_words..].iter().any(|word| *word != POISON)
            || lse[tokens * heads..].iter().any(|lse| *lse != NO_LSE)
        {
            return Err("written beyond the batch".to_owned());
        }
        if let Some(at) = lse[..tokens * heads].iter().position(|lse| *lse == NO_LSE) {
            return Err(format!("token {}, head {}: not written", at / heads, at % heads));
        }
        let step = if tokens > 1000 { 61 } else { 1 };
        for request in 0..self.first_query.len() - 1 {
            let [queries, keys] = [&self.first_query, &self.first_key]
                .map(|first| first[request] as usize..first[request + 1] as usize);
            for token in queries.clone().step_by(step) {
                let seen = keys.start..keys.end - (queries.end - 1 - token);
                (0..heads).try_for_each(|head| {
                    self.check_row(token, head, seen.clone(), outputs, lse[token * heads + head])
                        .map_err(|wrong| format!("request {request}, token {} of {queries:?}, head {head}, keys {seen:?}: {wrong}", token))
                })?;
            }
        }
        Ok(())
    }

    fn check_row(
        &self,
        token: usize,
        head: usize,
        seen: std::ops::Range<usize>,
        outputs: &[u128],
        lse: f32,
    ) -> Result<(), String> {
        let at = token * self.kv_heads * self.group + head;
        let query = self.row(&self.queries, at);
        let token = |key: usize| {
            let row = key * self.kv_heads + head / self.group;
            Token { key: self.row(&self.keys, row), value: self.row(&self.values, row), bias: 0.0 }
        };
        check_head(query, self.scale, &seen.map(token).collect::<Vec<_>>(), self.row(outputs, at), lse)
    }

    /// A head of a token.
    fn row<'a>(&self, tensor: &'a [u128], row: usize) -> &'a [bf16] {
        bytemuck::cast_slice(&tensor[row * self.head_words..][..self.head_words])
    }
}

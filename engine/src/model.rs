//! The forward pass of Qwen3 and Llama models on the CPU backend, in f32.

mod forward;
mod ops;
pub(crate) mod rope;
mod weights;

use std::path::Path;

pub use forward::{DecodeToken, PREFILL_CHUNK, Prompt, Wanted};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use rope::Rope;
use spinkv::KvShape;
pub use weights::STREAMED_TOKENS;
use weights::{Layer, Linear};

/// A model with its weights in memory, as f32.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    shape: KvShape,
    rope: Rope,
    /// `[vocab_size, hidden_size]`; also the output head where the model ties them.
    embedding: Linear,
    layers: Vec<Layer>,
    /// `[hidden_size]`.
    final_norm: Vec<f32>,
    /// `[vocab_size, hidden_size]`; `None` where the embedding is the head.
    head: Option<Linear>,
    weight_bytes: u64,
    file_bytes: u64,
}

impl Model {
    /// Loads the weights of the checkpoint in `dir`, whose configuration is `config`. `progress` hears of each
    /// layer that is loaded, as (done, total).
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`]; a tensor that is missing or has another shape than the configuration calls
    /// for.
    pub fn open(
        dir: impl AsRef<Path>,
        config: ModelConfig,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(&dir)?;
        let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim)?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = Linear::load(&checkpoint, "model.embed_tokens.weight", vocab, hidden)?;
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            layers.push(Layer::load(&checkpoint, &config, index)?);
            progress(index + 1, config.layers);
        }
        let final_norm = checkpoint.tensor_f32("model.norm.weight", &[hidden])?;
        let head = if config.tie_word_embeddings {
            None
        } else {
            Some(Linear::load(&checkpoint, "lm_head.weight", vocab, hidden)?)
        };
        let elements = embedding.elements()
            + layers.iter().map(Layer::elements).sum::<usize>()
            + final_norm.len()
            + head.as_ref().map_or(0, Linear::elements);
        Ok(Self {
            rope: Rope::new(&config.rope, config.head_dim),
            config,
            shape,
            embedding,
            layers,
            final_norm,
            head,
            weight_bytes: (elements * size_of::<f32>()) as u64,
            file_bytes: checkpoint.file_bytes(),
        })
    }

    /// The model's dimensions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the KV memory needs to know of the model.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes of the weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of the weights on disk; they pass through memory while the model is loaded.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The embeddings of `tokens`, `[tokens, hidden_size]`.
    fn embed(&self, tokens: impl ExactSizeIterator<Item = u32>) -> Result<Vec<f32>> {
        let mut hidden = Vec::with_capacity(tokens.len() * self.config.hidden_size);
        for id in tokens {
            let vocab_size = self.config.vocab_size;
            let row = self.embedding.row(id as usize);
            hidden.extend_from_slice(row.ok_or(Error::TokenOutOfVocabulary { id, vocab_size })?);
        }
        Ok(hidden)
    }

    /// The logits, `[tokens, vocab_size]`, of final hidden states, `[tokens, hidden_size]`, as
    /// [`prefill`](Self::prefill) and [`decode`](Self::decode) return them.
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let mut normed = vec![0.0; hidden.len()];
        ops::rms_norm(hidden, &self.final_norm, self.config.rms_norm_eps as f32, &mut normed);
        head.apply(&normed)
    }
}

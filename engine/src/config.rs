//! A checkpoint's `config.json`, checked: what passes here, the engine can run.

mod preset;
mod rope;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use spinkv::{Rotary, Shard};

pub use preset::PRESETS;
pub use rope::{Llama3Scaling, RopeConfig, RopeScaling, YarnScaling};

use crate::error::{Error, Result};
use crate::model::rope::Rope;
use rope::RawRope;

/// Largest width or count that a configuration may name. Far above any real model, and low enough that
/// products of two of them fit in a `usize`.
const MAX_SIZE: usize = 1 << 24;

/// A family of models that the engine implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// `Qwen3ForCausalLM`: RMS norm on each query and key head before RoPE.
    Qwen3,
    /// `LlamaForCausalLM`: Llama 2, 3 and 3.1.
    Llama,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::Qwen3, Self::Llama];

    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }
}

/// A model's dimensions and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model family.
    pub architecture: Architecture,
    /// Rows of the embedding and of the output head. Can exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads per layer; a multiple of `kv_heads`.
    pub query_heads: usize,
    /// Key and value heads per layer.
    pub kv_heads: usize,
    /// Width of one head; even. `query_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Added to the mean square in each RMS norm.
    pub rms_norm_eps: f64,
    /// Position embedding.
    pub rope: RopeConfig,
    /// Longest context, in tokens, that the model is meant for: what the file says, or what YaRN stretches the original
    /// context to if that is longer, since files that ask for YaRN often keep the unstretched number.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a generation: those of `generation_config.json` where it names some, else those of
    /// `config.json`. Can be empty.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text, where the model has one.
    pub bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// What one of several GPUs computes of the model: its KV heads with their query heads, and its part of the MLP.
    ///
    /// # Errors
    /// [`spinkv::Error::Indivisible`].
    pub fn shard(&self, shard: Shard) -> Result<Self> {
        let kv_heads = shard.part("num_key_value_heads", self.kv_heads)?.len();
        Ok(Self {
            kv_heads,
            query_heads: kv_heads * (self.query_heads / self.kv_heads),
            intermediate_size: shard.part("intermediate_size", self.intermediate_size)?.len(),
            ..self.clone()
        })
    }

    /// Reads and checks `config.json` in `dir`, and `generation_config.json` where there is one.
    ///
    /// # Errors
    ///
    /// Fails if a file cannot be read or parsed, and if it asks for anything the engine would not compute
    /// faithfully: another architecture, activation, RoPE scaling, biases, a sliding window, quantised
    /// weights.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let raw: RawConfig = read_json(&path)?;
        let generation_path = dir.join("generation_config.json");
        let generation: RawGeneration =
            if generation_path.exists() { read_json(&generation_path)? } else { RawGeneration::default() };
        Check { path }.config(raw, generation)
    }

    /// How queries and keys are turned.
    pub fn rotary(&self) -> Arc<Rotary> {
        Arc::new(Rope::new(&self.rope, self.head_dim).rotary().clone())
    }

    /// Whether each query and key head passes an RMS norm of its own (`q_norm`, `k_norm`) before RoPE.
    pub fn has_qk_norm(&self) -> bool {
        self.architecture == Architecture::Qwen3
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(Error::json(path))
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    hidden_act: Option<String>,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    max_position_embeddings: usize,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
    eos_token_id: Option<OneOrMany>,
    bos_token_id: Option<u32>,
}

#[derive(Default, Deserialize)]
struct RawGeneration {
    eos_token_id: Option<OneOrMany>,
    bos_token_id: Option<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// The checks; `path` is the file that their errors name.
struct Check {
    path: PathBuf,
}

impl Check {
    fn config(&self, raw: RawConfig, generation: RawGeneration) -> Result<ModelConfig> {
        let architecture = self.architecture(raw.architectures.as_deref().unwrap_or_default())?;
        self.features(&raw)?;

        let query_heads = raw.num_attention_heads;
        let kv_heads = raw.num_key_value_heads.unwrap_or(query_heads);
        for (field, value) in [
            ("vocab_size", raw.vocab_size),
            ("hidden_size", raw.hidden_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", query_heads),
            ("num_key_value_heads", kv_heads),
            ("intermediate_size", raw.intermediate_size),
            ("max_position_embeddings", raw.max_position_embeddings),
        ] {
            self.size(field, value)?;
        }
        // After the sizes, which YaRN takes its original context from.
        let rope = self.rope(&raw)?;
        if !query_heads.is_multiple_of(kv_heads) {
            return Err(self.inconsistent(format!(
                "num_attention_heads is {query_heads}; must be a multiple of num_key_value_heads, {kv_heads}"
            )));
        }
        let head_dim = match raw.head_dim {
            Some(head_dim) => head_dim,
            None if raw.hidden_size.is_multiple_of(query_heads) => raw.hidden_size / query_heads,
            None => {
                return Err(self.inconsistent(format!(
                    "hidden_size is {}; without head_dim it must be a multiple of num_attention_heads, \
                     {query_heads}",
                    raw.hidden_size
                )));
            }
        };
        self.size("head_dim", head_dim)?;
        if !head_dim.is_multiple_of(2) {
            return Err(self.unsupported("head_dim", head_dim, "even numbers (RoPE turns pairs)"));
        }
        self.positive("rms_norm_eps", raw.rms_norm_eps)?;

        let eos_token_ids =
            generation.eos_token_id.or(raw.eos_token_id).map_or_else(Vec::new, |ids| match ids {
                OneOrMany::One(id) => vec![id],
                OneOrMany::Many(ids) => ids,
            });
        let bos_token_id = raw.bos_token_id.or(generation.bos_token_id);
        for id in eos_token_ids.iter().chain(&bos_token_id) {
            if *id as usize >= raw.vocab_size {
                return Err(self.inconsistent(format!(
                    "eos_token_id or bos_token_id is {id}; must be less than vocab_size, {}",
                    raw.vocab_size
                )));
            }
        }

        Ok(ModelConfig {
            architecture,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            layers: raw.num_hidden_layers,
            query_heads,
            kv_heads,
            head_dim,
            intermediate_size: raw.intermediate_size,
            rms_norm_eps: raw.rms_norm_eps,
            rope,
            max_position_embeddings: raw.max_position_embeddings.max(rope.stretched_context()),
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            eos_token_ids,
            bos_token_id,
        })
    }

    fn architecture(&self, names: &[String]) -> Result<Architecture> {
        let found = names.first().map_or("", String::as_str);
        Architecture::ALL.into_iter().find(|architecture| architecture.name() == found).ok_or_else(|| {
            Error::UnknownArchitecture {
                path: self.path.clone(),
                found: found.to_owned(),
                suggestion: spinkv::nearest_name(found, &Architecture::ALL.map(Architecture::name)),
            }
        })
    }

    /// Refuses what would otherwise be ignored and so computed wrongly.
    fn features(&self, raw: &RawConfig) -> Result<()> {
        match raw.hidden_act.as_deref() {
            None | Some("silu") => {}
            Some(other) => return Err(self.unsupported("hidden_act", Value::from(other), "silu")),
        }
        for (field, value) in [
            ("attention_bias", raw.attention_bias),
            ("mlp_bias", raw.mlp_bias),
            ("use_sliding_window", raw.use_sliding_window),
        ] {
            if value == Some(true) {
                return Err(self.unsupported(field, true, "false"));
            }
        }
        for layer_type in raw.layer_types.iter().flatten() {
            if layer_type != "full_attention" {
                let value = format!("{layer_type:?} for a layer");
                return Err(self.unsupported("layer_types", value, "full_attention for every layer"));
            }
        }
        if let Some(value) = raw.quantization_config.as_ref().filter(|value| !value.is_null()) {
            return Err(self.unsupported("quantization_config", value, "null (weights in bf16, f16 or f32)"));
        }
        Ok(())
    }

    fn size(&self, field: &'static str, value: usize) -> Result<()> {
        if (1..=MAX_SIZE).contains(&value) {
            return Ok(());
        }
        Err(self.unsupported(field, value, &format!("1 to {MAX_SIZE}")))
    }

    fn positive(&self, field: &'static str, value: f64) -> Result<()> {
        if value.is_finite() && value > 0.0 {
            return Ok(());
        }
        Err(self.unsupported(field, value, "finite numbers greater than 0"))
    }

    fn unsupported(&self, field: &'static str, value: impl ToString, supported: &str) -> Error {
        let (path, value, supported) = (self.path.clone(), value.to_string(), supported.to_owned());
        Error::UnsupportedConfig { path, field, value, supported }
    }

    fn inconsistent(&self, reason: String) -> Error {
        Error::InconsistentConfig { path: self.path.clone(), reason }
    }
}

#[cfg(test)]
mod tests;

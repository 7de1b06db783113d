//! Published models by name, for shapes without a checkpoint.

use spinkv::nearest_name;

use super::{Architecture, Llama3Scaling, ModelConfig, RopeConfig, RopeScaling};
use crate::error::{Error, Result};

/// The models that [`ModelConfig::preset`] knows.
pub const PRESETS: [&str; 5] = ["qwen3-8b", "qwen3-14b", "qwen3-32b", "llama-3.1-8b", "llama-3.1-70b"];

impl ModelConfig {
    /// A published model's configuration, as its `config.json` and `generation_config.json` give it (Llama 3.1's are those of
    /// the instruction-tuned models). Case does not matter.
    ///
    /// # Errors
    /// [`Error::UnknownModel`] with the nearest of [`PRESETS`].
    pub fn preset(name: &str) -> Result<Self> {
        match name.to_lowercase().as_str() {
            "qwen3-8b" => Ok(qwen3(36, 32, 4096, 12_288)),
            "qwen3-14b" => Ok(qwen3(40, 40, 5120, 17_408)),
            "qwen3-32b" => Ok(qwen3(64, 64, 5120, 25_600)),
            "llama-3.1-8b" => Ok(llama31(32, 32, 4096, 14_336)),
            "llama-3.1-70b" => Ok(llama31(80, 64, 8192, 28_672)),
            _ => {
                let suggestion = nearest_name(name, &PRESETS);
                Err(Error::UnknownModel { name: name.to_owned(), suggestion })
            }
        }
    }

    /// The same model with its first `layers` layers alone, to measure what a layer takes on a smaller GPU.
    ///
    /// # Errors
    /// [`Error::LayerCount`] for 0 and for more layers than the model has.
    pub fn with_layers(self, layers: usize) -> Result<Self> {
        if (1..=self.layers).contains(&layers) {
            return Ok(Self { layers, ..self });
        }
        Err(Error::LayerCount { layers, limit: self.layers })
    }
}

fn qwen3(layers: usize, query_heads: usize, hidden_size: usize, intermediate_size: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen3,
        vocab_size: 151_936,
        hidden_size,
        layers,
        query_heads,
        kv_heads: 8,
        head_dim: 128,
        intermediate_size,
        rms_norm_eps: 1e-6,
        rope: RopeConfig { theta: 1e6, scaling: None },
        max_position_embeddings: 40_960,
        tie_word_embeddings: false,
        eos_token_ids: vec![151_645, 151_643],
        bos_token_id: Some(151_643),
    }
}

fn llama31(layers: usize, query_heads: usize, hidden_size: usize, intermediate_size: usize) -> ModelConfig {
    let scaling = RopeScaling::Llama3(Llama3Scaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    });
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 128_256,
        hidden_size,
        layers,
        query_heads,
        kv_heads: 8,
        head_dim: 128,
        intermediate_size,
        rms_norm_eps: 1e-5,
        rope: RopeConfig { theta: 500_000.0, scaling: Some(scaling) },
        max_position_embeddings: 131_072,
        tie_word_embeddings: false,
        eos_token_ids: vec![128_001, 128_008, 128_009],
        bos_token_id: Some(128_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(config: &ModelConfig) -> usize {
        let ModelConfig { vocab_size, hidden_size, layers, head_dim, intermediate_size, .. } = *config;
        let (queries, keys) = (config.query_heads * head_dim, config.kv_heads * head_dim);
        let norms = 2 * hidden_size + if config.has_qk_norm() { 2 * head_dim } else { 0 };
        let matrices = (2 * queries + 2 * keys) * hidden_size + 3 * intermediate_size * hidden_size;
        let ends = if config.tie_word_embeddings { 1 } else { 2 };
        ends * vocab_size * hidden_size + layers * (matrices + norms) + hidden_size
    }

    /// The numbers that the models' pages give for their files.
    #[test]
    fn presets_have_the_published_numbers_of_parameters() {
        let published = [8_190_735_360, 14_768_307_200, 32_762_123_264, 8_030_261_248, 70_553_706_496];
        for (name, published) in PRESETS.into_iter().zip(published) {
            assert_eq!(parameters(&ModelConfig::preset(name).unwrap()), published, "{name}");
        }
    }

    #[test]
    fn names_are_found_whatever_their_case_and_others_are_refused() {
        assert_eq!(ModelConfig::preset("Qwen3-14B").unwrap(), ModelConfig::preset("qwen3-14b").unwrap());
        let text = ModelConfig::preset("qwen3-14").unwrap_err().to_string();
        let known = "qwen3-8b, qwen3-14b, qwen3-32b, llama-3.1-8b, llama-3.1-70b";
        assert_eq!(text, format!("unknown model \"qwen3-14\"; known: {known}; did you mean \"qwen3-14b\"?"));
        let text = ModelConfig::preset("gpt").unwrap_err().to_string();
        assert_eq!(text, format!("unknown model \"gpt\"; known: {known}"));
    }

    #[test]
    fn a_model_can_be_cut_to_fewer_layers_and_not_to_none_or_more() {
        let model = ModelConfig::preset("llama-3.1-8b").unwrap();
        let short = model.clone().with_layers(3).unwrap();
        assert_eq!((short.layers, short.hidden_size), (3, 4096));
        assert_eq!(model.clone().with_layers(32).unwrap(), model);
        for layers in [0, 33, usize::MAX] {
            let refused = model.clone().with_layers(layers).unwrap_err();
            assert_eq!(refused.to_string(), format!("{layers} layers asked for; the model has 1 to 32"));
        }
    }
}

//! The bundled checkpoints and what transformers computed for them.

use std::path::PathBuf;

use serde::Deserialize;
use spinkv_engine::checkpoint::Checkpoint;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::model::Model;
use spinkv_engine::tokenizer::Tokenizer;

/// A bundled checkpoint with the outputs that transformers computed for it in float32.
pub struct Bundled {
    /// The model.
    pub model: Model,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// `prompts.json`, by name.
    pub prompts: Vec<Prompt>,
    reference: Checkpoint,
}

/// An entry of `prompts.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Prompt {
    /// The name that the reference's tensors begin with.
    pub name: String,
    /// The prompt; empty where only its tokens are bundled.
    #[serde(default)]
    pub text: String,
    /// The digits of the right answer; empty for prompts that ask nothing.
    #[serde(default)]
    pub answer: String,
    /// For each greedy step the gap between the two best logits.
    pub greedy_margins: Vec<f32>,
}

#[derive(Deserialize)]
struct Prompts {
    prompts: Vec<Prompt>,
}

/// The reference's logits at some positions of a prompt.
pub struct Logits {
    /// The positions.
    pub positions: Vec<usize>,
    /// `[positions, vocab]`.
    pub values: Vec<f32>,
}

impl Bundled {
    /// Loads `models/<name>`.
    ///
    /// # Panics
    /// If it is not whole; tests cannot go on without it.
    pub fn open(name: &str) -> Self {
        let dir = dir(name);
        let prompts = std::fs::read_to_string(dir.join("prompts.json")).expect("prompts.json is bundled");
        let prompts: Prompts = serde_json::from_str(&prompts).expect("prompts.json is valid");
        let config = ModelConfig::open(&dir).expect("the configuration is bundled");
        Self {
            model: Model::open(&dir, config, |_, _| {}).expect("the model is bundled"),
            tokenizer: Tokenizer::open(&dir).expect("the tokenizer is bundled"),
            prompts: prompts.prompts,
            reference: Checkpoint::open_file(dir.join("reference.safetensors"))
                .expect("the reference is bundled"),
        }
    }

    /// The prompt of a name.
    ///
    /// # Panics
    /// If there is none.
    pub fn prompt(&self, name: &str) -> &Prompt {
        self.prompts.iter().find(|prompt| prompt.name == name).expect("the prompt is bundled")
    }

    /// The tokens of a prompt.
    ///
    /// # Panics
    /// If the reference lacks them.
    pub fn input_ids(&self, name: &str) -> Vec<u32> {
        self.ids(&format!("{name}.input_ids"))
    }

    /// The reference's 16 greedy tokens.
    ///
    /// # Panics
    /// If the reference lacks them.
    pub fn greedy_ids(&self, name: &str) -> Vec<u32> {
        self.ids(&format!("{name}.greedy_ids"))
    }

    /// The reference's logits of a prompt: at the positions that it names, at all, or at the last.
    ///
    /// # Panics
    /// If the reference lacks them.
    pub fn logits(&self, name: &str) -> Logits {
        let (all, last) = (format!("{name}.logits"), format!("{name}.last_logits"));
        let positions = format!("{name}.logits_positions");
        let (tensor, positions) = if self.reference.contains(&positions) {
            (all, self.ids(&positions).iter().map(|id| *id as usize).collect())
        } else if self.reference.contains(&all) {
            (all, (0..self.input_ids(name).len()).collect())
        } else {
            (last, vec![self.input_ids(name).len() - 1])
        };
        let shape = self.reference.shape(&tensor).expect("the reference has logits").to_vec();
        Logits { positions, values: self.reference.tensor_f32(&tensor, &shape).expect("logits are f32") }
    }

    fn ids(&self, tensor: &str) -> Vec<u32> {
        let ids = self.reference.tensor_i64(tensor).expect("the reference has token ids");
        ids.into_iter().map(|id| u32::try_from(id).expect("ids are not negative")).collect()
    }
}

/// The folder of a bundled checkpoint: in `SPINKV_MODELS`, or in this repository.
///
/// # Panics
/// If it is in neither; tests cannot go on without it.
pub fn dir(name: &str) -> PathBuf {
    let models = std::env::var_os("SPINKV_MODELS").map(PathBuf::from);
    let models = models.unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models")));
    let dir = models.join(name);
    assert!(
        dir.is_dir(),
        "{} is not there: SPINKV_MODELS names the folder of the bundled models",
        dir.display()
    );
    dir
}

/// The largest absolute difference of two equally long slices.
///
/// # Panics
/// If their lengths differ.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

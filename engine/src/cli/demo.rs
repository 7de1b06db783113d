use std::path::{Path, PathBuf};

use serde::Deserialize;
use spinkv_engine::{Error, Result};

/// The question that a run without arguments asks: one fact hidden near the start of 4,030 tokens.
const QUESTION: &str = "needle_4k_0";

/// A bundled prompt with a known answer.
#[derive(Debug, Deserialize)]
pub(super) struct Question {
    name: String,
    pub text: String,
    #[serde(default)]
    pub key: String,
    #[serde(default)]
    pub answer: String,
    #[serde(default)]
    pub n_needles: usize,
}

#[derive(Deserialize)]
struct Prompts {
    prompts: Vec<Question>,
}

/// The bundled model: below the working directory, or in the source tree that this binary was built from.
pub(super) fn model() -> PathBuf {
    let name = Path::new("models/needle-tiny");
    if name.is_dir() {
        return name.to_owned();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).join(name)
}

/// The bundled question, out of the model's `prompts.json`.
pub(super) fn question(model: &Path) -> Result<Question> {
    let path = model.join("prompts.json");
    let text = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let prompts: Prompts = serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })?;
    let question = prompts.prompts.into_iter().find(|question| question.name == QUESTION);
    question.ok_or(Error::NoPrompt { model: model.to_owned() })
}

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use spinkv::memory::HostFormat;

use super::{EvalError, Measured, Task};
use crate::error::{Error, Result};

/// Everything that a result depends on. Results of other keys are nobody's business.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is what its name says")]
pub struct Key {
    /// [`Key::FORMAT`].
    pub format: u32,
    /// The engine's version.
    pub version: String,
    /// Fingerprint of the checkpoint.
    pub model: String,
    /// Fingerprint of haystack and nouns.
    pub text: String,
    pub backend: String,
    pub task: Task,
    pub context: usize,
    /// 0 where no text is scored.
    pub scored_tokens: usize,
    pub seed: u64,
    /// The prompt's number.
    pub prompt: usize,
    /// The method with its options.
    pub method: String,
    /// Fingerprint of the gates that the method scores by; `None` for a method without any.
    pub gates: Option<String>,
    pub budget: Option<String>,
    pub sinks: usize,
    pub window: usize,
    pub page_tokens: usize,
    pub kv_dtype: String,
    /// What the host holds of a page; journals from before there was a choice have full pages.
    #[serde(default = "full")]
    pub host_kv: String,
    /// As text, so that it compares.
    pub buffering: String,
    pub recall: bool,
}

fn full() -> String {
    HostFormat::Full.to_string()
}

impl Key {
    /// Goes up when a result means something else than before.
    pub const FORMAT: u32 = 1;
}

#[derive(Serialize, Deserialize)]
struct Line {
    key: Key,
    result: Measured,
}

/// The results so far, and, if there is one, the file that they are kept in: a line of JSON for each, written when it is known.
///
/// Lines of other settings stay in the file and are ignored. A last line that a killed process wrote in part is cut off.
#[derive(Debug, Default)]
pub struct Journal {
    results: HashMap<Key, Measured>,
    file: Option<(PathBuf, File)>,
}

impl Journal {
    /// Results that are kept nowhere else.
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// Reads the results in the file at `path`, where there is one, and keeps new ones there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`EvalError::Journal`] for a line that is no result, but for a last one that is cut off.
    pub fn open(path: &Path) -> Result<Self> {
        let text = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(Error::Io { path: path.to_owned(), source }),
        };
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let mut results = HashMap::new();
        for (index, line) in text[..whole].split(|byte| *byte == b'\n').enumerate() {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let parsed = serde_json::from_slice(line).map_err(|error| {
                let (path, reason) = (path.to_owned(), format!("not a result of spinkv eval: {error}"));
                EvalError::Journal { path, line: index + 1, reason }
            });
            let Line { key, result } = parsed?;
            results.insert(key, result);
        }
        // A file that holds something else, without an end of line, is not ours to cut.
        if whole == 0 && !text.is_empty() && !text.starts_with(b"{\"key\":{") {
            let reason = "not a result of spinkv eval".to_owned();
            return Err(EvalError::Journal { path: path.to_owned(), line: 1, reason }.into());
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))?;
        if whole < text.len() {
            file.set_len(whole as u64).map_err(Error::io(path))?;
        }
        Ok(Self { results, file: Some((path.to_owned(), file)) })
    }

    /// A result.
    pub fn get(&self, key: &Key) -> Option<&Measured> {
        self.results.get(key)
    }

    /// Adds a result, in the file first. It is kept as it reads back, so that it makes no difference whether a run was interrupted.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, key: Key, result: Measured) -> Result<()> {
        let mut text = serde_json::to_string(&Line { key, result }).expect("a result is plain data");
        let Line { key, result } = serde_json::from_str(&text).expect("what was written can be read");
        if let Some((path, file)) = &mut self.file {
            text.push('\n');
            file.write_all(text.as_bytes()).map_err(Error::io(path))?;
        }
        self.results.insert(key, result);
        Ok(())
    }
}

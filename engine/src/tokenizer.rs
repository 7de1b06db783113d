//! Text to token ids and back, from a checkpoint's `tokenizer.json`.

use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::IgnoredAny;
use tokenizers::DecoderWrapper;

use crate::error::{Error, Result};

mod stream;

pub use stream::TextStream;

/// A checkpoint's tokenizer. A clone shares its tables.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    tables: Arc<Tables>,
}

struct Tables {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    /// Bytes of the longest token, where texts are cut into tokens byte for byte.
    longest_token: Option<usize>,
    /// What the post-processor puts before every text; for most models the BOS token or nothing.
    prefix: Vec<u32>,
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Tables").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`. Its settings for truncation and padding are ignored: they are left
    /// over from training and would cut long prompts without a word.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read or is not a tokenizer.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("tokenizer.json");
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        // What is no JSON, as a file that was cut short, is told with its place.
        serde_json::from_slice::<IgnoredAny>(&bytes).map_err(Error::json(&path))?;
        Self::from_bytes(&path, bytes)
    }

    fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        let fail = |error| tokenizer_error(path, error);
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(fail)?;
        inner.with_truncation(None).map_err(fail)?;
        inner.with_padding(None);
        let vocab = inner.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |id| *id as usize + 1);
        // The vocabulary spells some bytes with two; that only makes a token look longer.
        let whole_text = is_byte_level(&inner) && inner.get_normalizer().is_none();
        let longest_token = vocab.keys().map(String::len).max().filter(|_| whole_text);
        let probe = guarded(|| inner.encode("a", true)).map_err(fail)?;
        let added = probe.get_special_tokens_mask().iter().take_while(|&&special| special == 1).count();
        let prefix = probe.get_ids()[..added].to_vec();
        Ok(Self {
            tables: Arc::new(Tables { path: path.to_owned(), inner, vocab_size, longest_token, prefix }),
        })
    }

    /// A tokenizer for models whose tokens mean nothing: the text of token 17 is `17`, texts are such numbers with spaces between them. None is special.
    ///
    /// # Errors
    /// For no tokens at all.
    pub fn numbered(vocab_size: usize) -> Result<Self> {
        let vocab: serde_json::Map<_, _> = (0..vocab_size).map(|id| (id.to_string(), id.into())).collect();
        let described = serde_json::json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null,
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "0"},
        });
        Self::from_bytes(Path::new("numbered tokens"), described.to_string().into_bytes())
    }

    /// The token ids of `text`.
    ///
    /// Special tokens spelled out in the text become those tokens. What the tokenizer's own post-processor
    /// adds, such as BOS, is added, but not to a text that already begins with it. So a prompt from a chat
    /// template and a bare one both get BOS once.
    ///
    /// # Errors
    ///
    /// Fails if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let Tables { inner, prefix, .. } = &*self.tables;
        let encoding = guarded(|| inner.encode_fast(text, true)).map_err(|error| self.tables.error(error))?;
        let ids = encoding.get_ids();
        let doubled = ids.strip_prefix(prefix.as_slice()).filter(|rest| rest.starts_with(prefix));
        Ok(doubled.unwrap_or(ids).to_vec())
    }

    /// A number of tokens that `text` has at least, found without encoding it; 0 where nothing can be said.
    pub fn least_tokens(&self, text: &str) -> usize {
        self.tables.longest_token.map_or(0, |longest| text.len().div_ceil(longest))
    }

    /// The text of `ids`. Special tokens, and ids that a model has but its tokenizer has not (padding of the
    /// embedding), give no text; bytes that are not UTF-8 give U+FFFD.
    ///
    /// # Errors
    ///
    /// Fails if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let shown: Vec<u32> =
            ids.iter().copied().filter(|&id| self.tables.text_token(id).is_some()).collect();
        self.tables.decode(&shown)
    }

    /// One more than the largest token id. At most the model's `vocab_size`, which may be padded.
    pub fn vocab_size(&self) -> usize {
        self.tables.vocab_size
    }

    /// The id of a token by its text, for instance `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tables.inner.token_to_id(token)
    }

    /// The bytes of a single token, which need not be whole characters; those of its spelling for a special token, and none for an id that the
    /// tokenizer has not.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.tables.inner.id_to_token(id) else { return Vec::new() };
        let mut bytes = Vec::new();
        if self.tables.text_token(id).is_none() {
            bytes.extend_from_slice(token.as_bytes());
        } else if self.tables.is_byte_level() {
            stream::append_bytes(&token, &mut bytes);
        } else if let Some(byte) = stream::fallback_byte(&token) {
            bytes.push(byte);
        } else {
            bytes = self.tables.decode(&[id]).unwrap_or(token).into_bytes();
        }
        bytes
    }

    /// A decoder for tokens as they are generated.
    pub fn stream(&self) -> TextStream {
        TextStream::new(Arc::clone(&self.tables))
    }
}

impl Tables {
    /// A token's spelling in the vocabulary, unless it gives no text.
    fn text_token(&self, id: u32) -> Option<String> {
        let token = self.inner.id_to_token(id)?;
        (!self.inner.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }

    /// Decodes ids that all have text.
    fn decode(&self, ids: &[u32]) -> Result<String> {
        if ids.is_empty() {
            // Some decoders of the library count down from the number of tokens.
            return Ok(String::new());
        }
        guarded(|| self.inner.decode(ids, true)).map_err(|error| self.error(error))
    }

    /// Whether a token is bytes in the GPT-2 alphabet, and a text all its tokens' bytes in turn.
    fn is_byte_level(&self) -> bool {
        is_byte_level(&self.inner)
    }

    fn error(&self, error: tokenizers::Error) -> Error {
        tokenizer_error(&self.path, error)
    }
}

fn is_byte_level(tokenizer: &tokenizers::Tokenizer) -> bool {
    matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
}

/// Calls the library. It panics at some files that it does not understand: that is an error of the file, not the end of a server.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a word");
        Err(format!("the library that reads it panicked: {said}").into())
    })
}

fn tokenizer_error(path: &Path, error: tokenizers::Error) -> Error {
    Error::Tokenizer { path: path.to_path_buf(), message: error.to_string() }
}

#[cfg(test)]
mod tests;

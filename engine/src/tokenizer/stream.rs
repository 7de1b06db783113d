//! Decoding token by token.

use std::mem;
use std::str;
use std::sync::{Arc, LazyLock};

use super::Tables;
use crate::error::Result;

/// Turns tokens into text as they come.
///
/// A character that takes several tokens is held back until it is complete. All pieces joined, with what
/// [`finish`](Self::finish) returns, are what [`Tokenizer::decode`](super::Tokenizer::decode) makes of all
/// the tokens at once. The work per token does not grow with the length of the text.
#[derive(Debug)]
pub struct TextStream {
    tables: Arc<Tables>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// For byte-level tokenizers (Qwen, Llama 3): the bytes of a character begun, at most three.
    Bytes(Vec<u8>),
    /// For others, whose decoders look at neighbours.
    Window {
        /// The tokens last emitted. They keep a decoder from treating the next as the beginning of a text.
        context: Vec<u32>,
        /// Tokens held back.
        pending: Vec<u32>,
    },
}

impl TextStream {
    pub(super) fn new(tables: Arc<Tables>) -> Self {
        let state = State::new(&tables);
        Self { tables, state }
    }

    /// Takes the next token and returns the text that is now certain, if any.
    ///
    /// # Errors
    ///
    /// Fails if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let Some(token) = self.tables.text_token(id) else {
            return Ok(None);
        };
        let text = match &mut self.state {
            State::Bytes(held) => {
                append_bytes(&token, held);
                take_complete(held)
            }
            State::Window { context, pending } => {
                pending.push(id);
                if fallback_byte(&token).is_some() {
                    // Whether a run of byte tokens is text or rubbish is known only at its end.
                    return Ok(None);
                }
                let text = window_text(&self.tables, context, pending)?;
                if text.ends_with(char::REPLACEMENT_CHARACTER) {
                    return Ok(None);
                }
                *context = mem::take(pending);
                text
            }
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }

    /// Returns what is still held back, a cut-off character as U+FFFD. The stream is then as new.
    ///
    /// # Errors
    ///
    /// Fails if the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = match mem::replace(&mut self.state, State::new(&self.tables)) {
            State::Bytes(held) => String::from_utf8_lossy(&held).into_owned(),
            State::Window { pending, .. } if pending.is_empty() => String::new(),
            State::Window { context, pending } => window_text(&self.tables, &context, &pending)?,
        };
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

impl State {
    fn new(tables: &Tables) -> Self {
        if tables.is_byte_level() {
            Self::Bytes(Vec::new())
        } else {
            Self::Window { context: Vec::new(), pending: Vec::new() }
        }
    }
}

/// What `pending` adds to the text of `context`.
fn window_text(tables: &Tables, context: &[u32], pending: &[u32]) -> Result<String> {
    let before = tables.decode(context)?;
    let text = tables.decode(&[context, pending].concat())?;
    Ok(match text.strip_prefix(&before) {
        Some(new) => new.to_owned(),
        // A decoder that rewrites what it has already given; take the tokens by themselves.
        None => tables.decode(pending)?,
    })
}

/// Takes all but a character begun off `held`, with U+FFFD for bytes that no character has. The same as
/// `from_utf8_lossy` of the whole, cut at a place where it cannot tell.
fn take_complete(held: &mut Vec<u8>) -> String {
    let begun = held.utf8_chunks().last().map_or(0, |chunk| {
        let invalid = chunk.invalid();
        // Only bytes that could still become a character make the parser run out of input.
        match str::from_utf8(invalid) {
            Err(error) if error.error_len().is_none() => invalid.len(),
            _ => 0,
        }
    });
    let rest = held.split_off(held.len() - begun);
    let complete = mem::replace(held, rest);
    String::from_utf8_lossy(&complete).into_owned()
}

/// Appends the bytes that a byte-level token stands for. As in the library, a token with a character outside
/// the alphabet, so an added one, stands for its own UTF-8.
pub(super) fn append_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for char in token.chars() {
        match BYTE_OF_CHAR.get(char as usize).copied().flatten() {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The GPT-2 alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on, in
/// order.
static BYTE_OF_CHAR: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let char = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        table[char] = Some(byte);
    }
    table
});

/// The byte that a token stands for if it is spelled `<0x0A>`.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

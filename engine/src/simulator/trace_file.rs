//! Traces as files.
//!
//! ```text
//! magic      8 bytes  "SPINTRC" and the version, 1
//! name       number n, then n bytes of UTF-8
//! numbers    tokens of a page, tokens of the context at the first step, rows
//! each row   layer, KV head, bound of its page keys, steps
//! each step  number of keys; the first key; then, for each further key, its distance from the one before, less 1
//! checksum   8 bytes, little-endian: FNV-1a, 64 bits, over everything before
//! ```
//!
//! A number is a LEB128 varint of at most 32 bits: 7 bits a byte, the lowest first, the high bit set on all but the
//! last. A selected page takes a little more than one byte.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::{Trace, TraceRow};

const MAGIC: &[u8; 8] = b"SPINTRC\x01";

/// Why a trace could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The file is not a trace, or not one of this version.
    #[error("{}: not a trace of version 1: it begins with {found:02x?}, not {MAGIC:02x?}", path.display())]
    NotATrace {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: Vec<u8>,
    },

    /// The file is cut off or was changed.
    #[error("{}: damaged at byte {offset} of {len}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it was noticed.
        offset: usize,
        /// Bytes of the file.
        len: usize,
        /// What is wrong.
        reason: &'static str,
    },
}

impl Trace {
    /// Writes the trace to `path`; the module's source describes the format.
    ///
    /// # Errors
    /// [`TraceError::Io`].
    pub fn save(&self, path: &Path) -> Result<(), TraceError> {
        fs::write(path, self.encode()).map_err(|source| TraceError::Io { path: path.to_owned(), source })
    }

    /// Reads a trace that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn load(path: &Path) -> Result<Self, TraceError> {
        let bytes = fs::read(path).map_err(|source| TraceError::Io { path: path.to_owned(), source })?;
        if !bytes.starts_with(MAGIC) {
            let found = bytes[..bytes.len().min(MAGIC.len())].to_vec();
            return Err(TraceError::NotATrace { path: path.to_owned(), found });
        }
        decode(&bytes).map_err(|(offset, reason)| {
            let len = bytes.len();
            TraceError::Damaged { path: path.to_owned(), offset, len, reason }
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        number(&mut out, self.name.len() as u32);
        out.extend(self.name.as_bytes());
        for value in [self.page_tokens, self.context, self.rows.len() as u32] {
            number(&mut out, value);
        }
        for row in &self.rows {
            for value in [row.layer, row.head, row.keys(), row.steps() as u32] {
                number(&mut out, value);
            }
            for keys in row.selections() {
                number(&mut out, keys.len() as u32);
                let mut least = 0;
                for key in keys {
                    number(&mut out, key - least);
                    least = key + 1;
                }
            }
        }
        let checksum = fnv(&out);
        out.extend(checksum.to_le_bytes());
        out
    }
}

fn number(out: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(super) fn fnv(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Where and why reading stopped.
type Damage = (usize, &'static str);

fn decode(bytes: &[u8]) -> Result<Trace, Damage> {
    let end = bytes.len() - MAGIC.len().min(bytes.len());
    let (body, checksum) = bytes.split_at(end.max(MAGIC.len()));
    if checksum != fnv(body).to_le_bytes() {
        return Err((body.len(), "the checksum does not match"));
    }
    let mut input = Input { bytes: body, at: MAGIC.len() };
    let name = input.number()? as usize;
    let name = input.take(name)?;
    let name = std::str::from_utf8(name).map_err(|_| (input.at, "the name is not UTF-8"))?.to_owned();
    let (page_tokens, context, rows) = (input.number()?, input.number()?, input.number()?);
    let mut trace = Trace { name, page_tokens, context, rows: Vec::new() };
    for _ in 0..rows {
        let (layer, head, keys, steps) = (input.number()?, input.number()?, input.number()?, input.number()?);
        let mut row = TraceRow::new(layer, head, keys);
        let mut selected = Vec::new();
        for _ in 0..steps {
            selected.clear();
            let mut least = 0u32;
            for _ in 0..input.number()? {
                let key = least.checked_add(input.number()?).filter(|key| *key < keys);
                let key = key.ok_or((input.at, "a key is beyond the row's bound"))?;
                selected.push(key);
                least = key + 1;
            }
            row.push(&selected);
        }
        trace.rows.push(row);
    }
    if input.at != body.len() { Err((input.at, "there is more than the rows")) } else { Ok(trace) }
}

struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Damage> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or((self.at, "the file ends in the middle"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u32, Damage> {
        let (mut value, mut shift) = (0u32, 0);
        loop {
            let byte = self.take(1)?[0];
            let bits = u32::from(byte & 0x7f);
            if shift > 28 || (shift == 28 && bits > 0xf) {
                return Err((self.at, "a number has more than 32 bits"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
            shift += 7;
        }
    }
}

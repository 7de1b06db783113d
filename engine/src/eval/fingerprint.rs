use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use spinkv::Rotary;
use spinkv::gates::Gates;

use crate::error::{Error, Result};

/// Bytes that are looked at, at each end of a file of weights.
const END: u64 = 1 << 20;

/// FNV-1a over what it is given, in order: tells files apart that somebody mixed up, not files that somebody forged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub fn add(mut self, bytes: &[u8]) -> Self {
        // The length as well, so that what moves from one piece to the next shows.
        for byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
        self
    }

    pub fn hex(self) -> String {
        format!("{:016x}", self.0)
    }
}

/// The fingerprint of a checkpoint: its configuration, its tokenizer, and of each file of weights its name, its length and the first
/// and the last MiB.
pub(super) fn of_model(dir: &Path) -> Result<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let name = entry.map_err(Error::io(dir))?.file_name();
        let text = name.to_string_lossy().into_owned();
        if text == "config.json" || text == "tokenizer.json" || text.ends_with(".safetensors") {
            names.push(text);
        }
    }
    names.sort();
    let mut fingerprint = Fingerprint::new();
    for name in names {
        let path = dir.join(&name);
        let ends = ends(&path).map_err(Error::io(&path))?;
        fingerprint = fingerprint.add(name.as_bytes()).add(&ends);
    }
    Ok(fingerprint.hex())
}

/// The fingerprint of gates: of every weight and of how they turn, whatever file they came from.
pub(super) fn of_gates(gates: &Gates) -> String {
    let turned = |fingerprint: Fingerprint, rotary: &Rotary| {
        fingerprint.add(&bytes(rotary.frequencies())).add(&rotary.magnitude().to_le_bytes())
    };
    let mut fingerprint = Fingerprint::new().add(&(gates.rank() as u64).to_le_bytes());
    fingerprint = turned(turned(fingerprint, gates.model_rotary()), gates.gate_rotary());
    for layer in gates.layers() {
        let norm = |norm: &Option<Vec<f32>>| bytes(norm.as_deref().unwrap_or_default());
        fingerprint = fingerprint
            .add(&bytes(&layer.query))
            .add(&bytes(&layer.key))
            .add(&norm(&layer.query_norm))
            .add(&norm(&layer.key_norm));
    }
    fingerprint.hex()
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A file's length, and its first and last MiB.
fn ends(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut bytes = length.to_le_bytes().to_vec();
    (&mut file).take(END).read_to_end(&mut bytes)?;
    file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
    file.take(END).read_to_end(&mut bytes)?;
    Ok(bytes)
}

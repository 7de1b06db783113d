//! Weights in safetensors files: one `model.safetensors`, or shards with an index.
//!
//! The files are mapped, not read: a tensor costs memory only while its f32 copy lives, and the pages behind
//! it are the system's to drop.

mod raw;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str;

use memmap2::Mmap;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};
use serde::Deserialize;

pub use raw::RawTensor;

use crate::error::{Error, Result};

/// Bytes before the header: its length as a little-endian u64.
const PREFIX_BYTES: usize = 8;

/// The tensors of one or several mapped safetensors files.
///
/// The files must not be changed or cut short while a `Checkpoint` lives; replace a checkpoint by renaming a
/// new file into place.
#[derive(Debug)]
pub struct Checkpoint {
    /// What errors name when a tensor is in no file: the single file or the index.
    path: PathBuf,
    files: Vec<MappedFile>,
    /// Which of `files` holds a tensor.
    file_of: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    /// Tensor name to file name. Ordered, so that errors do not depend on a hash.
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights in `dir`: `model.safetensors`, or else every shard that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    ///
    /// Fails if there are no weights, if a shard or a tensor that the index names does not exist, and if a
    /// file is not a whole safetensors file. Headers are checked here; no tensor data is touched.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        fs::read_dir(dir).map_err(Error::io(dir))?;
        let single = dir.join("model.safetensors");
        if single.exists() {
            return Self::open_file(single);
        }
        let index = dir.join("model.safetensors.index.json");
        if index.exists() {
            return Self::open_shards(dir, index);
        }
        Err(Error::MissingWeights { dir: dir.to_path_buf() })
    }

    /// Opens a single safetensors file, for instance reference outputs.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let file = MappedFile::open(path.clone())?;
        let file_of = file.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { path, files: vec![file], file_of })
    }

    fn open_shards(dir: &Path, index: PathBuf) -> Result<Self> {
        let text = fs::read(&index).map_err(Error::io(&index))?;
        let ShardIndex { weight_map } = serde_json::from_slice(&text).map_err(Error::json(&index))?;
        let mut files: Vec<MappedFile> = Vec::new();
        let mut opened: HashMap<&str, usize> = HashMap::new();
        let mut file_of = HashMap::with_capacity(weight_map.len());
        for (name, shard) in &weight_map {
            let number = match opened.get(shard.as_str()) {
                Some(&number) => number,
                None => {
                    let path = dir.join(shard);
                    if !path.is_file() {
                        return Err(Error::MissingShard { index, shard: shard.clone() });
                    }
                    files.push(MappedFile::open(path)?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            // A wrong index should fail when the model is opened, not at the first use of the tensor.
            files[number].info(name)?;
            file_of.insert(name.clone(), number);
        }
        Ok(Self { path: index, files, file_of })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// The names of all tensors, in no particular order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// Bytes of all the files together.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.map.len() as u64).sum()
    }

    /// A tensor's shape, outermost dimension first.
    ///
    /// # Errors
    ///
    /// Fails if there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.file(name)?.info(name)?.shape)
    }

    /// A tensor as it lies in the file.
    ///
    /// # Errors
    ///
    /// Fails if there is no such tensor, if its shape is not `expected_shape`, or if it is not bf16, f16 or
    /// f32.
    pub fn raw(&self, name: &str, expected_shape: &[usize]) -> Result<RawTensor<'_>> {
        let file = self.file(name)?;
        let info = file.info(name)?;
        if info.shape != expected_shape {
            return Err(Error::TensorShape {
                path: file.path.clone(),
                name: name.to_owned(),
                found: info.shape.clone(),
                expected: expected_shape.to_vec(),
            });
        }
        let bytes = file.bytes(info);
        match info.dtype {
            Dtype::BF16 => Ok(RawTensor::Bf16(elements(bytes))),
            Dtype::F16 => Ok(RawTensor::F16(elements(bytes))),
            Dtype::F32 => Ok(RawTensor::F32(elements(bytes))),
            _ => Err(file.dtype_error(name, info, "BF16, F16, F32")),
        }
    }

    /// A tensor as f32, in row-major order. bf16 and f16 convert exactly.
    ///
    /// # Errors
    ///
    /// As [`raw`](Self::raw).
    pub fn tensor_f32(&self, name: &str, expected_shape: &[usize]) -> Result<Vec<f32>> {
        Ok(self.raw(name, expected_shape)?.to_f32())
    }

    /// An integer tensor, in row-major order.
    ///
    /// # Errors
    ///
    /// Fails if there is no such tensor, or if it is not i64 or i32.
    pub fn tensor_i64(&self, name: &str) -> Result<Vec<i64>> {
        let file = self.file(name)?;
        let info = file.info(name)?;
        let bytes = file.bytes(info);
        match info.dtype {
            Dtype::I64 => Ok(elements::<8>(bytes).iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()),
            Dtype::I32 => {
                Ok(elements::<4>(bytes).iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect())
            }
            _ => Err(file.dtype_error(name, info, "I64, I32")),
        }
    }

    fn file(&self, name: &str) -> Result<&MappedFile> {
        match self.file_of.get(name) {
            Some(&number) => Ok(&self.files[number]),
            None => Err(Error::MissingTensor { path: self.path.clone(), name: name.to_owned() }),
        }
    }
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where tensor data begins; the offsets in `metadata` count from here.
    data_start: usize,
}

impl MappedFile {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the mapping is read-only, and `Checkpoint` documents that its files must not change while
        // it lives.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        match parse_header(&map) {
            Ok((data_start, metadata)) => {
                // `SafeTensors::read_metadata` makes this sum unchecked, and an absurd shape overflows it.
                let expected = data_start.saturating_add(metadata.data_len());
                if expected != map.len() {
                    return Err(Error::WeightsLength { path, found: map.len(), expected });
                }
                Ok(Self { path, map, metadata, data_start })
            }
            Err(source) => Err(Error::CorruptWeights { path, source }),
        }
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata
            .info(name)
            .ok_or_else(|| Error::MissingTensor { path: self.path.clone(), name: name.to_owned() })
    }

    /// A tensor's bytes, at any alignment. In range, since `open` found the offsets gapless and their end to
    /// be the file's.
    fn bytes(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets;
        &self.map[self.data_start + start..self.data_start + end]
    }

    fn dtype_error(&self, name: &str, info: &TensorInfo, supported: &'static str) -> Error {
        let (path, name) = (self.path.clone(), name.to_owned());
        Error::TensorDtype { path, name, found: info.dtype.to_string(), supported }
    }
}

/// Where the data begins, and the checked header: tensors without gaps, each as long as its shape says.
fn parse_header(bytes: &[u8]) -> std::result::Result<(usize, Metadata), SafeTensorError> {
    let (length, rest) = bytes.split_first_chunk::<PREFIX_BYTES>().ok_or(SafeTensorError::HeaderTooSmall)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| SafeTensorError::HeaderTooLarge)?;
    let header = rest.get(..length).ok_or(SafeTensorError::InvalidHeaderLength)?;
    let header = str::from_utf8(header).map_err(SafeTensorError::InvalidHeader)?;
    let metadata = serde_json::from_str(header).map_err(SafeTensorError::InvalidHeaderDeserialization)?;
    Ok((PREFIX_BYTES + length, metadata))
}

/// Little-endian elements of `N` bytes. The header check made the length a multiple of `N`.
fn elements<const N: usize>(bytes: &[u8]) -> &[[u8; N]] {
    bytes.as_chunks::<N>().0
}

#[cfg(test)]
mod tests;

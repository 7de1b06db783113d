//! Tensors as they lie in a file, and what they are converted to.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements that one task converts: enough to be worth a task, few enough to share a small tensor out.
pub(super) const CHUNK: usize = 1 << 16;

/// A tensor's elements in row-major order, little-endian, at any alignment.
#[derive(Clone, Copy, Debug)]
pub enum RawTensor<'a> {
    /// bf16.
    Bf16(&'a [[u8; 2]]),
    /// f16.
    F16(&'a [[u8; 2]]),
    /// f32.
    F32(&'a [[u8; 4]]),
}

impl RawTensor<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(elements) | Self::F16(elements) => elements.len(),
            Self::F32(elements) => elements.len(),
        }
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it as f32, by all threads. bf16 and f16 convert exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        match self {
            Self::Bf16(elements) => in_chunks(elements, &mut values, |elements, values| {
                for (value, &bytes) in values.iter_mut().zip(elements) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
                }
            }),
            Self::F16(elements) => in_chunks(elements, &mut values, f16_to_f32),
            Self::F32(elements) => in_chunks(elements, &mut values, |elements, values| {
                for (value, &bytes) in values.iter_mut().zip(elements) {
                    *value = f32::from_le_bytes(bytes);
                }
            }),
        }
        values
    }

    /// The bits of the elements from `first` on as bf16, as many as `out` has room for, by all threads. f16 and f32 are rounded to
    /// nearest, ties to even.
    ///
    /// # Panics
    /// If there are not as many elements.
    pub fn bf16_bits(&self, first: usize, out: &mut [u16]) {
        let elements = first..first + out.len();
        match self {
            Self::Bf16(all) => in_chunks(&all[elements], out, |elements, bits| {
                for (bits, &bytes) in bits.iter_mut().zip(elements) {
                    *bits = u16::from_le_bytes(bytes);
                }
            }),
            Self::F16(all) => in_chunks(&all[elements], out, |elements, bits| {
                let mut values = [0.0; BLOCK];
                for (elements, bits) in elements.chunks(BLOCK).zip(bits.chunks_mut(BLOCK)) {
                    let values = &mut values[..elements.len()];
                    f16_to_f32(elements, values);
                    for (bits, &value) in bits.iter_mut().zip(&*values) {
                        *bits = bf16::from_f32(value).to_bits();
                    }
                }
            }),
            Self::F32(all) => in_chunks(&all[elements], out, |elements, bits| {
                for (bits, &bytes) in bits.iter_mut().zip(elements) {
                    *bits = bf16::from_f32(f32::from_le_bytes(bytes)).to_bits();
                }
            }),
        }
    }
}

/// Elements that are converted at once on the stack.
const BLOCK: usize = 512;

fn in_chunks<const N: usize, T: Send>(
    elements: &[[u8; N]],
    out: &mut [T],
    chunk: impl Fn(&[[u8; N]], &mut [T]) + Sync,
) {
    out.par_chunks_mut(CHUNK).zip(elements.par_chunks(CHUNK)).for_each(|(to, from)| chunk(from, to));
}

/// Copies to an aligned buffer first, which `half` needs to convert many at once in hardware.
fn f16_to_f32(bytes: &[[u8; 2]], values: &mut [f32]) {
    let mut block = [f16::ZERO; BLOCK];
    for (bytes, values) in bytes.chunks(BLOCK).zip(values.chunks_mut(BLOCK)) {
        let block = &mut block[..bytes.len()];
        for (value, &bytes) in block.iter_mut().zip(bytes) {
            *value = f16::from_le_bytes(bytes);
        }
        block.convert_to_f32_slice(values);
    }
}

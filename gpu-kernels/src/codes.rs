//! Words of codes of one byte, and the words of bf16 that they stand for; see [`PageCode`].

use cuda_std::prelude::*;
use cuda_std::warp::FULL_MASK;

use crate::abi::WARP;
use crate::abi::page_code::PageCode;
use crate::model::elements::{eight_of, word_of_eight};

/// The two words that a word of codes stands for. Numbers of a code times a power of two are bf16 already.
#[inline(always)]
pub fn decode_word(code: PageCode, word: U32x4, scale: f32) -> [U32x4; 2] {
    let four = |codes: u32| codes.to_le_bytes().map(|byte| code.decode(byte, scale));
    let pair = |low: u32, high: u32| {
        let ([a, b, c, d], [e, f, g, h]) = (four(low), four(high));
        word_of_eight([a, b, c, d, e, f, g, h])
    };
    [pair(word.x, word.y), pair(word.z, word.w)]
}

/// The word of codes of two words.
#[inline(always)]
pub fn encode_words(code: PageCode, words: [U32x4; 2], inverse_scale: f32) -> U32x4 {
    let of_word = |word: U32x4| {
        let [a, b, c, d, e, f, g, h] = eight_of(word).map(|element| code.encode(element, inverse_scale));
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
    };
    let ((x, y), (z, w)) = (of_word(words[0]), of_word(words[1]));
    U32x4 { x, y, z, w }
}

/// The greatest of a word's elements by size, as the bits of an f32 without its sign.
#[inline(always)]
pub fn greatest_of(word: U32x4) -> u32 {
    let of_pair = |pair: u32| (pair << 16 & 0x7fff_0000).max(pair & 0x7fff_0000);
    of_pair(word.x).max(of_pair(word.y)).max(of_pair(word.z)).max(of_pair(word.w))
}

/// A warp writes the host page of a full page of `2 * half` words, keys and then values, each an even number of words: word `at` of it comes from `load`, twice.
/// `store` gets the host page's words and `round` the page's, as they are read from then on.
///
/// # Safety
/// All lanes of the warp come here; `half` is at most half of [`MAX_PAGE_WORDS`](crate::abi::MAX_PAGE_WORDS); the functions as they are called.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn encode_page(
    code: PageCode,
    half: u32,
    load: impl Fn(u32) -> U32x4,
    store: impl Fn(u32, U32x4),
    round: impl Fn(u32, U32x4),
) {
    let scale_of = |first: u32| {
        let mut greatest = 0;
        let mut word = warp::lane_id();
        while word < half {
            greatest = greatest.max(greatest_of(load(first + word)));
            word += WARP;
        }
        code.scale(warp::warp_reduce_max(FULL_MASK, greatest))
    };
    let (keys, values) = (scale_of(0), scale_of(half));
    let mut word = warp::lane_id();
    while word < half {
        let scale = if 2 * word < half { keys } else { values };
        let codes = encode_words(code, [load(2 * word), load(2 * word + 1)], 1.0 / scale);
        store(word, codes);
        let [even, odd] = decode_word(code, codes, scale);
        round(2 * word, even);
        round(2 * word + 1, odd);
        word += WARP;
    }
    if warp::lane_id() == 0 {
        store(half, U32x4 { x: keys.to_bits(), y: values.to_bits(), z: 0, w: 0 });
    }
}

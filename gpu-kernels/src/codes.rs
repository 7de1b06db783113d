//! Words of codes of one byte, and the words of bf16 that they stand for; see [`PageCode`].

use cuda_std::prelude::*;
use cuda_std::warp::FULL_MASK;

use crate::abi::WARP;
use crate::abi::page_code::PageCode;
use crate::model::elements::{eight_of, word_of_eight};

/// The two words that a word of codes stands for. Numbers of a code times a power of two are bf16 already.
#[inline(always)]
pub fn decode_word(code: PageCode, word: U32x4, scale: f32) -> [U32x4; 2] {
    // One branch a word, not one an element.
    match code {
        PageCode::E4m3 => decoded(word, |byte| PageCode::E4m3.decode(byte, scale)),
        PageCode::Int8 => decoded(word, |byte| PageCode::Int8.decode(byte, scale)),
    }
}

#[inline(always)]
fn decoded(word: U32x4, element: impl Fn(u8) -> f32) -> [U32x4; 2] {
    let four = |codes: u32| codes.to_le_bytes().map(&element);
    let pair = |low: u32, high: u32| {
        let ([a, b, c, d], [e, f, g, h]) = (four(low), four(high));
        word_of_eight([a, b, c, d, e, f, g, h])
    };
    [pair(word.x, word.y), pair(word.z, word.w)]
}

/// The word of codes of two words.
#[inline(always)]
pub fn encode_words(code: PageCode, words: [U32x4; 2], inverse_scale: f32) -> U32x4 {
    match code {
        PageCode::E4m3 => encoded(words, |element| PageCode::E4m3.encode(element, inverse_scale)),
        PageCode::Int8 => encoded(words, |element| PageCode::Int8.encode(element, inverse_scale)),
    }
}

#[inline(always)]
fn encoded(words: [U32x4; 2], code: impl Fn(f32) -> u8) -> U32x4 {
    let of_word = |word: U32x4| {
        let [a, b, c, d, e, f, g, h] = eight_of(word).map(&code);
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

/// A warp writes the host page of a full page of `2 * half` words, keys and then values, each an even number of words. `load` has words `at` and
/// `at + 1` of the page, of an even `at`, and is asked twice; `store` gets the host page's words, `round` the page's pairs as they are read from
/// then on.
///
/// # Safety
/// All lanes of the warp come here; `half` is at most half of [`MAX_PAGE_WORDS`](crate::abi::MAX_PAGE_WORDS); the functions as they are called.
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
#[inline(always)]
pub unsafe fn encode_page(
    code: PageCode,
    half: u32,
    load: impl Fn(u32) -> [U32x4; 2],
    store: impl Fn(u32, U32x4),
    round: impl Fn(u32, [U32x4; 2]),
) {
    // After both halves, the scales of both.
    let (mut keys, mut values) = (0.0f32, 0.0f32);
    let mut first = 0;
    while first < 2 * half {
        // A lane has the same pairs twice, so nobody reads what another one has rounded.
        let end = first + half;
        let mut greatest = 0;
        let mut at = first + 2 * warp::lane_id();
        while at < end {
            let [even, odd] = load(at);
            greatest = greatest.max(greatest_of(even)).max(greatest_of(odd));
            at += 2 * WARP;
        }
        let scale = code.scale(warp::warp_reduce_max(FULL_MASK, greatest));
        let inverse_scale = 1.0 / scale;
        let mut at = first + 2 * warp::lane_id();
        while at < end {
            let codes = encode_words(code, load(at), inverse_scale);
            store(at / 2, codes);
            round(at, decode_word(code, codes, scale));
            at += 2 * WARP;
        }
        (keys, values) = (values, scale);
        first = end;
    }
    if warp::lane_id() == 0 {
        store(half, U32x4 { x: keys.to_bits(), y: values.to_bits(), z: 0, w: 0 });
    }
}

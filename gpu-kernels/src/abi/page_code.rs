//! Codes of one byte an element, which host pages may hold in place of bf16.
//!
//! A coded host page is the codes of its keys and then of its values, in their order, and a last word with the scales of the keys and of the
//! values, f32. An element is its code's number times its half's scale. Scales are powers of two, the least by which the half's greatest element
//! is within the code's range, so numbers come back as exact bf16 (short of 0.96 * 2^128, above which they may round to infinity), and a page that has come back reads the same when it is coded once more.

/// A code of one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum PageCode {
    /// OCP's 8-bit floating point with 4 bits of exponent and 3 of mantissa, up to 448 (arXiv 2209.05433).
    E4m3 = 1,
    /// Whole numbers from -127 to 127.
    Int8 = 2,
}

/// The parameter of a kernel for pages that are not coded.
pub const NO_CODE: u32 = 0;

/// Elements of a word of codes.
pub const CODED_ELEMENTS: usize = super::WORD_BYTES;

/// Words of the host page of a GPU page of `page_words` words of bf16. Of the keys and of the values each there are whole words if `page_words` is a
/// multiple of 4.
pub const fn coded_words(page_words: u32) -> u32 {
    page_words / 2 + 1
}

/// 2^-120 in f32: between the exponents of e4m3 and of f32, whose biases are 7 and 127.
const TO_E4M3: f32 = f32::from_bits(7 << 23);
const FROM_E4M3: f32 = f32::from_bits(247 << 23);
/// 1.5 * 2^23: a small number that it is added to is rounded to a whole one, ties to even, in the lowest bits.
const TO_WHOLE: f32 = 12_582_912.0;
/// The least scale: the inverse of it is a number, too.
const LEAST_SCALE: i32 = 7;

impl PageCode {
    /// The code of a kernel's parameter that is not [`NO_CODE`].
    #[inline(always)]
    pub const fn of(parameter: u32) -> Self {
        if parameter == Self::E4m3 as u32 { Self::E4m3 } else { Self::Int8 }
    }

    /// The scale for a half whose greatest element by size has these bits, without their sign. A half that holds an infinity or a NaN has a NaN for
    /// its scale, and comes back as NaNs.
    #[inline(always)]
    pub const fn scale(self, greatest: u32) -> f32 {
        if greatest >= f32::INFINITY.to_bits() {
            return f32::NAN;
        }
        // The greatest number of a code is 448 = 1.75 * 2^8 or 127 = (1 + 63/64) * 2^6.
        let (exponent, mantissa) = match self {
            Self::E4m3 => (8, 0x60_0000),
            Self::Int8 => (6, 0x7e_0000),
        };
        let above = (greatest & 0x7f_ffff > mantissa) as i32;
        let biased = (greatest >> 23) as i32 - exponent + above;
        let biased = if biased < LEAST_SCALE { LEAST_SCALE } else { biased };
        f32::from_bits((biased as u32) << 23)
    }

    /// The code of the number nearest to `element / scale`, ties to even, given the inverse of [`scale`](Self::scale), which is exact.
    #[inline(always)]
    pub fn encode(self, element: f32, inverse_scale: f32) -> u8 {
        let scaled = element * inverse_scale;
        match self {
            Self::E4m3 => {
                // In bits 20 to 27 of it is the code, but for the sign: also below the least normal number, where f32 rounds no bit of bf16 away.
                let bits = (scaled * TO_E4M3).to_bits();
                let magnitude = bits & 0x7fff_ffff;
                let rounded = (magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20;
                (rounded | bits >> 31 << 7) as u8
            }
            Self::Int8 => (scaled + TO_WHOLE).to_bits() as u8,
        }
    }

    /// The element of a code.
    #[inline(always)]
    pub fn decode(self, code: u8, scale: f32) -> f32 {
        let number = match self {
            Self::E4m3 => {
                let code = u32::from(code);
                f32::from_bits((code & 0x7f) << 20 | code >> 7 << 31) * FROM_E4M3
            }
            Self::Int8 => f32::from(code as i8),
        };
        number * scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an e4m3 code stands for, by its definition.
    fn e4m3(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let size = if exponent == 0 {
            mantissa / 8.0 * (-6f64).exp2()
        } else {
            (1.0 + mantissa / 8.0) * f64::from(exponent - 7).exp2()
        };
        if code > 127 { -size } else { size }
    }

    /// Codes that stand for numbers, and those numbers.
    fn numbers(code: PageCode) -> Vec<(u8, f64)> {
        let all = 0..=255u8;
        match code {
            PageCode::E4m3 => all.filter(|code| code & 0x7f != 0x7f).map(|code| (code, e4m3(code))).collect(),
            PageCode::Int8 => {
                all.filter(|code| *code != 128).map(|code| (code, f64::from(code as i8))).collect()
            }
        }
    }

    #[test]
    fn codes_are_the_numbers_of_their_definition() {
        for code in [PageCode::E4m3, PageCode::Int8] {
            for (byte, number) in numbers(code) {
                for scale in [1.0, 0.125, 1024.0] {
                    assert_eq!(
                        f64::from(code.decode(byte, scale)),
                        number * f64::from(scale),
                        "{code:?} {byte}"
                    );
                    let back = code.encode(code.decode(byte, scale), 1.0 / scale);
                    assert!(back == byte || number == 0.0 && back == 0, "{code:?} {byte}: {back}");
                }
            }
        }
        assert_eq!(e4m3(0x7e), 448.0);
    }

    /// Every bf16 within the range, against a search for the nearest; of two that are as near it is the one with the even code.
    #[test]
    fn encoding_takes_the_nearest_number_ties_to_even() {
        for code in [PageCode::E4m3, PageCode::Int8] {
            let numbers = numbers(code);
            let greatest = numbers.iter().map(|(_, number)| *number).fold(0.0, f64::max);
            for bits in 0..=u16::MAX {
                let element = f32::from_bits(u32::from(bits) << 16);
                let within = f64::from(element).abs() <= greatest;
                if !within {
                    continue;
                }
                let far = |number: f64| (number - f64::from(element)).abs();
                let least = numbers.iter().map(|(_, number)| far(*number)).fold(f64::MAX, f64::min);
                let mut nearest: Vec<_> =
                    numbers.iter().filter(|(_, number)| far(*number) == least).collect();
                nearest.dedup_by_key(|(_, number)| *number);
                let even = |(byte, _): &&&(u8, f64)| byte % 2 == 0;
                let expected =
                    if nearest.len() == 1 { nearest[0] } else { *nearest.iter().find(even).unwrap() };
                let found = code.encode(element, 1.0);
                assert_eq!(
                    f64::from(code.decode(found, 1.0)),
                    expected.1,
                    "{code:?} of {element:e}: {found}"
                );
            }
        }
    }

    #[test]
    fn a_scale_is_the_least_power_of_two_that_brings_the_greatest_into_range() {
        for (code, limit) in [(PageCode::E4m3, 448.0), (PageCode::Int8, 127.0)] {
            for greatest in [448.0, 448.1, 127.0, 127.1, 1.0, 1.75, 1.76, 1e-3, 3.3e38, 1e-30f32] {
                let scale = code.scale(greatest.to_bits());
                assert_eq!(scale.log2().fract(), 0.0, "{code:?} {greatest}: {scale}");
                assert!(
                    greatest / scale <= limit && greatest / (scale / 2.0) > limit,
                    "{code:?} {greatest}: {scale}"
                );
            }
            for tiny in [0.0, f32::from_bits(1), f32::MIN_POSITIVE] {
                let scale = code.scale(tiny.to_bits());
                assert!(scale > 0.0 && (1.0 / scale).is_finite(), "{code:?} {tiny}: {scale}");
            }
            for bad in [f32::INFINITY, f32::NAN] {
                let scale = code.scale(bad.to_bits());
                assert!(code.decode(code.encode(1.0, 1.0 / scale), scale).is_nan(), "{code:?} {bad}");
            }
        }
    }
}

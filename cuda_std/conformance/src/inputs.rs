use crate::{Case, Domain};

/// The input of a case: the same words for the same seed, on every machine.
pub fn inputs(case: &Case, seed: u64) -> Vec<u32> {
    // FNV-1a, so that two cases of one shape and seed do not get the same words.
    let name = case
        .name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mut random = SplitMix(name ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (0..case.input_words()).map(|_| word(case.domain, &mut random)).collect()
}

fn word(domain: Domain, random: &mut SplitMix) -> u32 {
    match domain {
        Domain::Bits => match random.below(8) {
            0 => random.one_of(&SPECIAL_INTEGERS),
            1 => random.one_of(&SPECIAL_FLOATS),
            // Numbers of everyday size: most f32 of random bits are huge or tiny.
            2 => everyday(random).to_bits(),
            3 => random.below(40),
            _ => random.next() as u32,
        },
        Domain::SmallFloats => (random.below(2001) as f32 - 1000.0).to_bits(),
        Domain::FiniteFloats => match random.below(8) {
            0 => sign(random),
            1 => sign(random) | random.below(1 << 23),
            2 => sign(random) | random.below(2 << 23),
            3 => sign(random) | random.below((127 + 100) << 23),
            _ => everyday(random).to_bits(),
        },
        Domain::Floats => match random.below(4) {
            0 => random.one_of(&SPECIAL_FLOATS[..NAN]),
            1 => everyday(random).to_bits(),
            _ => sign(random) | random.below((255 << 23) + 1),
        },
    }
}

/// Either sign bit.
fn sign(random: &mut SplitMix) -> u32 {
    random.below(2) << 31
}

/// Between -16 and 16.
fn everyday(random: &mut SplitMix) -> f32 {
    (random.next() as u32 as f32 / (1u64 << 31) as f32 - 1.0) * 16.0
}

const SPECIAL_INTEGERS: [u32; 12] =
    [0, 1, 2, 31, 32, 33, 0x7fff_fffe, 0x7fff_ffff, 0x8000_0000, 0x8000_0001, 0xffff_fffe, 0xffff_ffff];

/// Where the NaNs begin.
const NAN: usize = 26;

const SPECIAL_FLOATS: [u32; NAN + 6] = [
    0x0000_0000, // 0
    0x8000_0000, // -0
    0x0000_0001, // the least subnormal
    0x8000_0001, // and its negative
    0x007f_ffff, // the greatest subnormal
    0x807f_ffff, // and its negative
    0x0080_0000, // the least normal
    0x8080_0000, // and its negative
    0x7f7f_ffff, // the greatest
    0xff7f_ffff, // and its negative
    0x7f80_0000, // infinity
    0xff80_0000, // and its negative
    0x3f80_0000, // 1
    0xbf80_0000, // -1
    0x3f7f_ffff, // the greatest below 1
    0x3f80_0001, // the least above 1
    0x4000_0000, // 2
    0x3f00_0000, // 1/2
    0x4300_0000, // 128: 2 to its power is infinite
    0xc2fc_0000, // -126: the least normal power of 2
    0xc315_0000, // -149: the least subnormal one
    0x3f80_8000, // halfway between two bf16, the lower even
    0x3f81_8000, // halfway between two bf16, the upper even
    0x3f80_8001, // just above halfway
    0x7f7f_8000, // rounds to infinity as bf16
    0x7e80_0000, // 2^126: the reciprocal is the least normal
    0x7fff_ffff, // NaN, as GPUs make them
    0xffff_ffff, // and its negative
    0x7fc0_0000, // NaN, as Rust makes them
    0xffc0_0000, // and as x86 does
    0x7f80_0001, // a signalling NaN
    0xffa0_0000, // another
];

struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Below `end`, evenly enough.
    fn below(&mut self, end: u32) -> u32 {
        (((self.next() >> 32) * u64::from(end)) >> 32) as u32
    }

    fn one_of(&mut self, words: &[u32]) -> u32 {
        words[self.below(words.len() as u32) as usize]
    }
}

/// A stream of random numbers that is the same on every machine: splitmix64 (Steele et al., OOPSLA 2014).
#[derive(Clone, Debug)]
pub(super) struct Noise {
    state: u64,
}

impl Noise {
    /// The stream that follows from these numbers. Different numbers give unrelated streams.
    pub fn new(parts: &[u64]) -> Self {
        let mut noise = Self { state: 0 };
        for part in parts {
            noise.state = noise.next() ^ part;
        }
        noise
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Evenly from `0.0..1.0`.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Evenly from `0..limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next()) * limit as u128) >> 64) as usize
    }

    /// Nearly normal, of mean 0 and variance 1: the sum of four uniform numbers, which is cheap and needs no
    /// function whose last bit differs between machines. Never beyond 3.5.
    pub fn normal(&mut self) -> f32 {
        const SCALE: f32 = 1.732_050_8 / 65_536.0;
        let bits = self.next();
        let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        (sum as f32 - 131_070.0) * SCALE
    }
}

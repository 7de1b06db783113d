/// What decides which partitions of a row are selected from step to step. A partition's score is
///
/// ```text
/// -popularity ln(rank)                 a fixed random order of the partitions: vertical patterns
/// + fast(t) + drift slow(t)            two AR(1) processes of variance 1
/// + flicker noise(t)                   fresh in each step
/// + slash  on 4 diagonals              positions at a fixed distance from the newest token
/// + topic  in 1 or 2 regions           of 512 to 4096 tokens, for 20 to 200 steps at a time
/// ```
///
/// and the largest scores are selected. Sinks and the recent window are not part of it: they never enter a cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Locality {
    /// Exponent of the partitions' popularity (Zipf).
    pub popularity: f32,
    /// From one step to the next, how much of the fast process stays.
    pub fast: f32,
    /// From one step to the next, how much of the slow process stays.
    pub slow: f32,
    /// Weight of the slow process.
    pub drift: f32,
    /// Weight of the fresh noise.
    pub flicker: f32,
    /// What diagonals add.
    pub slash: f32,
    /// What the current topic adds to its regions.
    pub topic: f32,
    /// Share of the noise's variance that the heads of a layer have in common.
    pub shared: f32,
}

impl Locality {
    /// Reproduces the miss ratios that HiSparse measured on LongBench-v2 (k = 2048 tokens a layer): see
    /// [`Checkpoints::HISPARSE`](super::Checkpoints::HISPARSE). `fast`, `drift` and `flicker` were found by
    /// [`calibrate`](super::calibrate()); a test finds them again.
    pub const CALIBRATED: Self = Self {
        popularity: 0.9,
        fast: 0.8814,
        slow: 0.998,
        drift: 0.4727,
        flicker: 0.3848,
        slash: 0.5,
        topic: 1.0,
        shared: 0.3,
    };

    /// The same pattern moving `pace` times as fast: what the processes forget in a step, and the fresh noise,
    /// times `pace`. At 0 the selection of a topic never changes; large values leave popularity alone.
    pub fn at_pace(self, pace: f32) -> Self {
        let forgets = |keeps: f32| (1.0 - (1.0 - keeps) * pace).clamp(0.0, 1.0);
        Self { fast: forgets(self.fast), slow: forgets(self.slow), flicker: self.flicker * pace, ..self }
    }
}

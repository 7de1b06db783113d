//! What `drift` selects: selections for measurements, that change from step to step as those of text do.

/// Threads of a block.
pub const BLOCK: u32 = 128;

/// One in the units of [`DriftRow::pace`].
pub const PACE_ONE: u32 = 1 << 16;

/// The pace at which caches of one, two and four times a step's pages miss about 21, 13 and 9 percent of contexts of 16 times as much; 30, 13.4 and
/// 6.7 percent are what is published of text (see the simulator's preset `calibrated`).
pub const PACE: u32 = 36 * PACE_ONE / 100;

/// A row at one step, as far as its selection depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriftRow {
    /// Layer * KV heads + KV head.
    pub row: u32,
    /// Tokens of the request.
    pub tokens: u32,
    /// Partitions to choose from.
    pub partitions: u32,
    /// Partitions to select: at least 1, fewer than there are.
    pub count: u32,
    /// Partitions that change in a step, in 65,536ths of the selected ones.
    pub pace: u32,
}

impl DriftRow {
    /// The partition in place `at` of the selection, counted from the first that may be selected: ascending in `at`.
    ///
    /// The partitions are cut into as many runs as are selected, and of each run one is. It stays for 1 / `pace` steps, and then another is drawn, the
    /// first ones of a run by far the oftenest (the sixth power of a uniform number), so that some come back and others are seen once. Runs are cut anew when
    /// the partitions have grown by a part in 16 to 32, not with each of them.
    #[inline(always)]
    pub const fn partition(&self, at: u32) -> u32 {
        let (first, end) = (self.run(at), self.run(at + 1));
        let seed = mix(mix(self.row) ^ at);
        // Runs change at different steps.
        let drawn = (self.tokens as u64 * self.pace as u64 + (seed & 0xffff) as u64) >> 16;
        let uniform = mix(seed ^ mix(drawn as u32)) >> 16;
        let cube = (((uniform * uniform) >> 16) * uniform) >> 16;
        let sixth = (cube * cube) >> 16;
        first + (((end - first) as u64 * sixth as u64) >> 16) as u32
    }

    /// Where run `at` begins.
    #[inline(always)]
    const fn run(&self, at: u32) -> u32 {
        let unit = 1 << (27 - (self.partitions | 31).leading_zeros());
        let rounded = self.partitions / unit * unit;
        let cut = if rounded < self.count { self.partitions } else { rounded };
        (at as u64 * cut as u64 / self.count as u64) as u32
    }
}

/// A number that shows nothing of `of` (the finalizer of MurmurHash3).
#[inline(always)]
const fn mix(of: u32) -> u32 {
    let of = (of ^ of >> 16).wrapping_mul(0x85eb_ca6b);
    let of = (of ^ of >> 13).wrapping_mul(0xc2b2_ae35);
    of ^ of >> 16
}

//! Which units of work a block has.

/// Units parted among blocks: runs of equal length, the first few of one unit more.
#[derive(Clone, Copy)]
pub struct Shares {
    each: u32,
    /// Blocks that have one more.
    longer: u32,
}

impl Shares {
    /// `units` units for `blocks` blocks, at most as many.
    #[inline(always)]
    pub fn new(units: u32, blocks: u32) -> Self {
        Self { each: units / blocks, longer: units % blocks }
    }

    /// The first unit of block `block`; of the one after the last block, the number of units.
    #[inline(always)]
    pub fn first(&self, block: u32) -> u32 {
        block * self.each + block.min(self.longer)
    }

    /// The block that has unit `unit`.
    #[inline(always)]
    pub fn owner(&self, unit: u32) -> u32 {
        let of_longer = self.longer * (self.each + 1);
        if unit < of_longer { unit / (self.each + 1) } else { self.longer + (unit - of_longer) / self.each }
    }
}

#[cfg(all(test, not(target_arch = "nvptx64")))]
mod tests {
    use super::*;

    #[test]
    fn every_unit_has_the_owner_whose_run_it_lies_in() {
        for (units, blocks) in [(1, 1), (7, 7), (8, 7), (13, 7), (14, 7), (95_000, 132)] {
            let shares = Shares::new(units, blocks);
            assert_eq!((shares.first(0), shares.first(blocks)), (0, units));
            for block in 0..blocks {
                let run = shares.first(block)..shares.first(block + 1);
                assert!(run.len() as u32 == units / blocks || run.len() as u32 == units / blocks + 1);
                assert!(run.clone().all(|unit| shares.owner(unit) == block), "{run:?} of {block}");
            }
        }
    }
}

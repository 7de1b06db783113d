//! Cases of `drift`, and what its selections must be.

use cuda_std::emulator::{Buffer, Fault, Launch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv_kernels::abi::Entry;
use spinkv_kernels::abi::drift::{BLOCK, DriftRow, PACE};
use spinkv_kernels::select::drift;

use super::top_k::compare;
use super::{WILD, pick, wild_entry};

/// A launch of `drift` on a ragged batch.
#[derive(Debug)]
pub struct DriftCase {
    /// `[batch]`.
    pub entries: Vec<Entry>,
    /// Row of KV head 0.
    pub first_row: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Changes of a step.
    pub pace: u32,
    /// Ids that a row has room for.
    pub capacity: u32,
}

impl DriftCase {
    /// The case of a seed: rows without partitions, with fewer than are to be selected, and with many times as many.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (kv_heads, capacity) = (rng.random_range(1..4), pick(&mut rng, &[1, 3, 127, 128, 129, 300]));
        let entries = (0..rng.random_range(1..4)).map(|_| {
            if rng.random_bool(0.2) {
                return wild_entry();
            }
            let partitions = pick(&mut rng, &[0, 1, 2, 127, 128, 130, 500, 4095, 131_072]);
            let limit = match rng.random_range(0..4) {
                0 => WILD,
                1 => 0,
                _ => rng.random_range(0..=partitions + 1),
            };
            let (tokens, first_partition) = (rng.random_range(1..2_000_000), rng.random_range(0..9));
            Entry { tokens, first_partition, partitions, limit, ..wild_entry() }
        });
        let entries = entries.collect();
        Self {
            entries,
            first_row: rng.random_range(0..500),
            kv_heads,
            pace: pick(&mut rng, &[0, PACE, 1 << 16]),
            capacity,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.entries.len() * self.kv_heads as usize
    }

    /// Ids and counts after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<(Vec<u32>, Vec<u32>), Fault> {
        let entries = super::emulated::entries(&self.entries);
        let (ids, selected) = (
            Buffer::from_slice(&vec![WILD; self.rows() * self.capacity as usize]),
            Buffer::from_slice(&vec![WILD; self.rows()]),
        );
        let Self { first_row, kv_heads, pace, capacity, .. } = *self;
        Launch::new(self.rows() as u32, BLOCK).seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                drift(
                    entries.view(),
                    first_row,
                    kv_heads,
                    pace,
                    capacity,
                    ids.view_mut(),
                    selected.view_mut(),
                )
            };
        })?;
        Ok((ids.to_vec(), selected.to_vec()))
    }

    /// Whether lists hold what they should, and nothing else was written.
    ///
    /// # Errors
    /// The first row that differs.
    pub fn check(&self, ids: &[u32], selected: &[u32]) -> Result<(), String> {
        for row in 0..self.rows() {
            let (entry, head) = (&self.entries[row / self.kv_heads as usize], row as u32 % self.kv_heads);
            let found = &ids[row * self.capacity as usize..][..self.capacity as usize];
            if entry.tokens == 0 {
                if selected[row] != WILD || found.iter().any(|id| *id != WILD) {
                    return Err(format!("row {row}: written for an entry without tokens"));
                }
                continue;
            }
            let (partitions, tokens) = (entry.partitions, entry.tokens);
            let count = entry.limit.min(partitions).min(self.capacity);
            let drawn = DriftRow { row: self.first_row + head, tokens, partitions, count, pace: self.pace };
            let of = |at| if count < partitions { drawn.partition(at) } else { at };
            let expected: Vec<u32> = (0..count).map(|at| entry.first_partition + of(at)).collect();
            let (found, beyond) = found.split_at((selected[row] as usize).min(self.capacity as usize));
            compare(&format!("row {row}"), selected[row], found, beyond, &expected)?;
        }
        Ok(())
    }
}

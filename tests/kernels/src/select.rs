//! Cases of `select`.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu::{Wish, choose, merge_heads};
use spinkv::pipeline::GroupMerge;
use spinkv_kernels::abi::Entry;
use spinkv_kernels::abi::score::{TILE_UNIT, tile, tiles};
use spinkv_kernels::abi::select::{MERGE_MAX, MERGE_MEAN, MERGE_SUM, WEIGHT_OF_ONE};

use super::top_k::{LENGTHS, compare, scores};
use super::{WILD, pick};

/// A launch of `select` on logits that are given.
#[derive(Debug)]
pub struct SelectCase {
    /// `[batch]`; some only fill the batch.
    pub entries: Vec<Entry>,
    /// `[batch * kv_heads, group, stride]`: infinity beyond a row's partitions.
    pub logits: Vec<f32>,
    /// `[batch * kv_heads, group, tiles, 2]`.
    pub statistics: Vec<f32>,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Room for a row's logits.
    pub stride: usize,
    /// Tiles of a row.
    pub tiles: u32,
    /// Whether the logits go through a softmax.
    pub softmax: bool,
    /// How heads are merged.
    pub merge: GroupMerge,
    /// The least score to select.
    pub least: f32,
    /// The part of the sum of scores to select.
    pub top_p: f32,
    /// `[rows of all requests, mark_words]`: the batch's are where `first_marks` says. Empty for none.
    pub forced: Vec<u32>,
    /// As `forced`.
    pub masked: Vec<u32>,
    /// Words of a row's marks; 0 for none of either.
    pub mark_words: usize,
    /// Row of KV head 0 in the marks.
    pub first_row: usize,
    /// `[rows of all requests, 2]`: how many partitions rows have, before and after a run. Empty where the entries say it.
    pub row_pages: Vec<u32>,
    /// Partitions to estimate.
    pub estimates: usize,
    /// The share of a row's partitions that this is at most.
    pub share: f32,
    /// Scores that shared memory has room for.
    pub resident: usize,
    /// Ids that a row has room for.
    pub capacity: usize,
}

/// What a launch writes.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// `[batch * kv_heads, capacity]`.
    pub ids: Vec<u32>,
    /// `[batch * kv_heads]`.
    pub selected: Vec<u32>,
    /// `[batch * kv_heads, estimates]`.
    pub estimated_ids: Vec<u32>,
    /// `[batch * kv_heads]`.
    pub estimated: Vec<u32>,
}

impl SelectCase {
    /// The case of a seed: any group, merge and option, any kind of scores, entries that only fill the batch.
    pub fn random(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (batch, kv_heads) = [(1, 1), (1, 2), (2, 1)][rng.random_range(0..3)];
        let lengths: Vec<usize> = (0..batch).map(|_| pick(&mut rng, &LENGTHS)).collect();
        let group = pick(&mut rng, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 16]);
        Self::sized(&mut rng, &lengths, kv_heads, group)
    }

    /// A case in which everything happens: marks, top-p, estimates, ties.
    pub fn full(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut case = Self::sized(&mut rng, &[300], 1, 2);
        case.entries[0] =
            Entry { tokens: 1, partitions: 300, limit: 80, first_partition: 3, ..Entry::default() };
        (case.softmax, case.merge) = (false, GroupMerge::Sum);
        (case.least, case.top_p, case.estimates, case.capacity) = (0.001, 0.6, 20, 100);
        (case.share, case.row_pages) = (1.0, Vec::new());
        (case.mark_words, case.first_row) = (10, 0);
        (case.forced, case.masked) = (vec![0x8001_0000; 10], vec![0x0001_0100; 10]);
        case.logits.iter_mut().for_each(|logit| *logit = rng.random_range(0..16) as f32 / 4096.0);
        case
    }

    /// Long rows: 128K tokens in chunks of 8, and a row longer than shared memory.
    pub fn large(seed: u64) -> Self {
        Self::sized(&mut ChaCha8Rng::seed_from_u64(seed), &[16_384, 9_000, 0, 60_001], 4, 5)
    }

    fn sized(rng: &mut impl Rng, lengths: &[usize], kv_heads: usize, group: usize) -> Self {
        let longest = *lengths.iter().max().unwrap();
        let stride = (longest + rng.random_range(0..9)).max(1).next_multiple_of(4);
        let rows = lengths.len() * kv_heads;
        let resident =
            if rng.random_bool(0.3) { (longest / 2 / 4 * 4).min(49_152) } else { stride.min(49_152) };
        let (softmax, by_p) = (rng.random_bool(0.5), rng.random_bool(0.3));
        let entries: Vec<Entry> = lengths
            .iter()
            .map(|&length| Entry {
                tokens: u32::from(rng.random_bool(0.9)),
                first_partition: rng.random_range(0..1000),
                partitions: length as u32,
                limit: match rng.random_range(0..6) {
                    0 => 0,
                    1 => WILD,
                    2 => length as u32,
                    3 => rng.random_range(0..=length as u32),
                    _ => rng.random_range(0..=length as u32 / 10 + 1),
                },
                ..Entry::default()
            })
            .collect();
        let mut logits = vec![f32::INFINITY; rows * group * stride];
        for row in 0..rows {
            let length = lengths[row / kv_heads];
            for head in 0..group {
                let mut values = scores(rng, length);
                if softmax || by_p {
                    // A softmax of infinities is NaN throughout; one case of that is enough.
                    values
                        .iter_mut()
                        .filter(|value| value.abs() > 1e4 || value.is_nan())
                        .for_each(|value| *value = 1e4);
                }
                if by_p && !softmax {
                    // As probabilities.
                    let sum: f32 = values.iter().map(|value| value.abs()).sum();
                    values.iter_mut().for_each(|value| *value = value.abs() / sum.max(1e-3));
                }
                logits[(row * group + head) * stride..][..length].copy_from_slice(&values);
            }
        }
        let mark_words = if rng.random_bool(0.5) { stride.div_ceil(32) + rng.random_range(0..3) } else { 0 };
        // The batch's requests are at some of the marks' places, in any order.
        let (layer, layers) = (rng.random_range(0..2), 2);
        let mut places: Vec<usize> = (0..lengths.len() + rng.random_range(0..2)).collect();
        places.shuffle(rng);
        let marked_rows = places.len() * layers * kv_heads;
        let mut entries = entries;
        for (entry, place) in entries.iter_mut().zip(&places) {
            entry.first_marks = (place * layers * kv_heads) as u32;
        }
        let marks = |rng: &mut _, odds: f64| -> Vec<u32> {
            if Rng::random_bool(rng, 0.2) {
                return Vec::new();
            }
            (0..marked_rows * mark_words)
                .map(|_| (0..32).fold(0, |word, bit| word | u32::from(Rng::random_bool(rng, odds)) << bit))
                .collect()
        };
        let odds = [0.01, 0.3][rng.random_range(0..2)];
        let mut case = Self {
            statistics: Vec::new(),
            forced: marks(rng, odds),
            masked: marks(rng, 0.2),
            mark_words,
            first_row: layer * kv_heads,
            entries,
            logits,
            kv_heads,
            group,
            stride,
            tiles: (stride as u32).div_ceil(TILE_UNIT * pick(rng, &[1, 2, 3, 4, 8])),
            softmax,
            merge: [GroupMerge::Max, GroupMerge::Sum, GroupMerge::Mean][rng.random_range(0..3)],
            least: if rng.random_bool(0.2) { rng.random_range(-1.0..1.0) } else { f32::NEG_INFINITY },
            top_p: if by_p { rng.random_range(0.0..1.0) } else { 1.0 },
            row_pages: Vec::new(),
            estimates: if rng.random_bool(0.4) { rng.random_range(1..=longest + 2) } else { 0 },
            share: if rng.random_bool(0.5) { 1.0 } else { rng.random_range(0.0..1.0) },
            resident,
            capacity: if rng.random_bool(0.3) { longest / 3 + 1 } else { longest + 1 },
        };
        if rng.random_bool(0.3) {
            // Some layers' last runs may not be selected yet; none has more partitions than its entry says, or has twice as many.
            case.row_pages = (0..2 * marked_rows).map(|_| rng.random_range(0..=2 * longest as u32)).collect();
            case.entries.iter_mut().for_each(|entry| entry.new_partitions = rng.random_range(0..=2));
        }
        case.statistics = case.statistics_of_logits();
        if !case.softmax && case.least != f32::NEG_INFINITY {
            // A score that some partition has: it is reached.
            let scores = case.scores(0);
            case.least =
                scores.get(scores.len() / 2).copied().filter(|score| score.is_finite()).unwrap_or(0.5);
        }
        case
    }

    /// The same with the tiles that its launch on a GPU has.
    pub fn tiled_as_launched(mut self) -> Self {
        self.tiles = tiles(self.rows() as u64, self.stride as u32);
        self.statistics = self.statistics_of_logits();
        self
    }

    /// What `score` would write beside the logits; NaN for tiles that it leaves out.
    fn statistics_of_logits(&self) -> Vec<f32> {
        let tiles = self.tiles as usize;
        let mut statistics = vec![f32::NAN; self.rows() * self.group * tiles * 2];
        for row in 0..self.rows() {
            for head in 0..self.group {
                let of_head = row * self.group + head;
                let logits = &self.logits[of_head * self.stride..][..self.partitions(row)];
                for (tile, logits) in
                    logits.chunks(tile(logits.len().max(1) as u32, self.tiles) as usize).enumerate()
                {
                    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let sum: f64 = logits.iter().map(|logit| f64::from(logit - greatest).exp()).sum();
                    statistics[(of_head * tiles + tile) * 2] = greatest;
                    statistics[(of_head * tiles + tile) * 2 + 1] = sum as f32;
                }
            }
        }
        statistics
    }

    /// Words of a row of `marks`, as the kernel takes them: 0 for none.
    pub fn words_of(&self, marks: &[u32]) -> usize {
        if marks.is_empty() { 0 } else { self.mark_words }
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.entries.len() * self.kv_heads
    }

    fn partitions(&self, row: usize) -> usize {
        let entry = self.entries[row / self.kv_heads];
        if entry.tokens == 0 {
            return 0;
        }
        let layer = (self.first_row / self.kv_heads) as u32;
        let place = entry.first_marks as usize + self.first_row + row % self.kv_heads;
        let pages = self.row_pages.get(2 * place + usize::from(layer >= entry.new_partitions));
        pages.map_or(entry.partitions, |pages| entry.partitions.min(*pages)) as usize
    }

    /// The merge as the kernel takes it.
    pub fn merge_code(&self) -> u32 {
        match self.merge {
            GroupMerge::Max => MERGE_MAX,
            GroupMerge::Sum => MERGE_SUM,
            GroupMerge::Mean => MERGE_MEAN,
        }
    }

    /// Room for keys of rows that shared memory is too small for.
    pub fn keys(&self) -> usize {
        if self.resident < self.stride { self.rows() * self.stride / 4 } else { 1 }
    }

    /// The outputs before the launch.
    pub fn outputs(&self) -> Selection {
        Selection {
            ids: vec![WILD; self.rows() * self.capacity],
            selected: vec![WILD; self.rows()],
            estimated_ids: vec![WILD; (self.rows() * self.estimates).max(1)],
            estimated: vec![WILD; self.rows()],
        }
    }

    /// Whether a selection is right.
    ///
    /// Of logits as they are it must be the reference's. After a softmax scores are not the reference's to the bit: then partitions
    /// may be on the other side of a border only if their scores are close to it.
    ///
    /// # Errors
    /// The first row that is wrong.
    pub fn check(&self, found: &Selection) -> Result<(), String> {
        for row in 0..self.rows() {
            let split = |ids: &[u32], width: usize, count: u32| -> [Vec<u32>; 2] {
                let of_row = if width == 0 { &[][..] } else { &ids[row * width..][..width] };
                let (found, beyond) = of_row.split_at((count as usize).min(width));
                [found.to_vec(), beyond.to_vec()]
            };
            let [ids, beyond] = split(&found.ids, self.capacity, found.selected[row]);
            let count = if self.estimates > 0 { found.estimated[row] } else { 0 };
            let [estimated_ids, beyond_estimated] = split(&found.estimated_ids, self.estimates, count);

            let first = self.entries[row / self.kv_heads].first_partition;
            let scores = self.scores(row);
            let (mut expected, mut estimated) = self.choose(row, &scores);
            for list in [&mut expected, &mut estimated] {
                list.iter_mut().for_each(|id| *id += first);
            }
            let name = format!("row {row}");
            if !self.softmax || (ids == expected && estimated_ids == estimated) {
                compare(&name, found.selected[row], &ids, &beyond, &expected)?;
                compare(&format!("{name}, estimates"), count, &estimated_ids, &beyond_estimated, &estimated)?;
                continue;
            }
            if beyond.iter().chain(&beyond_estimated).any(|id| *id != WILD) {
                return Err(format!("{name}: ids written beyond the lists"));
            }
            self.same_but_for_close(row, &scores, &ids, &estimated_ids).map_err(|wrong| {
                format!(
                    "{name}: {wrong}, of {} and {} where {} and {} were expected",
                    ids.len(),
                    estimated_ids.len(),
                    expected.len(),
                    estimated.len()
                )
            })?;
        }
        Ok(())
    }

    fn marked(&self, marks: &[u32], row: usize, id: u32) -> bool {
        if marks.is_empty() {
            return false;
        }
        let first = self.entries[row / self.kv_heads].first_marks as usize + self.first_row;
        let row = first + row % self.kv_heads;
        marks[row * self.mark_words + id as usize / 32] >> (id % 32) & 1 != 0
    }

    fn limit(&self, row: usize) -> usize {
        (self.entries[row / self.kv_heads].limit as usize).min(self.capacity)
    }

    fn choose(&self, row: usize, scores: &[f32]) -> (Vec<u32>, Vec<u32>) {
        self.choose_up_to(self.limit(row), self.least, row, scores)
    }

    /// How many partitions of a row are to be estimated.
    fn wanted(&self, scores: &[f32]) -> usize {
        self.estimates.min((scores.len() as f32 * self.share) as usize)
    }

    fn choose_up_to(&self, k: usize, least: f32, row: usize, scores: &[f32]) -> (Vec<u32>, Vec<u32>) {
        let wish = Wish {
            k,
            least,
            top_p: self.top_p,
            forced: &|id| self.marked(&self.forced, row, id),
            masked: &|id| self.marked(&self.masked, row, id),
            estimates: self.wanted(scores),
        };
        let logarithmic = self.softmax && self.merge == GroupMerge::Max;
        let weight = |score: f32| {
            let score = if logarithmic { score.exp() } else { score };
            (score * WEIGHT_OF_ONE) as u64
        };
        choose(scores, &wish, weight)
    }

    /// The merged scores of a row: logarithms where the kernel has them.
    fn scores(&self, row: usize) -> Vec<f32> {
        let partitions = self.partitions(row);
        let of_head = |head: usize| &self.logits[(row * self.group + head) * self.stride..][..partitions];
        if !self.softmax {
            let merged = (0..partitions)
                .map(|at| merge_heads((0..self.group).map(|head| of_head(head)[at]), self.merge));
            return merged
                .map(|score| if score.is_nan() { f32::from_bits(0x7fff_ffff) } else { score })
                .collect();
        }
        let log_sums: Vec<f64> = (0..self.group)
            .map(|head| {
                let greatest = f64::from(of_head(head).iter().copied().fold(f32::NEG_INFINITY, f32::max));
                let sum: f64 = of_head(head).iter().map(|logit| (f64::from(*logit) - greatest).exp()).sum();
                greatest + sum.ln()
            })
            .collect();
        (0..partitions)
            .map(|at| {
                let logs = (0..self.group).map(|head| f64::from(of_head(head)[at]) - log_sums[head]);
                match self.merge {
                    GroupMerge::Max => logs.fold(f64::NEG_INFINITY, f64::max) as f32,
                    GroupMerge::Sum => logs.map(f64::exp).sum::<f64>() as f32,
                    GroupMerge::Mean => (logs.map(f64::exp).sum::<f64>() / self.group as f64) as f32,
                }
            })
            .collect()
    }

    /// By how much a score may be on the wrong side of a border. A logarithm's error counts as it is, one of a score in proportion.
    fn room(&self, border: f32) -> f32 {
        if self.merge == GroupMerge::Max {
            2_f32.powi(-14) * border.abs().max(1.0)
        } else {
            // A head's exponential below the least normal number is 0.
            border.abs() * 2_f32.powi(-10) + self.group as f32 * f32::MIN_POSITIVE
        }
    }

    /// Whether a selection has a length that scores within the tolerance allow, and it, and estimates and it, are the best partitions but
    /// for some that are as good as the last of them. Nothing is as good as a NaN.
    fn same_but_for_close(
        &self,
        row: usize,
        scores: &[f32],
        ids: &[u32],
        estimated: &[u32],
    ) -> Result<(), String> {
        if [ids, estimated].iter().any(|list| !list.is_sorted_by(|a, b| a < b)) {
            return Err("not ascending".to_owned());
        }
        let first = self.entries[row / self.kv_heads].first_partition;
        let unmasked = (0..scores.len() as u32).filter(|id| !self.marked(&self.masked, row, *id));
        let (forced, mut free): (Vec<u32>, Vec<u32>) =
            unmasked.partition(|id| self.marked(&self.forced, row, *id));
        let score = |id: &u32| scores[*id as usize];
        free.sort_by(|a, b| score(b).total_cmp(&score(a)));
        let all = forced.len() + free.len();

        let mut most = self.limit(row).min(all);
        let mut fewest = most;
        if self.least != f32::NEG_INFINITY {
            let reaching = |border| forced.len() + free.iter().filter(|id| score(id) >= border).count();
            let room = self.room(self.least);
            (fewest, most) = (fewest.min(reaching(self.least + room)), most.min(reaching(self.least - room)));
        }
        if self.top_p < 1.0 {
            let by_p = self.choose_up_to(all, f32::NEG_INFINITY, row, scores).0.len();
            let room = 1 + by_p / 50;
            (fewest, most) = (fewest.min(by_p.saturating_sub(room)), most.min(by_p + room));
        }
        if !(fewest..=most).contains(&ids.len()) {
            return Err(format!("{} partitions where {fewest} to {most} are right", ids.len()));
        }
        if estimated.len() != self.wanted(scores).min(all - ids.len()) {
            return Err("another number of estimates".to_owned());
        }
        for count in [ids.len(), ids.len() + estimated.len()] {
            let listed = [ids, &estimated[..count - ids.len()]];
            let listed = |id: u32| listed.iter().any(|list| list.binary_search(&(first + id)).is_ok());
            let of_forced = forced.iter().take(count).filter(|id| listed(**id)).count();
            if of_forced != count.min(forced.len()) {
                return Err("not all that are forced, or not the first of them".to_owned());
            }
            let of_free = count - of_forced;
            let border = of_free.checked_sub(1).map_or(f32::INFINITY, |last| score(&free[last]));
            let room = self.room(border);
            let mut found = 0;
            for id in &free {
                let right = if listed(*id) { score(id) >= border - room } else { score(id) <= border + room };
                if !right {
                    return Err(format!("partition {id} has {} where the border is {border}", score(id)));
                }
                found += usize::from(listed(*id));
            }
            if found != of_free {
                return Err("ids that are out of range, masked or listed twice".to_owned());
            }
        }
        Ok(())
    }
}

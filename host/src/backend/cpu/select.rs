use multiversion::multiversion;

use super::math::{axpy, dot, exp_sum, max, upper_bound};
use crate::pipeline::{GroupMerge, PartitionScore};

/// Scores every partition of a row: for each query head the softmax over the partitions of
/// `query . summary / sqrt(head_dim)`, merged over the heads.
///
/// `queries` is `[group, head_dim]`, `summaries` `[partitions, head_dim]`, `scores` `[partitions]`; `logits`
/// is scratch of the same length.
pub fn score(
    queries: &[f32],
    summaries: &[f32],
    head_dim: usize,
    merge: GroupMerge,
    scores: &mut [f32],
    logits: &mut [f32],
) {
    score_beside(queries, summaries, head_dim, merge, &|_| false, scores, logits);
}

/// [`score`] where the softmaxes are over the partitions that are not `left_out`; those that are have a score of 0.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn score_beside(
    queries: &[f32],
    summaries: &[f32],
    head_dim: usize,
    merge: GroupMerge,
    left_out: &dyn Fn(u32) -> bool,
    scores: &mut [f32],
    logits: &mut [f32],
) {
    let scale = 1.0 / (head_dim as f32).sqrt();
    scores.fill(0.0);
    for query in queries.chunks_exact(head_dim) {
        for (logit, summary) in logits.iter_mut().zip(summaries.chunks_exact(head_dim)) {
            *logit = dot(query, summary) * scale;
        }
        for (partition, logit) in logits.iter_mut().enumerate() {
            if left_out(partition as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        let highest = max(logits);
        let factor = 1.0 / exp_sum(logits, highest);
        match merge {
            GroupMerge::Max => {
                for (score, weight) in scores.iter_mut().zip(&*logits) {
                    let weight = weight * factor;
                    // Not f32::max, which would hide a NaN.
                    *score = if weight > *score || weight.is_nan() { weight } else { *score };
                }
            }
            GroupMerge::Sum | GroupMerge::Mean => axpy(factor, logits, scores),
        }
    }
    if merge == GroupMerge::Mean {
        let share = head_dim as f32 / queries.len() as f32;
        scores.iter_mut().for_each(|score| *score *= share);
    }
}

/// The greatest dot product that a key within bounds can have with `query` (Quest). A NaN is never hidden.
///
/// `bounds` is `[2, head_dim]`: the least and the greatest of each element of a partition's keys.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn bound(query: &[f32], bounds: &[f32]) -> f32 {
    let (least, greatest) = bounds.split_at(query.len());
    upper_bound(query, least, greatest)
}

/// Scores every partition of a row by its bounds: each query head's [`bound`], merged over the heads as it is.
///
/// `queries` is `[group, head_dim]`, `bounds` `[partitions, 2, head_dim]`, `scores` `[partitions]`.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn score_bounds(queries: &[f32], bounds: &[f32], head_dim: usize, merge: GroupMerge, scores: &mut [f32]) {
    for (score, bounds) in scores.iter_mut().zip(bounds.chunks_exact(2 * head_dim)) {
        let (least, greatest) = bounds.split_at(head_dim);
        let heads = queries.chunks_exact(head_dim);
        *score = merge_heads(heads.map(|query| upper_bound(query, least, greatest)), merge);
    }
}

/// Scores every partition of a row by its summary, as `kind` says; see [`score`] and [`score_bounds`].
pub fn score_partitions(
    kind: PartitionScore,
    queries: &[f32],
    summaries: &[f32],
    head_dim: usize,
    merge: GroupMerge,
    scores: &mut [f32],
) {
    score_partitions_beside(kind, queries, summaries, head_dim, merge, &|_| false, scores);
}

/// [`score_partitions`] beside those that are read in any case, which are `left_out` of the softmaxes: see [`score_beside`].
pub fn score_partitions_beside(
    kind: PartitionScore,
    queries: &[f32],
    summaries: &[f32],
    head_dim: usize,
    merge: GroupMerge,
    left_out: &dyn Fn(u32) -> bool,
    scores: &mut [f32],
) {
    match kind {
        PartitionScore::DotProduct => {
            let logits = &mut vec![0.0; scores.len()];
            score_beside(queries, summaries, head_dim, merge, left_out, scores, logits);
        }
        PartitionScore::Bound => score_bounds(queries, summaries, head_dim, merge, scores),
    }
}

/// Merges the heads' scores of one partition as they are.
///
/// A NaN is never hidden, and sums run from the first head on.
pub fn merge_heads(scores: impl ExactSizeIterator<Item = f32>, merge: GroupMerge) -> f32 {
    let share = 1.0 / scores.len() as f32;
    let merged = match merge {
        GroupMerge::Max => scores.reduce(|a, b| if b > a || b.is_nan() { b } else { a }),
        GroupMerge::Sum | GroupMerge::Mean => scores.reduce(|a, b| a + b),
    };
    let merged = merged.unwrap_or(0.0);
    if merge == GroupMerge::Mean { merged * share } else { merged }
}

/// What may be selected besides the `k` best.
#[derive(Clone, Copy)]
#[allow(missing_debug_implementations, reason = "it borrows functions")]
pub struct Wish<'a> {
    /// The most to select.
    pub k: usize,
    /// Only scores that are at least this.
    pub least: f32,
    /// Below 1, only the fewest scores that reach this part of the sum of all. What is forced or masked does not count in it.
    pub top_p: f32,
    /// Selected first, whatever the score; of too many the lower ones.
    pub forced: &'a dyn Fn(u32) -> bool,
    /// Never selected, forced or not.
    pub masked: &'a dyn Fn(u32) -> bool,
    /// How many of the best that are not selected to list besides.
    pub estimates: usize,
}

impl Default for Wish<'_> {
    fn default() -> Self {
        let (k, least, top_p, estimates) = (0, f32::NEG_INFINITY, 1.0, 0);
        Self { k, least, top_p, forced: &|_| false, masked: &|_| false, estimates }
    }
}

/// The indices that `wish` selects of `scores`, and those of the estimates; both ascending. `weight` is what a score counts for
/// [`top_p`](Wish::top_p): a whole number, so that sums don't depend on their order.
pub fn choose(scores: &[f32], wish: &Wish<'_>, weight: impl Fn(f32) -> u64) -> (Vec<u32>, Vec<u32>) {
    let score = |id: u32| scores[id as usize];
    let mut best: Vec<u32> = (0..scores.len() as u32).filter(|id| !(wish.masked)(*id)).collect();
    // Stable: of equal ones the lower ids stay first.
    best.sort_by(|a, b| {
        (wish.forced)(*b)
            .cmp(&(wish.forced)(*a))
            .then_with(|| if (wish.forced)(*a) { a.cmp(b) } else { score(*b).total_cmp(&score(*a)) })
    });
    let forced = best.iter().filter(|id| (wish.forced)(**id)).count();

    let mut selected = wish.k.min(best.len());
    if wish.least != f32::NEG_INFINITY {
        let reaching =
            best[forced..].iter().take_while(|id| score(**id).total_cmp(&wish.least).is_ge()).count();
        selected = selected.min(forced + reaching);
    }
    if wish.top_p < 1.0 {
        let weights: Vec<u64> = best[forced..].iter().map(|id| weight(score(*id))).collect();
        let total: u64 = weights.iter().sum();
        if total > 0 {
            let part = ((total as f32 * wish.top_p) as u64).clamp(1, total);
            let sums = weights.iter().scan(0, |sum, weight| {
                *sum += weight;
                Some(*sum)
            });
            let fewest = sums.take_while(|sum| *sum < part).count() + 1;
            selected = selected.min(forced + fewest);
        }
    }
    let mut estimated = best[selected..].to_vec();
    estimated.truncate(wish.estimates);
    estimated.sort_unstable();
    best.truncate(selected);
    best.sort_unstable();
    (best, estimated)
}

/// Appends the indices of the `k` largest scores to `ids`, ascending; of equal scores the lower index wins.
pub fn top_k(scores: &[f32], k: usize, ids: &mut Vec<u32>) {
    top_k_beside(scores, k, &|_| false, ids);
}

/// Appends the indices that are `always` taken, and the `k` others with the largest scores, to `ids`, ascending; of equal scores the
/// lower index wins.
pub fn top_k_beside(scores: &[f32], k: usize, always: &dyn Fn(u32) -> bool, ids: &mut Vec<u32>) {
    let first = ids.len();
    let all = 0..scores.len() as u32;
    ids.extend(all.clone().filter(|id| !always(*id)));
    if k < ids.len() - first {
        let order =
            |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then_with(|| a.cmp(b));
        if k > 0 {
            ids[first..].select_nth_unstable_by(k - 1, order);
        }
        ids.truncate(first + k);
    }
    ids.extend(all.filter(|id| always(*id)));
    ids[first..].sort_unstable();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_is_never_hidden() {
        for merge in [GroupMerge::Max, GroupMerge::Sum, GroupMerge::Mean] {
            let (mut scores, mut logits) = ([0.0; 3], [0.0; 3]);
            let summaries = [0.0, 1.0, f32::NAN, 0.0, 1.0, 1.0];
            score(&[1.0, 1.0, 2.0, 2.0], &summaries, 2, merge, &mut scores, &mut logits);
            assert!(scores.iter().all(|score| score.is_nan()), "{scores:?}");
        }
    }

    #[test]
    fn of_equal_scores_the_lower_index_wins() {
        let mut ids = vec![];
        top_k(&[0.5, 1.0, 0.5, 0.5, 2.0], 3, &mut ids);
        assert_eq!(ids, [0, 1, 4]);
        for (k, expected) in [(0, 0), (5, 5), (9, 5)] {
            ids.clear();
            top_k(&[1.0; 5], k, &mut ids);
            assert_eq!(ids.len(), expected);
        }
    }

    #[test]
    fn what_is_always_taken_does_not_count() {
        for (k, expected) in [(0, &[1, 3][..]), (1, &[1, 3, 4]), (2, &[0, 1, 3, 4]), (9, &[0, 1, 2, 3, 4])] {
            let mut ids = vec![7];
            top_k_beside(&[0.5, 0.0, 0.5, 9.0, 2.0], k, &|id| id % 2 == 1, &mut ids);
            assert_eq!((ids[0], &ids[1..]), (7, expected), "{k}");
        }
    }

    #[test]
    fn a_bound_is_reached_by_a_corner_of_the_box() {
        let (query, least, greatest) = ([2.0, -1.0, 0.0], [-1.0, -3.0, 5.0], [4.0, 0.5, 6.0]);
        assert_eq!(bound(&query, &[least, greatest].concat()), 8.0 + 3.0);
        // A NaN in any of them.
        for place in 0..2 {
            let mut bounds = [-1.0, -1.0, 1.0, 1.0];
            (bounds[place], bounds[place + 2]) = (f32::NAN, f32::NAN);
            assert!(bound(&[0.5, -0.5], &bounds).is_nan());
        }
        assert!(bound(&[f32::NAN, 1.0], &[0.0; 4]).is_nan());
    }

    #[test]
    fn bounds_are_merged_as_they_are() {
        let queries = [1.0, 0.0, 0.0, 1.0];
        // Two partitions: keys within (-1 to 2, 3 to 4) and (0 to 1, -5 to 9).
        let bounds = [-1.0, 3.0, 2.0, 4.0, 0.0, -5.0, 1.0, 9.0];
        for (merge, expected) in
            [(GroupMerge::Max, [4.0, 9.0]), (GroupMerge::Sum, [6.0, 10.0]), (GroupMerge::Mean, [3.0, 5.0])]
        {
            let mut scores = [f32::NAN; 2];
            score_partitions(PartitionScore::Bound, &queries, &bounds, 2, merge, &mut scores);
            assert_eq!(scores, expected);
        }
    }

    #[test]
    fn heads_merge_as_they_are() {
        let merged = |merge| merge_heads([1.0, -3.0, 8.0].into_iter(), merge);
        assert_eq!([GroupMerge::Max, GroupMerge::Sum, GroupMerge::Mean].map(merged), [8.0, 6.0, 2.0]);
        assert!(merge_heads([1.0, f32::NAN, 8.0].into_iter(), GroupMerge::Max).is_nan());
    }

    #[test]
    fn a_wish_is_chosen_step_by_step() {
        let scores = [0.1, 0.3, 0.05, 0.3, 0.05, 0.2];
        let weight = |score: f32| (score * 1000.0).round() as u64;
        let chosen = |wish: Wish<'_>| choose(&scores, &wish, weight);
        assert_eq!(chosen(Wish { k: 2, estimates: 2, ..Wish::default() }), (vec![1, 3], vec![0, 5]));
        assert_eq!(chosen(Wish { k: 1, estimates: 9, ..Wish::default() }), (vec![1], vec![0, 2, 3, 4, 5]));
        let forced = |id| id == 4 || id == 2;
        let masked = |id| id == 1;
        let wish = Wish { k: 3, forced: &forced, masked: &masked, ..Wish::default() };
        assert_eq!(chosen(wish).0, [2, 3, 4]);
        assert_eq!(chosen(Wish { k: 1, ..wish }).0, [2]);
        assert_eq!(chosen(Wish { k: 6, least: 0.2, ..Wish::default() }).0, [1, 3, 5]);
        assert_eq!(chosen(Wish { k: 6, least: 0.2, ..wish }).0, [2, 3, 4, 5]);
        assert_eq!(chosen(Wish { k: 6, top_p: 0.6, ..Wish::default() }).0, [1, 3]);
        assert_eq!(chosen(Wish { k: 6, top_p: 0.61, ..Wish::default() }).0, [1, 3, 5]);
        assert_eq!(chosen(Wish { k: 1, top_p: 0.61, ..Wish::default() }).0, [1]);
    }

    /// One head sees partition 1 most, the other partition 2; by hand.
    #[test]
    fn heads_are_merged_after_their_softmax() {
        let (queries, summaries) = ([2.0f32, 0.0, 0.0, 8.0], [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]);
        let root = 2f32.sqrt();
        let first = [1.0, (2.0 / root).exp(), 1.0];
        let second = [1.0, 1.0, (8.0 / root).exp()];
        for merge in [GroupMerge::Max, GroupMerge::Sum, GroupMerge::Mean] {
            let (mut scores, mut logits) = ([0.0; 3], [0.0; 3]);
            score(&queries, &summaries, 2, merge, &mut scores, &mut logits);
            for partition in 0..3 {
                let a = first[partition] / first.iter().sum::<f32>();
                let b = second[partition] / second.iter().sum::<f32>();
                let expected = match merge {
                    GroupMerge::Max => a.max(b),
                    GroupMerge::Sum => a + b,
                    GroupMerge::Mean => (a + b) / 2.0,
                };
                approx::assert_relative_eq!(scores[partition], expected, max_relative = 1e-6);
            }
        }
    }
}

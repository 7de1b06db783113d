use multiversion::multiversion;

use super::math::{axpy, dot, exp_sum, max};
use crate::pipeline::GroupMerge;

/// Scores every partition of a row: for each query head the softmax over the partitions of
/// `query . summary / sqrt(head_dim)`, merged over the heads.
///
/// `queries` is `[group, head_dim]`, `summaries` `[partitions, head_dim]`, `scores` `[partitions]`; `logits`
/// is scratch of the same length.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn score(
    queries: &[f32],
    summaries: &[f32],
    head_dim: usize,
    merge: GroupMerge,
    scores: &mut [f32],
    logits: &mut [f32],
) {
    let scale = 1.0 / (head_dim as f32).sqrt();
    scores.fill(0.0);
    for query in queries.chunks_exact(head_dim) {
        for (logit, summary) in logits.iter_mut().zip(summaries.chunks_exact(head_dim)) {
            *logit = dot(query, summary) * scale;
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
            GroupMerge::Sum => axpy(factor, logits, scores),
        }
    }
}

/// Appends the indices of the `k` largest scores to `ids`, ascending; of equal scores the lower index wins.
pub fn top_k(scores: &[f32], k: usize, ids: &mut Vec<u32>) {
    let first = ids.len();
    ids.extend(0..scores.len() as u32);
    if k < scores.len() {
        let order =
            |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then_with(|| a.cmp(b));
        if k > 0 {
            ids[first..].select_nth_unstable_by(k - 1, order);
        }
        ids.truncate(first + k);
        ids[first..].sort_unstable();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_is_never_hidden() {
        for merge in [GroupMerge::Max, GroupMerge::Sum] {
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

    /// One head sees partition 1 most, the other partition 2; by hand.
    #[test]
    fn heads_are_merged_after_their_softmax() {
        let (queries, summaries) = ([2.0f32, 0.0, 0.0, 8.0], [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]);
        let root = 2f32.sqrt();
        let first = [1.0, (2.0 / root).exp(), 1.0];
        let second = [1.0, 1.0, (8.0 / root).exp()];
        for merge in [GroupMerge::Max, GroupMerge::Sum] {
            let (mut scores, mut logits) = ([0.0; 3], [0.0; 3]);
            score(&queries, &summaries, 2, merge, &mut scores, &mut logits);
            for partition in 0..3 {
                let a = first[partition] / first.iter().sum::<f32>();
                let b = second[partition] / second.iter().sum::<f32>();
                let expected = if merge == GroupMerge::Max { a.max(b) } else { a + b };
                approx::assert_relative_eq!(scores[partition], expected, max_relative = 1e-6);
            }
        }
    }
}

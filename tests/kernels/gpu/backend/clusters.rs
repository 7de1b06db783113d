//! A step over clusters by definition: which tokens each partition has, what is selected and estimated, and what attention makes of it, in f64.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use spinkv::KvShape;
use spinkv::backend::cpu::score_partitions;
use spinkv::backend::cuda::RowClusters;
use spinkv::memory::Word;
use spinkv::pipeline::{PartitionScore, Place, Reach, RequestId, Select};

use super::run::{Run, Wrong};

/// Numbers of words of bf16.
fn numbers(words: &[Word]) -> Vec<f32> {
    bytemuck::cast_slice::<_, bf16>(words).to_f32_vec()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

impl Run<'_> {
    /// The outputs of a row's group in the layer that ran last, over what it selected and estimated, which must be right: `[group, head_dim]`.
    pub fn over_clusters(
        &self,
        request: RequestId,
        layer: usize,
        index: usize,
        kv_head: usize,
        token: usize,
    ) -> Result<Vec<f64>, Wrong> {
        let (config, backend, sequence) =
            (self.pipeline.config(), self.pipeline.backend(), &self.sequences[&request]);
        let KvShape { kv_heads, query_heads, head_dim, .. } = *config.shape();
        let group = query_heads / kv_heads;
        let wrong = |what: String| {
            Wrong::Output(format!("{request:?}, layer {layer}, KV head {kv_head}, token {token}: {what}"))
        };
        let clusters = backend.row_clusters(request, layer, kv_head)?.expect("clusters");
        let of = |tensor: fn(&spinkv_tests::Sequence, usize, std::ops::Range<usize>) -> &[f32],
                  token: usize| {
            tensor(sequence, layer, token..token + 1)[kv_head * head_dim..][..head_dim].to_vec()
        };
        let (key_of, value_of) = (
            |token| of(spinkv_tests::Sequence::keys, token),
            |token| of(spinkv_tests::Sequence::values, token),
        );
        let zone = config.zones(token + 1).retrievable;
        let members = self.members(&clusters, zone.clone(), &key_of, &value_of).map_err(wrong)?;
        let (summaries, means) = (numbers(&clusters.summaries), numbers(&clusters.value_means));
        for (partition, tokens) in members.iter().enumerate() {
            for (found, tensor) in [(&summaries, &key_of as &dyn Fn(usize) -> Vec<f32>), (&means, &value_of)]
            {
                for channel in 0..head_dim {
                    let sum: f64 = tokens.iter().map(|token| f64::from(tensor(*token)[channel])).sum();
                    let (mean, found) = (sum / tokens.len() as f64, found[partition * head_dim + channel]);
                    // Rounded to bf16, of a sum in f32.
                    let off = (f64::from(found) - mean).abs();
                    if off.is_nan() || off > mean.abs() / 250.0 + 1e-5 {
                        return Err(wrong(format!("a mean of partition {partition} is {found}, not {mean}")));
                    }
                }
            }
        }

        let (ids, estimated) = (backend.selected(index, kv_head)?, backend.estimated(index, kv_head)?);
        let Select::TopK { merge, budget, .. } = config.method().select() else {
            panic!("clusters are ranked")
        };
        let (limit, share) = match config.reach(Place { layer, kv_head }) {
            Reach::Selected => (config.budget_partitions(budget, token + 1), config.method().estimated()),
            Reach::Everything => (members.len(), 0.0),
            Reach::Steady => (0, 0.0),
        };
        let limit = limit.min(members.len());
        let estimates = (members.len() as f32 * share) as usize;
        let estimates = estimates.min(members.len() - limit);
        if (ids.len(), estimated.len()) != (limit, estimates) {
            return Err(wrong(format!(
                "{} selected and {} estimated of {}, not {limit} and {estimates}",
                ids.len(),
                estimated.len(),
                members.len()
            )));
        }
        let queries =
            &sequence.queries(layer, token..token + 1)[kv_head * group * head_dim..][..group * head_dim];
        let mut scores = vec![0.0; members.len()];
        score_partitions(PartitionScore::DotProduct, queries, &summaries, head_dim, merge, &mut scores);
        let class = |id: u32| if ids.contains(&id) { 2 } else { usize::from(estimated.contains(&id)) };
        for border in [1, 2] {
            let of = |above: bool| (0..scores.len() as u32).filter(move |id| (class(*id) >= border) == above);
            let least = of(true).map(|id| scores[id as usize]).fold(f32::INFINITY, f32::min);
            let most = of(false).map(|id| scores[id as usize]).fold(f32::NEG_INFINITY, f32::max);
            if most > least * (1.0 + 1e-3) {
                return Err(wrong(format!("a score of {least} was taken and one of {most} left")));
            }
        }

        let scale = 1.0 / (head_dim as f64).sqrt();
        let read: Vec<usize> = ids.iter().flat_map(|id| members[*id as usize].clone()).collect();
        let seen: Vec<usize> = (0..zone.start).chain(zone.end..token + 1).chain(read).collect();
        let mut outputs = Vec::new();
        for query in queries.chunks(head_dim) {
            let exact = seen.iter().map(|token| (dot(query, &key_of(*token)) * scale, 1.0, value_of(*token)));
            let estimates = estimated.iter().map(|id| {
                let of = *id as usize * head_dim..(*id as usize + 1) * head_dim;
                let tokens = clusters.tokens[*id as usize];
                (dot(query, &summaries[of.clone()]) * scale, f64::from(tokens), means[of].to_vec())
            });
            let parts: Vec<(f64, f64, Vec<f32>)> = exact.chain(estimates).collect();
            let highest = parts.iter().map(|(logit, ..)| *logit).fold(f64::NEG_INFINITY, f64::max);
            let (mut sum, mut out) = (0.0, vec![0.0; head_dim]);
            for (logit, tokens, value) in &parts {
                let weight = tokens * (logit - highest).exp();
                sum += weight;
                out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * f64::from(*value));
            }
            outputs.extend(out.iter().map(|out| out / sum));
        }
        Ok(outputs)
    }

    /// The tokens of each partition, by their keys and values on the host: each of the zone's once.
    fn members(
        &self,
        clusters: &RowClusters,
        zone: std::ops::Range<usize>,
        key_of: &dyn Fn(usize) -> Vec<f32>,
        value_of: &dyn Fn(usize) -> Vec<f32>,
    ) -> Result<Vec<Vec<usize>>, String> {
        let layout = self.pipeline.config().layout();
        let (head_dim, page_words) = (layout.head_dim(), layout.page_words());
        let known: Vec<(Vec<f32>, Vec<f32>)> =
            zone.clone().map(|token| (key_of(token), value_of(token))).collect();
        let mut left: Vec<bool> = vec![true; known.len()];
        let mut members = Vec::new();
        for (partition, page) in clusters.pages.chunks(page_words).enumerate() {
            let page = numbers(page);
            let (keys, values) = page.split_at(page.len() / 2);
            let count = clusters.tokens[partition] as usize;
            let mut tokens = Vec::new();
            for (key, value) in keys.chunks(head_dim).zip(values.chunks(head_dim)).take(count) {
                let same = |at: &usize| left[*at] && known[*at].0 == key && known[*at].1 == value;
                let at = (0..known.len()).find(same);
                let at =
                    at.ok_or_else(|| format!("partition {partition} has a token that is not of {zone:?}"))?;
                left[at] = false;
                tokens.push(zone.start + at);
            }
            if keys[count * head_dim..].iter().chain(&values[count * head_dim..]).any(|x| *x != 0.0) {
                return Err(format!("partition {partition} has something behind its {count} tokens"));
            }
            members.push(tokens);
        }
        match left.iter().position(|left| *left) {
            Some(at) => Err(format!("token {} of {zone:?} is in no partition", zone.start + at)),
            None => Ok(members),
        }
    }
}

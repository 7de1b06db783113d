use std::ops::Range;

use spinkv_kernels::abi::cluster::NO_TOKEN;

use super::super::attend::Estimate;
use super::super::cluster::cluster;
use super::super::index::mean_key;
use super::tokens::{NewTokens, Tokens};
use super::{Row, Shared, TRANSFER_PAGES, Tiers};
use crate::KvConfig;
use crate::backend::StepEntry;
use crate::memory::{Direction, Transfer};

/// What a row has beside other rows' things if its partitions are clusters.
///
/// Two numberings of pages meet here: steady pages are counted along the sequence, pages of clusters, and with them partitions, in the order in which
/// they were made. Only the latter are on the host and in the cache.
#[derive(Debug, Default)]
pub(super) struct RowClusters {
    /// Pages of all clusters so far.
    pub pages: u32,
    /// The tokens of each page that Index made in this step, counted from the first token that left: Offload stores them.
    members: Vec<u32>,
    /// Select's partitions that are estimated, ascending.
    pub estimated: Vec<u32>,
}

/// A row's partitions of clusters, one piece a segment: see [`KvConfig::summary_elements`].
pub(super) struct ClusterSummaries<'a> {
    pieces: &'a [&'a mut [f32]],
    partitions: usize,
    head_dim: usize,
}

impl<'a> ClusterSummaries<'a> {
    pub fn new(config: &KvConfig, pieces: &'a [&'a mut [f32]]) -> Self {
        Self { pieces, partitions: config.segment_partitions(), head_dim: config.layout().head_dim() }
    }

    /// What stands for a partition.
    pub fn estimate(&self, id: u32) -> Estimate<'a> {
        let (segment, at) = (id as usize / self.partitions, id as usize % self.partitions);
        let (keys, rest) = self.pieces[segment].split_at(self.partitions * self.head_dim);
        let (values, tokens) = rest.split_at(self.partitions * self.head_dim);
        let of = at * self.head_dim..(at + 1) * self.head_dim;
        Estimate { key: &keys[of.clone()], value: &values[of], tokens: tokens[at] }
    }
}

impl Row {
    /// Index: makes clusters of the tokens that leave the steady zone, and writes the mean key, the mean value and the number of tokens of each of their pages
    /// into `summaries`.
    pub(super) fn index_clusters(
        &mut self,
        config: &KvConfig,
        tokens: &Tokens<'_>,
        new_values: NewTokens<'_>,
        leaving: Range<usize>,
        summaries: &mut [&mut [f32]],
    ) {
        if leaving.is_empty() {
            return;
        }
        let (head_dim, partitions) = (config.layout().head_dim(), config.segment_partitions());
        let (mut keys, mut values) =
            (vec![0.0; leaving.len() * head_dim], vec![0.0; leaving.len() * head_dim]);
        let heads = keys.chunks_exact_mut(head_dim).zip(values.chunks_exact_mut(head_dim));
        leaving.zip(heads).for_each(|(token, (key, value))| {
            tokens.key(&self.steady, token, key);
            tokens.value(&self.steady, new_values, token, value);
        });
        let page_tokens = config.layout().page_tokens();
        self.clusters.members = cluster(&keys, head_dim, page_tokens);
        for (id, page) in
            (self.clusters.pages as usize..).zip(self.clusters.members.chunks_exact(page_tokens))
        {
            let valid = page.iter().filter(|token| **token != NO_TOKEN);
            let of = |tensor: &[f32]| -> Vec<f32> {
                let heads = valid.clone().map(|token| &tensor[*token as usize * head_dim..][..head_dim]);
                heads.collect::<Vec<_>>().concat()
            };
            let (of_keys, of_values) = (of(&keys), of(&values));
            let (segment, at) = (id / partitions, id % partitions);
            let (mean_keys, rest) = summaries[segment].split_at_mut(partitions * head_dim);
            let (mean_values, tokens) = rest.split_at_mut(partitions * head_dim);
            mean_key(&of_keys, &mut mean_keys[at * head_dim..][..head_dim]);
            mean_key(&of_values, &mut mean_values[at * head_dim..][..head_dim]);
            tokens[at] = (of_keys.len() / head_dim) as f32;
        }
    }

    /// Offload: pages of the clusters that Index made go to the host; the steady pages that their tokens were on are free for others.
    pub(super) fn offload_clusters(
        &mut self,
        config: &KvConfig,
        tiers: &mut Tiers,
        shared: &Shared<'_>,
        entry: &StepEntry,
        keys: NewTokens<'_>,
        values: NewTokens<'_>,
    ) {
        let layout = config.layout();
        let page_tokens = layout.page_tokens();
        let leaving = config.leaving_tokens(entry.before, entry.after());
        let (mut key, mut value) = (vec![0.0; layout.head_dim()], vec![0.0; layout.head_dim()]);
        let members = std::mem::take(&mut self.clusters.members);
        let mut transfer = Transfer::new(shared.id, Direction::ToHost);
        self.host.set_computed(self.clusters.pages + (members.len() / page_tokens) as u32);
        for page in members.chunks_exact(page_tokens) {
            let mut staging = vec![0; layout.page_words()];
            let tokens = Tokens { pool: &tiers.pool, layout, before: entry.before, keys };
            for (at, token) in page.iter().filter(|token| **token != NO_TOKEN).enumerate() {
                let token = leaving.start + *token as usize;
                tokens.key(&self.steady, token, &mut key);
                tokens.value(&self.steady, values, token, &mut value);
                layout.write_token(&mut staging, at, &key, &value);
            }
            transfer.add_staged(self.clusters.pages, &staging, self.host_page(self.clusters.pages));
            self.clusters.pages += 1;
            if transfer.len() == TRANSFER_PAGES {
                self.send(tiers, shared, &mut transfer);
            }
        }
        self.send(tiers, shared, &mut transfer);
        let left = config.left_pages(entry.after());
        while let Some((key, page)) = self.steady.leave(&left) {
            self.steady.replace(key, page);
        }
        for token in entry.before..entry.after() {
            let sequential = (token / page_tokens) as u32;
            if left.contains(&sequential) {
                continue;
            }
            let page = self.steady.lookup(sequential).unwrap_or_else(|| self.steady.push(sequential));
            let new = token - entry.before;
            layout.write_token(
                tiers.pool.page_mut(page),
                token % page_tokens,
                keys.get(new),
                values.get(new),
            );
        }
    }
}

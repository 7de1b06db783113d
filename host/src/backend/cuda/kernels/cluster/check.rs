//! What the launches of a run refuse.

use spinkv_kernels::abi::cluster::{self, MAX_SPANS, MAX_TOKENS};
use spinkv_kernels::abi::{MAX_PAGE_WORDS, SLAB_PAGES, WORD_BYTES};

use super::super::super::driver::{
    Result, check_choice, check_length, check_multiple, check_operand, check_range,
};
use super::{ANY, ClusterRun, ClusterScratch, ClusterShape};

impl ClusterRun<'_> {
    /// Refuses sizes that do not fit together.
    pub(super) fn check(&self) -> Result<()> {
        let ClusterShape { tokens, kv_heads, head_words, spans, span_centroids } = self.shape;
        check_choice("cluster head_words", head_words, &[8, 16])?;
        check_operand("cluster kv_heads", kv_heads.into(), 1..=ANY)?;
        check_operand("cluster tokens", tokens.into(), 1..=MAX_TOKENS.into())?;
        check_operand("cluster spans", spans.into(), 1..=MAX_SPANS.into())?;
        check_multiple("cluster span_centroids", span_centroids.into(), 8)?;
        check_operand("cluster span_centroids", span_centroids.into(), 8..=u64::from(tokens / spans))?;
        let width = u128::from(kv_heads) * u128::from(head_words);
        let end = u128::from(self.first) + u128::from(tokens);
        let words = u64::try_from(end * width).unwrap_or(u64::MAX);
        // Kernels count words in 32 bits.
        check_operand("cluster words of keys", words, 1..=ANY)?;
        check_range("cluster keys", 0, words as usize, self.keys.len())?;
        check_range("cluster values", 0, words as usize, self.values.len())?;
        self.check_tables()?;
        self.check_pages()?;

        let (width, clusters) = (width as usize, self.shape.clusters());
        let ClusterScratch { sums, means, centroids, biases, assigned, sizes, firsts, members } =
            self.scratch;
        let listed = self.member_pages() as usize * self.tables.page_tokens as usize;
        for (what, needed, found) in [
            ("cluster sums", cluster::sums::parts(tokens) as usize * 2 * width, sums.len()),
            ("cluster means", 2 * width, means.len()),
            ("cluster centroids", clusters as usize * width, centroids.len()),
            ("cluster biases", self.rows_of(clusters), biases.len()),
            ("cluster assigned", self.rows_of(tokens.next_multiple_of(4)), assigned.len()),
            ("cluster sizes", self.rows_of(clusters), sizes.len()),
            ("cluster firsts", self.rows_of(clusters), firsts.len()),
            ("cluster members", kv_heads as usize * listed, members.len()),
        ] {
            check_range(what, 0, needed, found)?;
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<()> {
        let ClusterShape { kv_heads, head_words, .. } = self.shape;
        let tables = &self.tables;
        let most = cluster::means::MAX_PAGE_TOKENS;
        check_operand("cluster page_tokens", tables.page_tokens.into(), 1..=most.into())?;
        check_operand("cluster segment_partitions", tables.segment_partitions.into(), 1..=ANY)?;
        let last = u64::from(tables.first_row) + u64::from(kv_heads);
        check_operand("cluster first_row + kv_heads", last, 1..=tables.request_rows.into())?;
        check_operand("cluster capacity", tables.capacity.into(), self.member_pages().into()..=ANY)?;
        let segments = tables.capacity.div_ceil(tables.segment_partitions) as usize;
        check_range("cluster directories", tables.directory as usize, segments, tables.directories.len())?;
        let place = tables.first_place as usize + tables.first_row as usize;
        check_range("cluster row_pages", 2 * place, self.rows_of(2), tables.row_pages.len())?;
        // One segment at least: more are the directories' to name.
        let segment = tables.request_rows as usize * tables.segment_partitions as usize;
        check_range("cluster partition_tokens", 0, segment, tables.partition_tokens.len())?;
        let words = segment.saturating_mul(head_words as usize);
        check_range("cluster summaries", 0, words, tables.summaries.len())?;
        check_range("cluster value_means", 0, words, tables.value_means.len())
    }

    fn check_pages(&self) -> Result<()> {
        let ClusterShape { kv_heads, head_words, .. } = self.shape;
        let (page_tokens, pages) = (self.tables.page_tokens, &self.pages);
        let page_words = 2 * u64::from(page_tokens) * u64::from(head_words);
        check_operand("cluster page words", page_words, 2..=MAX_PAGE_WORDS.into())?;
        let listed = u64::from(self.member_pages()) * u64::from(page_tokens);
        check_operand("cluster member_pages * page_tokens", listed, 1..=ANY)?;
        let all = u64::from(self.member_pages()) * u64::from(kv_heads);
        check_operand("cluster member_pages * kv_heads", all, 1..=cluster::store::MAX_PAGES.into())?;
        check_operand("cluster blocks", pages.blocks.into(), 1..=cluster::store::MAX_BLOCKS.into())?;
        check_length("cluster host_valid", pages.host_slabs.len(), pages.host_valid.len())?;
        let slab = page_words as usize * SLAB_PAGES as usize;
        check_range("cluster arena words", 0, slab, pages.host_pages.len() / WORD_BYTES)
    }
}

//! What a method selects, and the pages that a selection needs.

use std::fmt;

use crate::pipeline::ZoneUnit;
use crate::{Error, Result};

/// How a method cuts a row's tokens into partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionKind {
    /// Runs of `tokens` consecutive tokens: partition `c` holds tokens `c * tokens .. (c + 1) * tokens`.
    Chunk {
        /// Tokens of a partition.
        tokens: usize,
    },
    /// Single tokens. Memory still moves whole pages, and attention reads all tokens of a page that is
    /// fetched.
    Token,
    /// Groups of tokens with like keys, made of `run` tokens at a time, and stored in an order of their own. A group has pages of its own, and
    /// each of them is a partition: all of a page's tokens are of one group, and the last page of a group may have fewer than the others.
    ///
    /// Which tokens a partition has differs from row to row, and so does their number.
    Cluster {
        /// Tokens that leave the steady zone, and become clusters, at a time: a multiple of [`CLUSTER_RUN_UNIT`] and of a page's tokens.
        run: usize,
    },
}

/// A run of tokens that becomes clusters is a multiple of it: 8 clusters of 16 tokens on average.
pub const CLUSTER_RUN_UNIT: usize = 128;

impl PartitionKind {
    /// The most tokens of a partition, on pages of `page_tokens` tokens.
    pub fn tokens(self, page_tokens: usize) -> usize {
        match self {
            Self::Chunk { tokens } => tokens,
            Self::Token => 1,
            Self::Cluster { .. } => page_tokens,
        }
    }

    /// The granularity at which context leaves the steady zone: no partition and no page lies across a border.
    pub fn zone_unit(self, page_tokens: usize) -> ZoneUnit {
        match self {
            Self::Chunk { tokens } => ZoneUnit::even(tokens),
            Self::Token => ZoneUnit::even(page_tokens),
            Self::Cluster { run } => ZoneUnit { sinks: page_tokens, context: run },
        }
    }
}

impl fmt::Display for PartitionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chunk { tokens } => write!(f, "chunks of {tokens} tokens"),
            Self::Token => f.write_str("single tokens"),
            Self::Cluster { run } => write!(f, "clusters of {run} tokens at a time"),
        }
    }
}

/// A page that a selection needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SelectedPage {
    /// The page key.
    pub key: u32,
    /// Valid tokens, from the page's start; fewer than a page's only on a cluster's last page.
    pub tokens: u32,
}

/// From partition ids to page keys, alike in every row. Of clusters each page is a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartitionMap {
    /// Partition `c` is pages `c * pages .. (c + 1) * pages`.
    Chunk {
        /// Pages of a partition.
        pages: u32,
        /// Tokens of a page.
        page_tokens: u32,
    },
    /// Token `t` lies on page `t / page_tokens`.
    Token {
        /// Tokens of a page.
        page_tokens: u32,
    },
}

impl PartitionMap {
    /// The map of a row whose partitions are of `kind`; `method` names the asker in errors.
    ///
    /// # Errors
    /// [`Error::PageSizeDoesNotDivide`] if a chunk, or a run that becomes clusters, is not a whole number of pages.
    pub fn new(kind: PartitionKind, page_tokens: usize, method: &str) -> Result<Self> {
        let page = page_tokens as u32;
        let whole = |tokens: usize| {
            if tokens > 0 && tokens.is_multiple_of(page_tokens) {
                return Ok(());
            }
            let (method, partition_tokens) = (method.to_owned(), tokens);
            Err(Error::PageSizeDoesNotDivide { method, page_tokens, partition_tokens })
        };
        Ok(match kind {
            PartitionKind::Chunk { tokens } => {
                whole(tokens)?;
                Self::Chunk { pages: (tokens / page_tokens) as u32, page_tokens: page }
            }
            PartitionKind::Token => Self::Token { page_tokens: page },
            PartitionKind::Cluster { run } => {
                whole(run)?;
                Self::Chunk { pages: 1, page_tokens: page }
            }
        })
    }

    /// The most pages that `partitions` partitions can touch.
    pub fn max_pages(&self, partitions: usize) -> usize {
        match self {
            Self::Chunk { pages, .. } => partitions * *pages as usize,
            Self::Token { .. } => partitions,
        }
    }

    /// Appends the pages of partitions `ids`, which ascend, to `pages`: keys ascend, each occurs once.
    pub fn expand(&self, ids: &[u32], pages: &mut Vec<SelectedPage>) {
        debug_assert!(ids.is_sorted_by(|a, b| a < b), "partition ids must ascend and be unique");
        match self {
            Self::Chunk { pages: count, page_tokens } => {
                for id in ids {
                    let keys = id * count..(id + 1) * count;
                    pages.extend(keys.map(|key| SelectedPage { key, tokens: *page_tokens }));
                }
            }
            Self::Token { page_tokens } => {
                for id in ids {
                    let page = SelectedPage { key: id / page_tokens, tokens: *page_tokens };
                    if pages.last() != Some(&page) {
                        pages.push(page);
                    }
                }
            }
        }
    }
}

//! What a method selects, and the pages that a selection needs.

use std::fmt;

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
    /// Groups of tokens of any size, stored one after the other in an order of their own, as clustering
    /// methods make them.
    Cluster,
}

impl PartitionKind {
    /// Tokens of one partition where all are of one size.
    pub fn tokens(self) -> Option<usize> {
        match self {
            Self::Chunk { tokens } => Some(tokens),
            Self::Token => Some(1),
            Self::Cluster => None,
        }
    }

    /// The granularity, in tokens, at which context leaves the steady zone: no partition and no page lies
    /// across the border.
    pub fn zone_unit(self, page_tokens: usize) -> usize {
        match self {
            Self::Chunk { tokens } => tokens,
            Self::Token | Self::Cluster => page_tokens,
        }
    }
}

impl fmt::Display for PartitionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chunk { tokens } => write!(f, "chunks of {tokens} tokens"),
            Self::Token => f.write_str("single tokens"),
            Self::Cluster => f.write_str("clusters"),
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

/// From partition ids to page keys. Chunks and tokens expand alike in every row; clusters differ from row to
/// row, so backends that store them will hold one map a row.
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
    /// Clusters, through their offsets.
    Cluster(ClusterTable),
}

impl PartitionMap {
    /// The map of a row whose partitions are of `kind`; `method` names the asker in errors.
    ///
    /// # Errors
    /// [`Error::PageSizeDoesNotDivide`] if a chunk is not a whole number of pages.
    pub fn new(kind: PartitionKind, page_tokens: usize, method: &str) -> Result<Self> {
        let page = page_tokens as u32;
        Ok(match kind {
            PartitionKind::Chunk { tokens } => {
                if tokens == 0 || !tokens.is_multiple_of(page_tokens) {
                    return Err(Error::PageSizeDoesNotDivide {
                        method: method.to_owned(),
                        page_tokens,
                        partition_tokens: tokens,
                    });
                }
                Self::Chunk { pages: (tokens / page_tokens) as u32, page_tokens: page }
            }
            PartitionKind::Token => Self::Token { page_tokens: page },
            PartitionKind::Cluster => Self::Cluster(ClusterTable::new(page_tokens)),
        })
    }

    /// The most pages that `partitions` partitions of one size can touch, or `None` for clusters, whose
    /// sizes vary.
    pub fn max_pages(&self, partitions: usize) -> Option<usize> {
        match self {
            Self::Chunk { pages, .. } => Some(partitions * *pages as usize),
            Self::Token { .. } => Some(partitions),
            Self::Cluster(_) => None,
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
            Self::Cluster(table) => ids.iter().for_each(|id| pages.extend(table.pages(*id))),
        }
    }
}

/// Where one cluster lies among its row's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterRun {
    /// The page key of the first page.
    pub first_key: u32,
    /// Pages of the cluster.
    pub pages: u32,
    /// Valid tokens of the last page, at least 1; 0 if there are no pages.
    pub last_tokens: u32,
}

/// The offset table of one row's clusters. Each cluster starts on a page of its own, so a page holds tokens of one
/// cluster only.
///
/// Two numbers a cluster, 8 bytes, as a kernel would read them; pages and the last page's tokens follow from the
/// tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterTable {
    page_tokens: u32,
    /// First page key of each cluster: `[clusters]`.
    first_key: Vec<u32>,
    /// Tokens of each cluster: `[clusters]`.
    tokens: Vec<u32>,
}

impl ClusterTable {
    /// An empty table.
    pub fn new(page_tokens: usize) -> Self {
        Self { page_tokens: page_tokens as u32, first_key: Vec::new(), tokens: Vec::new() }
    }

    /// Adds a cluster of `tokens` tokens after the others and returns its id. An empty cluster has an id
    /// and no pages.
    pub fn push(&mut self, tokens: u32) -> u32 {
        self.first_key.push(self.total_pages());
        self.tokens.push(tokens);
        self.tokens.len() as u32 - 1
    }

    /// Clusters of the row.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no clusters.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Pages of all clusters together, padding included.
    pub fn total_pages(&self) -> u32 {
        self.len().checked_sub(1).map_or(0, |last| {
            let run = self.run(last as u32);
            run.first_key + run.pages
        })
    }

    /// Where cluster `id` lies.
    pub fn run(&self, id: u32) -> ClusterRun {
        let (first_key, tokens) = (self.first_key[id as usize], self.tokens[id as usize]);
        let pages = tokens.div_ceil(self.page_tokens);
        ClusterRun { first_key, pages, last_tokens: tokens - pages.saturating_sub(1) * self.page_tokens }
    }

    /// The pages of cluster `id`, ascending; the last one may be partly filled.
    pub fn pages(&self, id: u32) -> impl Iterator<Item = SelectedPage> + use<> {
        let (ClusterRun { first_key, pages, last_tokens }, full) = (self.run(id), self.page_tokens);
        (1..=pages).map(move |page| SelectedPage {
            key: first_key + page - 1,
            tokens: if page == pages { last_tokens } else { full },
        })
    }

    /// Bytes of the table.
    pub fn bytes(&self) -> usize {
        size_of_val(self.first_key.as_slice()) + size_of_val(self.tokens.as_slice())
    }
}

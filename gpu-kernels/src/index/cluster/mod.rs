//! Clusters of keys: segmented spherical k-means over a run of tokens of one request, in one layer (RetroInfer, arXiv 2505.02922, section 4.2).
//!
//! Keys are centred by their mean `m` over the run. They are not written anew: the product of a centred key `k - m` with a centroid `c` is `k c + bias`,
//! where `bias = -m c` belongs to the centroid, so keys are read as the model has them, unrounded.
//!
//! | launches | kernel | what |
//! |---|---|---|
//! | 1 | [`cluster_sums`] | sums of keys, of 512 tokens each |
//! | 1 | [`cluster_start`] | the mean; centroids of each span: keys at even distances |
//! | 9 | [`cluster_assign_128`] | each token's best centroid of its span |
//! | 9, in turn | [`cluster_update`] | centroids: directions of the members' mean |
//! | 1 | [`cluster_assign_128`] | each token's best centroid of all, and how many tokens each has |
//! | 1 | [`cluster_pages`] | where clusters' pages begin |
//! | 1 | [`cluster_list`] | the tokens of each page |
//! | 1 | [`cluster_means`] | of each page, which is a partition, mean key and mean value |
//! | 1 | [`cluster_store`] | keys and values in clusters' order as pages of the host |
//!
//! [`gather_run()`] fetches generated tokens' keys and values from where they are steady.
//!
//! Every sum of floats has one order, which tokens and clusters alone decide, so results are the same in all bits from run to run.

mod assign;
mod centroid;
mod gather_run;
mod list;
mod means;
mod members;
mod pages;
mod start;
mod store;
mod sums;
mod table;
mod update;

pub use assign::{cluster_assign_64, cluster_assign_128};
pub(crate) use centroid::{Channels, channels, f32_words, of_f32_words};
pub use gather_run::gather_run;
pub use list::cluster_list;
pub use means::cluster_means;
pub(crate) use members::of_groups;
pub use pages::cluster_pages;
pub use start::cluster_start;
pub use store::cluster_store;
pub use sums::cluster_sums;
pub(crate) use table::Table;
pub use update::cluster_update;

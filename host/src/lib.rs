//! SpinKV: sparse attention over hierarchical KV memory.
//!
//! The full KV cache of a request lives in host memory. The GPU keeps summaries, a small cache of pages
//! and compact tables, and each decode step fetches only the pages that it misses. An embedding engine
//! hands over queries, keys and values and gets attention outputs back; a sparse-attention method is
//! added by writing its Index and its Select ([`pipeline::Method`]).
//!
//! # Units
//!
//! | word | meaning |
//! |---|---|
//! | row | one (request, layer, KV head): the unit of residency; rows share nothing |
//! | partition | what a method selects, an id within a row |
//! | page | what memory moves and the cache evicts: `page_tokens` tokens of one row, K then V |
//! | page key | the number of a page within its row, `0..n` |
//! | slot | a place in a row's GPU cache; it holds one page |
//!
//! # Example
//!
//! One layer, one KV head, random-looking data, everything selected:
//!
//! ```
//! use std::sync::Arc;
//! use spinkv::algorithms::Dense;
//! use spinkv::backend::cpu::CpuBackend;
//! use spinkv::memory::{KvDtype, MemoryLimits, PageLayout};
//! use spinkv::pipeline::Pipeline;
//! use spinkv::{KvConfig, KvShape};
//!
//! let shape = KvShape::new(1, 1, 1, 8)?;
//! let layout = PageLayout::new(8, shape.head_dim, KvDtype::F32)?;
//! let config = KvConfig::new(shape, layout, Arc::new(Dense::default()))?;
//! let mut pipeline = Pipeline::new(CpuBackend::new(config, MemoryLimits::default()));
//!
//! let request = pipeline.admit(100)?; // room for 100 tokens
//! let prompt = vec![0.5; 20 * 8]; // [tokens, heads, head_dim]
//! let mut out = vec![0.0; 20 * 8];
//! pipeline.prefill(request, 0, 20, &prompt, &prompt)?.attend(20, &prompt, &mut out)?;
//!
//! let token = vec![0.25; 8];
//! let mut out = vec![0.0; 8];
//! pipeline.decode(0, &[request], &token, &token, &token, &mut out)?;
//! pipeline.release(request);
//! # Ok::<(), spinkv::Error>(())
//! ```
//!
//! # Layouts
//!
//! Activations are row-major: queries and outputs `[tokens, query_heads, head_dim]`, keys and values
//! `[tokens, kv_heads, head_dim]`; query head `h` reads KV head `h / group`. Keys carry their rotary
//! embedding already.

pub mod algorithms;
pub mod backend;
mod config;
mod error;
pub mod gates;
pub mod memory;
pub mod paging;
pub mod partition;
pub mod pipeline;
mod rotary;
mod shape;
mod shard;

pub use config::{KvConfig, RowsByReach};
pub use error::{Error, Result, nearest_name};
pub use rotary::Rotary;
pub use shape::KvShape;
pub use shard::Shard;

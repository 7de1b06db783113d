//! A shape, sequences and setups small enough that prompts of some dozens of tokens select and evict.

use std::sync::Arc;

use spinkv::algorithms::{Dense, LowRankKeys, Quest, RetroInfer, ShadowKv, StreamingLlm, TokenTopK};
use spinkv::memory::{MemoryLimits, MemoryUsage};
use spinkv::pipeline::{Budget, LowRank, Method, SteadyZone};
use spinkv::{KvShape, Rotary};

use crate::{Layers, Run, Sequence, Setup, Style};

/// A short window, so that little context is steady.
pub const STEADY: SteadyZone = SteadyZone { sinks: 4, window: 12 };

/// Selects 3 chunks.
pub const SPARSE: ShadowKv = ShadowKv { budget: Budget::Tokens(24), steady: STEADY, outliers: 0 };

/// 2 layers, 4 query heads, 2 KV heads, head width 16.
///
/// # Panics
/// Never.
pub fn shape() -> KvShape {
    KvShape::new(2, 4, 2, 16).expect("a valid shape")
}

/// A rotary embedding of heads of `head_dim`, of base 10,000.
pub fn rotary(head_dim: usize) -> Arc<Rotary> {
    let frequency = |i| 10_000_f32.powf(-2.0 * i as f32 / head_dim as f32);
    Arc::new(Rotary::new((0..head_dim / 2).map(frequency).collect(), 1.0))
}

/// `method` with its keys in low rank, for heads of `head_dim`.
pub fn low_rank(method: impl Method + 'static, rank: usize, head_dim: usize) -> LowRankKeys {
    LowRankKeys::new(Arc::new(method), LowRank { rank, rotary: rotary(head_dim) })
}

/// A random sequence of that shape.
pub fn sequence(tokens: usize, seed: u64) -> Sequence {
    Sequence::new(shape(), Style::Random, tokens, seed)
}

/// One setup for each kind of selection, each with another page size.
pub fn setups() -> Vec<Setup> {
    vec![
        Setup::new(shape(), 8, SPARSE),
        Setup::new(shape(), 2, SPARSE),
        Setup::new(shape(), 16, Dense { steady: STEADY }),
        Setup::new(shape(), 4, StreamingLlm { steady: STEADY }),
        Setup::new(shape(), 4, ShadowKv { outliers: 2, ..SPARSE }),
        Setup::new(shape(), 4, low_rank(ShadowKv { outliers: 2, ..SPARSE }, 10, 16)),
        Setup::new(shape(), 4, RetroInfer { update: 128, ..RetroInfer::new(Budget::Tokens(24), STEADY) }),
        Setup::new(shape(), 8, Quest::new(Budget::Tokens(32), STEADY)),
        Setup::new(shape(), 8, TokenTopK { budget: Budget::Tokens(16), steady: STEADY }),
    ]
}

/// What a request gives when it has the machine to itself: the prompt's outputs and those of all steps.
///
/// # Panics
/// If a call is refused.
pub fn alone(setup: &Setup, sequence: &Sequence, prompt: usize) -> (Layers, Vec<Layers>) {
    let mut run = Setup { limits: MemoryLimits::default(), ..setup.clone() }.start();
    let id = run.admit(sequence).expect("room for the request");
    let outputs = run.prompt(id, prompt, prompt).expect("a prompt");
    (outputs, run.generate(id, sequence.tokens - prompt))
}

/// Checks that nothing is held on either tier.
///
/// # Panics
/// If something is.
pub fn assert_all_returned(run: &Run) {
    assert_eq!(run.pipeline.usage(), MemoryUsage::default(), "a released request left something behind");
}

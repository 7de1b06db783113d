use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{HostArena, HostFormat, HostMemory, SLAB_PAGES, SlabId, Stamped};
use crate::{Error, KvConfig, Result};

/// Host pages of prompts, kept for later prompts that begin with the same tokens.
///
/// Its unit is a *block*: the tokens that a slab has room for, with one slab of each row. Keys and values depend on their token and on all
/// before it, so a block is known by the block before it and its own tokens. Both are compared in full: no collision of hashes can lead to
/// another's pages.
///
/// A block holds its slabs as a row does, by [reference](HostArena::retain), so a slab is free when neither a row nor a block nor a transfer
/// has it. Of blocks that go, the last of their chain go first, and of those the one that no prompt began with for the longest time; those
/// whose slabs a request has, too, only when there are no others, since that frees nothing.
///
/// A cache is of one model, one [page layout](crate::memory::PageLayout) and one arena.
#[derive(Debug)]
pub struct PrefixCache {
    block_tokens: usize,
    block_bytes: u64,
    most_blocks: usize,
    blocks: HashMap<BlockId, Block>,
    by_content: HashMap<Arc<Content>, BlockId>,
    /// Blocks that no other follows, by when they were last used.
    leaves: BTreeSet<(u64, BlockId)>,
    next_id: BlockId,
    /// Prompts that were looked up or kept.
    clock: u64,
    usage: PrefixUsage,
}

/// Never used twice.
type BlockId = u64;

#[derive(Debug, PartialEq, Eq, Hash)]
struct Content {
    before: Option<BlockId>,
    tokens: Box<[u32]>,
}

#[derive(Debug)]
struct Block {
    content: Arc<Content>,
    /// `[layers, kv_heads]`.
    slabs: Box<[Stamped<SlabId>]>,
    /// Blocks that follow it.
    followers: usize,
    used: u64,
}

/// What a [`PrefixCache`] holds, and what it did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixUsage {
    /// Blocks that are kept.
    pub blocks: usize,
    /// Bytes of their slabs, those that requests have as well included.
    pub bytes: u64,
    /// Prompts that were looked up.
    pub lookups: u64,
    /// Tokens of those prompts.
    pub prompt_tokens: u64,
    /// Those of them whose pages were there.
    pub cached_tokens: u64,
    /// Blocks that were evicted.
    pub evicted_blocks: u64,
}

/// The beginning of a prompt whose pages are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedPrefix {
    /// Its tokens: whole blocks.
    pub tokens: usize,
    /// The slabs of each block, `[blocks][layers * kv_heads]`, each retained once.
    pub slabs: Vec<Vec<SlabId>>,
}

impl PrefixCache {
    /// A cache without blocks for slabs of at most `limit_bytes` bytes, or of as many as the arena has room for.
    ///
    /// # Errors
    /// [`Error::PrefixesUnsupported`] where host pages are not what a prompt's attention reads: they are
    /// [clusters'](KvConfig::clusters), values alone, or coded.
    pub fn new(config: &KvConfig, limit_bytes: Option<u64>) -> Result<Self> {
        let host = config.host_layout();
        let reason = match host.format() {
            _ if config.clusters() => {
                Some("their host pages are clusters', in no order of tokens".to_owned())
            }
            HostFormat::Values => Some("the host has their values alone".to_owned()),
            HostFormat::Coded(_) => Some(format!("their host pages are rounded to {}", host.format())),
            HostFormat::Full => None,
        };
        if let Some(reason) = reason {
            return Err(Error::PrefixesUnsupported { method: config.method().name().to_owned(), reason });
        }
        let block_bytes = config.shape().rows() as u64 * host.slab_bytes();
        Ok(Self {
            block_tokens: SLAB_PAGES * config.layout().page_tokens(),
            block_bytes,
            most_blocks: limit_bytes.map_or(usize::MAX, |limit| (limit / block_bytes) as usize),
            blocks: HashMap::new(),
            by_content: HashMap::new(),
            leaves: BTreeSet::new(),
            next_id: 0,
            clock: 0,
            usage: PrefixUsage::default(),
        })
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// What is kept, and what happened.
    pub fn usage(&self) -> PrefixUsage {
        let blocks = self.blocks.len();
        PrefixUsage { blocks, bytes: blocks as u64 * self.block_bytes, ..self.usage }
    }

    /// The most blocks that `prompt` begins with and that are together a multiple of `unit` tokens. At least one token of the prompt is
    /// left over, since its last query is always wanted. Their slabs are retained for the caller, once each.
    ///
    /// # Panics
    /// If `unit` is 0.
    pub fn share<M: HostMemory>(
        &mut self,
        prompt: &[u32],
        unit: usize,
        arena: &mut HostArena<M>,
    ) -> SharedPrefix {
        let mut chain = Vec::new();
        let usable = prompt.len().saturating_sub(1) / self.block_tokens;
        for tokens in prompt.chunks_exact(self.block_tokens).take(usable) {
            match self.find(chain.last().copied(), tokens) {
                Some(id) => chain.push(id),
                None => break,
            }
        }
        while !(chain.len() * self.block_tokens).is_multiple_of(unit) {
            chain.pop();
        }
        self.clock += 1;
        chain.iter().for_each(|id| self.touch(*id));
        let slabs = chain.iter().map(|id| retained(&self.blocks[id].slabs, arena)).collect();
        let tokens = chain.len() * self.block_tokens;
        self.usage.lookups += 1;
        self.usage.prompt_tokens += prompt.len() as u64;
        self.usage.cached_tokens += tokens as u64;
        SharedPrefix { tokens, slabs }
    }

    /// Keeps the whole blocks of `tokens`, the beginning of a prompt whose pages are complete on the host: of those that are not there yet
    /// the slabs, `slabs` of a block's number `[layers * kv_heads]`, are retained. What is above the limit then goes.
    pub fn keep<M: HostMemory>(
        &mut self,
        tokens: &[u32],
        mut slabs: impl FnMut(usize) -> Vec<SlabId>,
        arena: &mut HostArena<M>,
    ) {
        self.clock += 1;
        let mut before = None;
        for (number, tokens) in tokens.chunks_exact(self.block_tokens).enumerate() {
            let id = match self.find(before, tokens) {
                Some(id) => id,
                None => self.add(Content { before, tokens: tokens.into() }, &slabs(number), arena),
            };
            self.touch(id);
            before = Some(id);
        }
        while self.blocks.len() > self.most_blocks {
            self.evict(arena);
        }
    }

    /// Lets go of a block; false if there is none.
    ///
    /// A caller that is short of slabs calls it until it has them: what no request has then comes free, however blocks depend on each
    /// other, at the latest with the last block.
    pub fn evict<M: HostMemory>(&mut self, arena: &mut HostArena<M>) -> bool {
        let unused = |(_, id): &&(u64, BlockId)| {
            self.blocks[id].slabs.iter().all(|slab| arena.references(slab.id) == 1)
        };
        let Some(&leaf) = self.leaves.iter().find(unused).or_else(|| self.leaves.first()) else {
            return false;
        };
        self.leaves.remove(&leaf);
        let block = self.blocks.remove(&leaf.1).expect("a leaf is a block");
        self.by_content.remove(&block.content);
        for slab in &block.slabs {
            assert!(arena.is_current(*slab), "{:?} was used again under a block", slab.id);
            arena.release(slab.id);
        }
        if let Some(before) = block.content.before {
            let parent = self.blocks.get_mut(&before).expect("blocks go after those that follow them");
            parent.followers -= 1;
            if parent.followers == 0 {
                self.leaves.insert((parent.used, before));
            }
        }
        self.usage.evicted_blocks += 1;
        true
    }

    /// Takes slabs as [`HostArena::take`] does, and evicts blocks until they are there.
    ///
    /// # Errors
    /// As for [`HostArena::take`], once no block is left.
    pub fn take_slabs<M: HostMemory>(
        cache: Option<&mut Self>,
        layer: usize,
        count: usize,
        arena: &mut HostArena<M>,
    ) -> Result<Vec<SlabId>> {
        let Some(cache) = cache else { return arena.take(layer, count) };
        loop {
            match arena.take(layer, count) {
                Err(Error::OutOfHostMemory { .. } | Error::AllocationFailed { .. }) if cache.evict(arena) => {
                }
                outcome => return outcome,
            }
        }
    }

    fn find(&self, before: Option<BlockId>, tokens: &[u32]) -> Option<BlockId> {
        self.by_content.get(&Content { before, tokens: tokens.into() }).copied()
    }

    fn add<M: HostMemory>(
        &mut self,
        content: Content,
        slabs: &[SlabId],
        arena: &mut HostArena<M>,
    ) -> BlockId {
        let id = self.next_id;
        self.next_id += 1;
        if let Some(before) = content.before {
            let parent = self.blocks.get_mut(&before).expect("the block before is there");
            parent.followers += 1;
            self.leaves.remove(&(parent.used, before));
        }
        slabs.iter().for_each(|slab| arena.retain(*slab));
        let (content, slabs) = (Arc::new(content), slabs.iter().map(|slab| arena.stamp(*slab)).collect());
        self.by_content.insert(Arc::clone(&content), id);
        self.blocks.insert(id, Block { content, slabs, followers: 0, used: self.clock });
        self.leaves.insert((self.clock, id));
        id
    }

    fn touch(&mut self, id: BlockId) {
        let block = self.blocks.get_mut(&id).expect("a block that was found");
        let used = std::mem::replace(&mut block.used, self.clock);
        if self.leaves.remove(&(used, id)) {
            self.leaves.insert((self.clock, id));
        }
    }
}

fn retained<M: HostMemory>(slabs: &[Stamped<SlabId>], arena: &mut HostArena<M>) -> Vec<SlabId> {
    let retain = |slab: &Stamped<SlabId>| {
        assert!(arena.is_current(*slab), "{:?} was used again under a block", slab.id);
        arena.retain(slab.id);
        slab.id
    };
    slabs.iter().map(retain).collect()
}

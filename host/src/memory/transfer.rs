use super::{HostArena, HostMemory, HostPage, PagePool, PhysicalPage, SlabId, Stamped, Word};
use crate::pipeline::RequestId;

/// A row of a request: `layer * kv_heads + kv_head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId {
    /// The request.
    pub request: RequestId,
    /// The row within it.
    pub row: u32,
}

/// Which way pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Full pages, to their host pages: they are published when the transfer is complete.
    ToHost,
    /// Missing pages, to their slots: they may be read when the transfer is complete.
    ToGpu,
}

/// Pages of one row that move together. Until it is complete no place that it touches is used for anything else,
/// even if the request ends: see [`Transfers`].
#[derive(Debug)]
pub struct Transfer {
    row: RowId,
    direction: Direction,
    moves: Vec<PageMove>,
    /// Pages that come from no GPU page: those in the middle of a prompt.
    staged: Vec<Word>,
}

#[derive(Debug)]
struct PageMove {
    key: u32,
    /// `None` for the next of the staged pages.
    page: Option<PhysicalPage>,
    host: HostPage,
    /// What is held until the transfer is complete.
    held_page: Option<Stamped<PhysicalPage>>,
    held_slab: Option<Stamped<SlabId>>,
}

impl Transfer {
    /// A transfer of no page yet.
    pub fn new(row: RowId, direction: Direction) -> Self {
        Self { row, direction, moves: Vec::new(), staged: Vec::new() }
    }

    /// Adds page `key`, between its GPU page and its host page.
    pub fn add(&mut self, key: u32, page: PhysicalPage, host: HostPage) {
        self.moves.push(PageMove { key, page: Some(page), host, held_page: None, held_slab: None });
    }

    /// Adds page `key`, whose bytes are `words`, to the host.
    pub fn add_staged(&mut self, key: u32, words: &[Word], host: HostPage) {
        self.staged.extend_from_slice(words);
        self.moves.push(PageMove { key, page: None, host, held_page: None, held_slab: None });
    }

    /// The row.
    pub fn row(&self) -> RowId {
        self.row
    }

    /// Which way.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The page keys, in the order in which they were added.
    pub fn keys(&self) -> impl Iterator<Item = u32> {
        self.moves.iter().map(|one| one.key)
    }

    /// The slab of each page's host page, in the same order.
    pub fn slabs(&self) -> impl Iterator<Item = SlabId> {
        self.moves.iter().map(|one| one.host.slab)
    }

    /// Pages of the transfer.
    pub fn len(&self) -> usize {
        self.moves.len()
    }

    /// Whether it has no pages.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }

    /// Whether it touches a GPU page.
    pub fn touches(&self, page: PhysicalPage) -> bool {
        self.moves.iter().any(|one| one.page == Some(page))
    }

    fn hold<M: HostMemory>(&mut self, pool: &mut PagePool, arena: &mut HostArena<M>) {
        for one in &mut self.moves {
            one.held_page = one.page.map(|page| pool.hold(page));
            arena.retain(one.host.slab);
            one.held_slab = Some(arena.stamp(one.host.slab));
        }
    }

    fn copy<M: HostMemory>(&self, pool: &mut PagePool, arena: &mut HostArena<M>) {
        let mut staged = self.staged.as_slice();
        for one in &self.moves {
            match (self.direction, one.page) {
                (Direction::ToHost, Some(page)) => arena.store(one.host, pool.page(page)),
                (Direction::ToHost, None) => {
                    let (words, rest) = staged.split_at(arena.layout().page().page_words());
                    arena.store(one.host, words);
                    staged = rest;
                }
                (Direction::ToGpu, Some(page)) => arena.load(one.host, pool.page_mut(page)),
                (Direction::ToGpu, None) => unreachable!("staged pages go to the host"),
            }
        }
    }

    fn let_go<M: HostMemory>(&mut self, pool: &mut PagePool, arena: &mut HostArena<M>) {
        for one in &mut self.moves {
            if let Some(page) = one.held_page.take() {
                pool.let_go(page);
            }
            if let Some(slab) = one.held_slab.take() {
                assert!(arena.is_current(slab), "{:?} was used again under a transfer", slab.id);
                arena.release(slab.id);
            }
        }
    }
}

/// The transfers under way.
///
/// A transfer holds its GPU pages ([`PagePool::hold`]) and its slabs ([`HostArena::retain`]) from its start to its
/// completion. So a request can end at any time: what its transfers touch becomes free when they are done.
///
/// On the CPU a transfer is complete at once, unless [`late`](Self::late): then its bytes move when somebody waits
/// for it, in random order, as a GPU's copy engines may have it at the worst.
#[derive(Debug, Default)]
pub struct Transfers {
    late: Option<Shuffle>,
    under_way: Vec<Transfer>,
}

impl Transfers {
    /// Transfers that are complete only when somebody waits for them, in an order drawn from `seed`. For tests.
    pub fn late(seed: u64) -> Self {
        Self { late: Some(Shuffle(seed)), under_way: Vec::new() }
    }

    /// Starts a transfer. It is handed back if it is complete already, for its row to hear of.
    pub fn start<M: HostMemory>(
        &mut self,
        mut transfer: Transfer,
        pool: &mut PagePool,
        arena: &mut HostArena<M>,
    ) -> Option<Transfer> {
        if self.late.is_none() || transfer.is_empty() {
            transfer.copy(pool, arena);
            return Some(transfer);
        }
        transfer.hold(pool, arena);
        self.under_way.push(transfer);
        None
    }

    /// Waits for the transfers that `which` names and returns them, for their rows to hear of.
    pub fn wait<M: HostMemory>(
        &mut self,
        which: impl Fn(&Transfer) -> bool,
        pool: &mut PagePool,
        arena: &mut HostArena<M>,
    ) -> Vec<Transfer> {
        if self.under_way.is_empty() {
            return Vec::new();
        }
        let (mut done, rest): (Vec<_>, Vec<_>) = self.under_way.drain(..).partition(which);
        self.under_way = rest;
        if let Some(shuffle) = &mut self.late {
            shuffle.apply(&mut done);
        }
        for transfer in &mut done {
            transfer.copy(pool, arena);
            transfer.let_go(pool, arena);
        }
        done
    }

    /// Completes up to `count` transfers, whichever, and returns them.
    pub fn complete<M: HostMemory>(
        &mut self,
        count: usize,
        pool: &mut PagePool,
        arena: &mut HostArena<M>,
    ) -> Vec<Transfer> {
        if let Some(shuffle) = &mut self.late {
            shuffle.apply(&mut self.under_way);
        }
        let kept = self.under_way.split_off(count.min(self.under_way.len()));
        let done = self.wait(|_| true, pool, arena);
        self.under_way = kept;
        done
    }

    /// The transfers under way.
    pub fn under_way(&self) -> &[Transfer] {
        &self.under_way
    }
}

/// A random order, of a generator of its own so that the crate needs none.
#[derive(Debug)]
struct Shuffle(u64);

impl Shuffle {
    fn apply<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

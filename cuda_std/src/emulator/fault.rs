//! What a launch can be refused for, and what a kernel can do wrong.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::panic::Location;

/// A place in the grid or in a block: x, y, z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "three coordinates")]
pub struct Index {
    pub x: u32,
    pub y: u32,
    pub z: u32,
}

impl Index {
    pub(super) fn in_box(linear: u32, (x, y, _): (u32, u32, u32)) -> Self {
        Self { x: linear % x, y: linear / x % y, z: linear / x / y }
    }
}

impl From<(u32, u32, u32)> for Index {
    fn from((x, y, z): (u32, u32, u32)) -> Self {
        Self { x, y, z }
    }
}

impl Display for Index {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {}, {})", self.x, self.y, self.z)
    }
}

/// The first fault of a launch: what, by which thread, at which line of the kernel.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct Fault {
    /// The kernel's name; empty where none was entered.
    pub kernel: &'static str,
    /// The faulting thread's block.
    pub block: Index,
    /// The faulting thread's place in its block.
    pub thread: Index,
    /// The call in the kernel's source.
    pub location: &'static Location<'static>,
    /// What is wrong.
    pub kind: FaultKind,
}

impl Display for Fault {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let FaultKind::Launch(refused) = &self.kind {
            return write!(f, "{}: {refused}", self.location);
        }
        let kernel = if self.kernel.is_empty() { "a kernel" } else { self.kernel };
        write!(f, "{}: {kernel}, block {}, thread {}: {}", self.location, self.block, self.thread, self.kind)
    }
}

/// Where an element lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// A [`Buffer`](super::Buffer).
    Global,
    /// The block's shared memory.
    Shared,
}

impl Display for Space {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Global => "global",
            Self::Shared => "shared",
        })
    }
}

/// What a thread does to an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A plain load.
    Load,
    /// A plain store.
    Store,
    /// An atomic load.
    AtomicLoad,
    /// An atomic store.
    AtomicStore,
    /// An atomic read-modify-write.
    Atomic,
    /// The source of an asynchronous copy.
    CopySource,
    /// The destination of an asynchronous copy.
    CopyDestination,
    /// A side of a warpgroup's matrix product.
    Operand,
    /// Cutting a view, which touches no element.
    Slice,
}

impl Display for Access {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load => "load",
            Self::Store => "store",
            Self::AtomicLoad => "atomic load",
            Self::AtomicStore => "atomic store",
            Self::Atomic => "atomic",
            Self::CopySource => "source of an asynchronous copy",
            Self::CopyDestination => "destination of an asynchronous copy",
            Self::Operand => "side of a matrix product",
            Self::Slice => "slice",
        })
    }
}

/// The other party of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    /// Its block.
    pub block: Index,
    /// Its place in the block.
    pub thread: Index,
    /// What it did.
    pub access: Access,
    /// Where in the kernel's source.
    pub location: &'static Location<'static>,
}

impl Display for Other {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} by block {}, thread {} at {}", self.access, self.block, self.thread, self.location)
    }
}

/// A collective of a warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the functions of `warp`, `mma` and `wgmma`")]
pub enum Operation {
    SyncWarp,
    Shuffle,
    VoteAll,
    VoteAny,
    VoteBallot,
    MatchAny,
    MatchAll,
    ReduceAdd,
    ReduceMin,
    ReduceMax,
    ReduceAnd,
    ReduceOr,
    ReduceXor,
    Mma,
    Transpose,
    ProductFence,
    ProductGroup,
    ProductWait,
    LoadMatrices,
    LoadTransposed,
}

/// What a kernel did wrong. The texts name values and limits.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultKind {
    /// An index at or past the end of its view.
    #[error("{}", bounds(*space, *access, *index, *start, *len, *buffer_len))]
    OutOfBounds {
        /// Where.
        space: Space,
        /// To do what. For a [`Access::Slice`], `index` is the end that lies outside.
        access: Access,
        /// The index, within the view.
        index: usize,
        /// The view's first element, within its buffer or shared array.
        start: usize,
        /// The view's length: of a row, of a slice, or of all.
        len: usize,
        /// The length of the whole buffer or shared array.
        buffer_len: usize,
    },
    /// A shared array that the launch has no room for, or that starts between elements.
    #[error(
        "a shared array of {bytes} bytes at byte {offset} does not fit the launch's {launched} bytes of shared memory, or is misaligned"
    )]
    SharedLayout {
        /// Where it starts.
        offset: usize,
        /// Its size.
        bytes: usize,
        /// `Launch::shared_bytes`.
        launched: usize,
    },
    /// A view outlived its buffer.
    #[error("the buffer of this view has been dropped")]
    FreedBuffer,
    /// A load of shared memory that the block has not written.
    #[error("{access} of shared element {index} (byte {byte}), which this block has not written")]
    UninitialisedShared {
        /// To do what.
        access: Access,
        /// The element, within its array.
        index: usize,
        /// Its first byte, within the block's shared memory.
        byte: usize,
    },
    /// A load of an element that nothing has written since [`Buffer::poisoned`](super::Buffer::poisoned).
    #[error("{access} of global element {index}, which was never written")]
    UninitialisedGlobal {
        /// To do what.
        access: Access,
        /// The element, within its buffer.
        index: usize,
    },
    /// Two threads of the block at one byte, at least one writing, no barrier between them.
    #[error(
        "{access} of shared element {index} (byte {byte}) races with the {other}: nothing orders the two"
    )]
    SharedRace {
        /// To do what.
        access: Access,
        /// The element, within its array.
        index: usize,
        /// Its first byte, within the block's shared memory.
        byte: usize,
        /// The one before.
        other: Other,
    },
    /// Two unordered accesses to an element, where the later writes.
    #[error("{access} of global element {index} races with the {other}: nothing orders the two")]
    GlobalWriteRace {
        /// To do what.
        access: Access,
        /// The element, within its buffer.
        index: usize,
        /// The one before.
        other: Other,
    },
    /// A load of what another thread wrote in the same launch, unordered.
    #[error("{access} of global element {index} races with the {other}: nothing orders the two")]
    GlobalReadRace {
        /// To do what.
        access: Access,
        /// The element, within its buffer.
        index: usize,
        /// The one before.
        other: Other,
    },
    /// An element both loaded through the read-only path and written, in one launch.
    #[error("{access} of global element {index}, which this launch {} at {other}", if access_writes(*access) { "loads through the read-only path" } else { "writes" })]
    ReadOnlyWritten {
        /// To do what.
        access: Access,
        /// The element, within its buffer.
        index: usize,
        /// The one before.
        other: &'static Location<'static>,
    },
    /// An access to the destination of an asynchronous copy, or a store to its source, that does not wait for it.
    #[error("{access} of element {index} while the {other} {}", if *waited { "was waited for, but no barrier orders that wait with this access" } else { "has not been waited for" })]
    PendingCopy {
        /// To do what.
        access: Access,
        /// The element, within its array or buffer.
        index: usize,
        /// The copying thread has waited, but nothing orders this thread after it.
        waited: bool,
        /// The copy.
        other: Other,
    },
    /// A thread returned before it waited for its asynchronous copies.
    #[error("the thread returns with {copies} asynchronous copies that it has not waited for")]
    CopyNotAwaited {
        /// How many.
        copies: usize,
    },
    /// A bulk copy that is not whole units of 16 bytes.
    #[error(
        "a bulk copy of {bytes} bytes, at byte {global_byte} of its buffer and byte {shared_byte} of shared memory: all three must be multiples of 16, and the first not 0"
    )]
    BulkAlignment {
        /// Its size.
        bytes: usize,
        /// Where its global side starts in its buffer.
        global_byte: usize,
        /// Where its shared side starts.
        shared_byte: usize,
    },
    /// Bulk copies of a phase that move other bytes than its arrivals said.
    #[error("bulk copies of {copied} bytes in a phase of a barrier that expects {expected}")]
    BulkBytes {
        /// The arrivals' word.
        expected: i64,
        /// What was started.
        copied: i64,
    },
    /// A bulk copy of or over what was stored, or onto a barrier that was initialised, or a warpgroup's product of what was stored, without
    /// a proxy fence since.
    #[error(
        "a bulk copy or a matrix product meets byte {byte} of shared memory, which was stored to without a proxy fence since"
    )]
    ProxyFence {
        /// The byte.
        byte: usize,
    },
    /// A barrier in shared memory that is none.
    #[error(
        "byte {byte} of shared memory is used as a barrier, and this block has not initialised one there"
    )]
    BarrierUninitialised {
        /// Its first byte.
        byte: usize,
    },
    /// A second initialisation.
    #[error("byte {byte} of shared memory already is a barrier")]
    BarrierInitialised {
        /// Its first byte.
        byte: usize,
    },
    /// One arrival too many in a phase.
    #[error("an arrival at a barrier whose phase has had all of its {arrivals}, and still waits for bytes")]
    BarrierOverrun {
        /// Arrivals of a phase.
        arrivals: u32,
    },
    /// More arrivals or bytes than a barrier counts.
    #[error("a barrier with {value} {what}; allowed: 1 to {limit}")]
    BarrierLimit {
        /// What is too large.
        what: &'static str,
        /// How large.
        value: i64,
        /// The most.
        limit: i64,
    },
    /// A wait for a phase whose parity stands for another one.
    #[error(
        "a wait for phase {phase} of a barrier of which {ended} have ended: by its parity that is taken for another phase"
    )]
    BarrierPhase {
        /// The one asked for.
        phase: u32,
        /// How many have ended.
        ended: u32,
    },
    /// Threads of one block at different barriers.
    #[error("the thread reaches this barrier while block {}, thread {} waits at the one at {}", other.block, other.thread, other.location)]
    BarrierMismatch {
        /// The first that waits (its access has no meaning).
        other: Other,
    },
    /// Threads wait at a barrier that others cannot reach.
    #[error("{waiting} threads of the block wait at this barrier, which thread {} cannot reach: it waits at {}", other.thread, other.location)]
    BarrierDivergence {
        /// How many wait.
        waiting: u32,
        /// One that is elsewhere (its access has no meaning).
        other: Other,
    },
    /// A collective by a lane that its mask does not name.
    #[error("lane {lane} is not in its own mask {mask:#010x}")]
    LaneNotInMask {
        /// The mask.
        mask: u32,
        /// The lane.
        lane: u32,
    },
    /// A collective whose mask names lanes that will not come: returned, never started, or waiting elsewhere.
    #[error("a collective over lanes {mask:#010x} waits for lanes {:#010x}, which do not come", mask & !arrived)]
    MissingLanes {
        /// The lanes that should take part.
        mask: u32,
        /// Those that are here.
        arrived: u32,
    },
    /// Lanes that wait for each other in different collectives.
    #[error("{operation:?} over lanes {mask:#010x}, while thread {} waits for this lane in {other_operation:?} over lanes {other_mask:#010x} at {}", other.thread, other.location)]
    CollectiveMismatch {
        /// The collective of this lane.
        operation: Operation,
        /// Its mask.
        mask: u32,
        /// The collective of the other.
        other_operation: Operation,
        /// Its mask.
        other_mask: u32,
        /// A lane that waits there (its access has no meaning).
        other: Other,
    },
    /// A matrix whose blocks of columns do not start where the swizzle does.
    #[error(
        "a matrix at byte {byte} of shared memory, its blocks of 64 columns {stride} bytes apart: both must be multiples of 1024"
    )]
    MatrixAlignment {
        /// Where it starts.
        byte: usize,
        /// From one block to the next.
        stride: usize,
    },
    /// Threads of a warpgroup at different products, or with different sides.
    #[error("the thread reaches this matrix product while thread {} of its warpgroup waits at {}, or brings another side", other.thread, other.location)]
    ProductMismatch {
        /// One that waits (its access has no meaning).
        other: Other,
    },
    /// A product of a warpgroup some of whose threads will not come: returned, never started, or waiting elsewhere.
    #[error("a matrix product has {arrived} of its warpgroup's 128 threads, and the others do not come")]
    MissingThreads {
        /// Those that are here.
        arrived: u32,
    },
    /// A product by a thread that has not passed a `wgmma::fence`, or has waited since.
    #[error("a matrix product without a wgmma::fence since the thread could touch its registers")]
    ProductFence,
    /// Sums that were changed, or are to be given back, while their product is under way.
    #[error("sums of the matrix product at {started} are {}", if *changed { "changed before they are given back" } else { "waited for, but not with its group" })]
    ProductPending {
        /// The product.
        started: &'static Location<'static>,
        /// Otherwise the wait does not cover it.
        changed: bool,
    },
    /// A thread returned before sums were given back.
    #[error("the thread returns with {products} matrix products whose sums it has not got back")]
    ProductNotAwaited {
        /// How many.
        products: usize,
    },
    /// An order that an atomic load or store cannot have.
    #[error("an {access} cannot be {order}")]
    OrderRefused {
        /// The load or store.
        access: Access,
        /// The order's name.
        order: &'static str,
    },
    /// Threads run and run and nothing comes of it.
    #[error("no progress: {limit} {what}")]
    Livelock {
        /// The limit that was reached.
        limit: u64,
        /// What was counted.
        what: &'static str,
    },
    /// The kernel panicked; its text.
    #[error("panic: {message}")]
    Panic {
        /// The panic's text.
        message: String,
    },
    /// The launch was refused.
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

/// Why a launch was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A grid or a block with a zero.
    #[error("a grid of {grid} blocks of {block} threads is empty")]
    Empty {
        /// `Launch::grid`.
        grid: Index,
        /// `Launch::block`.
        block: Index,
    },
    /// A block above the hardware's limits.
    #[error("a block of {block} threads exceeds 1024 threads or (1024, 1024, 64)")]
    BlockTooLarge {
        /// `Launch::block`.
        block: Index,
    },
    /// A grid above the hardware's limits, or of more than 2^32 threads.
    #[error("a grid of {grid} blocks exceeds (2^31 - 1, 65535, 65535) or 2^32 threads")]
    GridTooLarge {
        /// `Launch::grid`.
        grid: Index,
    },
    /// More shared memory than a block can have.
    #[error("{bytes} bytes of shared memory exceed the {limit} that a block can have")]
    SharedTooLarge {
        /// `Launch::shared_bytes`.
        bytes: usize,
        /// The hardware's limit.
        limit: usize,
    },
    /// Stacks on which not even an empty kernel can run.
    #[error("stacks of {bytes} bytes are too small: a thread needs at least {limit}")]
    StackTooSmall {
        /// `Launch::stack_bytes`.
        bytes: usize,
        /// The least.
        limit: usize,
    },
    /// Stacks larger than any kernel needs.
    #[error("stacks of {bytes} bytes exceed the {limit} that a thread can have")]
    StackTooLarge {
        /// `Launch::stack_bytes`.
        bytes: usize,
        /// The most.
        limit: usize,
    },
    /// The system has no memory for all the stacks. Threads may have run before that showed.
    #[error(
        "the system refused a thread's stack of {bytes} bytes ({reason}): use smaller stacks or fewer resident blocks"
    )]
    StackRefused {
        /// `Launch::stack_bytes`.
        bytes: usize,
        /// What the system said.
        reason: io::ErrorKind,
    },
    /// A launch from within a kernel.
    #[error("a kernel cannot launch kernels")]
    Nested,
}

fn access_writes(access: Access) -> bool {
    !matches!(
        access,
        Access::Load | Access::AtomicLoad | Access::CopySource | Access::Operand | Access::Slice
    )
}

fn bounds(space: Space, access: Access, index: usize, start: usize, len: usize, buffer_len: usize) -> String {
    let whole = if space == Space::Global { "buffer" } else { "shared array" };
    let view = format!("{len} elements, {start}..{} of a {whole} of {buffer_len}", start.saturating_add(len));
    let inside = match access {
        Access::Slice => start.saturating_add(index) <= buffer_len,
        _ => start.saturating_add(index) < buffer_len,
    };
    let leaves = if inside { "its row but not its" } else { "its" };
    match access {
        Access::Slice => {
            format!("a slice to element {index} of a {space} view leaves {leaves} {whole} ({view})")
        }
        _ => format!("{access} of element {index} of a {space} view leaves {leaves} {whole} ({view})"),
    }
}

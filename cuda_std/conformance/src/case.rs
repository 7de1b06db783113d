//! The table.

use crate::{atomic, bulk, copy, math, mma, shared, thread, view, warp, wgmma};

/// One kernel, how it is launched, and what it tests.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The kernel's name in the PTX.
    pub name: &'static str,
    /// The functions that it is a test of, as `module::function` or `module::Type::function`. Where a function exists for
    /// several types that the PTX tells apart, they stand as in `view::Global<u8>::load` or `warp::warp_match_any<u64>`.
    pub covers: &'static [&'static str],
    /// What its PTX holds: what the functions' documentation promises.
    pub expects: &'static [&'static str],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks.
    pub grid: [u32; 3],
    /// Dynamic shared memory, in bytes.
    pub shared_bytes: u32,
    /// Input words of a thread. Threads are numbered along x, then y, then z, block after block, and rows follow each other.
    pub in_words: u32,
    /// Output words of a thread.
    pub out_words: u32,
    /// What decides in which modules it stands.
    pub needs: Needs,
    /// What the input is made of.
    pub domain: Domain,
    /// Runs it on the emulator.
    #[cfg(feature = "emulate")]
    pub kernel: crate::emulate::Kernel,
}

/// What a case needs of an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing new: it stands in the module of sm_80 alone, which all newer architectures run.
    Sm80,
    /// What came with Hopper: it stands in the modules of sm_90a and sm_100a.
    Sm90,
    /// What is Hopper's alone: it stands in the module of sm_90a.
    Sm90a,
}

impl Needs {
    /// The architectures in whose modules the case stands, of [`ARCHITECTURES`](crate::ARCHITECTURES).
    pub const fn architectures(self) -> &'static [&'static str] {
        match self {
            Self::Sm80 => &["sm_80"],
            Self::Sm90 => &["sm_100a", "sm_90a"],
            Self::Sm90a => &["sm_90a"],
        }
    }
}

/// What input words are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// Any bits, often those of numbers that are special as an integer or as an f32.
    Bits,
    /// f32 whose sums are exact in any order: integers from -1000 to 1000.
    SmallFloats,
    /// f32 whose sums of a few hundred are finite: zeroes of both signs, subnormals, and numbers up to 2^100.
    FiniteFloats,
    /// f32 of any kind, infinities included, without NaN.
    Floats,
}

impl Case {
    /// Threads of the launch.
    pub const fn threads(&self) -> u32 {
        let ([x, y, z], [u, v, w]) = (self.block, self.grid);
        x * y * z * u * v * w
    }

    /// Words of the input.
    pub const fn input_words(&self) -> usize {
        self.threads() as usize * self.in_words as usize
    }

    /// Words of the output.
    pub const fn output_words(&self) -> usize {
        self.threads() as usize * self.out_words as usize
    }
}

/// What a case has that does not say otherwise: two blocks of three warps.
pub(crate) const USUAL: Case = Case {
    name: "",
    covers: &[],
    expects: &[],
    block: [96, 1, 1],
    grid: [2, 1, 1],
    shared_bytes: 0,
    in_words: 0,
    out_words: 0,
    needs: Needs::Sm80,
    domain: Domain::Bits,
    #[cfg(feature = "emulate")]
    kernel: crate::emulate::Kernel::NONE,
};

/// The words of `bytes`.
pub(crate) const fn words(bytes: usize) -> u32 {
    assert!(bytes.is_multiple_of(4), "a row is whole words");
    (bytes / 4) as u32
}

/// The types that rows are made of.
pub(crate) mod types {
    /// As large as `cuda_std`'s, which a host build without the emulator does not have.
    #[cfg(not(feature = "emulate"))]
    #[allow(dead_code, reason = "only its size counts")]
    pub struct U32x4([u32; 4]);
    #[cfg(feature = "emulate")]
    pub use cuda_std::U32x4;
}

const TABLES: &[&[Case]] = &[
    thread::CASES,
    warp::shuffle::CASES,
    warp::collective::CASES,
    warp::combined::CASES,
    view::element::CASES,
    view::cut::CASES,
    view::cached::CASES,
    shared::CASES,
    atomic::rmw::CASES,
    atomic::access::CASES,
    atomic::contended::CASES,
    atomic::order::CASES,
    copy::CASES,
    bulk::CASES,
    math::CASES,
    mma::CASES,
    wgmma::CASES,
];

const COUNT: usize = {
    let (mut count, mut table) = (0, 0);
    while table < TABLES.len() {
        count += TABLES[table].len();
        table += 1;
    }
    count
};

static ALL: [Case; COUNT] = {
    let mut all = [USUAL; COUNT];
    let (mut at, mut table) = (0, 0);
    while table < TABLES.len() {
        let mut case = 0;
        while case < TABLES[table].len() {
            all[at] = TABLES[table][case];
            at += 1;
            case += 1;
        }
        table += 1;
    }
    all
};

/// Every case, by subject.
pub static CASES: &[Case] = &ALL;

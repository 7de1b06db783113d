//! Matrix products of a warpgroup.
//!
//! The thread that comes last works in the others' registers, as with [`mma`](super::mma). What a product makes is kept apart until a wait
//! gives it back; until then the sums are signalling NaNs that say which product's they are. Any arithmetic makes those quiet, which tells
//! that sums were changed while they were not the thread's.
//!
//! The reads of a product are marked as those of the thread that came last, until it has waited. Which one that is differs between
//! schedules, so a write that is ordered after the waits of some warps alone is found by some of them.

use std::collections::HashMap;

use super::bulk::UNIT;
use super::fault::{Access, FaultKind, Space};
use super::machine::{Machine, SharedView, Site, checked, suspend, with};
use super::order::{LANES, Tag};
use super::warp::same_place;
use crate::wgmma::{Columns, Left, Matrix, Right, Rows};

/// Threads of a warpgroup.
pub(crate) const THREADS: usize = 128;

/// Rows of a product, and the columns of its left side.
const ROWS: usize = 64;
const DEPTH: usize = 16;

/// Where the blocks of a matrix start.
const ALIGNMENT: usize = 1024;

/// Elements of a word of 16 bytes.
const PER_WORD: usize = 8;

/// 16 columns or rows of a matrix in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixSlice {
    words: SharedView,
    stride: usize,
    step: usize,
    by_rows: bool,
}

impl MatrixSlice {
    pub(crate) fn columns(words: SharedView, stride: usize, step: usize, site: Site) -> Self {
        Self::new(Self { words, stride, step, by_rows: false }, site)
    }

    pub(crate) fn rows(words: SharedView, stride: usize, step: usize, site: Site) -> Self {
        Self::new(Self { words, stride, step, by_rows: true }, site)
    }

    fn new(slice: Self, site: Site) -> Self {
        let (byte, stride) = (slice.words.base + UNIT * slice.words.start, UNIT * slice.stride);
        checked(|machine| {
            let aligned = byte.is_multiple_of(ALIGNMENT) && stride.is_multiple_of(ALIGNMENT);
            if !aligned {
                machine.raise(site, FaultKind::MatrixAlignment { byte, stride });
            }
            aligned.then_some(())
        });
        slice
    }

    /// The places of the words that a side with `len` rows or columns reads, each with the first of its elements as `[k, row or column]`.
    fn places(self, len: usize) -> impl Iterator<Item = (usize, [usize; 2])> {
        let Self { stride, step, by_rows, .. } = self;
        let words = if by_rows { len / PER_WORD } else { DEPTH / PER_WORD };
        let rows = if by_rows { DEPTH } else { len };
        (0..rows).flat_map(move |row| (0..words).map(move |word| (row, word))).map(move |(row, word)| {
            let in_matrix = if by_rows { (DEPTH * step + row, word) } else { (row, 2 * step + word) };
            let place = in_matrix.1 / 8 * stride + Matrix::place(in_matrix.0, in_matrix.1 % 8);
            (place, if by_rows { [row, PER_WORD * word] } else { [PER_WORD * word, row] })
        })
    }
}

/// What all threads of a warpgroup say of a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Product {
    /// Otherwise it is in registers.
    left: Option<MatrixSlice>,
    right: MatrixSlice,
    add: bool,
    columns: usize,
}

impl Product {
    pub fn new(left: Left, right: Right, add: bool, columns: usize) -> Self {
        let left = match left {
            Left::Shared(Columns(slice)) => Some(slice),
            Left::Registers(_) => None,
        };
        let (Right::Columns(Columns(right)) | Right::Rows(Rows(right))) = right;
        Self { left, right, add, columns }
    }
}

/// Who of a warpgroup has come to a product.
#[derive(Clone, Default)]
pub(crate) struct Warpgroup {
    /// What the first brought, and where.
    first: Option<(usize, Product, Site)>,
    /// Of those that wait, by thread: where their sums are, and what of the left side they hold.
    waiting: Vec<(usize, *mut [f32], [u32; 4])>,
}

/// A thread's products.
#[derive(Clone, Default)]
pub(crate) struct Products {
    /// It has passed a fence, and has not waited since.
    fenced: bool,
    /// Number of the group that `commit_group` will close, and of the first that may be under way.
    group: u64,
    first_under_way: u64,
    /// Whose sums have not been given back.
    kept: Vec<Kept>,
    newest: u32,
    /// Marks of shared memory that stand for the warpgroup: by product, and how often each byte is in them.
    reads: Vec<(u64, Vec<usize>)>,
    readers: HashMap<usize, u32>,
}

/// Sums that the thread does not have.
#[derive(Clone)]
struct Kept {
    number: u32,
    group: u64,
    sums: Vec<f32>,
    /// How many have been given back.
    given: usize,
    site: Site,
}

/// A signalling NaN: sum `index` of a product. Numbers of products start at 1 and come again after 2^15 of them.
#[derive(Clone, Copy)]
struct Token {
    number: u32,
    index: usize,
}

impl Token {
    const EXPONENT: u32 = 0x7f80_0000;
    const QUIET: u32 = 0x0040_0000;
    const INDEX_BITS: u32 = 7;

    fn value(self) -> f32 {
        f32::from_bits(Self::EXPONENT | self.number << Self::INDEX_BITS | self.index as u32)
    }

    /// The token that a value is, and whether it is still as it was made.
    fn of(value: f32) -> Option<(Self, bool)> {
        let bits = value.to_bits() & !(1 << 31);
        let payload = bits & (Self::QUIET - 1);
        let token = Self {
            number: payload >> Self::INDEX_BITS,
            index: payload as usize & ((1 << Self::INDEX_BITS) - 1),
        };
        (value.is_nan() && token.number > 0).then(|| (token, value.to_bits() == token.value().to_bits()))
    }
}

/// Waits for the warpgroup's threads; the last one multiplies.
pub(crate) fn start(product: Product, left: Left, sums: &mut [f32], site: Site) {
    let parts = match left {
        Left::Registers(parts) => parts,
        Left::Shared(_) => [0; 4],
    };
    if with(|machine| machine.arrive_at_product(product, parts, sums, site)) {
        suspend();
    }
}

impl Machine {
    /// Whether the running thread must wait for others.
    fn arrive_at_product(&mut self, product: Product, parts: [u32; 4], sums: &mut [f32], site: Site) -> bool {
        self.step();
        if self.inert {
            return true;
        }
        let (slot, thread) = (self.me.slot, self.me.thread);
        if !self.block().products[thread].fenced {
            self.raise(site, FaultKind::ProductFence);
            return true;
        }
        let warpgroup = &mut self.block().warpgroups[thread / THREADS];
        match warpgroup.first {
            Some((first, brought, there)) if brought != product || !same_place(there, site) => {
                let other = self.other(slot, first, there);
                self.raise(site, FaultKind::ProductMismatch { other });
                return true;
            }
            Some(_) => {}
            None => warpgroup.first = Some((thread, product, site)),
        }
        warpgroup.waiting.push((thread, sums, parts));
        if warpgroup.waiting.len() < THREADS {
            self.check_warpgroup(thread / THREADS);
            return true;
        }
        let Warpgroup { waiting, .. } = std::mem::take(warpgroup);
        // SAFETY: the threads are in `start`, which holds on to their sums.
        if unsafe { self.multiply(product, &waiting, site) }.is_none() {
            return true;
        }
        self.report.matrix_products += 1;
        waiting.iter().filter(|(other, ..)| *other != thread).for_each(|(other, ..)| self.wake(slot, *other));
        false
    }

    /// Raises a fault if a warpgroup's threads wait at a product for some that are no more, or never were.
    fn check_warpgroup(&mut self, number: usize) {
        let block = &self.blocks[self.me.slot];
        let warps = block.warps.iter().skip(number * (THREADS / LANES)).take(THREADS / LANES);
        let here: u32 = warps.map(|warp| (warp.exists & !warp.returned).count_ones()).sum();
        if (here as usize) < THREADS {
            self.raise_missing(self.me.slot, number);
        }
    }

    fn raise_missing(&mut self, slot: usize, number: usize) -> bool {
        let warpgroup = &self.blocks[slot].warpgroups[number];
        let Some((first, _, site)) = warpgroup.first else { return false };
        let (arrived, waiting) = (warpgroup.waiting.len() as u32, self.other(slot, first, site));
        self.raise_at(waiting.block, waiting.thread, site, FaultKind::MissingThreads { arrived });
        true
    }

    /// No thread can run, and no warp says why.
    pub fn explain_missing_products(&mut self) {
        let all = |slot: usize| (0..self.blocks[slot].warpgroups.len()).map(move |number| (slot, number));
        let all: Vec<(usize, usize)> = (0..self.blocks.len()).flat_map(all).collect();
        _ = all.into_iter().any(|(slot, number)| self.raise_missing(slot, number));
    }

    /// Reads both sides, and keeps the sums of each of `waiting` threads.
    ///
    /// # Safety
    /// Nothing else refers to their sums just now.
    unsafe fn multiply(
        &mut self,
        product: Product,
        waiting: &[(usize, *mut [f32], [u32; 4])],
        site: Site,
    ) -> Option<()> {
        let Product { left, right, add, columns } = product;
        let mut bytes = Vec::new();
        let mut a = match left {
            Some(slice) => self.read_side(slice, ROWS, &mut bytes, site)?,
            None => vec![vec![0.0; ROWS]; DEPTH],
        };
        let b = self.read_side(right, columns, &mut bytes, site)?;
        if left.is_none() {
            for &(thread, _, parts) in waiting {
                for (part, word) in parts.into_iter().enumerate() {
                    let (row, column) = (row_of(thread) + part % 2 * 8, thread % 4 * 2 + part / 2 * 8);
                    for half in 0..2 {
                        a[column + half][row] = f32::from_bits(word >> (16 * half) << 16);
                    }
                }
            }
        }
        for &(thread, sums, _) in waiting {
            // SAFETY: the caller's word.
            let sums = unsafe { &mut *sums };
            let place = |at: usize| (row_of(thread) + at / 2 % 2 * 8, at / 4 * 8 + thread % 4 * 2 + at % 2);
            let mut own = self.values_of(thread, sums)?;
            for (at, sum) in own.iter_mut().enumerate() {
                let (row, column) = place(at);
                let start = if add { *sum } else { 0.0 };
                *sum = (0..DEPTH).fold(start, |sum, k| sum + a[k][row] * b[k][column]);
            }
            self.block().products[thread].keep(sums, own, site);
        }
        let thread = self.me.thread;
        let products = &mut self.block().products[thread];
        bytes.iter().for_each(|&byte| *products.readers.entry(byte).or_default() += 1);
        products.reads.push((products.group, bytes));
        Some(())
    }

    /// The elements of a side, by k and then by row or column; marks what it reads, and adds that to `bytes`.
    fn read_side(
        &mut self,
        slice: MatrixSlice,
        len: usize,
        bytes: &mut Vec<usize>,
        site: Site,
    ) -> Option<Vec<Vec<f32>>> {
        let SharedView { base, array_len: buffer_len, start, len: view_len } = slice.words;
        let mut side = vec![vec![0.0; len]; DEPTH];
        for (index, [k, at]) in slice.places(len) {
            if index >= view_len {
                let (space, access, len) = (Space::Shared, Access::Operand, view_len);
                self.raise(site, FaultKind::OutOfBounds { space, access, index, start, len, buffer_len });
                return None;
            }
            let byte = base + UNIT * (start + index);
            self.mark_shared(byte, UNIT, Tag::OPERAND.pending(), self.me, site)?;
            bytes.push(byte);
            // SAFETY: within the view, and so within the block's shared memory; any bits are elements.
            let word: [u16; PER_WORD] =
                unsafe { self.block().shared.data().add(byte).cast::<[u16; PER_WORD]>().read() };
            for (nth, bits) in word.into_iter().enumerate() {
                let (k, at) = if slice.by_rows { (k, at + nth) } else { (k + nth, at) };
                side[k][at] = f32::from_bits(u32::from(bits) << 16);
            }
        }
        Some(side)
    }

    /// What a thread's sums are, once the products before are done. They are dropped from those that it has yet to get back.
    fn values_of(&mut self, thread: usize, sums: &[f32]) -> Option<Vec<f32>> {
        sums.iter().map(|sum| self.value_of(thread, *sum, None)).collect()
    }

    /// What a sum is, or is to be; with the place of a wait, if that covers its product.
    fn value_of(&mut self, thread: usize, sum: f32, waited: Option<Site>) -> Option<f32> {
        let products = &mut self.blocks[self.me.slot].products[thread];
        let Some((token, intact)) = Token::of(sum) else { return Some(sum) };
        let Some(at) = products.kept.iter().position(|kept| kept.number == token.number) else {
            return Some(sum);
        };
        let kept = &mut products.kept[at];
        let (started, covered) = (kept.site, kept.group < products.first_under_way);
        if let (false, _, site) | (true, false, site @ Some(_)) = (intact, covered, waited) {
            self.raise(site.unwrap_or(started), FaultKind::ProductPending { started, changed: !intact });
            return None;
        }
        let value = kept.sums[token.index];
        kept.given += 1;
        if kept.given == kept.sums.len() {
            products.kept.swap_remove(at);
        }
        Some(value)
    }

    /// A fence of the running thread.
    pub fn fence_products(&mut self) {
        let thread = self.me.thread;
        self.block().products[thread].fenced = true;
    }

    pub fn commit_products(&mut self) {
        let thread = self.me.thread;
        self.block().products[thread].group += 1;
    }

    /// The running thread waits for all groups but the newest `newest`.
    pub fn wait_for_products(&mut self, newest: u32) {
        let (me, thread) = (self.me, self.me.thread);
        let block = self.block();
        let products = &mut block.products[thread];
        products.fenced = false;
        products.first_under_way =
            products.first_under_way.max(products.group.saturating_sub(u64::from(newest)));
        let over = products.reads.partition_point(|(group, _)| *group < products.first_under_way);
        for byte in products.reads.drain(..over).flat_map(|(_, bytes)| bytes) {
            let readers = products.readers.get_mut(&byte).expect("as many as products that read it");
            *readers -= 1;
            if *readers == 0 {
                products.readers.remove(&byte);
                block.shared.copy_read(me, byte, UNIT);
            }
        }
    }

    /// The sums that a wait has made the running thread's.
    pub fn give_back(&mut self, sums: &mut [f32], site: Site) -> Option<()> {
        if self.inert {
            return None;
        }
        let thread = self.me.thread;
        for sum in sums {
            *sum = self.value_of(thread, *sum, Some(site))?;
        }
        Some(())
    }

    /// A thread returns: its sums must have been given back, and nobody may be waiting for it at a product.
    pub fn check_products_of_returned(&mut self) {
        let thread = self.me.thread;
        let kept = &self.block().products[thread].kept;
        if let Some(first) = kept.first() {
            let (site, products) = (first.site, kept.len());
            self.raise(site, FaultKind::ProductNotAwaited { products });
        }
        self.check_warpgroup(thread / THREADS);
    }
}

impl Products {
    /// Keeps what the thread's `sums` are to be, and puts tokens in their place.
    fn keep(&mut self, sums: &mut [f32], values: Vec<f32>, site: Site) {
        self.newest = self.newest % ((1 << 15) - 1) + 1;
        let number = self.newest;
        for (index, sum) in sums.iter_mut().enumerate() {
            *sum = Token { number, index }.value();
        }
        self.kept.push(Kept { number, group: self.group, sums: values, given: 0, site });
    }
}

/// The first of a thread's rows.
fn row_of(thread: usize) -> usize {
    thread % THREADS / LANES * 16 + thread % LANES / 4
}

//! Global memory: buffers, and what the emulator keeps about their elements.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::fmt::{self, Debug, Formatter};
use std::marker::PhantomData;
use std::panic::Location;

use crate::face::GlobalPointer;
use crate::{Global, GlobalMut, Value};

/// Global memory that kernels reach through [`view`](Self::view) and [`view_mut`](Self::view_mut).
///
/// The host reads and writes it between launches. A view that outlives its buffer is found out at its first access.
pub struct Buffer<T: Value> {
    header: &'static Header,
    data: *mut T,
    len: usize,
    owns: PhantomData<T>,
}

impl<T: Value> Buffer<T> {
    /// A buffer that holds `values`.
    pub fn from_slice(values: &[T]) -> Self {
        Self::new(values.into(), None)
    }

    /// `len` times `value`.
    pub fn filled(len: usize, value: T) -> Self {
        Self::new(vec![value; len].into(), None)
    }

    /// `len` elements that hold nothing until they are written: reading one before is a fault.
    pub fn poisoned(len: usize) -> Self {
        // Any bit pattern is a value; zeroes would hide what reads them in spite of the fault.
        let mut poison = [0xa5_u8; 16];
        poison[15] = 0x7f;
        // SAFETY: a Value has at most 16 bytes, any of which are valid.
        let value = unsafe { poison.as_ptr().cast::<T>().read_unaligned() };
        Self::new(vec![value; len].into(), Some(vec![0; len.div_ceil(64)]))
    }

    fn new(values: Box<[T]>, written: Option<Vec<u64>>) -> Self {
        let len = values.len();
        let data = Box::into_raw(values).cast::<T>();
        let header = Header::take();
        let memory = Memory { data: data.cast(), len, size: size_of::<T>(), written, ..Memory::default() };
        // SAFETY: the header is this buffer's alone from here on, and nobody holds its memory now.
        unsafe { *header.memory.get() = memory };
        Self { header, data, len, owns: PhantomData }
    }

    /// How many elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What a kernel gets to read.
    pub fn view(&self) -> Global<T> {
        Global(GlobalPointer::of(self.header, self.len))
    }

    /// What a kernel gets to read and write.
    pub fn view_mut(&self) -> GlobalMut<T> {
        // SAFETY: nobody holds the memory across calls.
        unsafe { (*self.header.memory.get()).writable = true };
        GlobalMut(GlobalPointer::of(self.header, self.len))
    }

    /// Element `index`, or `None` if it was never written.
    pub fn get(&self, index: usize) -> Option<T> {
        assert!(index < self.len, "element {index} of a buffer of {}", self.len);
        // SAFETY: nobody holds the memory across calls.
        let written = unsafe { (*self.header.memory.get()).is_written(index) };
        // SAFETY: the index was checked, and any bits are a value.
        written.then(|| unsafe { self.data.add(index).read() })
    }

    /// Writes element `index`.
    pub fn set(&self, index: usize, value: T) {
        assert!(index < self.len, "element {index} of a buffer of {}", self.len);
        // SAFETY: nobody holds the memory across calls; the index was checked.
        unsafe {
            (*self.header.memory.get()).set_written(index);
            self.data.add(index).write(value);
        }
    }

    /// All elements.
    ///
    /// # Panics
    /// If one was never written.
    #[track_caller]
    pub fn to_vec(&self) -> Vec<T> {
        let element = |index| self.get(index).unwrap_or_else(|| panic!("element {index} was never written"));
        (0..self.len).map(element).collect()
    }
}

impl<T: Value> Drop for Buffer<T> {
    fn drop(&mut self) {
        self.header.give();
        let values = std::ptr::slice_from_raw_parts_mut(self.data, self.len);
        // SAFETY: from Box::into_raw in `new`; the header no longer leads here.
        drop(unsafe { Box::from_raw(values) });
    }
}

impl<T: Value> Debug for Buffer<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Where views find their buffer. Headers are never freed but reused, so a view can tell that its buffer is gone.
pub(crate) struct Header {
    generation: Cell<u32>,
    memory: UnsafeCell<Memory>,
}

thread_local! {
    static FREE: RefCell<Vec<&'static Header>> = const { RefCell::new(Vec::new()) };
}

impl Header {
    fn take() -> &'static Self {
        let free = FREE.with_borrow_mut(Vec::pop);
        free.unwrap_or_else(|| {
            Box::leak(Box::new(Self { generation: Cell::new(0), memory: UnsafeCell::new(Memory::default()) }))
        })
    }

    fn give(&'static self) {
        self.generation.set(self.generation.get().wrapping_add(1));
        // SAFETY: nobody holds the memory across calls.
        unsafe { *self.memory.get() = Memory::default() };
        // While the thread ends its list may be gone; the header then stays behind.
        let _ = FREE.try_with(|free| free.borrow_mut().push(self));
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.get()
    }

    /// The memory, if it still is the one of `generation`.
    ///
    /// # Safety
    /// The caller lets go of it before anything else asks for it.
    #[inline]
    #[allow(clippy::mut_from_ref, reason = "the contract is the caller's")]
    pub(super) unsafe fn memory(&self, generation: u32) -> Option<&mut Memory> {
        // SAFETY: headers never leave their OS thread; the rest is the caller's word.
        (self.generation.get() == generation).then(|| unsafe { &mut *self.memory.get() })
    }
}

/// A stamp in shadow memory; see [`Stamp`](super::order::Stamp).
pub(crate) type Word = [u32; 4];

/// A buffer's bytes and their shadow.
pub(crate) struct Memory {
    pub data: *mut u8,
    pub len: usize,
    /// Bytes of an element.
    pub size: usize,
    /// Bits, for a buffer that began poisoned.
    pub written: Option<Vec<u64>>,
    /// A `GlobalMut` of it exists; otherwise no access can conflict with another.
    pub writable: bool,
    /// The launch that the rest is about; each vector is empty until it is needed.
    pub launch: u64,
    pub writes: Vec<Word>,
    pub atomics: Vec<Word>,
    pub reads: Vec<[Word; 2]>,
    /// Bits: loaded through the read-only path.
    pub read_only: Vec<u64>,
    pub read_only_at: Option<&'static Location<'static>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            data: std::ptr::null_mut(),
            len: 0,
            size: 0,
            written: None,
            writable: false,
            launch: 0,
            writes: Vec::new(),
            atomics: Vec::new(),
            reads: Vec::new(),
            read_only: Vec::new(),
            read_only_at: None,
        }
    }
}

impl Memory {
    #[inline]
    pub fn is_written(&self, index: usize) -> bool {
        self.written.as_ref().is_none_or(|bits| bits[index / 64] >> (index % 64) & 1 != 0)
    }

    #[inline]
    pub fn set_written(&mut self, index: usize) {
        if let Some(bits) = &mut self.written {
            bits[index / 64] |= 1 << (index % 64);
        }
    }

    /// Forgets what earlier launches did.
    #[inline]
    pub fn enter(&mut self, launch: u64) {
        if self.launch != launch {
            self.launch = launch;
            self.writes = Vec::new();
            self.atomics = Vec::new();
            self.reads = Vec::new();
            self.read_only = Vec::new();
            self.read_only_at = None;
        }
    }
}

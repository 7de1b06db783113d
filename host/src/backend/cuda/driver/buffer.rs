use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cust::sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
use cust::sys::{CUDA_MEMCPY2D, CUdeviceptr};

use super::error::{check_multiple, check_range};
use super::raw::{self, Code, call};
use super::{Context, DriverError, Event, Pending, PinnedArena, PinnedBuffer, Result, Stream};

/// GPU memory for `len` elements.
///
/// Dropping it, and the buffers that share its memory, waits for all work of the context. Elements that nothing has written hold some
/// bytes or other.
#[derive(Debug)]
pub struct DeviceBuffer<T: Pod> {
    address: CUdeviceptr,
    len: usize,
    /// `None` for no bytes.
    allocation: Option<Arc<Allocation>>,
    context: Context,
    elements: PhantomData<T>,
}

/// Memory of the driver's.
#[derive(Debug)]
struct Allocation {
    address: CUdeviceptr,
    context: Context,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.context.free_after_all_work(|| {
            // SAFETY: allocated by uninit, freed once, and nothing is under way that could use it.
            let _ = unsafe { call!(cuMemFree_v2(self.address)) };
        });
    }
}

impl<T: Pod> DeviceBuffer<T> {
    /// Memory that holds whatever was there.
    ///
    /// # Errors
    /// [`DriverError::OutOfGpuMemory`], or a refused call.
    pub fn uninit(context: &Context, len: usize) -> Result<Self> {
        // What the driver aligns allocations to.
        const { assert!(align_of::<T>() <= 256) };
        context.make_current()?;
        let mut address = 0;
        match len.checked_mul(size_of::<T>()) {
            Some(0) => {}
            Some(bytes) => {
                // SAFETY: it writes one address, which drop gives back.
                let code = unsafe { raw::cuMemAlloc_v2(&raw mut address, bytes) };
                if code == Code::OUT_OF_MEMORY {
                    return Err(out_of_memory(context, bytes as u64));
                }
                super::error::check("cuMemAlloc", code)?;
            }
            None => return Err(out_of_memory(context, u64::MAX)),
        }
        let allocation = (address != 0).then(|| Arc::new(Allocation { address, context: context.clone() }));
        Ok(Self { address, len, allocation, context: context.clone(), elements: PhantomData })
    }

    /// A range of the elements as a buffer of its own, for a batch smaller than this was made for, or one of several tables in it. Both are
    /// the same memory, which stays until both are dropped.
    ///
    /// # Errors
    /// [`DriverError::OutOfRange`]; [`DriverError::Multiple`] for a range that begins elsewhere than at a multiple of 256 bytes.
    pub fn part(&self, range: Range<usize>) -> Result<Self> {
        let len = range.end.checked_sub(range.start).unwrap_or(usize::MAX);
        check_range("part", range.start, len, self.len)?;
        let offset = (range.start * size_of::<T>()) as u64;
        check_multiple("part offset in bytes", offset, 256)?;
        let Self { allocation, context, .. } = self;
        Ok(Self {
            address: if len == 0 { 0 } else { self.address + offset },
            len,
            allocation: allocation.clone(),
            context: context.clone(),
            elements: PhantomData,
        })
    }

    /// Memory that is all zero, for whichever stream.
    ///
    /// # Errors
    /// As for [`uninit`](Self::uninit).
    pub fn zeroed(stream: &Stream, len: usize) -> Result<Self> {
        let buffer = Self::uninit(stream.context(), len)?;
        buffer.fill_bytes(stream, 0..len, 0)?;
        stream.synchronize()?;
        Ok(buffer)
    }

    /// Memory that holds `elements`, for whichever stream.
    ///
    /// # Errors
    /// As for [`uninit`](Self::uninit).
    pub fn from_slice(stream: &Stream, elements: &[T]) -> Result<Self> {
        let buffer = Self::uninit(stream.context(), elements.len())?;
        buffer.write(stream, 0, elements)?;
        Ok(buffer)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }

    /// Where it lies on the GPU; a multiple of 256, or 0 if it is empty.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The context that it belongs to.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Writes `elements` from element `at` on, in the stream's order, and waits for that.
    ///
    /// # Errors
    /// [`DriverError::OutOfRange`], [`DriverError::OtherContext`], or a refused call.
    pub fn write(&self, stream: &Stream, at: usize, elements: &[T]) -> Result<()> {
        let address = self.target(stream, "write", at, elements.len())?;
        let bytes = size_of_val(elements);
        if bytes > 0 {
            // SAFETY: the range is within the buffer, and the slice is borrowed until the copy is done, below.
            unsafe { call!(cuMemcpyHtoDAsync_v2(address, elements.as_ptr().cast(), bytes, stream.raw())) }?;
        }
        stream.synchronize()
    }

    /// Reads from element `at` on into `elements`, in the stream's order.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn read(&self, stream: &Stream, at: usize, elements: &mut [T]) -> Result<()> {
        let address = self.target(stream, "read", at, elements.len())?;
        let bytes = size_of_val(elements);
        if bytes > 0 {
            // SAFETY: the range is within the buffer, any bytes are elements, and the slice is borrowed until the copy
            // is done, below.
            unsafe {
                call!(cuMemcpyDtoHAsync_v2(elements.as_mut_ptr().cast(), address, bytes, stream.raw()))
            }?;
        }
        stream.synchronize()
    }

    /// All elements, in the stream's order.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); self.len];
        self.read(stream, 0, &mut elements)?;
        Ok(elements)
    }

    /// Async: sets every byte of a range of elements. 0xff makes NaNs of floats, so that a stale read shows.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn fill_bytes(&self, stream: &Stream, range: Range<usize>, byte: u8) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        let address = self.target(stream, "fill", range.start, len)?;
        let bytes = len * size_of::<T>();
        if bytes > 0 {
            // SAFETY: the range is within the buffer, and drop waits for the work.
            unsafe { call!(cuMemsetD8Async(address, byte, bytes, stream.raw())) }?;
        }
        Ok(())
    }

    /// Async: copies `len` elements of another buffer, from its element `from` on, to element `at` and on. Ranges of one
    /// buffer may not overlap.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn copy_from(&self, stream: &Stream, at: usize, other: &Self, from: usize, len: usize) -> Result<()> {
        let to = self.target(stream, "copy", at, len)?;
        let from = other.target(stream, "copy", from, len)?;
        let bytes = len * size_of::<T>();
        if bytes > 0 {
            // SAFETY: both ranges are within their buffers, whose drops wait for the work.
            unsafe { call!(cuMemcpyDtoDAsync_v2(to, from, bytes, stream.raw())) }?;
        }
        Ok(())
    }

    /// Async: copies `rows` rows of `width` elements of another buffer, whose rows have `stride` elements, from its element `from` on, to
    /// element `at` and on, where they lie behind each other. Ranges of one buffer may not overlap.
    ///
    /// # Errors
    /// As for [`write`](Self::write); [`DriverError::OutOfRange`] for rows wider than `stride`, too.
    pub fn copy_rows_from(
        &self,
        stream: &Stream,
        at: usize,
        other: &Self,
        from: usize,
        (rows, width, stride): (usize, usize, usize),
    ) -> Result<()> {
        check_range("copied row", 0, width, stride)?;
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let to = self.target(stream, "copy", at, rows.saturating_mul(width))?;
        let from =
            other.target(stream, "copy", from, (rows - 1).saturating_mul(stride).saturating_add(width))?;
        let [width, stride] = [width, stride].map(|elements| elements * size_of::<T>());
        let copy = CUDA_MEMCPY2D {
            srcMemoryType: CU_MEMORYTYPE_DEVICE,
            srcDevice: from,
            srcPitch: stride,
            dstMemoryType: CU_MEMORYTYPE_DEVICE,
            dstDevice: to,
            dstPitch: width,
            WidthInBytes: width,
            Height: rows,
            srcXInBytes: 0,
            srcY: 0,
            srcHost: std::ptr::null(),
            srcArray: std::ptr::null_mut(),
            dstXInBytes: 0,
            dstY: 0,
            dstHost: std::ptr::null_mut(),
            dstArray: std::ptr::null_mut(),
        };
        // SAFETY: all rows are within their buffers, as was checked, and the buffers' drops wait for the work; the description is read
        // before it returns.
        unsafe { call!(cuMemcpy2DAsync_v2(&raw const copy, stream.raw())) }
    }

    /// Async: writes all of `source` from element `at` on. The copy keeps `source` until it is done.
    ///
    /// # Errors
    /// As for [`write`](Self::write); `source` is then dropped.
    pub fn upload(
        &self,
        stream: &Stream,
        at: usize,
        source: PinnedBuffer<T>,
    ) -> Result<Pending<PinnedBuffer<T>>> {
        let len = source.len();
        self.upload_part(stream, at, source, len)
    }

    /// Async: writes the first `len` elements of `source` from element `at` on. The copy keeps `source` until it is done.
    ///
    /// # Errors
    /// As for [`write`](Self::write); `source` is then dropped.
    pub fn upload_part(
        &self,
        stream: &Stream,
        at: usize,
        source: PinnedBuffer<T>,
        len: usize,
    ) -> Result<Pending<PinnedBuffer<T>>> {
        check_range("upload source", 0, len, source.len())?;
        let address = self.target(stream, "upload", at, len)?;
        source.check_context(stream)?;
        let done = Event::untimed(&self.context)?;
        let bytes = len * size_of::<T>();
        if bytes > 0 {
            // SAFETY: the range is within the buffer. Both ends stay until the copy is done: their drops wait for it,
            // and Pending gives out no reference to the source before.
            unsafe { call!(cuMemcpyHtoDAsync_v2(address, source.as_ptr().cast(), bytes, stream.raw())) }?;
        }
        Pending::new(source, done, stream)
    }

    /// Async: fills `target` with the elements from `at` on. The copy keeps `target` until it is done.
    ///
    /// # Errors
    /// As for [`write`](Self::write); `target` is then dropped.
    pub fn download(
        &self,
        stream: &Stream,
        at: usize,
        mut target: PinnedBuffer<T>,
    ) -> Result<Pending<PinnedBuffer<T>>> {
        let address = self.target(stream, "download", at, target.len())?;
        target.check_context(stream)?;
        let done = Event::untimed(&self.context)?;
        let bytes = size_of_val(&*target);
        if bytes > 0 {
            // SAFETY: as in upload; any bytes are elements.
            unsafe { call!(cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), address, bytes, stream.raw())) }?;
        }
        Pending::new(target, done, stream)
    }

    /// Async: writes `len` elements out of the arena, from its byte `offset` on, to element `at` and on.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn copy_from_arena(
        &self,
        stream: &Stream,
        at: usize,
        arena: &PinnedArena,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        let address = self.target(stream, "copy from the arena", at, len)?;
        for piece in arena.pieces(stream, offset, len * size_of::<T>())? {
            let to = address + (piece.start - offset) as u64;
            let from = arena.pointer_at(piece.start).cast_const().cast();
            // SAFETY: both ranges are within their memory, whose drops wait for the work. The arena gives out no
            // references, so the copy may read it at any time.
            unsafe { call!(cuMemcpyHtoDAsync_v2(to, from, piece.len(), stream.raw())) }?;
        }
        Ok(())
    }

    /// Async: copies `len` elements, from `at` on, into the arena, to its byte `offset` and on.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn copy_to_arena(
        &self,
        stream: &Stream,
        at: usize,
        arena: &PinnedArena,
        offset: usize,
        len: usize,
    ) -> Result<()> {
        let address = self.target(stream, "copy to the arena", at, len)?;
        for piece in arena.pieces(stream, offset, len * size_of::<T>())? {
            let from = address + (piece.start - offset) as u64;
            let to = arena.pointer_at(piece.start).cast();
            // SAFETY: as in copy_from_arena; the arena may be written at any time as well.
            unsafe { call!(cuMemcpyDtoHAsync_v2(to, from, piece.len(), stream.raw())) }?;
        }
        Ok(())
    }

    /// The address of element `at`, if `len` elements lie there and the stream may touch them. Makes the context current.
    fn target(&self, stream: &Stream, what: &'static str, at: usize, len: usize) -> Result<CUdeviceptr> {
        self.context.check_same(stream.context(), "the buffer")?;
        check_range(what, at, len, self.len)?;
        self.context.make_current()?;
        Ok(self.address + (at * size_of::<T>()) as u64)
    }
}

fn out_of_memory(context: &Context, wanted: u64) -> DriverError {
    match context.memory() {
        Ok(memory) => {
            DriverError::OutOfGpuMemory { wanted, free: memory.free_bytes, total: memory.total_bytes }
        }
        Err(error) => error,
    }
}

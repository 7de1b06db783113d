/// Plain data that one access moves: 1, 2, 4, 8 or 16 bytes, aligned to its size.
///
/// # Safety
/// No padding, every bit pattern valid, `size_of::<Self>() == align_of::<Self>()` and at most 16.
pub unsafe trait Value: Copy + 'static {
    /// Reads through a device pointer in one access.
    #[doc(hidden)]
    #[inline(always)]
    unsafe fn read(pointer: *const Self) -> Self {
        pointer.read()
    }

    /// Writes through a device pointer in one access.
    #[doc(hidden)]
    #[inline(always)]
    unsafe fn write(pointer: *mut Self, value: Self) {
        pointer.write(value);
    }
}

macro_rules! plain {
    ($($ty:ty),*) => { $(
        // SAFETY: a primitive number; on both faces its alignment is its size.
        unsafe impl Value for $ty {}
    )* };
}
plain!(u8, u16, u32, u64, u128, i8, i16, i32, i64, f32);

/// Four `u32` in one 16-byte access (`ld.v4.b32`, `st.v4.b32`), the widest of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
#[allow(missing_docs, reason = "four lanes")]
pub struct U32x4 {
    pub x: u32,
    pub y: u32,
    pub z: u32,
    pub w: u32,
}

impl U32x4 {
    /// The four lanes in order.
    #[inline(always)]
    pub fn to_array(self) -> [u32; 4] {
        [self.x, self.y, self.z, self.w]
    }
}

// SAFETY: four u32 without padding, 16 bytes aligned to 16.
unsafe impl Value for U32x4 {
    // Lane by lane: LLVM joins the four into one v4 access, while a whole struct becomes two of 8 bytes.
    #[inline(always)]
    unsafe fn read(pointer: *const Self) -> Self {
        Self { x: (*pointer).x, y: (*pointer).y, z: (*pointer).z, w: (*pointer).w }
    }

    #[inline(always)]
    unsafe fn write(pointer: *mut Self, value: Self) {
        (*pointer).x = value.x;
        (*pointer).y = value.y;
        (*pointer).z = value.z;
        (*pointer).w = value.w;
    }
}

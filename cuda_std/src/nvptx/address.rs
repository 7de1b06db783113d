unsafe extern "C" {
    fn __cuda_std_dynamic_shared() -> *mut u8;
    fn __cuda_std_global_address(pointer: *const u8) -> u64;
    fn __cuda_std_shared_address(pointer: *const u8) -> u32;
}

/// The launch's dynamic shared memory, as a pointer that LLVM knows to be shared.
#[inline(always)]
pub fn shared_base() -> *mut u8 {
    // SAFETY: returns an address, touches nothing.
    unsafe { __cuda_std_dynamic_shared() }
}

/// The address that an instruction with `.global` takes.
#[inline(always)]
pub fn global<T>(pointer: *const T) -> u64 {
    // SAFETY: returns an address, touches nothing.
    unsafe { __cuda_std_global_address(pointer.cast()) }
}

/// The address that an instruction with `.shared` takes.
#[inline(always)]
pub fn shared<T>(pointer: *const T) -> u32 {
    // SAFETY: returns an address, touches nothing.
    unsafe { __cuda_std_shared_address(pointer.cast()) }
}

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Arc;

use super::error::Result;
use super::functions::{Functions, Opaque, Status};

/// Something that the library made, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Owned {
    pub raw: Opaque,
    destroy: unsafe extern "C" fn(Opaque) -> Status,
    pub functions: Arc<Functions>,
}

// SAFETY: what cuBLASLt makes is not bound to a thread; a handle may be used by several at once, and the other objects are only
// read after they were made.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Owned {
    /// # Safety
    /// `create` writes a handle that `destroy` takes.
    pub unsafe fn new(
        functions: &Arc<Functions>,
        destroy: unsafe extern "C" fn(Opaque) -> Status,
        call: &'static str,
        create: impl FnOnce(*mut Opaque) -> Status,
    ) -> Result<Self> {
        let mut raw = ptr::null_mut();
        functions.check(call, create(&raw mut raw))?;
        Ok(Self { raw, destroy, functions: functions.clone() })
    }

    /// Sets an attribute to the value that has these bytes.
    pub fn set(
        &self,
        set: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> Status,
        call: &'static str,
        attribute: c_int,
        value: &[u8],
    ) -> Result<()> {
        // SAFETY: the object is alive, and the value has the bytes that are named; it is copied.
        let code = unsafe { set(self.raw, attribute, value.as_ptr().cast(), value.len()) };
        self.functions.check(call, code)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by the library and given back once. A failure has no one left to tell.
            let _ = unsafe { (self.destroy)(self.raw) };
        }
    }
}

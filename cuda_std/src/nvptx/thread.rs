use core::arch::{asm, nvptx};

macro_rules! index {
    ($($name:ident = $register:ident;)*) => { $(
        #[inline(always)]
        pub fn $name() -> u32 {
            // SAFETY: reads a special register.
            (unsafe { nvptx::$register() }) as u32
        }
    )* };
}
index! {
    thread_idx_x = _thread_idx_x;
    thread_idx_y = _thread_idx_y;
    thread_idx_z = _thread_idx_z;
    block_dim_x = _block_dim_x;
    block_dim_y = _block_dim_y;
    block_dim_z = _block_dim_z;
    block_idx_x = _block_idx_x;
    block_idx_y = _block_idx_y;
    block_idx_z = _block_idx_z;
    grid_dim_x = _grid_dim_x;
    grid_dim_y = _grid_dim_y;
    grid_dim_z = _grid_dim_z;
}

unsafe extern "C" {
    fn __cuda_std_barrier();
    fn __cuda_std_barrier_count(predicate: u32) -> u32;
    fn __cuda_std_barrier_and(predicate: u32) -> u32;
    fn __cuda_std_barrier_or(predicate: u32) -> u32;
}

#[inline(always)]
pub unsafe fn sync_threads() {
    __cuda_std_barrier();
}

#[inline(always)]
pub unsafe fn sync_threads_count(predicate: bool) -> u32 {
    __cuda_std_barrier_count(u32::from(predicate))
}

#[inline(always)]
pub unsafe fn sync_threads_and(predicate: bool) -> bool {
    __cuda_std_barrier_and(u32::from(predicate)) != 0
}

#[inline(always)]
pub unsafe fn sync_threads_or(predicate: bool) -> bool {
    __cuda_std_barrier_or(u32::from(predicate)) != 0
}

#[inline(always)]
pub fn launch_dependents() {
    // SAFETY: tells the hardware what the kernel's author answers for.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack)) }
}

#[inline(always)]
pub fn wait_dependencies() {
    // Without `nomem`: what comes after reads what the launch before has written.
    // SAFETY: waits.
    unsafe { asm!("griddepcontrol.wait;", options(nostack)) }
}

#[inline(always)]
pub fn nanosleep(nanoseconds: u32) {
    // SAFETY: waits.
    unsafe { asm!("nanosleep.u32 {};", in(reg32) nanoseconds, options(nostack)) }
}

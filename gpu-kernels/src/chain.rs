//! Launches of a decode step that follow one another closely.

/// First of all in a kernel of a step: waits until all before it has ended and can be read, if it was launched to overlap with that, then lets the next launch
/// come to the multiprocessors, which waits in its turn. What overlaps is the time that a launch takes to get there.
#[inline(always)]
pub fn chain() {
    #[cfg(any(not(target_arch = "nvptx64"), sm_90))]
    {
        cuda_std::thread::wait_dependencies();
        cuda_std::thread::launch_dependents();
    }
}

//! Launches of a decode step that follow one another closely.

/// In a kernel of a step, before it writes anything: waits until all before it has ended and can be read, if it was launched to overlap with that, then lets the next
/// launch come to the multiprocessors, which waits in its turn. What overlaps is the time that a launch takes to get there, and what it does before it calls this.
///
/// Of all launches only the one before may still be running then, since each of a step's stages calls this in every block, or ends, before the next one can begin. So
/// a kernel may read earlier what that one does not write. (Products of few tokens let go before they wait: nobody who reads early stands behind one.)
#[inline(always)]
pub fn chain() {
    #[cfg(any(not(target_arch = "nvptx64"), sm_90))]
    {
        cuda_std::thread::wait_dependencies();
        cuda_std::thread::launch_dependents();
    }
}

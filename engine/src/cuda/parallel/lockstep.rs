use std::hint;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How often is looked whether the others have come before the thread sleeps: ranks that do the same come within microseconds.
const SPINS: usize = 4096;

/// What keeps the threads of a group's ranks together: before they enqueue what waits for each other on the GPUs, they agree that all of them
/// will. A rank that leaves early, in an error or a panic, counts as one that does not agree, so nobody waits for it.
#[derive(Debug)]
pub(super) struct Lockstep {
    ranks: usize,
    /// Agreements so far.
    round: AtomicU64,
    failed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Ranks that have come to the agreement under way.
    arrived: usize,
    /// Whether one of them is not ready.
    refused: bool,
    /// Ranks that have ended the work under way.
    left: usize,
    /// Of the last agreement.
    agreed: bool,
    /// The rank that failed first, and why.
    failure: Option<(usize, String)>,
}

impl Lockstep {
    /// Of so many ranks.
    pub fn new(ranks: usize) -> Self {
        Self {
            ranks,
            round: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Before all ranks begin a piece of work, while none is at one.
    pub fn begin(&self) {
        let mut state = self.lock();
        (state.arrived, state.refused, state.left) = (0, false, 0);
    }

    /// Waits for all ranks and says whether all of them were ready.
    pub fn agree(&self, ready: bool) -> bool {
        let mut state = self.lock();
        let round = self.round.load(Ordering::Relaxed);
        state.arrived += 1;
        state.refused |= !ready;
        self.complete(&mut state);
        drop(state);
        for _ in 0..SPINS {
            if self.round.load(Ordering::Relaxed) != round {
                break;
            }
            hint::spin_loop();
        }
        let mut state = self.lock();
        while self.round.load(Ordering::Relaxed) == round {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        // There is no next agreement before this rank comes to it.
        state.agreed
    }

    /// A rank's work is at its end.
    pub fn leave(&self) {
        let mut state = self.lock();
        state.left += 1;
        self.complete(&mut state);
    }

    /// A rank has failed where others may wait for it on the GPU: they are to wait no longer, and there is no further work.
    pub fn fail(&self, rank: usize, message: String) {
        self.lock().failure.get_or_insert((rank, message));
        self.failed.store(true, Ordering::Release);
    }

    /// Whether a rank has failed.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The rank that failed first, and why.
    pub fn failure(&self) -> Option<(usize, String)> {
        self.lock().failure.clone()
    }

    /// Ends the agreement under way if nobody is missing.
    fn complete(&self, state: &mut State) {
        if state.arrived == 0 || state.arrived + state.left < self.ranks {
            return;
        }
        state.agreed = !state.refused && state.left == 0 && !self.has_failed();
        (state.arrived, state.refused) = (0, false);
        // Under the lock, which orders it.
        self.round.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// What each rank made of its agreements, the first of which that fails being its last. Rank `rank` is ready as often as `ready` says, then
    /// says that it is not, or leaves.
    fn outcomes(lockstep: &Lockstep, ready: &[usize], refuses: &[bool]) -> Vec<usize> {
        lockstep.begin();
        thread::scope(|scope| {
            let ranks: Vec<_> = ready
                .iter()
                .zip(refuses)
                .map(|(ready, refuses)| {
                    scope.spawn(move || {
                        let agreed = (0..*ready).take_while(|_| lockstep.agree(true)).count();
                        if agreed == *ready && *refuses {
                            assert!(!lockstep.agree(false));
                        }
                        lockstep.leave();
                        agreed
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn ranks_go_as_far_as_the_first_that_does_not() {
        let lockstep = Lockstep::new(3);
        for round in 0..200 {
            let ready = [5, 3 + round % 4, 9];
            let refuses = [round % 2 == 0, round % 3 == 0, round % 5 == 0];
            let least = *ready.iter().min().unwrap();
            assert_eq!(outcomes(&lockstep, &ready, &refuses), [least; 3], "{ready:?}");
        }
        assert_eq!(outcomes(&lockstep, &[4, 4, 4], &[false; 3]), [4; 3]);
        assert!(!lockstep.has_failed());
    }

    #[test]
    fn nobody_agrees_after_a_failure_and_the_first_one_is_told() {
        let lockstep = Lockstep::new(2);
        assert_eq!(outcomes(&lockstep, &[2, 2], &[false; 2]), [2; 2]);
        lockstep.fail(1, "first".to_owned());
        lockstep.fail(0, "second".to_owned());
        assert_eq!(lockstep.failure(), Some((1, "first".to_owned())));
        assert_eq!(outcomes(&lockstep, &[2, 2], &[false; 2]), [0; 2]);
    }
}

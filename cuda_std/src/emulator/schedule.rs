//! Runs a launch: blocks in random order, a few at a time, each thread a coroutine, each turn by chance.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe, Location};

use corosensei::{Coroutine, CoroutineResult};
use rand::Rng;
use rand::seq::SliceRandom;

use super::fault::{Fault, FaultKind};
use super::launch::{Launch, Report};
use super::machine::{self, Machine, WARPS, set_current, with};
use super::order::LANES;
use super::panics;
use super::stacks::{self, ThreadStack};

pub(super) use super::machine::is_running;

type Fiber = Coroutine<(), (), (), ThreadStack>;

/// Of 8 turns, as many stay with the same warp.
const LOYALTY: u32 = 7;

pub(super) fn run(launch: &Launch, kernel: &dyn Fn()) -> Result<Report, Box<Fault>> {
    panics::install();
    let machine = Box::into_raw(Box::new(Machine::new(launch)));
    let mut session = Session { machine, kernel, fibers: Vec::new(), stacks: Vec::new() };
    session.run();
    drop(session);
    // SAFETY: from Box::into_raw above; the session, all that knew of it, is gone.
    let machine = unsafe { Box::from_raw(machine) };
    match machine.fault {
        Some(fault) => Err(fault),
        None => Ok(machine.report),
    }
}

struct Session<'k> {
    machine: *mut Machine,
    kernel: &'k dyn Fn(),
    /// By slot and thread, from a thread's first turn to its last.
    fibers: Vec<Option<Fiber>>,
    stacks: Vec<ThreadStack>,
}

impl Session<'_> {
    fn run(&mut self) {
        set_current(self.machine);
        let (slots, threads) = with(|machine| (machine.blocks.len(), machine.threads()));
        self.fibers.resize_with(slots * threads, || None);
        let (x, y, z) = with(|machine| machine.launch.grid);
        let mut waiting: Vec<u32> = (0..x * y * z).collect();
        with(|machine| waiting.shuffle(&mut machine.rng));
        for slot in 0..slots {
            if let Some(block) = waiting.pop() {
                with(|machine| machine.start_block(slot, block));
            }
        }
        let mut warp = None;
        while let Some((slot, thread)) = self.choose(&mut warp) {
            let fiber = &mut self.fibers[slot * threads + thread];
            let fiber = fiber.get_or_insert_with(|| {
                let stack = self
                    .stacks
                    .pop()
                    .unwrap_or_else(|| stacks::take(with(|machine| machine.launch.stack_bytes)));
                fiber_of(stack, self.kernel)
            });
            with(|machine| machine.in_kernel = true);
            let result = fiber.resume(());
            with(|machine| machine.in_kernel = false);
            if let CoroutineResult::Return(()) = result {
                if let Some(fiber) = self.fibers[slot * threads + thread].take() {
                    self.stacks.push(fiber.into_stack());
                }
                if with(Machine::returned)
                    && let Some(block) = waiting.pop()
                {
                    with(|machine| machine.start_block(slot, block));
                }
            }
        }
    }

    /// Whose turn it is; `None` when all is done or there is a fault.
    fn choose(&mut self, warp: &mut Option<u32>) -> Option<(usize, usize)> {
        with(|machine| {
            machine.step();
            if machine.inert {
                return None;
            }
            if machine.ready.is_empty() {
                if machine.blocks.iter().any(|block| block.live > 0) {
                    machine.explain_deadlock();
                }
                return None;
            }
            let chance: u32 = machine.rng.random();
            let stays = warp.filter(|id| machine.is_ready(*id) && chance % 8 < LOYALTY);
            let id = stays.unwrap_or_else(|| {
                let place = (u64::from(chance >> 8) * machine.ready.len() as u64) >> 24;
                machine.ready[place as usize]
            });
            *warp = Some(id);
            let (slot, number) = (id as usize / WARPS, id as usize % WARPS);
            let state = &mut machine.blocks[slot].warps[number];
            let turn = chance >> 3 & 31;
            let lane = (state.runnable.rotate_right(turn).trailing_zeros() + turn) % 32;
            state.runnable &= !(1 << lane);
            if state.runnable == 0 {
                machine.unlist(id);
            }
            let thread = number * LANES + lane as usize;
            machine.me = machine.blocks[slot].order.me(slot, thread);
            machine.report.turns += 1;
            let digest = machine.report.schedule ^ u64::from(machine.me.number);
            machine.report.schedule = digest.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
            Some((slot, thread))
        })
    }
}

impl Drop for Session<'_> {
    /// Unwinds what a fault has left standing.
    fn drop(&mut self) {
        with(|machine| (machine.inert, machine.in_kernel) = (true, true));
        for mut fiber in self.fibers.drain(..).flatten() {
            fiber.force_unwind();
            self.stacks.push(fiber.into_stack());
        }
        set_current(std::ptr::null_mut());
        stacks::keep(self.stacks.drain(..));
    }
}

fn fiber_of(stack: ThreadStack, kernel: &dyn Fn()) -> Fiber {
    // SAFETY: the session drops its coroutines before the kernel's borrow ends.
    unsafe {
        Coroutine::with_stack_unchecked(stack, move |yielder, ()| {
            with(|machine| {
                let thread = machine.me.thread;
                machine.block().yielders[thread] = yielder;
            });
            if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(kernel)) {
                with(|machine| machine.panicked(payload.as_ref()));
            }
        })
    }
}

impl Machine {
    fn is_ready(&self, id: u32) -> bool {
        self.blocks[id as usize / WARPS].warps[id as usize % WARPS].runnable != 0
    }

    /// The running thread has returned; whether its block has with it.
    fn returned(&mut self) -> bool {
        if self.inert {
            return false;
        }
        let machine::Block { live, warps, order, .. } = &mut self.blocks[self.me.slot];
        *live -= 1;
        warps[self.me.warp()].returned |= 1 << self.me.lane();
        order.returned(self.me.thread);
        let last = *live == 0;
        self.report.threads += 1;
        self.poll(true);
        self.check_copies_of_returned();
        self.check_bulk_of_returned(last);
        self.check_products_of_returned();
        self.check_gatherings_without_returned(self.me.slot, self.me.warp());
        self.pass_barrier_without_returned(self.me.slot);
        last
    }

    /// The panic hook has noted the fault already, unless someone replaced it. Unwinding for a fault of another thread comes
    /// here too and changes nothing.
    fn panicked(&mut self, payload: &(dyn Any + Send)) {
        if !self.inert {
            let message = panics::text_of(payload);
            self.raise(Location::caller(), FaultKind::Panic { message });
        }
    }
}

use cuda_std::emulator::{Buffer, Fault, Launch};
use cuda_std::{Global, GlobalMut, Value};

use crate::Case;

/// A case's kernel on the emulator.
#[derive(Clone, Copy, Debug)]
pub struct Kernel(pub(crate) Run);

type Run = fn(&Case, &[u32], u64) -> Result<Vec<u32>, Fault>;

impl Kernel {
    /// Stands where the table has yet to name one.
    pub(crate) const NONE: Self = Self(|case, _, _| unreachable!("{case:?} has no kernel"));
}

/// The [`Kernel`] of a case in the module that has its `kernels`.
macro_rules! kernel {
    ($name:ident, $in:ty, $out:ty) => {
        crate::emulate::Kernel(|case, input, seed| {
            // SAFETY: the case's own launch; what it does wrong nonetheless is a fault.
            crate::emulate::run::<$in, $out>(case, input, seed, |input, output| unsafe {
                kernels::$name(input, output);
            })
        })
    };
}
pub(crate) use kernel;

/// The output of a case for an input, with the schedule that `seed` gives.
///
/// # Panics
/// If the input has another length than [`Case::input_words`].
pub fn run_on_emulator(case: &Case, inputs: &[u32], seed: u64) -> Result<Vec<u32>, Fault> {
    assert_eq!(inputs.len(), case.input_words(), "words of input for {}", case.name);
    (case.kernel.0)(case, inputs, seed)
}

/// Runs a kernel whose rows are of `I` and `O`.
pub(crate) fn run<I: Value, O: Value>(
    case: &Case,
    inputs: &[u32],
    seed: u64,
    kernel: impl Fn(Global<I>, GlobalMut<O>),
) -> Result<Vec<u32>, Fault> {
    let input = Buffer::from_slice(&elements::<I>(inputs));
    let output = Buffer::from_slice(&elements::<O>(&vec![0; case.output_words()]));
    let launch = Launch {
        grid: case.grid.into(),
        block: case.block.into(),
        shared_bytes: case.shared_bytes as usize,
        seed,
        ..Launch::default()
    };
    launch.run(|| kernel(input.view(), output.view_mut()))?;
    Ok(words(&output.to_vec()))
}

/// Words as elements of another size.
fn elements<T: Value>(words: &[u32]) -> Vec<T> {
    assert!(size_of_val(words).is_multiple_of(size_of::<T>()), "whole elements");
    let first = words.as_ptr().cast::<T>();
    // SAFETY: within the words; any bits are a value.
    (0..size_of_val(words) / size_of::<T>())
        .map(|index| unsafe { first.add(index).read_unaligned() })
        .collect()
}

/// Elements as words.
fn words<T: Value>(elements: &[T]) -> Vec<u32> {
    assert!(size_of_val(elements).is_multiple_of(4), "whole words");
    let first = elements.as_ptr().cast::<u32>();
    // SAFETY: within the elements, which have no padding.
    (0..size_of_val(elements) / 4).map(|index| unsafe { first.add(index).read_unaligned() }).collect()
}

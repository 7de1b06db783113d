//! Loops that must not be loops.

/// Writes a block for `index` = 0, 1, … below `count`, a constant of at most 16. LLVM leaves a loop with so long a body as it is, and
/// arrays that its counter indexes in local memory.
macro_rules! unrolled {
    ($index:ident < $count:expr, $body:block) => {
        unrolled!(@$index < $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    };
    (@$index:ident < $count:expr, $body:block, $($at:literal)*) => {
        const { assert!($count <= 16) };
        // Of one type from the start: literals whose type is open keep the type checker busy for minutes.
        $(if ($at as usize) < ($count as usize) {
            let $index: usize = $at;
            $body
        })*
    };
}
pub(crate) use unrolled;

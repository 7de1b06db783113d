//! The table and the jumps through it.

/// One function: a slot in the table, and a jump to what the slot holds. The jump leaves all registers and the stack as
/// the caller set them, so it serves every signature.
#[cfg(target_arch = "x86_64")]
macro_rules! jump {
    ($slot:expr) => {
        concat!("jmp qword ptr [rip + ", $slot, "]")
    };
}
#[cfg(target_arch = "aarch64")]
macro_rules! jump {
    ($slot:expr) => {
        // x16 is the procedure linkage's own scratch register.
        concat!("adrp x16, ", $slot, "\nldr x16, [x16, :lo12:", $slot, "]\nbr x16")
    };
}
pub(crate) use jump;

macro_rules! slot {
    ($name:ident) => {
        concat!("spinkv_libcuda_", stringify!($name))
    };
}
pub(crate) use slot;

/// Defines the functions, the table in which the first `$loading` ones start with a function of this crate, and the
/// list of names in the table's order.
macro_rules! trampolines {
    ($($loading:ident => $first:ident),*; $($name:ident)*) => {
        std::arch::global_asm!(
            ".pushsection .data.spinkv_libcuda, \"aw\", @progbits",
            ".balign 8",
            ".globl spinkv_libcuda_slots",
            ".hidden spinkv_libcuda_slots",
            "spinkv_libcuda_slots:",
            $(concat!($crate::trampolines::slot!($loading), ": .quad {", stringify!($first), "}"),)*
            $(concat!($crate::trampolines::slot!($name), ": .quad {not_initialized}"),)*
            ".popsection",
            ".pushsection .text.spinkv_libcuda, \"ax\", @progbits",
            $($crate::trampolines::define!($loading),)*
            $($crate::trampolines::define!($name),)*
            ".popsection",
            $($first = sym $crate::$first,)*
            not_initialized = sym $crate::not_initialized,
        );

        /// The functions' names, in the order of the table.
        pub(crate) const NAMES: &[&str] = &[$(stringify!($loading),)* $(stringify!($name),)*];
    };
}
pub(crate) use trampolines;

macro_rules! define {
    ($name:ident) => {
        concat!(
            ".balign 16\n.globl ",
            stringify!($name),
            "\n.hidden ",
            stringify!($name),
            "\n.type ",
            stringify!($name),
            ", @function\n",
            stringify!($name),
            ":\n",
            $crate::trampolines::jump!($crate::trampolines::slot!($name)),
            "\n.size ",
            stringify!($name),
            ", . - ",
            stringify!($name)
        )
    };
}
pub(crate) use define;

use core::arch::asm;
use core::hint::unreachable_unchecked;

use crate::atomic::{Fence, Order, Rmw, Scope};

/// The atomics of a type, at addresses of one space.
#[allow(missing_docs, reason = "named as the facade's functions")]
pub trait AtomicFace: Copy {
    unsafe fn rmw_global(address: u64, op: Rmw, value: Self, order: Order, scope: Scope) -> Self;
    unsafe fn rmw_shared(address: u32, op: Rmw, value: Self, order: Order, scope: Scope) -> Self;
    unsafe fn compare_exchange_global(
        address: u64,
        expected: Self,
        new: Self,
        order: Order,
        scope: Scope,
    ) -> Self;
    unsafe fn compare_exchange_shared(
        address: u32,
        expected: Self,
        new: Self,
        order: Order,
        scope: Scope,
    ) -> Self;
    unsafe fn load_global(address: u64, order: Order, scope: Scope) -> Self;
    unsafe fn load_shared(address: u32, order: Order, scope: Scope) -> Self;
    unsafe fn store_global(address: u64, value: Self, order: Order, scope: Scope);
    unsafe fn store_shared(address: u32, value: Self, order: Order, scope: Scope);
}

/// `$emit!(order, scope)` with both as PTX spells them.
macro_rules! scoped {
    ($scope:expr, $emit:ident, $order:literal) => {
        match $scope {
            Scope::Block => $emit!($order, ".cta"),
            Scope::Device => $emit!($order, ".gpu"),
            Scope::System => $emit!($order, ".sys"),
        }
    };
}
macro_rules! ordered {
    ($order:expr, $scope:expr, $emit:ident) => {
        match $order {
            Order::Relaxed => scoped!($scope, $emit, ".relaxed"),
            Order::Acquire => scoped!($scope, $emit, ".acquire"),
            Order::Release => scoped!($scope, $emit, ".release"),
            Order::AcqRel => scoped!($scope, $emit, ".acq_rel"),
        }
    };
}

macro_rules! rmw {
    ($name:ident, $space:literal, $address:ty, $address_class:ident, $class:ident, $($op:ident = $ptx:literal),*) => {
        #[inline(always)]
        unsafe fn $name(address: $address, op: Rmw, value: Self, order: Order, scope: Scope) -> Self {
            let old;
            match op {
                $(Rmw::$op => {
                    macro_rules! emit {
                        ($order:literal, $scope:literal) => {
                            asm!(
                                concat!("atom", $order, $scope, $space, $ptx, " {old}, [{address}], {value};"),
                                old = out($class) old,
                                address = in($address_class) address,
                                value = in($class) value,
                                options(nostack)
                            )
                        };
                    }
                    ordered!(order, scope, emit);
                })*
                // SAFETY: the facade offers a type only the operations listed for it.
                #[allow(unreachable_patterns, reason = "u32 and u64 have all of them")]
                _ => unsafe { unreachable_unchecked() },
            }
            old
        }
    };
}

macro_rules! rest {
    ($space:literal, $address:ty, $address_class:ident, $class:ident, $bits:literal,
        $compare_exchange:ident, $load:ident, $store:ident) => {
        #[inline(always)]
        unsafe fn $compare_exchange(
            address: $address,
            expected: Self,
            new: Self,
            order: Order,
            scope: Scope,
        ) -> Self {
            let old;
            macro_rules! emit {
                ($order:literal, $scope:literal) => {
                    asm!(
                        concat!("atom", $order, $scope, $space, ".cas", $bits, " {old}, [{address}], {expected}, {new};"),
                        old = out($class) old,
                        address = in($address_class) address,
                        expected = in($class) expected,
                        new = in($class) new,
                        options(nostack)
                    )
                };
            }
            ordered!(order, scope, emit);
            old
        }

        #[inline(always)]
        unsafe fn $load(address: $address, order: Order, scope: Scope) -> Self {
            let value;
            macro_rules! emit {
                ($order:literal, $scope:literal) => {
                    asm!(
                        concat!("ld", $order, $scope, $space, $bits, " {value}, [{address}];"),
                        value = out($class) value,
                        address = in($address_class) address,
                        options(nostack)
                    )
                };
            }
            match order {
                Order::Relaxed => scoped!(scope, emit, ".relaxed"),
                Order::Acquire => scoped!(scope, emit, ".acquire"),
                Order::Release | Order::AcqRel => panic!("a load cannot release"),
            }
            value
        }

        #[inline(always)]
        unsafe fn $store(address: $address, value: Self, order: Order, scope: Scope) {
            macro_rules! emit {
                ($order:literal, $scope:literal) => {
                    asm!(
                        concat!("st", $order, $scope, $space, $bits, " [{address}], {value};"),
                        value = in($class) value,
                        address = in($address_class) address,
                        options(nostack)
                    )
                };
            }
            match order {
                Order::Relaxed => scoped!(scope, emit, ".relaxed"),
                Order::Release => scoped!(scope, emit, ".release"),
                Order::Acquire | Order::AcqRel => panic!("a store cannot acquire"),
            }
        }
    };
}

macro_rules! atomic {
    ($ty:ty, $class:ident, $bits:literal, $($op:ident = $ptx:literal),*) => {
        impl AtomicFace for $ty {
            rmw!(rmw_global, ".global", u64, reg64, $class, $($op = $ptx),*);
            rmw!(rmw_shared, ".shared", u32, reg32, $class, $($op = $ptx),*);
            rest!(".global", u64, reg64, $class, $bits, compare_exchange_global, load_global, store_global);
            rest!(".shared", u32, reg32, $class, $bits, compare_exchange_shared, load_shared, store_shared);
        }
    };
}
atomic!(
    u32,
    reg32,
    ".b32",
    Add = ".add.u32",
    Min = ".min.u32",
    Max = ".max.u32",
    And = ".and.b32",
    Or = ".or.b32",
    Xor = ".xor.b32",
    Exchange = ".exch.b32"
);
atomic!(
    i32,
    reg32,
    ".b32",
    Add = ".add.s32",
    Min = ".min.s32",
    Max = ".max.s32",
    And = ".and.b32",
    Or = ".or.b32",
    Xor = ".xor.b32",
    Exchange = ".exch.b32"
);
atomic!(
    u64,
    reg64,
    ".b64",
    Add = ".add.u64",
    Min = ".min.u64",
    Max = ".max.u64",
    And = ".and.b64",
    Or = ".or.b64",
    Xor = ".xor.b64",
    Exchange = ".exch.b64"
);
atomic!(f32, reg32, ".b32", Add = ".add.f32");

#[inline(always)]
pub fn fence(strength: Fence, scope: Scope) {
    macro_rules! emit {
        ($strength:literal, $scope:literal) => {
            // SAFETY: orders memory accesses and does nothing else.
            unsafe { asm!(concat!("fence", $strength, $scope, ";"), options(nostack)) }
        };
    }
    match strength {
        Fence::AcqRel => scoped!(scope, emit, ".acq_rel"),
        Fence::SeqCst => scoped!(scope, emit, ".sc"),
    }
}

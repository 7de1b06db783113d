//! Read-modify-writes, one thread an address, with each order and scope.

macro_rules! rmws {
    (
        rmw { $($ty:ty, $bytes:literal, $domain:ident: $($op:ident $ptx:literal $global:ident $shared:ident,)*;)* }
        compare_exchange { $($cas_ty:ty, $cas_bytes:literal: $cas_ptx:literal $cas_global:ident $cas_shared:ident;)* }
    ) => {
        conform! { CASES:
            $($(
                $global(
                    covers = [concat!("atomic::GlobalMut<", stringify!($ty), ">::", stringify!($op))],
                    expects = [
                        concat!("atom.relaxed.cta.global.", $ptx), concat!("atom.relaxed.gpu.global.", $ptx),
                        concat!("atom.relaxed.sys.global.", $ptx), concat!("atom.acquire.cta.global.", $ptx),
                        concat!("atom.acquire.gpu.global.", $ptx), concat!("atom.acquire.sys.global.", $ptx),
                        concat!("atom.release.cta.global.", $ptx), concat!("atom.release.gpu.global.", $ptx),
                        concat!("atom.release.sys.global.", $ptx), concat!("atom.acq_rel.cta.global.", $ptx),
                        concat!("atom.acq_rel.gpu.global.", $ptx), concat!("atom.acq_rel.sys.global.", $ptx),
                    ],
                    in = [$ty; 13], out = [$ty; 13], domain = crate::Domain::$domain,
                ) |io| {
                    let slot = io.results().slice(12, 1);
                    slot.store(0, io.take());
                    every_order!(|order, scope| io.put(slot.$op(0, io.take(), order, scope)));
                }

                $shared(
                    covers = [concat!("atomic::Shared<", stringify!($ty), ">::", stringify!($op))],
                    expects = [
                        concat!("atom.relaxed.cta.shared.", $ptx), concat!("atom.relaxed.gpu.shared.", $ptx),
                        concat!("atom.relaxed.sys.shared.", $ptx), concat!("atom.acquire.cta.shared.", $ptx),
                        concat!("atom.acquire.gpu.shared.", $ptx), concat!("atom.acquire.sys.shared.", $ptx),
                        concat!("atom.release.cta.shared.", $ptx), concat!("atom.release.gpu.shared.", $ptx),
                        concat!("atom.release.sys.shared.", $ptx), concat!("atom.acq_rel.cta.shared.", $ptx),
                        concat!("atom.acq_rel.gpu.shared.", $ptx), concat!("atom.acq_rel.sys.shared.", $ptx),
                    ],
                    in = [$ty; 13], out = [$ty; 13], domain = crate::Domain::$domain, shared_bytes = 96 * $bytes,
                ) |io| {
                    let slot = scratch::<$ty>(96).slice(thread_idx_x() as usize, 1);
                    slot.store(0, io.take());
                    every_order!(|order, scope| io.put(slot.$op(0, io.take(), order, scope)));
                    io.put(slot.load(0));
                }
            )*)*
            $(
                $cas_global(
                    covers = [concat!("atomic::GlobalMut<", stringify!($cas_ty), ">::atomic_compare_exchange")],
                    expects = [
                        concat!("atom.relaxed.cta.global.", $cas_ptx), concat!("atom.relaxed.gpu.global.", $cas_ptx),
                        concat!("atom.relaxed.sys.global.", $cas_ptx), concat!("atom.acquire.cta.global.", $cas_ptx),
                        concat!("atom.acquire.gpu.global.", $cas_ptx), concat!("atom.acquire.sys.global.", $cas_ptx),
                        concat!("atom.release.cta.global.", $cas_ptx), concat!("atom.release.gpu.global.", $cas_ptx),
                        concat!("atom.release.sys.global.", $cas_ptx), concat!("atom.acq_rel.cta.global.", $cas_ptx),
                        concat!("atom.acq_rel.gpu.global.", $cas_ptx), concat!("atom.acq_rel.sys.global.", $cas_ptx),
                    ],
                    in = [$cas_ty; 25], out = [$cas_ty; 13],
                ) |io| {
                    let slot = io.results().slice(12, 1);
                    slot.store(0, io.take());
                    exchange_sometimes!(io, slot);
                }

                $cas_shared(
                    covers = [concat!("atomic::Shared<", stringify!($cas_ty), ">::atomic_compare_exchange")],
                    expects = [
                        concat!("atom.relaxed.cta.shared.", $cas_ptx), concat!("atom.relaxed.gpu.shared.", $cas_ptx),
                        concat!("atom.relaxed.sys.shared.", $cas_ptx), concat!("atom.acquire.cta.shared.", $cas_ptx),
                        concat!("atom.acquire.gpu.shared.", $cas_ptx), concat!("atom.acquire.sys.shared.", $cas_ptx),
                        concat!("atom.release.cta.shared.", $cas_ptx), concat!("atom.release.gpu.shared.", $cas_ptx),
                        concat!("atom.release.sys.shared.", $cas_ptx), concat!("atom.acq_rel.cta.shared.", $cas_ptx),
                        concat!("atom.acq_rel.gpu.shared.", $cas_ptx), concat!("atom.acq_rel.sys.shared.", $cas_ptx),
                    ],
                    in = [$cas_ty; 25], out = [$cas_ty; 13], shared_bytes = 96 * $cas_bytes,
                ) |io| {
                    let slot = scratch::<$cas_ty>(96).slice(thread_idx_x() as usize, 1);
                    slot.store(0, io.take());
                    exchange_sometimes!(io, slot);
                    io.put(slot.load(0));
                }
            )*
        }
    };
}

/// Twelve compare-exchanges, about half of which find what they expect.
macro_rules! exchange_sometimes {
    ($io:ident, $slot:ident) => {
        let mut now = $io.given().load(0);
        every_order!(|order, scope| {
            let (expected, new) = ($io.take(), $io.take());
            let expected = if new.bits() & 2 == 0 { now } else { expected };
            let old = $slot.atomic_compare_exchange(0, expected, new, order, scope);
            if old == expected {
                now = new;
            }
            $io.put(old);
        });
        let _ = now;
    };
}

rmws! {
    rmw {
        u32, 4, Bits:
            atomic_add "add.u32" add_u32_global add_u32_shared,
            atomic_min "min.u32" min_u32_global min_u32_shared,
            atomic_max "max.u32" max_u32_global max_u32_shared,
            atomic_and "and.b32" and_u32_global and_u32_shared,
            atomic_or "or.b32" or_u32_global or_u32_shared,
            atomic_xor "xor.b32" xor_u32_global xor_u32_shared,
            atomic_exchange "exch.b32" exchange_u32_global exchange_u32_shared,;
        i32, 4, Bits:
            atomic_add "add.s32" add_i32_global add_i32_shared,
            atomic_min "min.s32" min_i32_global min_i32_shared,
            atomic_max "max.s32" max_i32_global max_i32_shared,
            atomic_and "and.b32" and_i32_global and_i32_shared,
            atomic_or "or.b32" or_i32_global or_i32_shared,
            atomic_xor "xor.b32" xor_i32_global xor_i32_shared,
            atomic_exchange "exch.b32" exchange_i32_global exchange_i32_shared,;
        u64, 8, Bits:
            atomic_add "add.u64" add_u64_global add_u64_shared,
            atomic_min "min.u64" min_u64_global min_u64_shared,
            atomic_max "max.u64" max_u64_global max_u64_shared,
            atomic_and "and.b64" and_u64_global and_u64_shared,
            atomic_or "or.b64" or_u64_global or_u64_shared,
            atomic_xor "xor.b64" xor_u64_global xor_u64_shared,
            atomic_exchange "exch.b64" exchange_u64_global exchange_u64_shared,;
        f32, 4, FiniteFloats:
            atomic_add "add.f32" add_f32_global add_f32_shared,;
    }
    compare_exchange {
        u32, 4: "cas.b32" compare_exchange_u32_global compare_exchange_u32_shared;
        i32, 4: "cas.b32" compare_exchange_i32_global compare_exchange_i32_shared;
        u64, 8: "cas.b64" compare_exchange_u64_global compare_exchange_u64_shared;
    }
}

//! Atomic loads and stores, one thread an address, with each order and scope.

macro_rules! accesses {
    ($($ty:ty, $bytes:literal, $ptx:literal: $global:ident $global_mut:ident $shared:ident;)*) => {
        conform! { CASES: $(
            $global(
                covers = [concat!("atomic::Global<", stringify!($ty), ">::atomic_load")],
                expects = [
                    concat!("ld.relaxed.cta.global.", $ptx), concat!("ld.relaxed.gpu.global.", $ptx),
                    concat!("ld.relaxed.sys.global.", $ptx), concat!("ld.acquire.cta.global.", $ptx),
                    concat!("ld.acquire.gpu.global.", $ptx), concat!("ld.acquire.sys.global.", $ptx),
                ],
                in = [$ty; 6], out = [$ty; 6],
            ) |io| {
                let mut index = 0;
                every_scope!([Relaxed, Acquire] |order, scope| {
                    io.put(io.given().atomic_load(index, order, scope));
                    index += 1;
                });
                let _ = index;
            }

            $global_mut(
                covers = [concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_load"),
                    concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_store")],
                expects = [
                    concat!("st.relaxed.cta.global.", $ptx), concat!("st.relaxed.gpu.global.", $ptx),
                    concat!("st.relaxed.sys.global.", $ptx), concat!("st.release.cta.global.", $ptx),
                    concat!("st.release.gpu.global.", $ptx), concat!("st.release.sys.global.", $ptx),
                    concat!("ld.relaxed.cta.global.", $ptx), concat!("ld.relaxed.gpu.global.", $ptx),
                    concat!("ld.relaxed.sys.global.", $ptx), concat!("ld.acquire.cta.global.", $ptx),
                    concat!("ld.acquire.gpu.global.", $ptx), concat!("ld.acquire.sys.global.", $ptx),
                ],
                in = [$ty; 12], out = [$ty; 13],
            ) |io| {
                let slot = io.results().slice(12, 1);
                every_scope!([Relaxed, Release] |order, scope| {
                    slot.atomic_store(0, io.take(), order, scope);
                    io.put(slot.atomic_load(0, Order::Relaxed, Scope::Block));
                });
                every_scope!([Relaxed, Acquire] |order, scope| {
                    slot.atomic_store(0, io.take(), Order::Relaxed, Scope::Block);
                    io.put(slot.atomic_load(0, order, scope));
                });
            }

            $shared(
                covers = [concat!("atomic::Shared<", stringify!($ty), ">::atomic_load"),
                    concat!("atomic::Shared<", stringify!($ty), ">::atomic_store")],
                expects = [
                    concat!("st.relaxed.cta.shared.", $ptx), concat!("st.relaxed.gpu.shared.", $ptx),
                    concat!("st.relaxed.sys.shared.", $ptx), concat!("st.release.cta.shared.", $ptx),
                    concat!("st.release.gpu.shared.", $ptx), concat!("st.release.sys.shared.", $ptx),
                    concat!("ld.relaxed.cta.shared.", $ptx), concat!("ld.relaxed.gpu.shared.", $ptx),
                    concat!("ld.relaxed.sys.shared.", $ptx), concat!("ld.acquire.cta.shared.", $ptx),
                    concat!("ld.acquire.gpu.shared.", $ptx), concat!("ld.acquire.sys.shared.", $ptx),
                ],
                in = [$ty; 12], out = [$ty; 12], shared_bytes = 96 * $bytes,
            ) |io| {
                let slot = scratch::<$ty>(96).slice(thread_idx_x() as usize, 1);
                every_scope!([Relaxed, Release] |order, scope| {
                    slot.atomic_store(0, io.take(), order, scope);
                    io.put(slot.atomic_load(0, Order::Relaxed, Scope::Block));
                });
                every_scope!([Relaxed, Acquire] |order, scope| {
                    slot.atomic_store(0, io.take(), Order::Relaxed, Scope::Block);
                    io.put(slot.atomic_load(0, order, scope));
                });
            }
        )* }
    };
}

accesses! {
    u32, 4, "b32": atomic_load_u32 atomic_global_u32 atomic_shared_u32;
    i32, 4, "b32": atomic_load_i32 atomic_global_i32 atomic_shared_i32;
    u64, 8, "b64": atomic_load_u64 atomic_global_u64 atomic_shared_u64;
    f32, 4, "b32": atomic_load_f32 atomic_global_f32 atomic_shared_f32;
}

//! One element of each type.

macro_rules! elements {
    ($($ty:ty, $len:literal, $bytes:literal, $ptx:literal: $global:ident $global_mut:ident $shared:ident;)*) => {
        conform! { CASES: $(
            $global(
                covers = [concat!("view::Global<", stringify!($ty), ">::load"),
                    concat!("view::GlobalMut<", stringify!($ty), ">::store")],
                expects = [concat!("ld.global.", $ptx), concat!("st.global.", $ptx)],
                in = [$ty; $len], out = [$ty; $len],
            ) |io| {
                let mut index = 0;
                while index < $len {
                    io.results().store(index, io.given().load($len - 1 - index));
                    index += 1;
                }
            }

            // Stores to its own row, then reads a neighbour's.
            $global_mut(
                covers = [concat!("view::GlobalMut<", stringify!($ty), ">::load"),
                    concat!("view::GlobalMut<", stringify!($ty), ">::store")],
                expects = [concat!("ld.global.", $ptx), concat!("st.global.", $ptx)],
                in = [$ty; $len], out = [$ty; 2 * $len],
            ) |io| {
                let mut index = 0;
                while index < $len {
                    io.results().store(index, io.given().load(index));
                    index += 1;
                }
                sync_threads();
                let neighbour = io.results_of(io.first_of_block() + (thread_idx_x() as usize + 37) % 96);
                while index < 2 * $len {
                    io.results().store(index, neighbour.load(index - $len));
                    index += 1;
                }
            }

            $shared(
                covers = [concat!("view::Shared<", stringify!($ty), ">::load"),
                    concat!("view::Shared<", stringify!($ty), ">::store")],
                expects = [concat!("ld.shared.", $ptx), concat!("st.shared.", $ptx)],
                in = [$ty; $len], out = [$ty; $len], shared_bytes = 96 * $len * $bytes,
            ) |io| {
                let elements = scratch::<$ty>(96 * $len);
                let mut index = 0;
                while index < $len {
                    elements.store(index * 96 + thread_idx_x() as usize, io.take());
                    index += 1;
                }
                sync_threads();
                let neighbour = (thread_idx_x() as usize + 37) % 96;
                while index > 0 {
                    index -= 1;
                    io.put(elements.load(index * 96 + neighbour));
                }
            }
        )* }
    };
}

elements! {
    u8, 4, 1, "b8": global_u8 global_mut_u8 shared_u8;
    u16, 4, 2, "b16": global_u16 global_mut_u16 shared_u16;
    u32, 3, 4, "b32": global_u32 global_mut_u32 shared_u32;
    u64, 3, 8, "b64": global_u64 global_mut_u64 shared_u64;
    u128, 3, 16, "v2.b64": global_u128 global_mut_u128 shared_u128;
    i8, 4, 1, "b8": global_i8 global_mut_i8 shared_i8;
    i16, 4, 2, "b16": global_i16 global_mut_i16 shared_i16;
    i32, 3, 4, "b32": global_i32 global_mut_i32 shared_i32;
    i64, 3, 8, "b64": global_i64 global_mut_i64 shared_i64;
    f32, 3, 4, "b32": global_f32 global_mut_f32 shared_f32;
    U32x4, 3, 16, "v4.b32": global_u32x4 global_mut_u32x4 shared_u32x4;
}

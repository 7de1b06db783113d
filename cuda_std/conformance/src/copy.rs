//! Asynchronous copies.

macro_rules! copies {
    ($($ty:ty, $bytes:literal, $ptx:literal: $copy:ident $or_zero:ident;)* { $($rest:tt)* }) => {
        conform! { CASES:
            $(
                // Four copies a thread; each is read by a neighbour.
                $copy(
                    covers = [concat!("copy::copy_async<", stringify!($ty), ">"), "copy::wait_all"],
                    expects = [concat!("cp.async.", $ptx), "cp.async.wait_all"],
                    in = [$ty; 4], out = [$ty; 4], shared_bytes = 4 * 96 * $bytes,
                ) |io| {
                    let tile = scratch::<$ty>(4 * 96);
                    let at = thread_idx_x() as usize;
                    let mut index = 0;
                    while index < 4 {
                        copy::copy_async(tile, 96 * index + at, io.given(), 3 - index);
                        index += 1;
                    }
                    copy::wait_all();
                    sync_threads();
                    let mut index = 0;
                    while index < 4 {
                        io.put(tile.load(96 * index + (at + 37) % 96));
                        index += 1;
                    }
                }

                // Over what was there before; a source that is not read may lie anywhere.
                $or_zero(
                    covers = [concat!("copy::copy_async_or_zero<", stringify!($ty), ">"), "copy::wait_all"],
                    expects = [concat!("cp.async.", $ptx), "cp.async.wait_all"],
                    in = [$ty; 5], out = [$ty; 4], shared_bytes = 4 * 96 * $bytes,
                ) |io| {
                    let tile = scratch::<$ty>(4 * 96);
                    let at = thread_idx_x() as usize;
                    let mut index = 0;
                    while index < 4 {
                        tile.store(96 * index + at, io.given().load(4));
                        index += 1;
                    }
                    let valid = io.given().load(4).bits();
                    let mut index = 0;
                    while index < 4 {
                        let valid = valid >> index & 1 == 1;
                        let from = if valid { index } else { index << 40 | 0x1000 };
                        copy::copy_async_or_zero(tile, 96 * index + at, io.given(), from, valid);
                        index += 1;
                    }
                    copy::wait_all();
                    sync_threads();
                    let mut index = 0;
                    while index < 4 {
                        io.put(tile.load(96 * index + (at + 37) % 96));
                        index += 1;
                    }
                }
            )*
            $($rest)*
        }
    };
}

copies! {
    u32, 4, "ca.shared.global": copy_u32 copy_u32_or_zero;
    f32, 4, "ca.shared.global": copy_f32 copy_f32_or_zero;
    u64, 8, "ca.shared.global": copy_u64 copy_u64_or_zero;
    U32x4, 16, "cg.shared.global": copy_u32x4 copy_u32x4_or_zero;
{
    // Four groups under way, the last not closed; a wait covers the thread's own copies, without a barrier.
    copy_groups(
        covers = ["copy::copy_async<u32>", "copy::commit_group", "copy::wait_group", "copy::wait_all"],
        expects = ["cp.async.commit_group", "cp.async.wait_group 2", "cp.async.wait_group 1",
            "cp.async.wait_group 0", "cp.async.wait_all"],
        in = [u32; 5], out = [u32; 5], shared_bytes = 5 * 96 * 4,
    ) |io| {
        let tile = scratch::<u32>(5 * 96);
        let at = thread_idx_x() as usize;
        copy::copy_async(tile, at, io.given(), 0);
        copy::commit_group();
        copy::copy_async(tile, 96 + at, io.given(), 1);
        copy::copy_async(tile, 2 * 96 + at, io.given(), 2);
        copy::commit_group();
        copy::copy_async_or_zero(tile, 3 * 96 + at, io.given(), 3, !at.is_multiple_of(3));
        copy::commit_group();
        copy::copy_async(tile, 4 * 96 + at, io.given(), 4);
        copy::wait_group::<2>();
        io.put(tile.load(at));
        copy::wait_group::<1>();
        io.put(tile.load(96 + at));
        io.put(tile.load(2 * 96 + at));
        copy::wait_group::<0>();
        io.put(tile.load(3 * 96 + at));
        copy::wait_all();
        io.put(tile.load(4 * 96 + at));
    }

    // A ring of three tiles, two of them on their way while one is read by the neighbours.
    copy_ring(
        covers = ["copy::copy_async<U32x4>", "copy::commit_group", "copy::wait_group"],
        expects = ["cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group 2"],
        in = [U32x4; 8], out = [U32x4; 8], shared_bytes = 3 * 96 * 16,
    ) |io| {
        let ring = scratch::<U32x4>(3 * 96);
        let at = thread_idx_x() as usize;
        let mut next = 0;
        while next < 2 {
            copy::copy_async(ring, next * 96 + at, io.given(), next);
            copy::commit_group();
            next += 1;
        }
        let mut step = 0;
        while step < 8 {
            if next < 8 {
                copy::copy_async(ring, next % 3 * 96 + at, io.given(), next);
                next += 1;
            }
            // A group a step, empty towards the end.
            copy::commit_group();
            copy::wait_group::<2>();
            sync_threads();
            io.put(ring.load(step % 3 * 96 + (at + 37) % 96));
            sync_threads();
            step += 1;
        }
    }
} }

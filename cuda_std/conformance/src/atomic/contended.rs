//! Many threads at one address, where the result does not depend on who comes first.

/// All threads of the block at nine cells: sums, least, greatest, bits, a sum by compare-exchange, and exchanges, where all
/// that ever was in the cell leaves it once. The cells then are the results.
macro_rules! at_cells {
    ($io:ident, $cells:ident, $scope:ident) => {
        let start = $io.take();
        if thread_idx_x() == 0 {
            let mut cell = 0;
            while cell < 7 {
                $cells.store(cell, start);
                cell += 1;
            }
            $cells.store(7, start);
            $cells.store(8, start);
        }
        sync_threads();
        let (order, scope) = (Order::Relaxed, Scope::$scope);
        $cells.atomic_add(0, $io.take(), order, scope);
        $cells.atomic_min(1, $io.take(), order, scope);
        $cells.atomic_max(2, $io.take(), order, scope);
        $cells.atomic_and(3, $io.take() | 0x00ff_00ff, order, scope);
        $cells.atomic_or(4, $io.take() & 0x0f0f_0f0f, order, scope);
        $cells.atomic_xor(5, $io.take(), order, scope);
        let (more, mut seen) = ($io.take(), start);
        loop {
            let old = $cells.atomic_compare_exchange(6, seen, seen.wrapping_add(more), order, scope);
            if old == seen {
                break;
            }
            seen = old;
        }
        let left = $cells.atomic_exchange(7, $io.take(), order, scope);
        $cells.atomic_add(8, left, order, scope);
        sync_threads();
        if thread_idx_x() == 0 {
            let last = $cells.load(7);
            $cells.store(8, $cells.load(8).wrapping_add(last));
            $cells.store(7, start);
        }
    };
}

macro_rules! contended {
    ($($ty:ty, $bytes:literal, $types:literal $bits:literal: $global:ident $shared:ident;)* { $($rest:tt)* }) => {
        conform! { CASES:
            $(
                // Where the result of an atomic is unused, LLVM may leave it so to ptxas.
                $global(
                    covers = [
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_add"),
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_min"),
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_max"),
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_and"),
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_or"),
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_xor"),
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_exchange"),
                        concat!("atomic::GlobalMut<", stringify!($ty), ">::atomic_compare_exchange"),
                    ],
                    expects = [
                        concat!("atom.relaxed.gpu.global.add.", $types), concat!("atom.relaxed.gpu.global.min.", $types),
                        concat!("atom.relaxed.gpu.global.max.", $types), concat!("atom.relaxed.gpu.global.and.", $bits),
                        concat!("atom.relaxed.gpu.global.or.", $bits), concat!("atom.relaxed.gpu.global.xor.", $bits),
                        concat!("atom.relaxed.gpu.global.exch.", $bits), concat!("atom.relaxed.gpu.global.cas.", $bits),
                    ],
                    in = [$ty; 9], out = [$ty; 9],
                ) |io| {
                    let cells = io.results_of(io.first_of_block());
                    at_cells!(io, cells, Device);
                }

                $shared(
                    covers = [
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_add"),
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_min"),
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_max"),
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_and"),
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_or"),
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_xor"),
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_exchange"),
                        concat!("atomic::Shared<", stringify!($ty), ">::atomic_compare_exchange"),
                    ],
                    expects = [
                        concat!("atom.relaxed.cta.shared.add.", $types), concat!("atom.relaxed.cta.shared.min.", $types),
                        concat!("atom.relaxed.cta.shared.max.", $types), concat!("atom.relaxed.cta.shared.and.", $bits),
                        concat!("atom.relaxed.cta.shared.or.", $bits), concat!("atom.relaxed.cta.shared.xor.", $bits),
                        concat!("atom.relaxed.cta.shared.exch.", $bits), concat!("atom.relaxed.cta.shared.cas.", $bits),
                    ],
                    in = [$ty; 9], out = [$ty; 9], shared_bytes = 9 * $bytes,
                ) |io| {
                    let cells = scratch::<$ty>(9);
                    at_cells!(io, cells, Block);
                    if thread_idx_x() == 0 {
                        let mut cell = 0;
                        while cell < 9 {
                            io.put(cells.load(cell));
                            cell += 1;
                        }
                    }
                }
            )*
            $($rest)*
        }
    };
}

contended! {
    u32, 4, "u32" "b32": contended_u32_global contended_u32_shared;
    i32, 4, "s32" "b32": contended_i32_global contended_i32_shared;
    u64, 8, "u64" "b64": contended_u64_global contended_u64_shared;
{
    // All threads of all blocks at cells that start as 0.
    contended_by_the_grid(
        covers = ["atomic::GlobalMut<u32>::atomic_add", "atomic::GlobalMut<u32>::atomic_max",
            "atomic::GlobalMut<u32>::atomic_or", "atomic::GlobalMut<u32>::atomic_xor"],
        expects = ["atom.relaxed.gpu.global.add.u32", "atom.relaxed.sys.global.add.u32",
            "atom.relaxed.gpu.global.max.u32", "atom.relaxed.sys.global.or.b32", "atom.relaxed.gpu.global.xor.b32"],
        in = [u32; 5], out = [u32; 5], grid = [7, 1, 1],
    ) |io| {
        let cells = io.results_of(0);
        cells.atomic_add(0, io.take(), Order::Relaxed, Scope::Device);
        cells.atomic_add(1, io.take(), Order::Relaxed, Scope::System);
        cells.atomic_max(2, io.take() >> 3, Order::Relaxed, Scope::Device);
        cells.atomic_or(3, io.take() & 0x0101_0101, Order::Relaxed, Scope::System);
        cells.atomic_xor(4, io.take(), Order::Relaxed, Scope::Device);
    }

    // Sums that are exact in any order.
    contended_f32_global(
        covers = ["atomic::GlobalMut<f32>::atomic_add"],
        expects = ["atom.relaxed.gpu.global.add.f32", "atom.relaxed.sys.global.add.f32"],
        in = [f32; 2], out = [f32; 2], domain = crate::Domain::SmallFloats, grid = [7, 1, 1],
    ) |io| {
        io.results_of(0).atomic_add(0, io.take(), Order::Relaxed, Scope::Device);
        io.results_of(0).atomic_add(1, io.take(), Order::Relaxed, Scope::System);
    }

    contended_f32_shared(
        covers = ["atomic::Shared<f32>::atomic_add"], expects = ["atom.relaxed.cta.shared.add.f32"],
        in = [f32; 2], out = [f32; 1], domain = crate::Domain::SmallFloats, shared_bytes = 4,
    ) |io| {
        let sum = scratch::<f32>(1);
        let start = io.take();
        if thread_idx_x() == 0 {
            sum.store(0, start);
        }
        sync_threads();
        sum.atomic_add(0, io.take(), Order::Relaxed, Scope::Block);
        sync_threads();
        io.put(sum.load(0));
    }
} }

//! Matrix products of a warpgroup.
//!
//! Elements are integers of -8 to 7 and sums stay below 2^14: every product and every sum is exact, so the order does not count.

/// The next of the thread's input, as four pairs of small integers in bf16.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
macro_rules! pairs {
    ($io:ident) => {{
        let pair = |word: u32| {
            let number = |bits: u32| (bits & 15) as f32 - 8.0;
            bf16::pack(number(word >> 3), number(word >> 11))
        };
        let U32x4 { x, y, z, w } = $io.take();
        U32x4 { x: pair(x), y: pair(y), z: pair(z), w: pair(w) }
    }};
}

/// The matrix of `rows` rows and `blocks` blocks of 64 columns from byte `first` of shared memory, filled from the block's input.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
macro_rules! filled {
    ($io:ident, $first:expr, $rows:expr, $blocks:expr) => {{
        let (rows, blocks): (usize, usize) = ($rows, $blocks);
        let words = shared::dynamic::<U32x4>($first, 8 * rows * blocks);
        let mut at = thread_idx_x() as usize;
        while at < 8 * rows * blocks {
            let (block, row, word) = (at / 8 / rows, at / 8 % rows, at % 8);
            words.store(8 * rows * block + wgmma::Matrix::place(row, word), pairs!($io));
            at += block_dim_x() as usize;
        }
        wgmma::Matrix::new(words, 8 * rows)
    }};
}

/// Rules for the two places of a left side: what it is made of, its slice for a step, and what a fence or a wait holds.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
macro_rules! left {
    (shared: made of $io:ident) => {
        filled!($io, 0, 64, 2)
    };
    (shared: $left:ident for $step:ident) => {
        $left.columns($step)
    };
    (shared: $left:ident with $sums:ident) => {
        &mut $sums
    };
    (registers: made of $io:ident) => {{
        let parts = || pairs!($io).to_array();
        [parts(), parts(), parts(), parts(), parts(), parts(), parts(), parts()]
    }};
    (registers: $left:ident for $step:ident) => {
        $left[$step]
    };
    (registers: $left:ident with $sums:ident) => {
        (&mut $sums, &mut $left)
    };
}

/// The same for the ways of a right side to lie, 128 by `N`.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
macro_rules! right {
    (columns: $columns:literal of $io:ident) => {
        filled!($io, 16384, $columns, 2)
    };
    (rows: $columns:literal of $io:ident) => {
        filled!($io, 16384, 128, $columns / 64)
    };
}

/// Small integers of four sums each, as a left side's columns: those of two groups of 8 columns stand where 16 of a left side do.
#[cfg(any(not(target_arch = "nvptx64"), sm_90a))]
macro_rules! narrowed {
    ($sums:ident, $step:expr) => {{
        let pair = |at: usize| {
            let number = |sum: f32| ((sum as i32) & 15) as f32 - 8.0;
            bf16::pack(number($sums[at]), number($sums[at + 1]))
        };
        let at = 8 * $step;
        [pair(at), pair(at + 2), pair(at + 4), pair(at + 6)]
    }};
}

macro_rules! products {
    ($($name:ident: $columns:literal, $left:ident, $right:ident, $shape:literal;)* { $($rest:tt)* }) => {
        conform! { sm_90a CASES: $(
            // Eight steps that add to small integers, then one that replaces the sums.
            $name(
                covers = ["wgmma::Matrix::new", "wgmma::Matrix::place", concat!("wgmma::Matrix::", stringify!($right)),
                    "wgmma::Matrix::columns", "wgmma::fence", "wgmma::multiply", "wgmma::multiply_add", "wgmma::commit_group",
                    "wgmma::wait_group"],
                expects = ["wgmma.fence.sync.aligned",
                    concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.bf16.bf16"), "wgmma.commit_group.sync.aligned",
                    "wgmma.wait_group.sync.aligned"],
                in = [U32x4; 8 + $columns / 8], out = [f32; $columns], block = [128, 1, 1],
                shared_bytes = 16384 + 256 * $columns,
            ) |io| {
                #[allow(unused_mut, reason = "where it is in registers")]
                let mut left = left!($left: made of io);
                let right = right!($right: $columns of io);
                bulk::fence();
                sync_threads();
                let mut sums = [0.0; $columns / 2];
                let mut at = 0;
                while at < $columns / 2 {
                    sums[at] = (at as u32 + 3 * thread_idx_x()) as f32 - 200.0;
                    at += 1;
                }
                wgmma::fence(left!($left: left with sums));
                let mut step = 0;
                while step < 8 {
                    wgmma::multiply_add(&mut sums, left!($left: left for step), right.$right(step));
                    step += 1;
                }
                wgmma::commit_group();
                wgmma::wait_group::<0>(left!($left: left with sums));
                let mut at = 0;
                while at < $columns / 2 {
                    io.put(sums[at]);
                    at += 1;
                }
                wgmma::fence(left!($left: left with sums));
                let step = 5;
                wgmma::multiply(&mut sums, left!($left: left for step), right.$right(step));
                wgmma::commit_group();
                wgmma::wait_group::<0>(left!($left: left with sums));
                let mut at = 0;
                while at < $columns / 2 {
                    io.put(sums[at]);
                    at += 1;
                }
            }
        )* $($rest)* }
    };
}

products! {
    wgmma_n64_shared_columns: 64, shared, columns, "m64n64k16";
    wgmma_n64_shared_rows: 64, shared, rows, "m64n64k16";
    wgmma_n64_registers_columns: 64, registers, columns, "m64n64k16";
    wgmma_n64_registers_rows: 64, registers, rows, "m64n64k16";
    wgmma_n128_shared_columns: 128, shared, columns, "m64n128k16";
    wgmma_n128_shared_rows: 128, shared, rows, "m64n128k16";
    wgmma_n128_registers_columns: 128, registers, columns, "m64n128k16";
    wgmma_n128_registers_rows: 128, registers, rows, "m64n128k16";
{
    // An attention's loop, with small integers for the softmax: two warpgroups, four tiles of 64 keys that are values too. The scores of a tile
    // are under way while the one before is weighed, and its weighing while the next scores become weights.
    wgmma_attention(
        covers = ["wgmma::Matrix::from_row", "wgmma::hold", "wgmma::fence", "wgmma::multiply", "wgmma::multiply_add", "wgmma::commit_group", "wgmma::wait_group"],
        expects = ["wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "wgmma.wait_group.sync.aligned"],
        in = [U32x4; 12], out = [f32; 32], block = [256, 1, 1], shared_bytes = 49152,
    ) |io| {
        let queries = filled!(io, 0, 128, 1);
        let tiles = filled!(io, 16384, 256, 1);
        bulk::fence();
        sync_threads();
        // The same in all lanes, as the compiler sees from the shuffle: descriptors are then worked out once a warp.
        let warpgroup = warp_shuffle_idx(FULL_MASK, thread_idx_x() / 128, 0, 32);
        let own = queries.from_row(64 * warpgroup as usize);
        let (mut scores, mut out) = ([0.0; 32], [0.0; 32]);
        wgmma::fence((&mut scores, &mut out));
        wgmma::multiply(&mut scores, own.columns(0), tiles.columns(0));
        wgmma::multiply_add(&mut scores, own.columns(1), tiles.columns(1));
        wgmma::multiply_add(&mut scores, own.columns(2), tiles.columns(2));
        wgmma::multiply_add(&mut scores, own.columns(3), tiles.columns(3));
        wgmma::commit_group();
        wgmma::wait_group::<0>(&mut scores);
        let mut weights = [narrowed!(scores, 0), narrowed!(scores, 1), narrowed!(scores, 2), narrowed!(scores, 3)];
        let mut tile = 1;
        while tile < 4 {
            let (keys, values) = (tiles.from_row(64 * tile), tiles.from_row(64 * (tile - 1)));
            wgmma::fence((&mut scores, (&mut out, &mut weights)));
            wgmma::multiply(&mut scores, own.columns(0), keys.columns(0));
            wgmma::multiply_add(&mut scores, own.columns(1), keys.columns(1));
            wgmma::multiply_add(&mut scores, own.columns(2), keys.columns(2));
            wgmma::multiply_add(&mut scores, own.columns(3), keys.columns(3));
            wgmma::commit_group();
            wgmma::multiply_add(&mut out, weights[0], values.rows(0));
            wgmma::multiply_add(&mut out, weights[1], values.rows(1));
            wgmma::multiply_add(&mut out, weights[2], values.rows(2));
            wgmma::multiply_add(&mut out, weights[3], values.rows(3));
            wgmma::commit_group();
            wgmma::wait_group::<1>(&mut scores);
            let mut next = [narrowed!(scores, 0), narrowed!(scores, 1), narrowed!(scores, 2), narrowed!(scores, 3)];
            wgmma::hold(&mut next);
            wgmma::wait_group::<0>((&mut out, &mut weights));
            weights = next;
            tile += 1;
        }
        let values = tiles.from_row(192);
        wgmma::fence((&mut out, &mut weights));
        wgmma::multiply_add(&mut out, weights[0], values.rows(0));
        wgmma::multiply_add(&mut out, weights[1], values.rows(1));
        wgmma::multiply_add(&mut out, weights[2], values.rows(2));
        wgmma::multiply_add(&mut out, weights[3], values.rows(3));
        wgmma::commit_group();
        wgmma::wait_group::<0>((&mut out, &mut weights));
        let mut at = 0;
        while at < 32 {
            io.put(out[at]);
            at += 1;
        }
    }
} }

//! Shuffles: each type, each width, all lanes and some.

/// Six rounds, one a width: all 32 lanes; then two sets of whole groups that pass each other by. The lane operand may
/// differ from lane to lane.
macro_rules! every_width {
    ($io:ident, $shuffle:ident, |$operand:ident, $width:ident| $lane:expr) => {
        let mut round = 0;
        while round < 6 {
            let $width = 1u32 << round;
            let (value, $operand) = ($io.take(), $io.take().bits());
            $io.put($shuffle(FULL_MASK, value, $lane, $width));
            let (value, $operand) = ($io.take(), $io.take().bits());
            let mask = own(whole_groups($io.take_of_warp().bits(), $width));
            $io.put($shuffle(mask, value, $lane, $width));
            round += 1;
        }
    };
}

macro_rules! shuffles {
    ($($ty:ty: $idx:ident $xor:ident $up:ident $down:ident;)* { $($rest:tt)* }) => {
        conform! { CASES:
            $(
                $idx(
                    covers = [concat!("warp::warp_shuffle_idx<", stringify!($ty), ">")],
                    expects = ["shfl.sync.idx.b32"], in = [$ty; 30], out = [$ty; 12],
                ) |io| {
                    every_width!(io, warp_shuffle_idx, |operand, width| operand);
                }
                $xor(
                    covers = [concat!("warp::warp_shuffle_xor<", stringify!($ty), ">")],
                    expects = ["shfl.sync.bfly.b32"], in = [$ty; 30], out = [$ty; 12],
                ) |io| {
                    every_width!(io, warp_shuffle_xor, |operand, width| operand % width);
                }
                $up(
                    covers = [concat!("warp::warp_shuffle_up<", stringify!($ty), ">")],
                    expects = ["shfl.sync.up.b32"], in = [$ty; 30], out = [$ty; 12],
                ) |io| {
                    every_width!(io, warp_shuffle_up, |operand, width| operand % 32);
                }
                $down(
                    covers = [concat!("warp::warp_shuffle_down<", stringify!($ty), ">")],
                    expects = ["shfl.sync.down.b32"], in = [$ty; 30], out = [$ty; 12],
                ) |io| {
                    every_width!(io, warp_shuffle_down, |operand, width| operand % 32);
                }
            )*
            $($rest)*
        }
    };
}

shuffles! {
    u32: shuffle_idx_u32 shuffle_xor_u32 shuffle_up_u32 shuffle_down_u32;
    i32: shuffle_idx_i32 shuffle_xor_i32 shuffle_up_i32 shuffle_down_i32;
    f32: shuffle_idx_f32 shuffle_xor_f32 shuffle_up_f32 shuffle_down_f32;
    u64: shuffle_idx_u64 shuffle_xor_u64 shuffle_up_u64 shuffle_down_u64;
{
    // Any set of lanes; each names one of its own set.
    shuffle_idx_of_some(
        covers = ["warp::warp_shuffle_idx<u32>"], expects = ["shfl.sync.idx.b32"],
        in = [u32; 12], out = [u32; 4],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            let mask = own(io.take_of_warp());
            let start = io.take() % 32;
            let lane = (start + mask.rotate_right(start).trailing_zeros()) % 32;
            io.put(warp_shuffle_idx(mask, io.take(), lane, WARP_SIZE));
            round += 1;
        }
    }

    // In a branch that only the lanes of the mask take; the others have branches of their own.
    shuffle_in_branches(
        covers = ["warp::warp_shuffle_xor<u32>", "warp::warp_shuffle_down<u32>"],
        expects = ["shfl.sync.bfly.b32", "shfl.sync.down.b32"],
        in = [u32; 2], out = [u32; 2],
    ) |io| {
        let mask = whole_groups(io.take_of_warp(), 4);
        let value = io.take();
        if mask >> lane_id() & 1 == 1 {
            io.put(warp_shuffle_xor(mask, value, 3, 4));
            io.put(1);
        } else {
            io.put(warp_shuffle_down(!mask, value, 1, 4));
            io.put(2);
        }
    }
} }

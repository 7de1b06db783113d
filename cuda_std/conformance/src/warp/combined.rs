//! What `cuda_std` makes of shuffles.

conform! { CASES:
    warp_sum_f32(
        covers = ["warp::warp_sum"], expects = ["shfl.sync.bfly.b32", "add.rn.f32"],
        in = [f32; 4], out = [f32; 4], domain = crate::Domain::FiniteFloats,
    ) |io| {
        let mut round = 0;
        while round < 4 {
            io.put(warp_sum(io.take()));
            round += 1;
        }
    }

    warp_max_f32(
        covers = ["warp::warp_max"], expects = ["shfl.sync.bfly.b32", "max.f32"],
        in = [f32; 4], out = [f32; 4], domain = crate::Domain::Floats,
    ) |io| {
        let mut round = 0;
        while round < 4 {
            io.put(warp_max(io.take()));
            round += 1;
        }
    }

    // The hard ones: zeroes of either sign, and NaN, which counts as less than anything else.
    warp_max_of_specials(
        covers = ["warp::warp_max"], expects = ["shfl.sync.bfly.b32", "max.f32"],
        in = [u32; 5], out = [u32; 4],
    ) |io| {
        let kinds = io.take_of_warp();
        let mut round = 0;
        while round < 4 {
            let word = io.take();
            let value = match kinds >> (2 * round) & 3 {
                0 => word & 0x8000_0000,
                1 => word | 0x7f80_0001,
                2 => word & 0x8000_0003,
                _ => word,
            };
            io.put(warp_max(f32::from_bits(value)).to_bits());
            round += 1;
        }
    }

    warp_inclusive_scan(
        covers = ["warp::warp_inclusive_scan_add"], expects = ["shfl.sync.up.b32"],
        in = [u32; 4], out = [u32; 4],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            io.put(warp_inclusive_scan_add(io.take()));
            round += 1;
        }
    }

    warp_exclusive_scan(
        covers = ["warp::warp_exclusive_scan_add"], expects = ["shfl.sync.up.b32"],
        in = [u32; 4], out = [u32; 4],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            io.put(warp_exclusive_scan_add(io.take()));
            round += 1;
        }
    }
}

//! Votes, matches, reductions, and who is there.

macro_rules! collectives {
    (reduce { $($reduce:ident: $function:ident = $ptx:literal;)* } $($rest:tt)*) => {
        conform! { CASES:
            $(
                // All lanes, then two sets that pass each other by.
                $reduce(
                    covers = [concat!("warp::", stringify!($function))], expects = [$ptx],
                    in = [u32; 12], out = [u32; 8],
                ) |io| {
                    let mut round = 0;
                    while round < 4 {
                        let value = io.take();
                        io.put($function(FULL_MASK, value));
                        let mask = own(io.take_of_warp());
                        io.put($function(mask, io.take()));
                        round += 1;
                    }
                }
            )*
            $($rest)*
        }
    };
}

collectives! {
    reduce {
        reduce_add: warp_reduce_add = "redux.sync.add.u32";
        reduce_min: warp_reduce_min = "redux.sync.min.u32";
        reduce_max: warp_reduce_max = "redux.sync.max.u32";
        reduce_and: warp_reduce_and = "redux.sync.and.b32";
        reduce_or: warp_reduce_or = "redux.sync.or.b32";
        reduce_xor: warp_reduce_xor = "redux.sync.xor.b32";
    }

    lane_id_along_x(covers = ["warp::lane_id"], expects = ["%laneid"], in = [u32; 1], out = [u32; 1]) |io| {
        io.put(lane_id());
    }

    lane_id_in_space(
        covers = ["warp::lane_id"], expects = ["%laneid"],
        in = [u32; 1], out = [u32; 1], block = [5, 3, 4], grid = [1, 2, 1],
    ) |io| {
        let io = io.in_space();
        io.put(lane_id());
    }

    // Where lanes are sure to run together: a kernel's first instruction, with a last warp of half the lanes. None leaves
    // before all have looked.
    activemask_at_start(
        covers = ["warp::activemask"], expects = ["activemask.b32"],
        in = [u32; 1], out = [u32; 1], block = [80, 1, 1],
    ) |io| {
        let lanes = activemask();
        sync_threads();
        io.put(lanes);
    }

    // Each lane hands words to others of its set through shared memory.
    sync_warp_of_some(
        covers = ["warp::sync_warp"], expects = ["bar.warp.sync"],
        in = [u32; 12], out = [u32; 4], shared_bytes = 384,
    ) |io| {
        let words = scratch::<u32>(96);
        let warp = thread_idx_x() - lane_id();
        let mut round = 0;
        while round < 4 {
            let mask = own(io.take_of_warp());
            let start = io.take() % 32;
            let lane = (start + mask.rotate_right(start).trailing_zeros()) % 32;
            words.store(thread_idx_x() as usize, io.take());
            sync_warp(mask);
            io.put(words.load((warp + lane) as usize));
            sync_warp(mask);
            // The next round has other sets.
            sync_warp(FULL_MASK);
            round += 1;
        }
    }

    // Predicates that nearly all lanes agree on.
    vote_all(
        covers = ["warp::warp_vote_all"], expects = ["vote.sync.all.pred"],
        in = [u32; 8], out = [u32; 8],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            let word = io.take();
            io.put(warp_vote_all(FULL_MASK, word & 0x1f00 != 0x100).into());
            let mask = own(io.take_of_warp());
            io.put(warp_vote_all(mask, word & 0xf != 1).into());
            round += 1;
        }
    }

    vote_any(
        covers = ["warp::warp_vote_any"], expects = ["vote.sync.any.pred"],
        in = [u32; 8], out = [u32; 8],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            let word = io.take();
            io.put(warp_vote_any(FULL_MASK, word & 0x1f00 == 0x100).into());
            let mask = own(io.take_of_warp());
            io.put(warp_vote_any(mask, word & 0xf == 1).into());
            round += 1;
        }
    }

    vote_ballot(
        covers = ["warp::warp_vote_ballot"], expects = ["vote.sync.ballot.b32"],
        in = [u32; 8], out = [u32; 8],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            let word = io.take();
            io.put(warp_vote_ballot(FULL_MASK, word & 1 == 1));
            let mask = own(io.take_of_warp());
            io.put(warp_vote_ballot(mask, word & 2 == 2));
            round += 1;
        }
    }

    match_any_u32(
        covers = ["warp::warp_match_any<u32>"], expects = ["match.any.sync.b32"],
        in = [u32; 12], out = [u32; 8],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            io.put(warp_match_any(FULL_MASK, io.take() % 5));
            let mask = own(io.take_of_warp());
            io.put(warp_match_any(mask, io.take() & 0xc000_0001));
            round += 1;
        }
    }

    match_any_u64(
        covers = ["warp::warp_match_any<u64>"], expects = ["match.any.sync.b64"],
        in = [u64; 12], out = [u32; 8],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            io.put(warp_match_any(FULL_MASK, io.take() % 5));
            let mask = own(io.take_of_warp().bits());
            io.put(warp_match_any(mask, io.take() & 0x8000_0001_0000_0001));
            round += 1;
        }
    }

    // Values that nearly all lanes agree on.
    match_all_u32(
        covers = ["warp::warp_match_all<u32>"], expects = ["match.all.sync.b32"],
        in = [u32; 16], out = [u32; 16],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            let value = io.take_of_warp() ^ u32::from(io.take() & 0x1f00 == 0x100) << 31;
            let (lanes, agreed) = warp_match_all(FULL_MASK, value);
            io.put(lanes);
            io.put(agreed.into());
            let mask = own(io.take_of_warp());
            let value = value ^ u32::from(io.take() & 0x1f == 1);
            let (lanes, agreed) = warp_match_all(mask, value);
            io.put(lanes);
            io.put(agreed.into());
            round += 1;
        }
    }

    match_all_u64(
        covers = ["warp::warp_match_all<u64>"], expects = ["match.all.sync.b64"],
        in = [u64; 16], out = [u32; 16],
    ) |io| {
        let mut round = 0;
        while round < 4 {
            let value = io.take_of_warp() ^ u64::from(io.take() & 0x1f00 == 0x100) << 63;
            let (lanes, agreed) = warp_match_all(FULL_MASK, value);
            io.put(lanes);
            io.put(agreed.into());
            let mask = own(io.take_of_warp().bits());
            let value = value ^ u64::from(io.take() & 0x1f == 1);
            let (lanes, agreed) = warp_match_all(mask, value);
            io.put(lanes);
            io.put(agreed.into());
            round += 1;
        }
    }

    // A warp that was never full, and lanes that have returned: the mask names those that are left.
    collectives_of_those_left(
        covers = ["warp::warp_vote_ballot", "warp::warp_vote_all", "warp::warp_vote_any", "warp::warp_match_any<u32>",
            "warp::warp_match_all<u32>", "warp::warp_reduce_add", "warp::warp_reduce_and"],
        expects = ["vote.sync.ballot.b32", "vote.sync.all.pred", "vote.sync.any.pred", "match.any.sync.b32",
            "match.all.sync.b32", "redux.sync.add.u32", "redux.sync.and.b32"],
        in = [u32; 2], out = [u32; 8], block = [80, 1, 1],
    ) |io| {
        let warp = thread_idx_x() - lane_id();
        let left = io.take_of_warp() & u32::MAX >> (32 - (block_dim_x() - warp).min(32));
        if left >> lane_id() & 1 == 0 {
            return;
        }
        let word = io.take();
        io.put(warp_vote_ballot(left, word & 1 == 1));
        io.put(warp_vote_all(left, word & 0xf0 != 0x10).into());
        io.put(warp_vote_any(left, word & 0xf0 == 0x10).into());
        io.put(warp_match_any(left, word % 3));
        let (lanes, agreed) = warp_match_all(left, u32::from(word & 0x1f00 == 0));
        io.put(lanes);
        io.put(agreed.into());
        io.put(warp_reduce_add(left, word));
        io.put(warp_reduce_and(left, word));
    }
}

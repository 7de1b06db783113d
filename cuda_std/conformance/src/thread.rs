//! Indices and barriers.

macro_rules! indices {
    ($($case:ident: $function:ident = $register:literal;)* { $($rest:tt)* }) => {
        conform! { CASES:
            $(
                $case(
                    covers = [concat!("thread::", stringify!($function))], expects = [$register],
                    in = [u32; 1], out = [u32; 1], block = [5, 3, 4], grid = [2, 3, 2],
                ) |io| {
                    let io = io.in_space();
                    io.put($function());
                }
            )*
            $($rest)*
        }
    };
}

indices! {
    thread_tid_x: thread_idx_x = "%tid.x";
    thread_tid_y: thread_idx_y = "%tid.y";
    thread_tid_z: thread_idx_z = "%tid.z";
    thread_ntid_x: block_dim_x = "%ntid.x";
    thread_ntid_y: block_dim_y = "%ntid.y";
    thread_ntid_z: block_dim_z = "%ntid.z";
    thread_ctaid_x: block_idx_x = "%ctaid.x";
    thread_ctaid_y: block_idx_y = "%ctaid.y";
    thread_ctaid_z: block_idx_z = "%ctaid.z";
    thread_nctaid_x: grid_dim_x = "%nctaid.x";
    thread_nctaid_y: grid_dim_y = "%nctaid.y";
    thread_nctaid_z: grid_dim_z = "%nctaid.z";
    thread_index_1d_in_space: index_1d = "mad.lo.s32";
{
    thread_index_1d(
        covers = ["thread::index_1d"], expects = ["mad.lo.s32"],
        in = [u32; 1], out = [u32; 1], grid = [5, 1, 1],
    ) |io| {
        io.put(index_1d());
    }

    // Each thread hands its words to others of the block, three times through the same memory.
    thread_barrier(
        covers = ["thread::sync_threads"], expects = ["bar.sync"],
        in = [u32; 6], out = [u32; 3], shared_bytes = 384,
    ) |io| {
        let words = scratch::<u32>(96);
        let mut round = 0;
        while round < 3 {
            words.store(thread_idx_x() as usize, io.take());
            sync_threads();
            io.put(words.load((io.take() % 96) as usize));
            sync_threads();
            round += 1;
        }
    }

    // Threads that have returned are not waited for.
    thread_barrier_after_return(
        covers = ["thread::sync_threads", "thread::sync_threads_count"], expects = ["bar.sync", "bar.red.popc.u32"],
        in = [u32; 3], out = [u32; 2], shared_bytes = 280,
    ) |io| {
        if thread_idx_x() >= 70 {
            return;
        }
        let words = scratch::<u32>(70);
        words.store(thread_idx_x() as usize, io.take());
        sync_threads();
        io.put(words.load((io.take() % 70) as usize));
        io.put(sync_threads_count(io.take() & 1 == 1));
    }

    thread_barrier_count(
        covers = ["thread::sync_threads_count"], expects = ["bar.red.popc.u32"],
        in = [u32; 4], out = [u32; 6], shared_bytes = 384,
    ) |io| {
        let words = scratch::<u32>(96);
        let mut round = 0;
        while round < 2 {
            let word = io.take();
            words.store(thread_idx_x() as usize, word);
            io.put(sync_threads_count(word & 1 == 1));
            io.put(words.load((io.take() % 96) as usize));
            io.put(sync_threads_count(word.is_multiple_of(3)));
            round += 1;
        }
    }

    // Predicates that nearly all threads agree on.
    thread_barrier_and(
        covers = ["thread::sync_threads_and"], expects = ["bar.red.and.pred"],
        in = [u32; 8], out = [u32; 12], shared_bytes = 384,
    ) |io| {
        let words = scratch::<u32>(96);
        let mut round = 0;
        while round < 4 {
            let word = io.take();
            words.store(thread_idx_x() as usize, word);
            io.put(sync_threads_and(word & 0x7f00 != 0).into());
            io.put(words.load((io.take() % 96) as usize));
            io.put(sync_threads_and(word & 0x70 == 0x70 || thread_idx_x() > 1).into());
            round += 1;
        }
    }

    thread_barrier_or(
        covers = ["thread::sync_threads_or"], expects = ["bar.red.or.pred"],
        in = [u32; 8], out = [u32; 12], shared_bytes = 384,
    ) |io| {
        let words = scratch::<u32>(96);
        let mut round = 0;
        while round < 4 {
            let word = io.take();
            words.store(thread_idx_x() as usize, word);
            io.put(sync_threads_or(word & 0x7f00 == 0x100).into());
            io.put(words.load((io.take() % 96) as usize));
            io.put(sync_threads_or(word & 1 == 1 && thread_idx_x() > 94).into());
            round += 1;
        }
    }

    thread_nanosleep(
        covers = ["thread::nanosleep"], expects = ["nanosleep.u32"],
        in = [u32; 1], out = [u32; 1],
    ) |io| {
        let nanoseconds = io.take() % 2000;
        nanosleep(nanoseconds);
        io.put(nanoseconds);
    }
} }

//! Sixteen bytes with a cache hint.

macro_rules! cached {
    (load { $($load:ident: $load_cache:ident = $load_ptx:literal;)* }
    store { $($store:ident: $store_cache:ident = $store_ptx:literal;)* } $($rest:tt)*) => {
        conform! { CASES:
            $(
                $load(
                    covers = ["view::Global::load_with", concat!("view::LoadCache::", stringify!($load_cache))],
                    expects = [$load_ptx], in = [U32x4; 3], out = [U32x4; 3],
                ) |io| {
                    let row = io.given();
                    io.put(row.load_with(2, LoadCache::$load_cache));
                    io.put(row.load_with(0, LoadCache::$load_cache));
                    io.put(row.load_with(1, LoadCache::$load_cache));
                }
            )*
            $(
                $store(
                    covers = ["view::GlobalMut::store_with", concat!("view::StoreCache::", stringify!($store_cache))],
                    expects = [$store_ptx], in = [U32x4; 3], out = [U32x4; 3],
                ) |io| {
                    let row = io.results();
                    row.store_with(2, io.take(), StoreCache::$store_cache);
                    row.store_with(0, io.take(), StoreCache::$store_cache);
                    row.store_with(1, io.take(), StoreCache::$store_cache);
                }
            )*
            $($rest)*
        }
    };
}

cached! {
    load {
        load_all: All = "ld.global.v4.u32";
        load_global: Global = "ld.global.cg.v4.u32";
        load_streaming: Streaming = "ld.global.cs.v4.u32";
        load_read_only: ReadOnly = "ld.global.nc.v4.u32";
        load_read_only_once: ReadOnlyOnce = "ld.global.nc.L1::no_allocate.v4.u32";
        load_read_only_run: ReadOnlyRun = "ld.global.nc.L1::no_allocate.L2::256B.v4.u32";
    }
    store {
        store_write_back: WriteBack = "st.global.v4.u32";
        store_global: Global = "st.global.cg.v4.u32";
        store_streaming: Streaming = "st.global.cs.v4.u32";
    }

    // It changes nothing: what is read behind it is what was there.
    load_prefetched(
        covers = ["view::Global::prefetch"], expects = ["prefetch.global.L2"], in = [U32x4; 3], out = [U32x4; 3],
    ) |io| {
        let row = io.given();
        row.prefetch(1);
        io.put(row.load(1));
        row.prefetch(2);
        io.put(row.load(0));
        io.put(row.load(2));
    }

    // Each way to write, then each way to read what a neighbour has written.
    load_what_was_stored(
        covers = ["view::Global::load_with", "view::GlobalMut::store_with"],
        expects = ["st.global.v4.u32", "st.global.cg.v4.u32", "st.global.cs.v4.u32", "ld.global.v4.u32",
            "ld.global.cg.v4.u32", "ld.global.cs.v4.u32"],
        in = [U32x4; 3], out = [U32x4; 6],
    ) |io| {
        let row = io.results();
        row.store_with(0, io.take(), StoreCache::WriteBack);
        row.store_with(1, io.take(), StoreCache::Global);
        row.store_with(2, io.take(), StoreCache::Streaming);
        sync_threads();
        let neighbour = io.results_of(io.first_of_block() + (thread_idx_x() as usize + 37) % 96).as_global();
        row.store(3, neighbour.load_with(0, LoadCache::Streaming));
        row.store(4, neighbour.load_with(1, LoadCache::All));
        row.store(5, neighbour.load_with(2, LoadCache::Global));
    }
}

//! Bulk copies and their barriers.

macro_rules! bulk_of_types {
    ($($name:ident: $ty:ty, $bytes:literal;)* { $($rest:tt)* }) => {
        conform! { sm_90 CASES:
            $(
                // The block's rows go in with one copy, are read by neighbours, change, and go out with another.
                $name(
                    covers = ["bulk::init", "bulk::fence", "bulk::arrive_expect", "bulk::copy_in", "bulk::try_wait", "bulk::wait",
                        "bulk::copy_out", "bulk::commit_group", "bulk::wait_group"],
                    expects = ["mbarrier.init.shared::cta.b64", "fence.proxy.async.shared::cta",
                        "mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.try_wait.parity.shared::cta.b64",
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
                        "cp.async.bulk.global.shared::cta.bulk_group", "cp.async.bulk.commit_group",
                        "cp.async.bulk.wait_group 0"],
                    in = [$ty; 2], out = [$ty; 2], shared_bytes = 128 + 2 * 96 * $bytes,
                ) |io| {
                    let barriers = shared::dynamic::<bulk::Barrier>(0, 1);
                    let tile = shared::dynamic::<$ty>(128, 2 * 96);
                    let (at, rows) = (thread_idx_x() as usize, 2 * io.first_of_block());
                    if at == 0 {
                        bulk::init(barriers, 0, 1);
                        bulk::fence();
                        bulk::arrive_expect(barriers, 0, 2 * 96 * $bytes);
                        bulk::copy_in(tile, io.input.slice(rows, 2 * 96), 2 * 96, barriers, 0);
                    }
                    sync_threads();
                    bulk::wait(barriers, 0, 0);
                    let (first, second) = (tile.load((at + 37) % 192), tile.load((at + 131) % 192));
                    sync_threads();
                    tile.store(2 * at, second);
                    tile.store(2 * at + 1, first);
                    bulk::fence();
                    sync_threads();
                    if at == 0 {
                        bulk::copy_out(io.output.slice(rows, 2 * 96), tile, 2 * 96);
                        bulk::commit_group();
                        bulk::wait_group::<0>();
                    }
                }
            )*
            $($rest)*
        }
    };
}

bulk_of_types! {
    bulk_u32: u32, 4;
    bulk_u64: u64, 8;
    bulk_u32x4: U32x4, 16;
{
    // Here since they came with sm_90, too. That launches overlap shows in the GPU tests of the layer's step.
    thread_dependencies(
        covers = ["thread::launch_dependents", "thread::wait_dependencies"],
        expects = ["griddepcontrol.launch_dependents", "griddepcontrol.wait"],
        in = [u32; 1], out = [u32; 1],
    ) |io| {
        launch_dependents();
        wait_dependencies();
        let word = io.take();
        io.put(word);
    }

    // Launched alone it has nothing to wait for; what it must not do is wait for ever.
    thread_wait_dependencies(
        covers = ["thread::wait_dependencies"], expects = ["griddepcontrol.wait"],
        in = [u32; 1], out = [u32; 1],
    ) |io| {
        wait_dependencies();
        let word = io.take();
        io.put(word);
    }

    // An arrival a thread, most with bytes of their own, over five phases of a barrier. Who brings nothing leaves what was there.
    bulk_phases(
        covers = ["bulk::init", "bulk::arrive_expect", "bulk::copy_in", "bulk::try_wait", "bulk::wait"],
        expects = ["mbarrier.init.shared::cta.b64", "mbarrier.arrive.expect_tx.shared::cta.b64",
            "mbarrier.try_wait.parity.shared::cta.b64",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"],
        in = [U32x4; 5], out = [U32x4; 5], shared_bytes = 128 + 96 * 16,
    ) |io| {
        let barriers = shared::dynamic::<bulk::Barrier>(0, 4);
        let tile = shared::dynamic::<U32x4>(128, 96);
        let at = thread_idx_x() as usize;
        if at == 0 {
            bulk::init(barriers, 3, 96);
            bulk::fence();
        }
        sync_threads();
        let mut phase = 0;
        while phase < 5 {
            let brings = phase == 0 || at % 3 != phase as usize % 3;
            bulk::arrive_expect(barriers, 3, if brings { 16 } else { 0 });
            if brings {
                bulk::copy_in(tile.slice(at, 1), io.given().slice(phase as usize, 1), 1, barriers, 3);
            }
            while !bulk::try_wait(barriers, 3, phase) {}
            io.put(tile.load((at + 37) % 96));
            sync_threads();
            phase += 1;
        }
    }

    // Each thread has a ring of three stages of three quads, two of them on their way in while one is on its way out.
    bulk_ring(
        covers = ["bulk::copy_in", "bulk::copy_out", "bulk::commit_group", "bulk::wait_group", "bulk::wait_group_read"],
        expects = ["cp.async.bulk.commit_group", "cp.async.bulk.wait_group.read 0", "cp.async.bulk.wait_group 1"],
        in = [U32x4; 18], out = [U32x4; 18], block = [8, 1, 1], shared_bytes = 256 + 8 * 9 * 16,
    ) |io| {
        let at = thread_idx_x() as usize;
        let barriers = shared::dynamic::<bulk::Barrier>(0, 24).slice(3 * at, 3);
        let ring = shared::dynamic::<U32x4>(256, 8 * 9).slice(9 * at, 9);
        let mut stage = 0;
        while stage < 3 {
            bulk::init(barriers, stage, 1);
            stage += 1;
        }
        bulk::fence();
        // The barriers are each thread's own; racecheck takes a warp's for shared.
        sync_threads();
        let (mut started, mut done) = (0, 0);
        while done < 6 {
            if started < 6 && started < done + 3 {
                bulk::wait_group_read::<0>();
                let stage = started % 3;
                bulk::arrive_expect(barriers, stage, 48);
                bulk::copy_in(ring.slice(3 * stage, 3), io.given().slice(3 * started, 3), 3, barriers, stage);
                started += 1;
            } else {
                let stage = done % 3;
                bulk::wait(barriers, stage, (done / 3) as u32);
                // The first quad becomes the last.
                bulk::copy_out(io.results().slice(3 * done, 2), ring.slice(3 * stage + 1, 2), 2);
                bulk::copy_out(io.results().slice(3 * done + 2, 1), ring.slice(3 * stage, 1), 1);
                bulk::commit_group();
                bulk::wait_group::<1>();
                done += 1;
            }
        }
        bulk::wait_group_read::<0>();
    }
} }

//! Dynamic shared memory and its layouts.

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod layout {
    cuda_std::shared_layout! {
        /// Arrays of every size of element, with lengths that leave gaps.
        pub struct Mixed {
            bytes: [u8; 97],
            quads: [cuda_std::U32x4; 96],
            halves: [u16; 99],
            floats: [f32; 96],
            words: [u64; 101],
        }
    }

    // The table states it for builds that have no layouts.
    const _: () = assert!(Mixed::BYTES == 128 + 1536 + 256 + 384 + 896);
}

conform! { CASES:
    // A part of the launch's shared memory that does not start at 0.
    shared_dynamic(
        covers = ["shared::dynamic"], expects = ["st.shared.b32", "ld.shared.b32"],
        in = [u32; 2], out = [u32; 2], shared_bytes = 512 + 384,
    ) |io| {
        let words = shared::dynamic::<u32>(512, 96);
        words.store(thread_idx_x() as usize, io.take());
        sync_threads();
        io.put(words.load((io.take() % 96) as usize));
        // The same bytes by another name: nothing lies before the offset.
        io.put(shared::dynamic::<u32>(0, 224).load(128 + (thread_idx_x() as usize + 37) % 96));
    }

    // All arrays are written before any is read, so one that overlapped another would show.
    shared_layout_of_mixed_types(
        covers = ["shared_layout!"], expects = ["st.shared.b8", "st.shared.v4.b32", "st.shared.b16",
            "st.shared.b32", "st.shared.b64", "ld.shared.b8", "ld.shared.v4.b32", "ld.shared.b16",
            "ld.shared.b32", "ld.shared.b64"],
        in = [U32x4; 2], out = [U32x4; 3], shared_bytes = 128 + 1536 + 256 + 384 + 896,
    ) |io| {
        use super::layout::Mixed;
        let at = thread_idx_x() as usize;
        let (quad, more) = (io.take(), io.take());
        Mixed::bytes().store(at + 1, more.x as u8);
        Mixed::quads().store(at, quad);
        Mixed::halves().store(at + 3, more.y as u16);
        Mixed::floats().store(at, f32::from_bits(more.z));
        Mixed::words().store(at + 5, u64::from(more.w) << 32 | u64::from(more.x));
        sync_threads();
        let at = (thread_idx_x() as usize + 37) % 96;
        io.put(Mixed::quads().load(at));
        let word = Mixed::words().load(at + 5);
        io.put(U32x4 {
            x: Mixed::bytes().load(at + 1).into(),
            y: Mixed::halves().load(at + 3).into(),
            z: Mixed::floats().load(at).to_bits(),
            w: word as u32,
        });
        io.put(U32x4 { x: (word >> 32) as u32, y: 0, z: 0, w: Mixed::BYTES as u32 });
    }
}

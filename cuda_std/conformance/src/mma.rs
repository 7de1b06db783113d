//! Matrix products.

conform! { CASES:
    // Integers of -8 to 7 and sums below 4096: every product and every sum is exact, so the order does not count.
    mma_m16n8k16_bf16(
        covers = ["mma::mma_m16n8k16_bf16"],
        expects = ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"],
        in = [u32; 20], out = [f32; 8],
    ) |io| {
        let pair = |word: u32| {
            let number = |bits: u32| (bits & 15) as f32 - 8.0;
            bf16::pack(number(word >> 3), number(word >> 11))
        };
        let sum = |word: u32| (word & 0xfff) as f32 - 2048.0;
        let mut round = 0;
        while round < 2 {
            let a = [pair(io.take()), pair(io.take()), pair(io.take()), pair(io.take())];
            let b = [pair(io.take()), pair(io.take())];
            let c = [sum(io.take()), sum(io.take()), sum(io.take()), sum(io.take())];
            let [first, second, third, fourth] = mma::mma_m16n8k16_bf16(a, b, c);
            io.put(first);
            io.put(second);
            io.put(third);
            io.put(fourth);
            round += 1;
        }
    }

    transpose_8x8(
        covers = ["mma::transpose_8x8"],
        expects = ["movmatrix.sync.aligned.m8n8.trans.b16"],
        in = [u32; 2], out = [u32; 2],
    ) |io| {
        let (first, second) = (io.take(), io.take());
        io.put(mma::transpose_8x8(first));
        io.put(mma::transpose_8x8(second));
    }

    // Rows lie in an order of their own, and each warp reads another's.
    load_8x8x4(
        covers = ["mma::load_8x8x4"],
        expects = ["ldmatrix.sync.aligned.m8n8.x4.shared.b16"],
        in = [U32x4; 1], out = [u32; 4], shared_bytes = 96 * 16,
    ) |io| {
        let rows = scratch::<U32x4>(96);
        let at = thread_idx_x() as usize;
        rows.store(at * 37 % 96, io.take());
        sync_threads();
        let [first, second, third, fourth] = mma::load_8x8x4(rows, (at + 32) * 37 % 96);
        io.put(first);
        io.put(second);
        io.put(third);
        io.put(fourth);
    }

    load_transposed_8x8x4(
        covers = ["mma::load_transposed_8x8x4"],
        expects = ["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"],
        in = [U32x4; 1], out = [u32; 4], shared_bytes = 96 * 16,
    ) |io| {
        let rows = scratch::<U32x4>(96);
        let at = thread_idx_x() as usize;
        rows.store(at * 37 % 96, io.take());
        sync_threads();
        let [first, second, third, fourth] = mma::load_transposed_8x8x4(rows, (at + 32) * 37 % 96);
        io.put(first);
        io.put(second);
        io.put(third);
        io.put(fourth);
    }
}

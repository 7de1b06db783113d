//! Parts of views.

conform! { CASES:
    global_slice(
        covers = ["view::Global::slice"], expects = ["ld.global.b32"],
        in = [u32; 7], out = [u32; 3],
    ) |io| {
        let part = io.input.slice(7 * io.thread + 1, 5).slice(2, 3);
        io.put(part.load(2));
        io.put(part.load(1));
        io.put(part.load(0));
    }

    global_mut_slice(
        covers = ["view::GlobalMut::slice"], expects = ["st.global.b32"],
        in = [u32; 3], out = [u32; 7],
    ) |io| {
        let part = io.output.slice(7 * io.thread + 1, 5).slice(2, 3);
        part.store(2, io.take());
        part.store(1, io.take());
        part.store(0, io.take());
    }

    shared_slice(
        covers = ["view::Shared::slice"], expects = ["st.shared.b32", "ld.shared.b32"],
        in = [u32; 3], out = [u32; 3], shared_bytes = 96 * 5 * 4,
    ) |io| {
        let own = scratch::<u32>(96 * 5).slice(5 * thread_idx_x() as usize, 5);
        own.slice(1, 3).store(0, io.take());
        own.slice(1, 3).store(1, io.take());
        own.slice(1, 3).store(2, io.take());
        sync_threads();
        let neighbour = (thread_idx_x() as usize + 37) % 96;
        let theirs = scratch::<u32>(96 * 5).slice(5 * neighbour, 5).slice(1, 3);
        io.put(theirs.load(2));
        io.put(theirs.load(1));
        io.put(theirs.load(0));
    }

    global_rows(
        covers = ["view::Global::rows", "view::Rows::row"], expects = ["ld.global.b32"],
        in = [u32; 6], out = [u32; 4],
    ) |io| {
        let neighbour = (io.thread + 37) % (96 * 2);
        let (halves, thirds) = (io.input.rows(3), io.input.rows(2));
        io.put(halves.row(2 * neighbour).load(0));
        io.put(halves.row(2 * neighbour + 1).load(2));
        io.put(thirds.row(3 * neighbour + 1).load(1));
        io.put(thirds.row(3 * neighbour + 2).load(0));
    }

    global_mut_rows(
        covers = ["view::GlobalMut::rows", "view::RowsMut::row"], expects = ["st.global.b32"],
        in = [u32; 4], out = [u32; 6],
    ) |io| {
        let neighbour = (io.thread + 37) % (96 * 2);
        let (halves, thirds) = (io.output.rows(3), io.output.rows(2));
        halves.row(2 * neighbour).store(0, io.take());
        halves.row(2 * neighbour + 1).store(2, io.take());
        thirds.row(3 * neighbour + 1).store(1, io.take());
        thirds.row(3 * neighbour + 2).store(0, io.take());
    }

    // What other threads of the block have written, through a view to read.
    global_mut_as_global(
        covers = ["view::GlobalMut::as_global"], expects = ["ld.global.b32"],
        in = [u32; 2], out = [u32; 2],
    ) |io| {
        io.put(io.given().load(0));
        sync_threads();
        let neighbour = io.first_of_block() + (thread_idx_x() as usize + 37) % 96;
        let word = io.output.as_global().rows(2).row(neighbour).load(0);
        io.put(word ^ io.given().load(1));
    }

    u32x4_to_array(
        covers = ["value::U32x4::to_array"], expects = ["ld.global.v4.b32"],
        in = [U32x4; 1], out = [u32; 4],
    ) |io| {
        let [x, y, z, w] = io.take().to_array();
        io.put(w);
        io.put(x);
        io.put(z);
        io.put(y);
    }
}

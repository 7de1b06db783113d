//! Indices outside of views, and views outside of memory.

use crate::{Scratch, at, by, tid};
use cuda_std::emulator::{Access, Buffer, FaultKind, Launch, Space};
use cuda_std::prelude::*;
use cuda_std::shared;

#[kernel]
pub unsafe fn row_end(values: Global<u32>, out: GlobalMut<u32>, len: u32) {
    let block = thread::block_idx_x() as usize;
    let row = values.rows(4).row(block);
    if block == 1 && tid() == 2 {
        for i in 0..len as usize {
            out.store(i, row.load(i)); // leaves the row
        }
    }
}

#[test]
fn a_load_past_the_end_of_a_row_is_found_where_the_buffer_goes_on() {
    let run = |rows: usize, len: u32| {
        let values = Buffer::filled(4 * rows, 7);
        let out = Buffer::filled(5, 0);
        Launch::new(2, 4).run(|| unsafe { row_end(values.view(), out.view_mut(), len) })
    };
    run(3, 4).unwrap();
    let fault = run(3, 5).unwrap_err();
    let (space, access) = (Space::Global, Access::Load);
    assert_eq!(
        fault.kind,
        FaultKind::OutOfBounds { space, access, index: 4, start: 4, len: 4, buffer_len: 12 }
    );
    at(&fault, "leaves the row");
    by(&fault, 1, 2);
    assert_eq!(fault.kernel, "row_end");
    let text = fault.to_string();
    assert!(text.contains("load of element 4 of a global view leaves its row but not its buffer"), "{text}");
    assert!(text.contains("4 elements, 4..8 of a buffer of 12"), "{text}");
    assert!(text.contains("row_end, block (1, 0, 0), thread (2, 0, 0)"), "{text}");

    let text = run(2, 5).unwrap_err().to_string();
    assert!(text.contains("leaves its buffer"), "{text}");
}

#[kernel]
pub unsafe fn store_at(out: GlobalMut<u32>, row: u32, index: u32) {
    out.rows(4).row(row as usize).store(index as usize, 1); // stores outside
}

#[test]
fn stores_and_rows_outside_of_the_buffer_are_found() {
    let out = Buffer::filled(8, 0);
    let run = |row, index| Launch::default().run(|| unsafe { store_at(out.view_mut(), row, index) });
    run(1, 3).unwrap();
    assert_eq!(out.to_vec(), [0, 0, 0, 0, 0, 0, 0, 1]);
    let fault = run(1, 4).unwrap_err();
    let (space, access) = (Space::Global, Access::Store);
    assert_eq!(
        fault.kind,
        FaultKind::OutOfBounds { space, access, index: 4, start: 4, len: 4, buffer_len: 8 }
    );
    at(&fault, "stores outside");
    let fault = run(2, 0).unwrap_err();
    let access = Access::Slice;
    assert_eq!(
        fault.kind,
        FaultKind::OutOfBounds { space, access, index: 12, start: 0, len: 8, buffer_len: 8 }
    );
    at(&fault, "stores outside");
}

#[kernel]
pub unsafe fn shared_index(start: u32, len: u32, index: u32) {
    let words = Scratch::words();
    words.store(tid(), 1);
    thread::sync_threads();
    words.slice(start as usize, len as usize).load(index as usize); // in shared
}

#[test]
fn bounds_of_shared_arrays_and_their_slices_are_checked() {
    let run = |start, len, index| {
        Launch::new(1, 256).shared(Scratch::BYTES).run(|| unsafe { shared_index(start, len, index) })
    };
    run(0, 256, 255).unwrap();
    run(10, 5, 4).unwrap();
    let space = Space::Shared;
    for (start, len, index, access) in
        [(10, 5, 5, Access::Load), (0, 256, 256, Access::Load), (250, 7, 257, Access::Slice)]
    {
        let fault = run(start, len, if access == Access::Slice { 0 } else { index }).unwrap_err();
        let whole = access == Access::Slice;
        let (start, len) = if whole { (0, 256) } else { (start as usize, len as usize) };
        let index = index as usize;
        assert_eq!(fault.kind, FaultKind::OutOfBounds { space, access, index, start, len, buffer_len: 256 });
        at(&fault, "in shared");
    }
}

#[kernel]
pub unsafe fn carve(offset: u32) {
    shared::dynamic::<u64>(offset as usize, 4); // carved
}

#[test]
fn shared_arrays_lie_within_the_launchs_shared_memory_and_on_their_alignment() {
    let run = |offset| Launch::default().shared(64).run(|| unsafe { carve(offset) });
    run(32).unwrap();
    for offset in [40, 4, 4096] {
        let fault = run(offset).unwrap_err();
        let offset = offset as usize;
        assert_eq!(fault.kind, FaultKind::SharedLayout { offset, bytes: 32, launched: 64 });
        at(&fault, "carved");
    }
}

#[kernel]
pub unsafe fn load_one(values: Global<u32>, out: GlobalMut<u32>) {
    out.store(0, values.load(0)); // loads
}

#[test]
fn a_view_that_outlives_its_buffer_is_found() {
    let out = Buffer::filled(1, 0);
    let view = Buffer::from_slice(&[5]).view();
    // Takes the place of the one that is gone.
    let other = Buffer::from_slice(&[6]);
    let fault = Launch::default().run(|| unsafe { load_one(view, out.view_mut()) }).unwrap_err();
    assert_eq!(fault.kind, FaultKind::FreedBuffer);
    at(&fault, "loads");
    Launch::default().run(|| unsafe { load_one(other.view(), out.view_mut()) }).unwrap();
    assert_eq!(out.get(0), Some(6));
}

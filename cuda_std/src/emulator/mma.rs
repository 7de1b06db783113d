//! Matrix operations of a warp.

use super::order::LANES;

/// What a lane brings, and in `c` what it gets.
pub(crate) struct Fragments {
    pub a: [u32; 4],
    pub b: [u32; 2],
    pub c: [f32; 4],
}

/// `mma.m16n8k16` of the fragments at `addresses`, lane by lane: sums in the order of k, rounded to nearest each time.
///
/// # Safety
/// Each address is that of a lane's [`Fragments`], which nothing else refers to just now.
pub(crate) unsafe fn multiply(addresses: &[u64; LANES]) {
    let (mut a, mut b) = ([[0.0_f32; 16]; 16], [[0.0_f32; 8]; 16]);
    for (lane, &address) in addresses.iter().enumerate() {
        // SAFETY: the caller's word.
        let own = unsafe { &*(address as *const Fragments) };
        let (group, pair) = (lane / 4, lane % 4 * 2);
        for half in 0..2 {
            for part in 0..4 {
                let (row, column) = (group + part % 2 * 8, pair + part / 2 * 8 + half);
                a[row][column] = element(own.a[part], half);
            }
            for part in 0..2 {
                b[pair + part * 8 + half][group] = element(own.b[part], half);
            }
        }
    }
    for (lane, &address) in addresses.iter().enumerate() {
        // SAFETY: the caller's word.
        let own = unsafe { &mut *(address as *mut Fragments) };
        for (part, sum) in own.c.iter_mut().enumerate() {
            let (row, column) = (lane / 4 + part / 2 * 8, lane % 4 * 2 + part % 2);
            *sum = (0..16).fold(*sum, |sum, k| sum + a[row][k] * b[k][column]);
        }
    }
}

/// One of a word's two bf16.
fn element(word: u32, half: usize) -> f32 {
    f32::from_bits(word >> (16 * half) << 16)
}

/// What `lane` gets of a transposed 8 x 8 matrix, whose pairs `of` gives by lane.
pub(crate) fn transposed(lane: usize, of: impl Fn(usize) -> u32) -> u32 {
    let (row, column) = (lane / 4, lane % 4 * 2);
    let element = |row: usize, column: usize| of(row * 4 + column / 2) >> (column % 2 * 16) & 0xffff;
    element(column, row) | element(column + 1, row) << 16
}

/// Hands out four matrices, whose rows lie at `addresses`, lane by lane: each is replaced by what its lane gets.
///
/// # Safety
/// Each address is that of a lane's row, which nothing else refers to just now.
pub(crate) unsafe fn distribute(addresses: &[u64; LANES], transpose: bool) {
    // SAFETY: the caller's word.
    let rows = addresses.map(|address| unsafe { *(address as *const [u32; 4]) });
    for (lane, &address) in addresses.iter().enumerate() {
        let parts = std::array::from_fn(|matrix| {
            let of = |lane: usize| rows[8 * matrix + lane / 4][lane % 4];
            if transpose { transposed(lane, of) } else { of(lane) }
        });
        // SAFETY: the caller's word.
        unsafe { *(address as *mut [u32; 4]) = parts };
    }
}

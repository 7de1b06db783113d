//! Rows made to be hard on a cache.

use super::TraceRow;
use super::noise::Noise;

/// Layer, KV head and bound of the page keys.
pub(super) type Place = (u32, u32, u32);

/// Every step draws `count` pages from all.
pub(super) fn uniform((layer, head, keys): Place, count: usize, steps: usize, noise: &mut Noise) -> TraceRow {
    let mut row = TraceRow::new(layer, head, keys);
    let mut all: Vec<u32> = (0..keys).collect();
    for _ in 0..steps {
        push_some(&mut row, &mut all, count, noise);
    }
    row
}

/// Three disjoint selections of `count` pages in turn: with room for two, LRU evicts just what comes next and never
/// hits. Which page is in which selection is drawn.
pub(super) fn cyclic((layer, head, keys): Place, count: usize, steps: usize, noise: &mut Noise) -> TraceRow {
    let mut row = TraceRow::new(layer, head, keys);
    let mut all: Vec<u32> = (0..keys).collect();
    let count = count.min(keys as usize / 3);
    shuffle(&mut all, 3 * count, noise);
    let mut turns: Vec<_> = all[..3 * count].chunks_mut(count.max(1)).collect();
    turns.iter_mut().for_each(|selected| selected.sort_unstable());
    for step in 0..steps {
        row.push(turns.get(step % 3).map_or(&[], |selected| &**selected));
    }
    row
}

/// `count` pages out of a working set of half as many more, which is another one every 100 steps: two take turns.
pub(super) fn phase((layer, head, keys): Place, count: usize, steps: usize, noise: &mut Noise) -> TraceRow {
    const PHASE_STEPS: usize = 100;
    let mut row = TraceRow::new(layer, head, keys);
    let mut all: Vec<u32> = (0..keys).collect();
    let size = (count * 3 / 2).min(keys as usize / 2);
    shuffle(&mut all, 2 * size, noise);
    let (first, second) = all.split_at_mut(size);
    let sets = [first, &mut second[..size]];
    for step in 0..steps {
        push_some(&mut row, sets[step / PHASE_STEPS % 2], count, noise);
    }
    row
}

/// A step of `count` pages out of `from`, whose order changes.
fn push_some(row: &mut TraceRow, from: &mut [u32], count: usize, noise: &mut Noise) {
    let count = count.min(from.len());
    shuffle(from, count, noise);
    let mut selected = from[..count].to_vec();
    selected.sort_unstable();
    row.push(&selected);
}

/// Draws the first `count` of `pages` out of all of them.
fn shuffle(pages: &mut [u32], count: usize, noise: &mut Noise) {
    for index in 0..count {
        let other = index + noise.below(pages.len() - index);
        pages.swap(index, other);
    }
}

//! Prompts that share host pages.

use std::sync::Arc;

use spinkv::Error;
use spinkv::algorithms::Dense;
use spinkv::backend::Backend;
use spinkv::backend::cuda::CudaLimits;
use spinkv::pipeline::RequestId;

use super::{LAYERS, Run, STEADY, driver, limits, low_rank, shadowkv};

/// Tokens of a block.
const BLOCK: usize = 128;
/// Slabs of a block: rows of a request.
const ROWS: usize = LAYERS * 2;

impl Run {
    /// Tells a request its prompt, takes it through all layers and returns what it shares.
    fn prompt(&mut self, request: RequestId, prompt: &[u32]) -> usize {
        let shared = self.pipeline.share_prefix(request, prompt, 1).unwrap();
        for layer in 0..LAYERS {
            let [mut keys, mut values] = [(); 2].map(|()| self.tensor(prompt.len(), 2));
            self.pipeline.fill_prefix(request, layer, prompt.len(), &mut keys, &mut values).unwrap();
            let rest = prompt.len() - shared;
            let [queries, mut out] = [(); 2].map(|()| self.tensor(rest, 4));
            let mut attention = self.pipeline.prefill(request, layer, prompt.len(), &keys, &values).unwrap();
            attention.attend(rest, &queries, &mut out).unwrap();
        }
        self.pipeline.backend_mut().finish_prompt().unwrap();
        shared
    }
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|token| token + seed * 1000).collect()
}

#[test]
fn keys_and_values_of_a_prefix_come_from_its_pages_and_its_slabs_are_counted() {
    let driver = driver();
    let mut run = Run::new(&driver, shadowkv(), &limits(3));
    run.pipeline.backend_mut().share_prefixes(None).unwrap();
    assert_eq!(run.pipeline.backend().prefix_block(), Some(BLOCK));
    let prompt = tokens(150, 1);
    let [first, second, third] = [(); 3].map(|()| run.pipeline.admit(180).unwrap());
    assert_eq!(run.prompt(first, &prompt), 0);
    let gathers =
        |log: Vec<String>| log.into_iter().filter(|line| line.contains("launch gather ")).collect::<Vec<_>>();
    let without = gathers(driver.log()).len();
    assert_eq!(run.pipeline.prefixes().unwrap().blocks, 1);

    assert_eq!(run.prompt(second, &prompt), BLOCK);
    let log = gathers(driver.log());
    assert_eq!(log.len(), without + 2 * LAYERS, "keys and values of each layer");
    // Single keys of 8 words, without a count.
    let of_keys = |line: &&String| {
        let numbers: Vec<_> = line.split(' ').collect();
        let [page_words, device_words, _, counted] = numbers[numbers.len() - 4..] else { return false };
        [page_words, device_words, counted] == ["8", "8", "0"]
    };
    assert_eq!(log.iter().filter(of_keys).count(), 2 * LAYERS, "{log:?}");

    // Two slabs a row each, of which the second shares one and gives one back.
    let slab_bytes = 16 * 2048;
    let used = |run: &Run| run.pipeline.backend().used_slabs();
    assert_eq!(used(&run), 3 * 2 * ROWS - ROWS);
    assert_eq!(run.pipeline.prefixes().unwrap().bytes, (ROWS * slab_bytes) as u64);
    // In another request's place of the tables.
    assert_eq!(run.prompt(third, &tokens(150, 2)), 0);
    run.pipeline.release(first);
    run.pipeline.release(second);
    assert_eq!(used(&run), 2 * ROWS + ROWS, "the third's, and the block");
    run.pipeline.release(third);
    assert_eq!((used(&run), run.pipeline.prefixes().unwrap().blocks), (2 * ROWS, 2));
    run.pipeline.backend_mut().clear_prefixes();
    assert!(run.pipeline.backend().is_empty());
}

#[test]
fn complete_pages_of_a_request_without_a_cache_come_back_at_once() {
    let driver = driver();
    let mut run = Run::new(&driver, Arc::new(Dense { steady: STEADY }), &limits(2));
    run.pipeline.backend_mut().share_prefixes(None).unwrap();
    let prompt = tokens(150, 1);
    let [first, second] = [(); 2].map(|()| run.pipeline.admit(180).unwrap());
    assert_eq!([run.prompt(first, &prompt), run.prompt(second, &prompt)], [0, BLOCK]);
    run.pipeline.park(second).unwrap();
    driver.log();
    run.pipeline.resume(second).unwrap();
    let log = driver.log();
    let gathers: Vec<_> = log.iter().filter(|line| line.contains("launch gather")).collect();
    // 16 pages of each row, which are those of the block that it shares.
    let [gather] = gathers[..] else { panic!("{gathers:?}") };
    let numbers: Vec<_> = gather.split_once(": ").unwrap().1.split(' ').collect();
    assert_eq!(numbers[2..4], ["1", &(16 * ROWS).to_string()], "{gather}");
    assert_eq!(numbers[6..8], ["128", "128"]);
    run.step(&[first, second]);
    [first, second].into_iter().for_each(|request| run.pipeline.release(request));
    run.pipeline.backend_mut().clear_prefixes();
    assert!(run.pipeline.backend().is_empty());
}

#[test]
fn admission_takes_back_what_is_kept() {
    let driver = driver();
    let room = 2 * 2 * ROWS as u64 * 16 * 2048;
    let mut run = Run::new(&driver, shadowkv(), &CudaLimits { host_bytes: Some(room), ..limits(3) });
    run.pipeline.backend_mut().share_prefixes(None).unwrap();
    for seed in 1..4 {
        let request = run.pipeline.admit(180).unwrap();
        assert_eq!(run.prompt(request, &tokens(150, seed)), 0);
        run.pipeline.release(request);
    }
    assert_eq!(run.pipeline.prefixes().unwrap().blocks, 3);
    let both = [(); 2].map(|()| run.pipeline.admit(180).unwrap());
    assert_eq!(run.pipeline.prefixes().unwrap().blocks, 0);
    let refused = run.pipeline.admit(180).unwrap_err();
    assert!(matches!(refused, Error::OutOfHostMemory { .. }), "{refused}");
    both.into_iter().for_each(|request| run.pipeline.release(request));
    assert!(run.pipeline.backend().is_empty());
}

#[test]
fn what_the_host_has_not_in_full_is_not_shared() {
    let driver = driver();
    let mut run = Run::new(&driver, low_rank(shadowkv(), 32), &limits(1));
    let refused = run.pipeline.backend_mut().share_prefixes(None).unwrap_err();
    assert!(
        matches!(&refused, Error::PrefixesUnsupported { reason, .. } if reason.contains("values")),
        "{refused}"
    );
    assert_eq!(run.pipeline.backend().prefix_block(), None);
}

//! Runs of pages by the copy engine against the CPU reference; the pool holds poison before.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use spinkv::backend::cpu;
use spinkv::backend::cuda::driver::{DeviceBuffer, DriverError, PinnedArena};
use spinkv::backend::cuda::{Restore, Restored};
use spinkv_kernel_tests::POISON;
use spinkv_kernels::abi::PageCopy;

use super::{Machine, Outcome, Test, test};

pub fn tests() -> Vec<Test> {
    vec![test("restore::random_runs", |machine| machine.on_seeds(|seed| restore(machine, seed)))]
}

/// Runs of random lengths between random gaps, their pages shuffled; pages of up to 4 KiB.
fn restore(machine: &Machine, seed: u64) -> Outcome {
    let Machine { context, stream, .. } = machine;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let page_words = rng.random_range(1..=256);
    let (mut copies, mut host_page, mut device_page) = (Vec::new(), 0u32, 0u32);
    let runs = rng.random_range(0..=12);
    for _ in 0..runs {
        // A gap of a page or more on one tier at least ends the run before.
        host_page += rng.random_range(1..=5);
        device_page += rng.random_range(0..=5);
        for _ in 0..rng.random_range(1..=9) {
            copies.push(PageCopy { host_page, device_page });
            (host_page, device_page) = (host_page + 1, device_page + 1);
        }
    }
    copies.shuffle(&mut rng);
    let (host_pages, device_pages) = (host_page as usize + 1, device_page as usize + 1);

    let host: Vec<u128> = (0..host_pages * page_words).map(|_| rng.random()).collect();
    let mut arena = PinnedArena::reserve(context, size_of_val(host.as_slice()), |_| {})?;
    arena.write(0, bytemuck::cast_slice(&host))?;
    let mut expected = vec![POISON; device_pages * page_words];
    let pool = DeviceBuffer::from_slice(stream, &expected)?;
    let restore = Restore { host_pages: &arena, device_pages: &pool, page_words };

    let outside = PageCopy { host_page: 0, device_page: device_pages as u32 };
    let refused = restore.enqueue(&[copies.as_slice(), &[outside]].concat(), stream);
    if !matches!(refused, Err(DriverError::OutOfRange { .. })) || pool.to_vec(stream)? != expected {
        return Err(format!("page {device_pages} of {device_pages} gave {refused:?}").into());
    }
    let restored = restore.enqueue(&copies, stream)?;
    let bytes = (copies.len() * page_words * size_of::<u128>()) as u64;
    if restored != (Restored { runs, bytes }) {
        return Err(format!("{restored:?} where {runs} runs and {bytes} bytes were given").into());
    }
    cpu::gather(&copies, &host, &mut expected, page_words, page_words);
    let found = pool.to_vec(stream)?;
    match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
        Some(word) => Err(format!("word {} of page {}", word % page_words, word / page_words).into()),
        None => Ok(()),
    }
}

use spinkv_kernel_tests::offload::OffloadCase;
use spinkv_kernel_tests::write_back::WriteBackCase;

use super::{SCHEDULES, SHAPES};

fn on_random_shapes(random: fn(u64) -> OffloadCase) {
    for seed in 0..SHAPES {
        let case = random(seed);
        let pages = case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&pages).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

fn in_random_orders(case: &OffloadCase) {
    let first = case.emulate(0).unwrap();
    case.check(&first).unwrap();
    assert_ne!(first.host_pages, case.before.host_pages, "a case that fills pages");
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}

fn fills(case: &OffloadCase) -> bool {
    case.emulate(0).unwrap().host_pages != case.before.host_pages
}

#[test]
fn append_on_random_shapes() {
    on_random_shapes(OffloadCase::append);
}

#[test]
fn append_in_random_orders() {
    let append = |seed| OffloadCase { on_host: true, ..OffloadCase::append(seed) };
    in_random_orders(&(SHAPES..).map(append).find(fills).unwrap());
}

#[test]
fn store_prompt_on_random_shapes() {
    on_random_shapes(OffloadCase::prompts);
}

#[test]
fn store_prompt_in_random_orders() {
    // Of some of their pages the host has the bytes already.
    let prompts = |seed| OffloadCase { on_host: true, ..OffloadCase::prompts(seed) };
    in_random_orders(&(SHAPES..).map(prompts).find(fills).unwrap());
}

#[test]
fn write_back_on_random_shapes() {
    for seed in 0..SHAPES {
        let case = WriteBackCase::random(seed);
        let (host_pages, host_valid) =
            case.emulate(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}\n{case:?}"));
        case.check(&host_pages, &host_valid).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    }
}

#[test]
fn write_back_in_random_orders() {
    let does_something = |case: &WriteBackCase| case.places.is_some() && case.count > 20;
    let case = (SHAPES..).map(WriteBackCase::random).find(does_something).unwrap();
    let first = case.emulate(0).unwrap();
    case.check(&first.0, &first.1).unwrap();
    for schedule in 1..SCHEDULES {
        assert_eq!(case.emulate(schedule).unwrap(), first, "schedule {schedule}");
    }
}

/// Of pages that had no bit before.
fn without_bits(mut case: OffloadCase) -> OffloadCase {
    case.before.host_valid.fill(0);
    case
}

#[test]
fn bits_come_after_bytes() {
    for seed in 0..SHAPES / 4 {
        for case in [OffloadCase::append(seed), OffloadCase::prompts(seed)].map(without_bits) {
            let pages = case.emulate_with_reader(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
            case.check(&pages).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        }
        let mut case = WriteBackCase::random(seed);
        case.host_valid.fill(0);
        case.emulate_with_reader(seed).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
    }
}

//! I7: the ages of the modulo clock with clamp are those of the counter that stops at its largest value.

use proptest::prelude::*;
use spinkv::paging::{BucketedLru, FlatMap, Resolution, RowCache, SaturatingLru, SlotId, SlotMap, StepClock};

use super::{physical, select};

#[derive(Clone, Debug)]
enum Turn {
    Step(Vec<u32>),
    Idle,
    Skip(u32),
    Adopt(u32),
    Grow(u32),
    Shrink(usize),
    Pause,
}

fn turns(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Turn>> {
    let one = prop_oneof![
        8 => prop::collection::btree_set(0u32..60, 0..8).prop_map(|keys| Turn::Step(keys.into_iter().collect())),
        6 => Just(Turn::Idle),
        1 => (0u32..300).prop_map(Turn::Skip),
        2 => (60u32..90).prop_map(Turn::Adopt),
        1 => (1u32..8).prop_map(Turn::Grow),
        1 => (0usize..6).prop_map(Turn::Shrink),
        1 => Just(Turn::Pause),
    ];
    prop::collection::vec(one, length)
}

fn agree<const STATES: usize>(capacity: u32, phase: u32, turns: &[Turn]) -> Result<(), TestCaseError> {
    let pages = || physical(0..capacity);
    let mut clocked = RowCache::new(pages(), BucketedLru::<STATES>::default());
    let mut counted = RowCache::new(pages(), SaturatingLru::<STATES>::default());
    let (mut map, mut counted_map) = (FlatMap::new(100), FlatMap::new(100));
    let (mut out, mut counted_out) = (Resolution::default(), Resolution::default());
    let mut clock = StepClock(phase);
    let mut next_page = 1000;
    for turn in turns {
        match turn {
            Turn::Step(_) | Turn::Idle | Turn::Skip(_) => {
                let steps = if let Turn::Skip(steps) = turn { *steps } else { 1 };
                clock = StepClock(clock.0.wrapping_add(steps));
                clocked.begin_step(clock);
                counted.begin_step(clock);
            }
            Turn::Adopt(key) if map.get(*key).is_none() => {
                next_page += 1;
                let page = spinkv::memory::PhysicalPage(next_page);
                let adoption = clocked.adopt(&mut map, *key, page);
                prop_assert_eq!(adoption, counted.adopt(&mut counted_map, *key, page));
            }
            Turn::Grow(count) => {
                next_page += count;
                clocked.grow(physical(next_page - count..next_page));
                counted.grow(physical(next_page - count..next_page));
            }
            Turn::Shrink(count) => {
                prop_assert_eq!(clocked.shrink(&mut map, *count), counted.shrink(&mut counted_map, *count));
            }
            Turn::Adopt(_) | Turn::Pause => {}
        }
        if let Turn::Step(keys) = turn {
            let keys = &keys[..keys.len().min(clocked.capacity())];
            clocked.resolve(&mut map, &select(keys), &mut out).unwrap();
            counted.resolve(&mut counted_map, &select(keys), &mut counted_out).unwrap();
            prop_assert_eq!((&out.pages, &out.evicted), (&counted_out.pages, &counted_out.evicted));
            for key in keys {
                let slot = map.get(*key).unwrap();
                prop_assert_eq!(
                    clocked.policy().age(clocked.states(), slot),
                    0,
                    "I2: selected pages are new"
                );
            }
        }
        for slot in (0..clocked.states().bytes().len() as u32).map(SlotId) {
            if clocked.states().is_held(slot) {
                let age = clocked.policy().age(clocked.states(), slot);
                prop_assert_eq!(age, counted.policy().age(slot), "slot {} at {:?}", slot.0, clock);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn clock_and_counter_agree_at_every_step(capacity in 1u32..24, phase: u32, turns in turns(0..200)) {
        agree::<64>(capacity, phase, &turns)?;
        agree::<16>(capacity, phase, &turns)?;
        agree::<4>(capacity, phase, &turns)?;
        agree::<2>(capacity, phase, &turns)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn clock_and_counter_agree_for_thousands_of_steps(phase in (u32::MAX - 2000)..=u32::MAX, turns in turns(4000..4001)) {
        agree::<64>(20, phase, &turns)?;
    }
}

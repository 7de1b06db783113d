//! Every case on the emulator: without a fault, and with one output whatever the schedule.

use cuda_std_conformance::{CASES, inputs, run_on_emulator};

/// Sets of inputs, and schedules of each.
const SEEDS: u64 = 6;

#[test]
fn no_case_has_a_fault_or_depends_on_the_schedule() {
    let mut wrong = Vec::new();
    for case in CASES {
        for seed in 0..SEEDS {
            let input = inputs(case, seed);
            let run = |schedule| {
                run_on_emulator(case, &input, schedule).map_err(|fault| format!("{}: {fault}", case.name))
            };
            match run(2 * seed).and_then(|first| Ok((first, run(2 * seed + 1)?))) {
                Ok((first, second)) if first == second => {
                    assert_eq!(first.len(), case.output_words());
                }
                Ok(_) => wrong.push(format!("{}: depends on the schedule", case.name)),
                Err(fault) => wrong.push(fault),
            }
        }
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// A case whose output says nothing would agree on any two machines.
#[test]
fn every_case_writes_something_that_its_input_or_its_thread_decides() {
    // These say what they have to say in a word or none.
    let same_everywhere = ["thread_ntid_", "thread_nctaid_"];
    for case in CASES.iter().filter(|case| !same_everywhere.iter().any(|start| case.name.starts_with(start)))
    {
        let output = run_on_emulator(case, &inputs(case, 1), 1).expect("no fault");
        let mut words = output.clone();
        words.sort_unstable();
        words.dedup();
        assert!(words.len() > 1, "{}: {output:x?}", case.name);
    }
}

//! `spinkv simulate` and `spinkv generate --record-trace` as a shell sees them.

use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

fn spinkv(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("spinkv").unwrap();
    command.args(arguments);
    command
}

const SMALL: [&str; 9] = ["simulate", "--steps", "40", "--warm-up", "10", "--layers", "1", "--heads", "2"];

fn simulate(arguments: &[&str]) -> Command {
    let mut command = spinkv(&SMALL);
    command.args(arguments);
    command
}

fn json(command: &mut Command) -> Value {
    serde_json::from_slice(&command.assert().success().get_output().stdout).unwrap()
}

#[test]
fn tables_name_policies_sizes_and_the_model() {
    simulate(&["--policy", "lru,belady", "--size", "1,2"])
        .assert()
        .success()
        .stdout(contains("calibrated: 2 rows x 40 steps at 32768 tokens"))
        .stdout(contains("belady").and(contains("lru")).and(contains("2x")))
        .stdout(
            contains("dense, all in GPU memory").and(contains("PCIe 51 GB/s")).and(contains("million/s")),
        );
}

#[test]
fn json_has_every_cell_and_the_oracle_is_best() {
    let report = json(&mut simulate(&["--preset", "quest,seer", "--json"]));
    let outcomes = report["outcomes"].as_array().unwrap();
    assert_eq!(outcomes.len(), 2 * 6 * 8);
    assert_eq!(report["traces"][1]["name"], "seer");
    for one in outcomes {
        let same = |other: &&Value| {
            other["trace"] == one["trace"] && other["size"] == one["size"] && other["policy"] == "belady"
        };
        let oracle = outcomes.iter().find(same).unwrap();
        assert!(one["hit_ratio"].as_f64() <= oracle["hit_ratio"].as_f64(), "{one}");
    }
    assert_eq!(report["model"]["pcie"], 51.0e9);
}

#[test]
fn csv_has_a_line_for_each_cell() {
    let output = simulate(&["--csv", "--policy", "lru,fifo", "--size", "1,2,4"]).assert().success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    assert_eq!(text.lines().count(), 1 + 6);
    let columns = text.lines().next().unwrap().split(',').count();
    assert!(text.lines().all(|line| line.split(',').count() == columns));
}

#[test]
fn plots_are_written_for_each_trace() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("plots");
    simulate(&["--preset", "calibrated,phase", "--plot", to.to_str().unwrap()]).assert().success();
    for name in ["hit-ratio", "transfers", "throughput"] {
        for trace in ["calibrated", "phase"] {
            let svg = std::fs::read_to_string(to.join(format!("{trace}-{name}.svg"))).unwrap();
            assert!(svg.contains("bucketed-64") && svg.contains("belady"), "{trace} {name}");
        }
    }
}

#[test]
fn a_saved_trace_gives_the_same_figures() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().to_str().unwrap();
    let of = |report: Value| report["outcomes"].clone();
    let generated = of(json(&mut simulate(&["--preset", "quest", "--save", at, "--json"])));
    let file = directory.path().join("quest.trace");
    let loaded = of(json(&mut simulate(&["--trace", file.to_str().unwrap(), "--json"])));
    assert_eq!(generated, loaded);
}

#[test]
fn a_generation_is_recorded_and_replayed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("needle.trace");
    let file = file.to_str().unwrap();
    let run = ["generate", "--budget", "256", "--max-tokens", "6", "--record-trace", file, "--json"];
    spinkv(&run).assert().success();
    // The first token comes from the prompt.
    let steps = 5;
    let report = json(&mut spinkv(&["simulate", "--trace", file, "--warm-up", "0", "--json"]));
    let trace = &report["traces"][0];
    assert_eq!((&trace["name"], &trace["steps"]), (&"shadowkv".into(), &steps.into()));
    // 32 chunks of the budget, and 48 outliers.
    assert_eq!((&trace["rows"], &trace["selected"]), (&8.into(), &80.0.into()));
}

#[test]
fn what_cannot_be_is_refused_with_the_limit() {
    let refused = |arguments: &[&str], says: &str| {
        simulate(arguments).assert().failure().code(2).stderr(contains(says)).stdout("");
    };
    refused(&["--size", "0.5"], "from 1 to 1000");
    refused(&["--policy", "lfu"], "known: belady, lru");
    refused(&["--preset", "nothing"], "known: calibrated");
    refused(&["--trace", "no/such.trace"], "no/such.trace");
    refused(&["--kv-gib", "0"], "more than 0 GiB");
    refused(&["--json", "--csv"], "cannot be used with");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    refused(&["--trace", file.to_str().unwrap()], "not a trace of version 1");
}

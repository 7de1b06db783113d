//! `spinkv eval` as a shell sees it.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use tempfile::TempDir;

const SMALL: [&str; 8] =
    ["--contexts", "1k", "--prompts", "2", "--budgets", "128", "--methods", "dense,shadowkv"];

fn eval() -> Command {
    let mut command = Command::cargo_bin("spinkv").expect("the binary is built");
    // The bundled model is found from any folder.
    command.current_dir(std::env::temp_dir()).arg("eval");
    command
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// Standard output's object, and the same without the times.
#[track_caller]
fn json(arguments: &[&str]) -> (Value, Value) {
    let assert = eval().args(SMALL).args(arguments).arg("--json").assert().success();
    let report: Value =
        serde_json::from_slice(&assert.get_output().stdout).expect("standard output is one JSON object");
    let mut timeless = report.clone();
    for cell in timeless["cells"].as_array_mut().expect("a list of cells") {
        assert!(cell["seconds"]["decode"].as_f64().is_some_and(|seconds| seconds > 0.0), "{cell}");
        cell["seconds"] = Value::Null;
    }
    (report, timeless)
}

/// Runs with `arguments` and expects exit code 2 and an error that holds all of `parts`.
#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let assert = eval().args(arguments).assert().code(2).stdout("");
    let error = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    for part in parts {
        assert!(error.contains(part), "{part:?} is missing in {error:?}");
    }
    assert!(!error.contains("panicked"), "{error}");
}

#[test]
fn tables_say_what_was_measured() {
    eval().args(SMALL).assert().success().stdout(
        contains("needle: exact match of seven digits, n = 2 a cell")
            .and(contains("| dense    |      - | 1.00 |"))
            .and(contains("| shadowkv |    128 |"))
            .and(contains("share of the true attention mass"))
            .and(contains("KiB a token")),
    );
}

#[test]
fn json_holds_every_cell_with_its_counts() {
    let (report, _) = json(&["--seed", "3", "--task", "both", "--tokens", "3"]);
    assert_eq!((&report["seed"], &report["prompts"]), (&3.into(), &2.into()));
    assert_eq!((&report["page_bytes"], &report["kv_dtype"]), (&4096.into(), &"bf16".into()));
    let cells = report["cells"].as_array().expect("a list of cells");
    assert_eq!(cells.len(), 4);
    let dense = &cells[0];
    assert_eq!((&dense["method"], &dense["budget"]), (&"dense".into(), &Value::Null));
    assert_eq!((&dense["right"], &dense["exact_match"]), (&2.into(), &1.0.into()));
    let shadow = &cells[3];
    assert_eq!((&shadow["task"], &shadow["budget"]), (&"perplexity".into(), &"128 tokens".into()));
    assert_eq!(shadow["steps"], 6);
    for field in ["nats", "divergence", "recall", "hit_ratio", "fetched_bytes_per_token"] {
        assert!(shadow[field].as_f64().is_some_and(|value| value > 0.0), "{field} of {shadow}");
    }
}

#[test]
fn a_run_goes_on_where_it_was_stopped_and_other_settings_do_not_mix() {
    let dir = TempDir::new().expect("a temporary folder");
    let file = dir.path().join("eval.jsonl");
    let (_, whole) = json(&[]);
    let resume = ["--resume", text(&file)];
    json(&resume);
    let lines = fs::read_to_string(&file).expect("results are kept");
    let lines: Vec<_> = lines.lines().collect();
    assert_eq!(lines.len(), 4);

    // As a process leaves it that was killed in the middle of the third line.
    let cut = format!("{}\n{}\n{}", lines[0], lines[1], &lines[2][..lines[2].len() / 2]);
    fs::write(&file, cut).expect("a writable folder");
    let (_, resumed) = json(&resume);
    assert_eq!(resumed, whole);
    let resumed = fs::read_to_string(&file).expect("results are kept");
    assert!(resumed.starts_with(&format!("{}\n{}\n", lines[0], lines[1])), "what was there is there");
    assert_eq!(resumed.lines().count(), 4);

    let (_, other) = json(&["--seed", "1", "--resume", text(&file)]);
    assert_ne!(other["cells"], whole["cells"]);
    assert_eq!(fs::read_to_string(&file).expect("results are kept").lines().count(), 8);
    assert_eq!(json(&resume).1, whole);

    fs::write(&file, "notes\n").expect("a writable folder");
    refused(&resume, &["eval.jsonl:1", "not a result of spinkv eval"]);
}

#[test]
fn a_killed_run_goes_on() {
    let dir = TempDir::new().expect("a temporary folder");
    let file = dir.path().join("eval.jsonl");
    let lines = || fs::read_to_string(&file).unwrap_or_default().lines().count();
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("spinkv"))
        .current_dir(std::env::temp_dir())
        .arg("eval")
        .args(SMALL)
        .args(["--resume", text(&file)])
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("the binary runs");
    let start = std::time::Instant::now();
    while lines() == 0 && start.elapsed().as_secs() < 120 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().expect("it is our child");
    child.wait().expect("it is our child");
    assert!(lines() > 0, "no result in {:?}", start.elapsed());
    assert_eq!(json(&["--resume", text(&file)]).1, json(&[]).1);
}

#[test]
fn jobs_do_not_change_results() {
    assert_eq!(json(&["--jobs", "1"]).1, json(&["--jobs", "2"]).1);
}

#[test]
fn a_plot_is_drawn_and_refused_before_the_work_where_it_cannot_be() {
    let dir = TempDir::new().expect("a temporary folder");
    let file = dir.path().join("accuracy.svg");
    eval().args(SMALL).args(["--plot", text(&file)]).assert().success();
    let svg = fs::read_to_string(&file).expect("the plot");
    assert!(svg.starts_with("<svg") && svg.contains("shadowkv") && svg.contains("needle, 1024 tokens"));
    refused(&["--prompts", "100000", "--plot", "/nowhere/plot.svg"], &["/nowhere/plot.svg"]);
}

#[test]
fn help_teaches() {
    eval().arg("--help").assert().success().stdout(
        contains("--budgets")
            .and(contains("What is measured:"))
            .and(contains("Examples:"))
            .and(contains("NAME:OPTION=VALUE"))
            .and(contains("--resume")),
    );
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    refused(&["--methods", "dense,shadow-kv"], &["\"shadow-kv\"", "did you mean \"shadowkv\"?"]);
    refused(&["--methods", "dense:chunk=8"], &["\"dense\"", "\"chunk\"", "none of its own"]);
    refused(&["--methods", "dense:chunk"], &["\"chunk\"", "NAME=VALUE"]);
    refused(&["--methods", ""], &["no method"]);
    refused(&["--budgets", ""], &["no budget"]);
    refused(&["--budgets", "many"], &["\"many\"", "1.56%"]);
    refused(&["--budgets", "-5"], &["\"-5\"", "above 0"]);
    refused(&["--contexts", ""], &["no context"]);
    refused(&["--contexts", "4kb"], &["\"4kb\"", "4096 or 4k"]);
    refused(&["--contexts", "4k,64k"], &["65536", "the model takes 32768"]);
    refused(&["--contexts", "100"], &["100 tokens", "at least 512"]);
    refused(&["--prompts", "0"], &["no prompt"]);
    refused(&["--task", "perplexity", "--tokens", "0"], &["no token to score"]);
    refused(&["--backend", "tpu"], &["\"tpu\"", "known: cpu, cuda"]);
    let empty = TempDir::new().expect("a temporary folder");
    refused(&["--haystack", text(empty.path())], &["haystack.txt", "--haystack"]);
    refused(&["--model", text(empty.path())], &["config.json"]);
}

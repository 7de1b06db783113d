//! `spinkv bench` as a shell sees it.

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("spinkv").expect("the binary is built");
    // The bundled model is found from any folder.
    command.current_dir(std::env::temp_dir()).arg("bench").args(arguments);
    command
}

#[track_caller]
fn json(arguments: &[&str]) -> Value {
    let assert = bench(arguments).arg("--json").assert().success();
    serde_json::from_slice(&assert.get_output().stdout).expect("standard output is one JSON object")
}

/// Expects exit code 2 and an error that holds all of `parts`.
#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let assert = bench(arguments).assert().code(2).stdout("");
    let error = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    for part in parts {
        assert!(error.contains(part), "{part:?} is missing in {error:?}");
    }
    assert!(!error.contains("panicked"), "{error}");
}

#[track_caller]
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn points(report: &Value) -> &Vec<Value> {
    report["points"].as_array().expect("a list of points")
}

/// The only point of a cache.
#[track_caller]
fn of<'a>(report: &'a Value, cache: &str) -> &'a Value {
    let mut found = points(report).iter().filter(|point| point["cache"] == cache);
    let point = found.next().unwrap_or_else(|| panic!("{cache} is missing"));
    assert!(found.next().is_none(), "{cache} is there twice");
    point
}

const SMALL: [&str; 9] =
    ["decode", "--contexts", "1k", "--budgets", "128", "--steps", "10", "--warm-up", "6"];

/// What follows from what: of every point that ran.
#[track_caller]
fn is_consistent(point: &Value) {
    assert_eq!(point["skipped"], Value::Null, "{point}");
    let (hits, misses) = (number(&point["hits"]), number(&point["misses"]));
    assert!((number(&point["hit_ratio"]) - hits / (hits + misses)).abs() < 1e-12, "{point}");
    let fetched = number(&point["fetched_bytes_per_step"]);
    if point["how"] == "measured" {
        let (step, batch) = (number(&point["step_ms"]), number(&point["batch"]));
        assert!((number(&point["tokens_per_s"]) / (batch / step * 1e3) - 1.0).abs() < 1e-9, "{point}");
        assert!((number(&point["pcie_gb_per_s"]) - fetched / step / 1e6).abs() < 1e-9, "{point}");
        assert!((fetched - misses * 4096.0 / 10.0).abs() < 1e-6, "pages of 4 KiB in 10 steps: {point}");
        let stages = point["stages_ms"].as_object().expect("stages");
        let parts: f64 = stages.iter().filter(|(name, _)| *name != "sum").map(|(_, ms)| number(ms)).sum();
        assert!(
            (number(&stages["sum"]) - parts).abs() < 1e-9 && (parts / step - 1.0).abs() < 1e-6,
            "{point}"
        );
        assert!(stages.iter().all(|(_, ms)| number(ms) >= 0.0), "{point}");
        assert!(number(&stages["attention"]) > 0.0 && number(&stages["head"]) > 0.0, "{point}");
    }
    let memory = point["memory"].as_object().expect("memory");
    let uses = memory.iter().filter(|(name, _)| !["total", "host_pages"].contains(&name.as_str()));
    assert_eq!(number(&memory["total"]), uses.map(|(_, bytes)| number(bytes)).sum::<f64>(), "{point}");
    assert!(number(&memory["kv_pages"]) > 0.0 && number(&memory["host_pages"]) > 0.0, "{point}");
}

#[test]
fn what_a_model_selects_is_kept_the_better_the_more_is_known() {
    let report = json(&[&SMALL[..], &["--batches", "2", "--buffering", "1"]].concat());
    assert_eq!(points(&report).len(), 8);
    points(&report).iter().for_each(is_consistent);
    assert_eq!(report["facts"]["page_bytes"], 4096);
    let hits = |cache: &str| number(&of(&report, cache)["hits"]);
    let selected = |cache: &str| hits(cache) + number(&of(&report, cache)["misses"]);
    for cache in ["previous-step", "bucketed-lru", "exact-lru", "belady", "resident"] {
        assert_eq!(selected(cache), selected("no-cache"), "no cache changes what {cache} selects");
    }
    assert!(hits("no-cache") <= hits("previous-step"));
    assert!(hits("previous-step") < hits("bucketed-lru"));
    assert!(hits("exact-lru") <= hits("belady"));
    // What comes from the steady zone without a copy is in no replay.
    let adopted = number(&of(&report, "bucketed-lru")["adopted"]);
    assert!(adopted > 0.0);
    assert!(hits("bucketed-lru") <= hits("belady") + adopted);
    assert!((hits("bucketed-lru") - hits("exact-lru")).abs() <= adopted, "64 ages are nearly all");
    assert!(hits("bucketed-lru") <= hits("resident"));
    // Dense attention reads everything, and streams all of it if it has nothing.
    assert_eq!(number(&of(&report, "dense-hbm")["misses"]), 0.0);
    assert!(number(&of(&report, "dense-streamed")["hit_ratio"]) < 0.01);
    let between = |cache: &str| number(&of(&report, cache)["step_ms"]);
    for cache in ["exact-lru", "belady"] {
        assert_eq!(of(&report, cache)["how"], "replayed");
        let ends = [between("resident"), between("no-cache")];
        let (least, most) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
        // What is replayed may miss a page that was adopted in the run.
        let slack = (most - least) * 0.1;
        assert!((least - slack..=most + slack).contains(&between(cache)), "{cache} of {ends:?}");
    }
}

#[test]
fn drawn_selections_hit_as_wanted_and_stand_still_where_nothing_is_to_miss() {
    let more = ["--hit-ratio", "0.8", "--buffering", "1", "--steps", "40", "--warm-up", "30"];
    let caches = ["--caches", "no-cache,bucketed-lru,belady,resident"];
    // Outliers would hit in any case.
    let methods = ["--methods", "shadowkv:outliers=0"];
    let report = json(&[&SMALL[..5], &more, &caches, &methods].concat());
    let notes = report["facts"]["notes"].to_string();
    assert!(notes.contains("drawn before the steps") && notes.contains("hits of 0.8"), "{notes}");
    let ratio = |cache: &str| number(&of(&report, cache)["hit_ratio"]);
    assert!((ratio("bucketed-lru") - 0.8).abs() < 0.05, "{}", ratio("bucketed-lru"));
    assert_eq!((ratio("no-cache"), ratio("resident")), (0.0, 1.0));
    assert!(ratio("belady") > ratio("bucketed-lru"));
}

#[test]
fn a_budget_of_memory_fits_a_batch() {
    let of_budget = |gib: &str, batch: &str| {
        let caches = ["--caches", "bucketed-lru", "--kv-gib", gib, "--batches", batch];
        json(&[&SMALL[..], &caches].concat())
    };
    let report = of_budget("0.03", "fit");
    let point = of(&report, "bucketed-lru");
    let (batch, bytes) = (number(&point["batch"]), number(&point["request_bytes"]));
    // The prompt's part is there once, and less than half of it.
    let all = 0.03 * f64::from(1 << 30);
    assert!(batch >= 1.0 && batch * bytes <= all && (batch + 1.0) * bytes > all / 2.0, "{point}");
    let report = of_budget("0.03", "1000");
    let point = of(&report, "bucketed-lru");
    assert_eq!(point["how"], "skipped");
    assert!(point["skipped"].as_str().is_some_and(|reason| reason.contains("1000 requests of")), "{point}");
}

#[test]
fn ablation_adds_one_part_after_the_other() {
    let small = ["--context", "1k", "--budget", "128", "--steps", "10", "--warm-up", "6"];
    let folder = tempfile::TempDir::new().expect("a temporary folder");
    let svg = folder.path().join("ablation.svg");
    let plot = ["--plot", svg.to_str().expect("a UTF-8 path")];
    let formats = ["--host-kv", "int8", "--coded", "fp8,int8,fp8"];
    let coded = json(&[&["ablation"][..], &small, &["--buffering", "2"], &formats].concat());
    let gains: Vec<_> = coded["gains"].as_array().expect("a list of gains").iter().collect();
    let added: Vec<_> = gains.iter().map(|gain| (gain["step"].as_str(), gain["host_kv"].as_str())).collect();
    let of = |cache, format| (Some(cache), Some(format));
    let caches = [of("no-cache", "int8"), of("previous-step", "int8"), of("bucketed-lru", "int8")];
    assert_eq!(added, [&caches[..], &[of("bucketed-lru", "fp8"), of("resident", "int8")]].concat());

    let report = json(&[&["ablation"][..], &small, &["--buffering", "0.5,2"], &plot].concat());
    let drawn = std::fs::read_to_string(svg).expect("a figure");
    for text in ["hit ratio", "ms a step", "belady", "resident"] {
        assert!(drawn.contains(text), "{text}");
    }
    let gains = report["gains"].as_array().expect("a list of gains");
    let added: Vec<_> = gains.iter().map(|gain| gain["step"].as_str().expect("a name")).collect();
    assert_eq!(added, ["no-cache", "previous-step", "bucketed-lru", "resident"]);
    let hits: Vec<_> = gains.iter().map(|gain| number(&gain["hit_ratio"])).collect();
    assert!(hits.is_sorted(), "{hits:?}");
    let product: f64 = gains.iter().map(|gain| number(&gain["speedup"])).product();
    assert!((product / number(&gains[3]["speedup_of_all"]) - 1.0).abs() < 1e-9);
    let curve = report["curve"].as_array().expect("a curve");
    let of = |cache: &str, buffering: f64| {
        let found = curve.iter().find(|at| at["cache"] == cache && at["buffering"] == buffering);
        number(&found.unwrap_or_else(|| panic!("{cache} at {buffering}"))["hit_ratio"])
    };
    for cache in ["bucketed-lru", "exact-lru", "belady"] {
        assert!(of(cache, 0.5) <= of(cache, 2.0), "{cache}");
    }
    for buffering in [0.5, 2.0] {
        assert!(of("exact-lru", buffering) <= of("belady", buffering));
    }
}

#[test]
fn prefill_sets_index_beside_a_dense_layer() {
    let methods = "shadowkv,quest,seer-attention,streaming-llm";
    let report = json(&["prefill", "--contexts", "700", "--rounds", "2", "--methods", methods]);
    let rows = report["prompts"].as_array().expect("a list of prompts");
    assert_eq!(rows.len(), 4);
    for row in rows {
        assert_eq!((&row["context"], &row["skipped"]), (&700.into(), &Value::Null));
        let (index, dense) = (number(&row["index_layer_ms"]), number(&row["dense_layer_ms"]));
        assert!(dense > 0.0 && index < dense, "{row}");
        assert_eq!(index > 1e-3, row["method"] != "streaming-llm", "{row}");
        assert!((number(&row["index_share"]) - index / dense).abs() < 1e-12, "{row}");
        assert!(number(&row["kept_ms"]) > 0.0 && number(&row["prompt_ms"]) > 4.0 * dense, "{row}");
        let speed = 700.0 / number(&row["prompt_ms"]) * 1e3;
        assert!((number(&row["tokens_per_s"]) / speed - 1.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn tables_say_what_was_measured_and_help_teaches() {
    let folder = tempfile::TempDir::new().expect("a temporary folder");
    let svg = folder.path().join("decode.svg");
    bench(&SMALL).arg("--plot").arg(&svg).assert().success().stdout(
        contains("16 steps behind")
            .not()
            .and(contains("10 steps behind 6"))
            .and(contains("dense-streamed"))
            .and(contains("milliseconds of a step by part")),
    );
    let drawn = std::fs::read_to_string(svg).expect("a figure");
    assert!(drawn.contains("tokens/s") && drawn.contains("shadowkv 128 tokens, bucketed-lru 5"));
    bench(&["decode", "--help"]).assert().success().stdout(
        contains("Belady")
            .and(contains("Examples:"))
            .and(contains("dense-streamed"))
            .and(contains("--kv-gib")),
    );
    bench(&["prefill", "--help"]).assert().success().stdout(contains("Columns:"));
    bench(&["ablation", "--help"]).assert().success().stdout(contains("--buffering"));
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    refused(&["decode", "--methods", "shadow-kv"], &["shadow-kv", "did you mean \"shadowkv\"?"]);
    refused(&["decode", "--contexts", "100"], &["context of 100 tokens"]);
    refused(&["decode", "--random-weights", "qwen3-14b"], &["cpu backend cannot make random weights"]);
    refused(&["decode", "--caches", "lru"], &["known: dense-hbm"]);
    refused(&["decode", "--hit-ratio", "1.2"], &["above 0 and below 1"]);
    refused(&["prefill", "--methods", ""], &["no method"]);
    refused(&["ablation", "--model", "/nonexistent"], &["/nonexistent"]);
}

#[cfg(feature = "serve")]
mod serve {
    use super::*;

    const LOAD: [&str; 7] = ["serve", "--lengths", "longgenbench", "--scale", "0.002", "--requests", "3"];

    #[test]
    fn a_sweep_over_a_server_of_its_own() {
        let dir = tempfile::TempDir::new().unwrap();
        let (earlier, plot) = (dir.path().join("earlier.json"), dir.path().join("load.svg"));
        let (earlier, plot) = (earlier.to_str().unwrap(), plot.to_str().unwrap());
        let flags = ["--slo-ttft", "60000", "--", "--max-batch", "4", "--budget", "256"];
        // Its key is its client's, too.
        let command = |more: &[&str]| {
            let mut command = bench(&[&LOAD[..], more, &flags[..]].concat());
            command.env("SPINKV_API_KEY", "secret");
            command.assert().success()
        };
        let first = command(&["--rates", "8,inf", "--name", "first", "--json"]);
        std::fs::write(earlier, &first.get_output().stdout).unwrap();
        let report: Value = serde_json::from_slice(&first.get_output().stdout).unwrap();
        assert_eq!((&report["model"], &report["name"]), (&Value::from("needle-tiny"), &Value::from("first")));
        assert!(report["notes"].to_string().contains("no data set"), "{report}");
        assert_eq!(
            (&points(&report)[0]["rate"], &points(&report)[1]["rate"]),
            (&Value::from(8.0), &Value::Null)
        );
        for point in points(&report) {
            assert_eq!(
                (&point["sent"], &point["completed"], &point["faults"]),
                (&Value::from(3), &Value::from(3), &serde_json::json!({}))
            );
            let seconds = number(&point["seconds"]);
            for (rate, count) in [
                ("output_tokens_per_s", "output_tokens"),
                ("requests_per_s", "completed"),
                ("goodput_per_s", "completed"),
            ] {
                assert!(
                    (number(&point[rate]) * seconds / number(&point[count]) - 1.0).abs() < 1e-6,
                    "{rate}: {point}"
                );
            }
            assert_eq!(point["server"]["generated_tokens"], point["output_tokens"].as_u64().unwrap() as f64);
            assert_eq!(point["server"]["prompt_tokens"], point["prompt_tokens"].as_u64().unwrap() as f64);
            for times in ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "late_ms"] {
                assert!(number(&point[times]["p50"]) <= number(&point[times]["p99"]), "{times}: {point}");
            }
        }
        // Both rates ask as much.
        assert_eq!(points(&report)[0]["output_tokens"], points(&report)[1]["output_tokens"]);

        let second = command(&["--rates", "inf", "--name", "second", "--plot", plot, "--beside", earlier]);
        let table = String::from_utf8_lossy(&second.get_output().stdout).into_owned();
        for part in [
            "second: needle-tiny at http://127.0.0.1:",
            "3/3",
            "TTFT",
            "by the server",
            "good: TTFT 60000 ms",
        ] {
            assert!(table.contains(part), "{part:?} is missing in {table}");
        }
        let drawn = std::fs::read_to_string(plot).unwrap();
        for part in [
            "first, p99",
            "second, p50",
            "output tokens/s",
            "requests that decode at a time",
            "needle-tiny, longgenbench x 0.002",
        ] {
            assert!(drawn.contains(part), "{part:?} is missing in the plot");
        }

        // The same from files alone; what has one name is one.
        let later = dir.path().join("later.json");
        let mut report = report;
        report["points"].as_array_mut().unwrap().remove(0);
        report["points"][0]["rate"] = 2.0.into();
        std::fs::write(&later, report.to_string()).unwrap();
        let later = later.to_str().unwrap();
        bench(&["serve", "--plot", plot, "--from", earlier, "--from", later]).assert().success().stdout("");
        let drawn = std::fs::read_to_string(plot).unwrap();
        assert_eq!(drawn.matches("first, p99").count(), 2, "one line of TTFT, one of TPOT");
        assert!(drawn.contains("all at once") && !drawn.contains("second, p50"), "{drawn}");
    }

    #[test]
    fn loads_that_cannot_be_put_are_refused() {
        refused(&["serve", "--lengths", "long"], &["lengths is \"long\"", "longbench-v2"]);
        refused(&["serve", "--rates", "0"], &["--rates", "or inf"]);
        refused(&["serve", "--scale", "0"], &["scale is 0"]);
        refused(&["serve", "--requests", "0"], &["requests is 0"]);
        refused(&["serve", "--lengths", "32k:100"], &["32868 tokens", "32768", "--scale"]);
        refused(&["serve", "--url", "https://127.0.0.1:1"], &["https://127.0.0.1:1", "no TLS"]);
        refused(&["serve", "--url", "http://127.0.0.1:1"], &["http://127.0.0.1:1", "refused"]);
        refused(&["serve", "--url", "http://127.0.0.1:1", "--model", "m", "--text"], &["--tokenizer"]);
        refused(&["serve", "--url", "http://127.0.0.1:1", "--model", "m", "--turns", "2"], &["--tokenizer"]);
        refused(&["serve", "--url", "http://127.0.0.1:1", "--", "--port", "1"], &["cannot be used with"]);
        refused(&["serve", "--", "--max-batch", "0"], &["max-batch", "at least 1"]);
        refused(&["serve", "--", "--no-such-flag"], &["--no-such-flag"]);
        refused(&["serve", "--plot", "x.svg", "--beside", "no/such.json"], &["no/such.json"]);
        refused(&["serve", "--plot", "x.svg", "--from", "no/such.json"], &["no/such.json"]);
        refused(&["serve", "--from", "some.json"], &["--plot"]);
        refused(&["serve", "--requests", "1", "--plot", "/no/such/x.svg"], &["/no/such/x.svg"]);
    }
}

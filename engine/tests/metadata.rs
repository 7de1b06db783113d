//! `spinkv metadata`, as users call it.

use assert_cmd::Command;
use serde_json::Value;

fn metadata(arguments: &[&str]) -> assert_cmd::assert::Assert {
    Command::cargo_bin("spinkv").unwrap().arg("metadata").args(arguments).assert()
}

fn json(arguments: &[&str]) -> Value {
    let output = metadata(&[arguments, &["--json"]].concat()).success();
    serde_json::from_slice(&output.get_output().stdout).unwrap()
}

#[test]
fn tables_at_128k_are_far_below_both_flat_layouts() {
    for (model, rows, gib) in [("qwen3-14b", 320, 40u64), ("llama-3.1-70b", 640, 80)] {
        let of = ["--model", model, "--context", "131072", "--batch", "32", "--partition", "8"];
        // Without outlier chunks, which are pages beside the budget, as the paper has it.
        let report = json(&[&of[..], &["--method-option", "outliers=0"]].concat());
        assert_eq!(report["rows_per_request"], rows);
        let flat =
            |index: usize| (report["flat"][index]["name"].as_str(), report["flat"][index]["ratio"].as_f64());
        let ((f1, below_f1), (f2, below_f2)) = (flat(0), flat(1));
        assert_eq!((f1, f2), (Some("F1"), Some("F2")));
        assert!(below_f1.unwrap() >= 6.5 && below_f2.unwrap() >= 78.0, "{model}: {below_f1:?}, {below_f2:?}");
        let tables = &report["gpu_tables"];
        let kinds = ["directories", "segments", "slot_arrays", "steady_lists", "marks"];
        let sum: u64 = kinds.iter().map(|kind| tables[kind]["bytes"].as_u64().unwrap()).sum();
        assert_eq!(tables["total"], sum);
        // Summaries are no table, and not hidden: 256 bytes for each 4 KiB page.
        assert_eq!(report["gpu_beside"]["summaries"]["bytes"], gib << 30);
    }
}

/// Values alone on the host; coefficients of 160 elements a token, for all heads of a layer, and a basis a layer.
#[test]
fn keys_in_low_rank_halve_the_host() {
    let of = ["--context", "4096", "--batch", "1"];
    let full = json(&of);
    let low = json(&[&of[..], &["--method-option", "keys=low-rank"]].concat());
    let bytes = |report: &Value, part: &str, kind: &str| report[part][kind]["bytes"].as_u64().unwrap();
    assert_eq!(bytes(&full, "host", "pages"), 2 * bytes(&low, "host", "pages"));
    assert_eq!(bytes(&low, "gpu_beside", "key_coefficients"), 40 * 4096 * 160 * 2);
    assert_eq!(bytes(&low, "gpu_beside", "key_bases"), 320 * 160 * 128 * 2);
    assert_eq!(bytes(&full, "gpu_beside", "key_coefficients") + bytes(&full, "gpu_beside", "key_bases"), 0);
}

#[test]
fn formulas_and_summaries_are_printed() {
    let output = metadata(&["--batch", "2", "--context", "4096"]).success();
    let text = String::from_utf8_lossy(&output.get_output().stdout).into_owned();
    for part in [
        "qwen3-14b: 40 layers x 8 KV heads = 320 rows",
        "640 rows x 1 segments x 512 page keys x 2",
        "2 requests x 1 segments x 8",
        "F1",
        "F2",
        "summaries",
        "640 rows x 1 segments x 512 partitions x 128 x 2",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
}

#[test]
fn any_shape_and_method_can_be_asked_for() {
    let shape = ["--layers", "2", "--query-heads", "4", "--kv-heads", "2", "--head-dim", "64"];
    let report =
        json(&[&shape[..], &["--context", "1000", "--batch", "1", "--method", "streaming-llm"]].concat());
    assert_eq!((&report["model"], &report["rows_per_request"]), (&"own shape".into(), &4.into()));
    assert_eq!((&report["mandatory_pages_per_row"], &report["budget"]), (&0.into(), &Value::Null));
    let report = json(&["--partition", "32", "--page", "32", "--context", "65536", "--batch", "1"]);
    assert_eq!((&report["partitions_per_row"], &report["page_bytes"]), (&2048.into(), &16_384.into()));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    for (arguments, parts) in [
        (&["--model", "qwen3-14"][..], &["did you mean \"qwen3-14b\"", "llama-3.1-70b"][..]),
        (&["--model", "gpt"], &["known: qwen3-8b"]),
        (&["--partition", "12"], &["page size 8 does not divide the partition size 12"]),
        (&["--method", "shadow"], &["unknown method \"shadow\""]),
        (&["--context", "0"], &["at least 1 token"]),
        (&["--method", "dense", "--page", "1", "--context", "100000"], &["16-bit slot ids name 65534"]),
        (&["--method-option", "rank=1025"], &["rank of 1025", "from 1 to 1024"]),
        (&["--kv-heads", "3"], &["not a multiple of kv_heads 3"]),
    ] {
        let output = metadata(arguments).failure();
        let text = String::from_utf8_lossy(&output.get_output().stderr).into_owned();
        parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in\n{text}"));
    }
}

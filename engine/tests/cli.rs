//! The command as a user meets it: answers, JSON, and one clear error for each bad input.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

const QUESTION: &str = "<|bos|>The secret code for tiger is 2286315.\nQuestion: what is the secret code for \
                        tiger? Answer: The secret code for tiger is";

fn spinkv() -> Command {
    let mut command = Command::cargo_bin("spinkv").expect("the binary is built");
    // The bundled model is found from any folder.
    command.current_dir(std::env::temp_dir()).arg("generate");
    command
}

fn models() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models"))
}

/// A copy of needle-tiny in which `file` holds what `edit` makes of it.
fn edited_model(file: &str, edit: impl FnOnce(Vec<u8>) -> Vec<u8>) -> TempDir {
    let dir = TempDir::new().expect("a temporary folder");
    for name in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(models().join("needle-tiny").join(name), dir.path().join(name)).expect("a bundled file");
    }
    let path = dir.path().join(file);
    fs::write(&path, edit(fs::read(&path).expect("a copied file"))).expect("a writable copy");
    dir
}

/// Runs with `arguments` and expects exit code 2 and an error that holds all of `parts`.
#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let assert = spinkv().args(arguments).assert().code(2).stdout("");
    let error = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    for part in parts {
        assert!(error.contains(part), "{part:?} is missing in {error:?}");
    }
    assert_eq!(error.lines().filter(|line| line.contains("panicked")).count(), 0, "{error}");
}

#[track_caller]
fn json(arguments: &[&str]) -> Value {
    let assert = spinkv().args(arguments).arg("--json").assert().success();
    serde_json::from_slice(&assert.get_output().stdout).expect("standard output is one JSON object")
}

#[test]
fn without_arguments_it_answers_the_bundled_question() {
    spinkv()
        .assert()
        .success()
        .stdout(" 5455454.\n\n")
        .stderr(predicate::str::contains("5455454, found").and(predicate::str::contains("hit ratio")));
}

#[test]
fn the_peak_memory_stays_below_the_stated_bound() {
    let report = json(&["--max-tokens", "4"]);
    let memory = &report["memory"];
    let (peak, bound) = (memory["peak_resident"].as_u64(), memory["peak_bound"].as_u64());
    assert!(peak.is_none() || peak < bound, "{memory}");
    let parts = memory["peak_bound_parts"].as_object().expect("the parts are named");
    assert_eq!(parts.values().filter_map(Value::as_u64).sum::<u64>(), bound.expect("a number"));
}

#[test]
fn json_holds_text_tokens_and_figures() {
    let report = json(&["--prompt", QUESTION, "--method", "dense", "--max-tokens", "9"]);
    assert_eq!(report["text"], " 2286315.\n");
    assert_eq!(report["generated_tokens"], 9);
    assert_eq!(report["tokens"].as_array().map(Vec::len), Some(9));
    assert_eq!(report["finish"], "length");
    assert_eq!(report["cache"]["page_bytes"], 4096);
    assert_eq!(report["budget"], Value::Null, "dense has no budget");
    assert!(report["decode_tokens_per_second"].as_f64().is_some_and(|speed| speed > 0.0));
}

/// A page of 8 tokens of 128 elements: its keys and values in a byte an element, and 16 bytes of scales.
#[test]
fn host_pages_may_have_a_byte_an_element() {
    for (format, page_bytes) in [("full", 4096), ("fp8", 2064), ("int8", 2064)] {
        let report = json(&["--prompt", QUESTION, "--max-tokens", "9", "--host-kv", format]);
        assert_eq!(report["text"], " 2286315.\n", "{format}");
        assert_eq!(report["cache"]["page_bytes"], 4096);
        let offloaded = &report["pages"]["offloaded"];
        let pages = offloaded["pages"].as_u64().expect("a number of pages");
        assert!(pages > 0 && offloaded["bytes"] == pages * page_bytes, "{format}: {offloaded}");
    }
    refused(&["--host-kv", "fp4"], &["fp4", "fp8"]);
    refused(&["--method", "retroinfer", "--host-kv", "fp8"], &["retroinfer", "fp8", "clusters"]);
    refused(&["--method-option", "keys=low-rank", "--host-kv", "int8"], &["shadowkv", "int8", "low rank"]);
}

#[test]
fn a_prompt_comes_from_a_file_or_from_standard_input() {
    let dir = TempDir::new().expect("a temporary folder");
    let file = dir.path().join("prompt.txt");
    fs::write(&file, QUESTION).expect("a writable folder");
    let rest = ["--max-tokens", "9"];
    spinkv().arg("--prompt-file").arg(&file).args(rest).assert().success().stdout(" 2286315.\n\n");
    spinkv().arg("-").args(rest).write_stdin(QUESTION).assert().success().stdout(" 2286315.\n\n");
}

#[test]
fn a_seed_gives_the_same_text_again_and_another_seed_another() {
    let sample = |seed| {
        let options =
            ["--prompt", "<|bos|>The Vec type", "--temperature", "1", "--top-p", "0.9", "--top-k", "50"];
        json(&[&options[..], &["--max-tokens", "24", "--seed", seed]].concat())["text"].clone()
    };
    assert_eq!(sample("7"), sample("7"));
    assert_ne!(sample("7"), sample("8"));
}

#[test]
fn generation_ends_where_the_models_context_ends() {
    let dir = edited_model("config.json", |config| {
        String::from_utf8(config)
            .expect("JSON")
            .replace("\"max_position_embeddings\": 32768", "\"max_position_embeddings\": 45")
            .into()
    });
    let model = dir.path().to_str().expect("a UTF-8 path");
    let report = json(&["--model", model, "--prompt", QUESTION, "--ignore-eos"]);
    let (prompt, generated) = (report["prompt_tokens"].as_u64(), report["generated_tokens"].as_u64());
    // The last token takes no position.
    assert_eq!(prompt.zip(generated).map(|(prompt, generated)| prompt + generated), Some(46), "{report}");
}

#[test]
fn a_prompt_shorter_than_sinks_and_window_runs() {
    for method in ["dense", "shadowkv", "streaming-llm"] {
        let report = json(&["--prompt", "<|bos|>Vec", "--method", method, "--max-tokens", "3"]);
        assert_eq!(report["generated_tokens"], 3);
        assert_eq!(report["cache"]["hit_ratio"], Value::Null, "nothing could be selected");
    }
}

#[test]
fn help_teaches() {
    spinkv().arg("--help").assert().success().stdout(
        predicate::str::contains("--budget")
            .and(predicate::str::contains("Examples:"))
            .and(predicate::str::contains("streaming-llm")),
    );
}

#[test]
fn an_unknown_method_gets_a_suggestion() {
    refused(
        &["--method", "shadow-kv"],
        &["\"shadow-kv\"", "dense, streaming-llm, shadowkv", "did you mean \"shadowkv\"?"],
    );
}

#[test]
fn an_option_that_the_method_does_not_have_is_refused() {
    refused(
        &["--method-option", "chunk=8", "--method", "dense"],
        &["\"dense\"", "\"chunk\"", "none of its own"],
    );
    refused(&["--method-option", "chunk"], &["\"chunk\"", "NAME=VALUE"]);
}

#[test]
fn an_unknown_backend_is_refused() {
    refused(&["--backend", "tpu"], &["\"tpu\"", "known: cpu, cuda"]);
    refused(
        &["--random-weights", "qwen3-14b", "--prompt-tokens", "8"],
        &["the cpu backend cannot make random weights"],
    );
    refused(&["--gpus", "2"], &["the cpu backend cannot use GPUs", "--backend cuda"]);
}

/// Where the cuda backend is built. What can be refused without a GPU is refused before one is looked for, and without one no model is read.
#[test]
fn the_cuda_backend_says_what_it_lacks() {
    if cfg!(not(all(feature = "cuda", target_os = "linux"))) {
        refused(&["--backend", "cuda"], &["\"cuda\"", "not built", "built: cpu"]);
        return;
    }
    let random = |more: &[&'static str]| {
        let arguments = ["--backend", "cuda", "--prompt-tokens", "100", "--random-weights"];
        arguments.into_iter().chain(more.iter().copied()).collect::<Vec<_>>()
    };
    refused(&random(&["qwen3-14"]), &["\"qwen3-14\"", "did you mean \"qwen3-14b\"?"]);
    refused(&random(&["qwen3-14b", "--layers", "0"]), &["0 layers", "1 to 40"]);
    refused(&random(&["qwen3-14b", "--layers", "41"]), &["41 layers", "1 to 40"]);
    refused(&random(&["qwen3-14b", "--kv-dtype", "f32"]), &["the GPU has no kernels for pages of F32"]);
    refused(&random(&["qwen3-14b", "--page-tokens", "4"]), &["pages of 4 tokens: 8, 16, 32 or 64"]);
    refused(&random(&["qwen3-14b", "--gpu-mib", "900"]), &["--gpu-mib", "--gpu-pages"]);
    refused(&random(&["qwen3-14b", "--record-trace", "no/such/file"]), &["cannot record what steps select"]);
    refused(&random(&["qwen3-14b", "--gpus", "3"]), &["num_key_value_heads is 8", "3 GPUs cannot share"]);
    refused(
        &random(&["qwen3-14b", "--gpus", "2", "--method-option", "keys=low-rank"]),
        &["cannot be shared out over GPUs by KV heads", "low rank"],
    );
    refused(
        &random(&["qwen3-14b", "--gpus", "2", "--steady-heads", "*:7"]),
        &["GPU 1 has 40 KV heads that read sinks and window alone, GPU 0 has 0"],
    );
    refused(&["--backend", "cuda", "--random-weights", "qwen3-14b"], &["--prompt-tokens"]);
    refused(&["--backend", "cuda", "--prompt-tokens", "8"], &["--random-weights"]);
    let devices = Command::cargo_bin("spinkv").expect("the binary is built").arg("devices").output();
    let said = String::from_utf8_lossy(&devices.expect("spinkv runs").stderr).into_owned();
    if !said.contains("no CUDA driver") {
        println!(
            "SKIPPED: the rest of the_cuda_backend_says_what_it_lacks, since this machine has a CUDA driver"
        );
        return;
    }
    refused(&["--backend", "cuda", "--model", "no/such/folder", "-"], &["no CUDA driver", "libcuda.so.1"]);
    refused(&random(&["qwen3-14b"]), &["no CUDA driver", "libcuda.so.1"]);
}

#[test]
fn budgets_that_cannot_work_are_refused_with_the_limit() {
    refused(&["--budget", "0"], &["budget \"0\"", "at least 1"]);
    refused(&["--budget", "67"], &["budget of 67", "68", "sinks 4 + window 64"]);
    refused(&["--budget", "-5"], &["budget \"-5\"", "above 0 and at most 1"]);
    refused(&["--budget", "150%"], &["budget \"1.5\"", "at most 1"]);
    refused(&["--budget", "lots"], &["budget \"lots\"", "1024"]);
}

#[test]
fn steady_zones_and_page_sizes_that_cannot_work_are_refused() {
    refused(&["--window", "0"], &["window of 0", "at least 1"]);
    refused(&["--page-tokens", "3"], &["page size 3", "partition size 8", "\"shadowkv\""]);
    refused(&["--page-tokens", "16"], &["page size 16", "partition size 8"]);
    refused(&["--page-tokens", "0"], &["page size of 0", "at least 1"]);
}

#[test]
fn too_little_memory_is_refused_with_what_is_needed() {
    refused(&["--gpu-pages", "100"], &["out of GPU pages", "needs at least 1488", "100 of 100 are free"]);
    refused(&["--host-mib", "2"], &["out of host memory", "of 2097152 are free"]);
}

#[test]
fn host_memory_is_reserved_up_to_the_limit() {
    let run = |reserve| json(&["--prompt", QUESTION, "--max-tokens", "9", "--reserve-host-mib", reserve]);
    let (without, with) = (run("0"), run("200"));
    assert_eq!(with["text"], without["text"]);
    let host = |report: &Value| report["memory"]["peak_bound_parts"]["host_pages"].as_u64();
    assert_eq!(host(&with), Some(200 << 20), "{with}");
    if let Some(peak) = with["memory"]["peak_resident"].as_u64() {
        // Whole slabs of every layer: less than one slab a layer is left over.
        assert!(peak > 190 << 20, "not all of it is resident: {peak}");
        assert!(Some(peak) < with["memory"]["peak_bound"].as_u64(), "{with}");
    }
    spinkv()
        .args(["--prompt", QUESTION, "--max-tokens", "2", "--host-mib", "64", "--reserve-host-mib", "64"])
        .assert()
        .success();
    refused(
        &["--host-mib", "64", "--reserve-host-mib", "65"],
        &["out of host memory: 68157440 bytes needed for the reserve", "of 67108864 are free"],
    );
}

#[test]
fn sampling_parameters_out_of_range_are_refused() {
    refused(&["--temperature", "-1"], &["temperature is -1"]);
    refused(&["--top-p", "1.5"], &["top_p is 1.5"]);
    refused(&["--min-p", "-0.1"], &["min_p is -0.1"]);
    refused(&["--top-k", "0"], &["top_k is 0"]);
    refused(&["--max-tokens", "0"], &["0 tokens", "at least 1"]);
}

#[test]
fn prompts_that_are_none_are_refused() {
    refused(&["--prompt", ""], &["prompt is empty", "at least 1"]);
    refused(&["--prompt-file", "no-such-file.txt"], &["no-such-file.txt", "No such file"]);
    let model = models().join("tiny-llama31-random");
    refused(&["--model", model.to_str().expect("a UTF-8 path")], &["no prompt", "--prompt-file"]);

    let dir = TempDir::new().expect("a temporary folder");
    let file = dir.path().join("latin1.txt");
    fs::write(&file, b"caf\xe9 au lait").expect("a writable folder");
    refused(&["--prompt-file", file.to_str().expect("a UTF-8 path")], &["latin1.txt", "not UTF-8", "byte 3"]);
}

#[test]
fn a_prompt_longer_than_the_models_context_is_refused() {
    let dir = edited_model("config.json", |config| {
        String::from_utf8(config)
            .expect("JSON")
            .replace("\"max_position_embeddings\": 32768", "\"max_position_embeddings\": 20")
            .into()
    });
    let model = dir.path().to_str().expect("a UTF-8 path");
    refused(
        &["--model", model, "--prompt", QUESTION],
        &["tokens; the model takes 20", "max_position_embeddings"],
    );
}

#[test]
fn broken_checkpoints_are_refused_by_file_and_fault() {
    let refused = |dir: &Path, parts: &[&str]| {
        refused(&["--model", dir.to_str().expect("a UTF-8 path"), "--prompt", "x"], parts);
    };
    refused(Path::new("no-such-model"), &["no-such-model", "config.json", "No such file"]);

    let truncated = edited_model("model.safetensors", |bytes| bytes[..bytes.len() / 2].to_vec());
    refused(truncated.path(), &["model.safetensors", "bytes; its header describes"]);

    let cut_header = edited_model("model.safetensors", |bytes| bytes[..100].to_vec());
    refused(cut_header.path(), &["model.safetensors"]);

    let missing = edited_model("config.json", |bytes| bytes);
    fs::remove_file(missing.path().join("model.safetensors")).expect("a copied file");
    refused(missing.path(), &["neither model.safetensors nor model.safetensors.index.json"]);

    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| String::from_utf8(bytes).expect("JSON").replace(from, to).into_bytes()
    };
    let misshapen =
        edited_model("config.json", replace("\"intermediate_size\": 768", "\"intermediate_size\": 770"));
    refused(misshapen.path(), &["mlp.gate_proj.weight", "[768, 256]", "[770, 256]"]);

    let unknown = edited_model("config.json", replace("Qwen3ForCausalLM", "MambaForCausalLM"));
    refused(unknown.path(), &["\"MambaForCausalLM\"", "Qwen3ForCausalLM, LlamaForCausalLM"]);

    let tokenizer = edited_model("tokenizer.json", |bytes| bytes[..1000].to_vec());
    refused(tokenizer.path(), &["tokenizer.json"]);
}

/// A stream that nobody reads any more is the reader's choice; one that cannot be written is a failure. Neither is a
/// panic.
#[test]
#[cfg(target_os = "linux")]
fn streams_that_cannot_be_written_are_no_panic() {
    use std::process::{Command, Stdio};

    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full"));
    let spinkv = |stdout: Stdio, stderr: Stdio, arguments: &[&str]| {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin("spinkv"));
        command.arg("generate").args(arguments).stdout(stdout).stderr(stderr);
        command.status().expect("the binary runs").code()
    };
    let short = ["--prompt", QUESTION, "--max-tokens", "2"];
    assert_eq!(spinkv(full(), Stdio::null(), &short), Some(2), "text was lost");
    assert_eq!(spinkv(full(), Stdio::null(), &[&short[..], &["--json"]].concat()), Some(2), "JSON was lost");
    assert_eq!(spinkv(Stdio::null(), full(), &short), Some(0), "the table is no result");
    assert_eq!(spinkv(Stdio::null(), full(), &["--method", "nope"]), Some(2));
}

/// A text that is far too long is refused by its length, without being cut into tokens.
#[test]
fn a_huge_prompt_is_refused_at_once() {
    let start = std::time::Instant::now();
    let text = "the quick brown fox ".repeat(2_000_000);
    spinkv()
        .arg("-")
        .write_stdin(text)
        .assert()
        .code(2)
        .stderr(predicate::str::contains("the model takes 32768"));
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn numbers_beyond_all_bounds_are_refused() {
    let huge = usize::MAX.to_string();
    refused(&["--sinks", &huge], &["steady zone", "at most 1073741824"]);
    refused(&["--window", &huge], &["steady zone", "at most 1073741824"]);
    refused(&["--page-tokens", &huge, "--method", "dense"], &["page size", "at most 65536"]);
    refused(&["--buffering=-1"], &["buffering of -1", "at least 0"]);
    refused(&["--buffering", "nan"], &["buffering of NaN", "at least 0"]);
    refused(&["--method", "dense", "--budget", "0"], &["budget \"0\""]);
    let report =
        json(&["--prompt", QUESTION, "--max-tokens", &huge, "--budget", &huge, "--gpu-pages", &huge]);
    assert_eq!(report["finish"], "stop");
}

/// Where there is a driver there may be a GPU, and the command's answer is another.
#[test]
fn devices_says_why_there_are_none() {
    let spinkv = || {
        let mut command = Command::cargo_bin("spinkv").expect("the binary is built");
        command.arg("devices");
        command
    };
    let assert = spinkv().arg("--json").assert();
    let found: Value =
        serde_json::from_slice(&assert.get_output().stdout).expect("standard output is one JSON object");
    let reason = found["reason"].as_str().unwrap_or_default();
    if !reason.contains("no CUDA driver") {
        println!("SKIPPED: devices_says_why_there_are_none, since this machine has a CUDA driver: {found}");
        return;
    }
    assert.code(2);
    assert_eq!(found["devices"], serde_json::json!([]));
    let reason =
        predicate::str::contains("spinkv: no CUDA driver").and(predicate::str::contains("libcuda.so.1"));
    spinkv().assert().code(2).stdout("").stderr(reason);
}

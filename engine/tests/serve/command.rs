//! `spinkv serve` as a process: settings, their order, and signals.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use predicates::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use crate::http::{begin, get, post, request};

fn spinkv() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("spinkv"));
    command.arg("serve").current_dir(std::env::temp_dir()).env_clear();
    command
}

struct Process {
    child: Child,
    address: SocketAddr,
    /// What it logs after it listens.
    log: BufReader<std::process::ChildStderr>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        let mut child =
            command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the binary runs");
        let log = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut process = Self { child, address: ([0, 0, 0, 0], 0).into(), log };
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            assert!(process.log.read_line(&mut line).expect("a line") > 0, "it ended: {seen}");
            if let Some((_, address)) = line.trim_end().split_once("listening on http://") {
                let address = address.split([' ', '"']).next().and_then(|address| address.parse().ok());
                process.address = address.expect("an address");
                return process;
            }
            seen += &line;
        }
    }

    fn wait_until_ready(&self) {
        for _ in 0..1000 {
            if get(self.address, "/health/ready").status == 200 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("it is never ready");
    }

    #[cfg(unix)]
    fn terminate(&self) {
        // SAFETY: kill(2) takes any numbers; the process was not waited for, so its id is its own.
        let done = unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        assert_eq!(done, 0);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Flags win over variables, variables over the file.
#[test]
#[cfg(unix)]
fn settings_have_an_order_and_a_signal_drains() {
    let dir = TempDir::new().unwrap();
    let (file, keys) = (dir.path().join("serve.toml"), dir.path().join("keys"));
    std::fs::write(&keys, "\nof-file\n").unwrap();
    let text = format!(
        "port = 0\nserved-model-name = \"file\"\nmax-body-mib = 1\nmax-batch = 2\napi-key-file = {:?}\nbudget = \"512\"\n\
         log-json = true\nprefix-mib = 0\n",
        keys.to_str().unwrap()
    );
    std::fs::write(&file, text).unwrap();
    let mut command = spinkv();
    command.arg("--config").arg(&file).args(["--served-model-name", "flag"]);
    command.env("SPINKV_SERVED_MODEL_NAME", "variable").env("SPINKV_API_KEY", "of-variable");
    let mut process = Process::start(command);
    process.wait_until_ready();

    let body = json!({"model": "flag", "prompt": "<|bos|>The", "max_tokens": 400, "ignore_eos": true, "stream": true});
    post(process.address, "/v1/completions", &body).refused(401, "invalid_api_key", None);
    let headers = [("Authorization", "Bearer of-variable")];
    assert_eq!(request(process.address, "GET", "/v1/models/flag", &headers, "").status, 200);
    assert!(get(process.address, "/status").json()["prefixes"].is_null(), "the file says 0");
    let headers = [("Authorization", "Bearer of-file")];
    let large = format!("{{\"prompt\": \"{}\"}}", "x".repeat(1 << 20));
    request(process.address, "POST", "/v1/completions", &headers, &large).refused(
        413,
        "body_too_large",
        None,
    );

    // A signal: what is there is answered, and the process ends well.
    let mut stream = std::net::TcpStream::connect(process.address).unwrap();
    let text = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer of-file\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    );
    std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
    let mut going = crate::http::open(stream);
    assert!(going.chunk().is_some());
    process.terminate();
    let rest = going.rest();
    assert!(rest.body.ends_with("data: [DONE]\n\n"), "{rest:?}");
    assert!(process.child.wait().unwrap().success());
    let mut log = String::new();
    std::io::Read::read_to_string(&mut process.log, &mut log).unwrap();
    assert!(log.contains("\"message\":\"draining\"") && log.contains("\"message\":\"closed\""), "{log}");
    assert!(!log.contains("of-variable") && !log.contains("of-file"), "keys are not logged: {log}");
}

/// Requests that do not end in time are cut off.
#[test]
#[cfg(unix)]
fn a_drain_has_an_end() {
    let mut command = spinkv();
    command.args(["--port", "0", "--drain-timeout", "1"]);
    let mut process = Process::start(command);
    process.wait_until_ready();
    let body = json!({"model": "needle-tiny", "prompt": "<|bos|>The", "max_tokens": 30_000, "ignore_eos": true, "stream": true});
    let mut going = begin(process.address, "/v1/completions", &body);
    assert!(going.chunk().is_some());
    process.terminate();
    let rest = going.rest();
    assert!(rest.body.contains("\"shutting_down\"") && !rest.body.contains("[DONE]"), "{rest:?}");
    assert!(process.child.wait().unwrap().success());
}

/// A process that is killed leaves nothing behind that its successor on the same port would stumble over.
#[test]
#[cfg(unix)]
fn a_killed_server_is_replaced_on_its_port() {
    let mut command = spinkv();
    command.args(["--port", "0"]);
    let mut process = Process::start(command);
    process.wait_until_ready();
    let ask = |address| {
        let body = json!({"model": "needle-tiny", "prompt": "<|bos|>The", "max_tokens": 8, "temperature": 0});
        post(address, "/v1/completions", &body).json()["choices"][0]["text"].clone()
    };
    let expected = ask(process.address);
    let body = json!({"model": "needle-tiny", "prompt": "<|bos|>The", "max_tokens": 30_000, "ignore_eos": true, "stream": true});
    let mut going: Vec<_> = (0..3).map(|_| begin(process.address, "/v1/completions", &body)).collect();
    assert!(going.iter_mut().all(|stream| stream.chunk().is_some()));
    // SIGKILL: nothing of it is run any more.
    process.child.kill().unwrap();
    assert!(!process.child.wait().unwrap().success());
    for stream in going {
        let text = stream.until_it_ends();
        assert!(!text.contains("[DONE]"), "a broken stream is seen to be broken: {text}");
    }
    let mut command = spinkv();
    command.args(["--port", &process.address.port().to_string()]);
    let successor = Process::start(command);
    assert_eq!(successor.address, process.address);
    successor.wait_until_ready();
    assert_eq!(ask(successor.address), expected);
}

#[track_caller]
fn refused(command: &mut Command, parts: &[&str]) {
    let assert =
        assert_cmd::Command::from_std(std::mem::replace(command, Command::new("true"))).assert().code(2);
    for part in parts {
        assert.get_output();
        let error = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert!(predicate::str::contains(*part).eval(&error), "{part:?} is missing in {error:?}");
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let dir = TempDir::new().unwrap();
    let file = |text: &str| {
        let path = dir.path().join("settings.toml");
        std::fs::write(&path, text).unwrap();
        path
    };
    refused(spinkv().arg("--host").arg("0.0.0.0"), &["0.0.0.0", "--api-key", "--allow-open"]);
    refused(spinkv().arg("--config").arg(file("prot = 1")), &["settings.toml", "prot"]);
    refused(spinkv().arg("--config").arg(file("port = \"x\"")), &["settings.toml", "port"]);
    refused(spinkv().arg("--config").arg("no/such.toml"), &["no/such.toml", "No such file"]);
    refused(spinkv().arg("--max-batch").arg("0"), &["max-batch", "at least 1"]);
    refused(spinkv().arg("--max-batch").arg("65"), &["max-batch", "65", "up to 64"]);
    refused(spinkv().arg("--method").arg("shadow-kv"), &["did you mean \"shadowkv\"?"]);
    refused(spinkv().arg("--log").arg("a=b=c"), &["log", "a=b=c"]);
    refused(spinkv().env("SPINKV_API_KEY", " "), &["api-key", "not empty"]);
    refused(spinkv().arg("--api-key-file").arg(file("\n \n")), &["settings.toml", "holds no key"]);
    refused(spinkv().arg("--model").arg("no/such/model"), &["no/such/model"]);
    let random = ["--random-weights", "qwen3-14b"];
    refused(spinkv().args(random), &["cpu", "make random weights"]);
    refused(
        spinkv().args(["--backend", "cuda", "--random-weights", "qwen3-14"]),
        &["did you mean \"qwen3-14b\"?"],
    );
    refused(spinkv().args(["--overlap", "halves"]), &["cpu", "overlap halves of a batch"]);
    refused(spinkv().args(["--layers", "2"]), &["layers", "only random weights can be cut"]);
    refused(
        spinkv().args(["--method", "retroinfer", "--selections", "drifting"]),
        &["retroinfer cannot be drawn"],
    );
    // What is not asked for is off where it cannot be.
    let kept = ["--prefix-mib", "9"];
    let parts = ["retroinfer", "cannot share pages", "clusters"];
    refused(spinkv().args(kept).args(["--method", "retroinfer"]), &parts);
    refused(spinkv().args(kept).args(["--host-kv", "fp8"]), &["shadowkv", "cannot share pages", "fp8"]);
    refused(spinkv().args(["--backend", "tpu"]), &["\"tpu\"", "known: cpu, cuda"]);
    refused(spinkv().args(["--gpus", "2"]), &["the cpu backend cannot use GPUs"]);
}

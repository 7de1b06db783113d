//! What protects the server: keys, sizes, times, numbers, and clients that go away.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use spinkv::memory::MemoryLimits;
use spinkv_engine::serve::SchedulerOptions;
use spinkv_engine::serve::server::{ServerOptions, check_bind};

use crate::http::{self, begin, connect, events, get, open, post, request, send_only};
use crate::server::{Server, Setup};

const PATH: &str = "/v1/completions";

/// A request that goes on until it is stopped.
fn endless() -> Value {
    json!({"model": "needle-tiny", "prompt": "<|bos|>The", "max_tokens": 30_000, "ignore_eos": true, "temperature": 0})
}

fn short(tokens: usize) -> Value {
    json!({"model": "needle-tiny", "prompt": "<|bos|>The", "max_tokens": tokens, "ignore_eos": true, "temperature": 0})
}

fn with(options: impl FnOnce(&mut ServerOptions)) -> Setup {
    let mut setup = Setup::default();
    options(&mut setup.options);
    setup
}

#[test]
fn keys_open_v1_and_nothing_else_needs_them() {
    let server =
        Server::start(with(|options| options.api_keys = vec!["first".to_owned(), "second key".to_owned()]));
    let ask =
        |headers: &[(&str, &str)]| request(server.address, "POST", PATH, headers, &short(1).to_string());
    ask(&[]).refused(401, "invalid_api_key", None);
    for wrong in [
        "Bearer firs",
        "Bearer fisrt",
        "Bearer first ",
        "Bearer second",
        "first",
        "Basic first",
        "Bearer ",
        "bearer",
    ] {
        let answer = ask(&[("Authorization", wrong)]);
        // The end of a header's value has no spaces.
        if wrong != "Bearer first " {
            answer.refused(401, "invalid_api_key", None);
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
    }
    for right in ["Bearer first", "Bearer second key"] {
        assert_eq!(ask(&[("Authorization", right)]).status, 200);
    }
    get(server.address, "/v1/models").refused(401, "invalid_api_key", None);
    get(server.address, "/v1/models/needle-tiny").refused(401, "invalid_api_key", None);
    assert_eq!(get(server.address, "/health").status, 200);
    assert_eq!(get(server.address, "/metrics").status, 200);
}

#[test]
fn an_address_that_others_reach_needs_a_key() {
    let keys = ["k".to_owned()];
    let open = "0.0.0.0:8000".parse().unwrap();
    assert!(check_bind(&"127.0.0.1:1".parse().unwrap(), &[], false).is_ok());
    assert!(check_bind(&"[::1]:1".parse().unwrap(), &[], false).is_ok());
    let error = check_bind(&open, &[], false).unwrap_err().to_string();
    assert!(error.contains("0.0.0.0") && error.contains("--api-key"), "{error}");
    assert!(check_bind(&"[::]:1".parse().unwrap(), &[], false).is_err());
    assert!(check_bind(&open, &keys, false).is_ok() && check_bind(&open, &[], true).is_ok());
}

#[test]
fn bodies_that_are_too_large_or_too_slow_are_refused() {
    let server = Server::start(with(|options| {
        options.max_body_bytes = 2000;
        options.body_timeout = Duration::from_secs(1);
    }));
    let mut large = short(1);
    large["prompt"] = json!("x".repeat(2000));
    let message = post(server.address, PATH, &large).refused(413, "body_too_large", None);
    assert!(message.contains("2000 bytes"), "{message}");

    // The same without a length given beforehand.
    let mut stream = connect(server.address);
    stream
        .write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        .unwrap();
    for _ in 0..3 {
        let _ = stream.write_all(format!("3e8\r\n{}\r\n", "y".repeat(1000)).as_bytes());
    }
    assert_eq!(open(stream).status, 413);

    let mut stream = connect(server.address);
    stream
        .write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"model\"")
        .unwrap();
    let slow = open(stream);
    assert_eq!(slow.status, 408);
    assert_eq!(post(server.address, PATH, &short(1)).status, 200);
}

#[test]
fn a_request_that_runs_out_of_time_ends() {
    let server = Server::start(with(|options| options.request_timeout = Some(Duration::from_millis(400))));
    let message = post(server.address, PATH, &endless()).refused(504, "timeout", None);
    assert!(message.contains("out of time after"), "{message}");
    let mut body = endless();
    body["stream"] = json!(true);
    let answer = post(server.address, PATH, &body);
    let last =
        answer.body.lines().filter_map(|line| line.strip_prefix("data: ")).next_back().expect("chunks");
    let last: Value = serde_json::from_str(last).expect("no [DONE] after an error");
    assert_eq!(last["error"]["code"], "timeout");
    server.wait_for_nothing();
}

#[test]
fn too_many_requests_are_refused_and_others_go_on() {
    let mut setup = with(|options| options.max_concurrent = 2);
    setup.scheduling = SchedulerOptions { max_batch: 1, max_queue: 1, ..SchedulerOptions::default() };
    let server = Server::start(setup);
    let running = send_only(server.address, PATH, &endless());
    server.wait("one runs", |status| status["requests"]["decoding"] == 1);
    let waiting = send_only(server.address, PATH, &short(3));
    server.wait("one waits", |status| status["requests"]["waiting"] == 1);
    let refused = post(server.address, PATH, &short(1));
    assert!(refused.refused(429, "too_many_requests", None).contains("2 requests"));
    assert_eq!(refused.header("retry-after"), Some("1"));
    drop(running);
    assert_eq!(open(waiting).rest().json()["usage"]["completion_tokens"], 3);
    server.wait_for_nothing();

    let scheduling = SchedulerOptions { max_batch: 1, max_queue: 1, ..SchedulerOptions::default() };
    let server = Server::start(Setup { scheduling, ..Setup::default() });
    let running = send_only(server.address, PATH, &endless());
    server.wait("one runs", |status| status["requests"]["decoding"] == 1);
    let waiting = send_only(server.address, PATH, &endless());
    server.wait("one waits", |status| status["requests"]["waiting"] == 1);
    post(server.address, PATH, &short(1)).refused(429, "queue_full", None);
    // Who waits can go away, too.
    drop(waiting);
    server.wait("the place is free", |status| status["requests"]["waiting"] == 0);
    drop(running);
}

/// A client that closes its connection frees all that its request held, whatever it was at.
#[test]
fn clients_that_go_away_are_cancelled() {
    let server = Server::start(Setup::default());
    let free = |what: &str| {
        let begin = Instant::now();
        server.wait_for_nothing();
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
    };
    let mut body = endless();
    let whole = send_only(server.address, PATH, &body);
    server.wait("it runs", |status| status["requests"]["decoding"] == 1);
    drop(whole);
    free("while it waited for all of the answer");

    body["stream"] = json!(true);
    let mut stream = begin(server.address, PATH, &body);
    assert!(stream.chunk().is_some() && stream.chunk().is_some());
    drop(stream);
    free("in the middle of a stream");

    // In the middle of a long prompt.
    body["prompt"] = json!(vec![17; 6000]);
    let stream = begin(server.address, PATH, &body);
    server.wait("its prompt is under way", |status| status["requests"]["prompt"] == 1);
    drop(stream);
    server.wait("nobody is there", |status| {
        status["requests"]["prompt"] == 0 && status["requests"]["decoding"] == 0
    });
    free("in the middle of its prompt");
    let metrics = get(server.address, "/metrics").body;
    assert!(metrics.contains("spinkv_requests_finished_total{reason=\"cancelled\"} 3"), "{metrics}");
}

/// Who does not read holds up nobody, and finds all of the answer in the end.
#[test]
fn slow_readers_hold_up_nobody() {
    let server = Server::start(Setup::default());
    let mut body = short(1200);
    body["stream"] = json!(true);
    let expected = post(server.address, PATH, &short(1200)).json()["choices"][0]["text"].clone();
    let mut slow: Vec<_> = (0..3).map(|_| send_only(server.address, PATH, &body)).collect();
    server.wait("the slow ones run", |status| status["requests"]["decoding"] == 3);
    for _ in 0..3 {
        assert_eq!(post(server.address, PATH, &short(4)).status, 200);
    }
    server.wait("the slow ones are generated", |status| status["requests"]["decoding"] == 0);
    for stream in slow.drain(..) {
        let text: String = events(&open(stream).rest())
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
            .collect();
        assert_eq!(json!(text), expected);
    }
}

/// More than there is memory for is refused at once, with what is missing.
#[test]
fn what_can_never_fit_is_refused_at_once() {
    let limits = MemoryLimits { gpu_pages: Some(800), host_bytes: Some(16 << 20), ..MemoryLimits::default() };
    let server = Server::start(Setup { limits, ..Setup::default() });
    let mut body = short(1);
    body["max_tokens"] = json!(9000);
    let message = post(server.address, PATH, &body).refused(400, "context_length_exceeded", None);
    assert!(message.contains("out of host memory"), "{message}");
    assert_eq!(post(server.address, PATH, &short(40)).status, 200);
}

#[test]
fn a_server_that_drains_ends_what_it_has_and_takes_no_more() {
    let server = Server::start(Setup::default());
    let mut body = short(300);
    body["stream"] = json!(true);
    let mut going = begin(server.address, PATH, &body);
    assert!(going.chunk().is_some());
    server.engine.drain();
    post(server.address, PATH, &short(1)).refused(503, "shutting_down", None);
    assert_eq!(get(server.address, "/health/ready").status, 503);
    assert_eq!(get(server.address, "/health").status, 200);
    let rest: http::Answer = going.rest();
    assert!(rest.body.ends_with("data: [DONE]\n\n"), "{rest:?}");
    server.wait("it has stopped", |status| status["status"] == "stopped");
}

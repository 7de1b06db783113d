//! What must harm nobody else: clients that go in crowds, bodies of 100 MB, and memory that ends in the middle of a batch.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::{Lines, begin, connect, events, get, open, post, send_only};
use crate::server::{Server, Setup};

const PATH: &str = "/v1/completions";
/// More than any allocation: they are granted again.
const ALL: u64 = u64::MAX;

fn body(prompt: &Value, tokens: usize) -> Value {
    json!({"model": "needle-tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": true, "temperature": 0})
}

fn streamed(prompt: &Value, tokens: usize) -> Value {
    let mut body = body(prompt, tokens);
    body["stream"] = json!(true);
    body
}

fn ids(count: usize, first: usize) -> Value {
    json!((0..count).map(|id| 100 + (first + 7 * id) % 3000).collect::<Vec<_>>())
}

/// The text of a stream that came to its end.
fn text(answer: &crate::http::Answer) -> String {
    events(answer).iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect()
}

fn metric(server: &Server, name: &str) -> f64 {
    let metrics = get(server.address, "/metrics").body;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|line| line.parse().ok()).unwrap_or_else(|| panic!("{name} is missing in {metrics}"))
}

/// Waves of clients leave at every moment: before the body is there, in the queue, in the prompt, in the answer. Who stays gets the answer that it gets alone.
#[test]
fn a_storm_of_disconnects_harms_nobody() {
    let server = Server::start(Setup::default());
    let (prompt, tokens) = (ids(50, 3), 150);
    let expected = post(server.address, PATH, &body(&prompt, tokens)).json()["choices"][0]["text"].clone();
    let staying: Vec<_> = (0..2).map(|_| begin(server.address, PATH, &streamed(&prompt, tokens))).collect();
    for wave in 0..4 {
        let leaving: Vec<TcpStream> = (0..24)
            .map(|client: usize| match client % 4 {
                // Half a body, and half a head.
                0 => {
                    let mut stream = connect(server.address);
                    let head =
                        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{\"model\"";
                    stream
                        .write_all(&head.as_bytes()[..if client.is_multiple_of(8) { head.len() } else { 30 }])
                        .unwrap();
                    stream
                }
                1 => send_only(server.address, PATH, &body(&ids(40, client), 20_000)),
                2 => send_only(server.address, PATH, &streamed(&ids(900, client), 20_000)),
                _ => send_only(server.address, PATH, &streamed(&ids(3, client), 20_000)),
            })
            .collect();
        std::thread::sleep(Duration::from_millis(60 * wave));
        drop(leaving);
    }
    for stream in staying {
        assert_eq!(json!(text(&stream.rest())), expected);
    }
    server.wait_for_nothing();
    assert_eq!(metric(&server, "spinkv_requests_total{outcome=\"failed\"}"), 0.0);
    assert!(metric(&server, "spinkv_requests_finished_total{reason=\"cancelled\"}") > 20.0);
    assert_eq!(post(server.address, PATH, &body(&prompt, tokens)).json()["choices"][0]["text"], expected);
}

/// Sends a head and then `bytes` of `x` as the prompt, as far as the server takes them.
fn send_large(server: &Server, bytes: usize) -> TcpStream {
    let (before, after) = ("{\"model\": \"needle-tiny\", \"prompt\": \"", "\"}");
    let length = before.len() + bytes + after.len();
    let mut stream = connect(server.address);
    let head = format!(
        "POST {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{before}"
    );
    let chunk = vec![b'x'; 1 << 20];
    let mut send = || -> std::io::Result<()> {
        stream.write_all(head.as_bytes())?;
        (0..bytes / chunk.len()).try_for_each(|_| stream.write_all(&chunk))?;
        stream.write_all(after.as_bytes())
    };
    // Who refuses a body need not read it.
    let _ = send();
    stream
}

/// Beyond the limit on bodies they are refused unread; within it as the prompts that they are. Others are answered meanwhile.
#[test]
fn bodies_of_100_mb() {
    const LARGE: usize = 100 << 20;
    let server = Server::start(Setup::default());
    let going = begin(server.address, PATH, &streamed(&ids(20, 1), 200));
    let before = Instant::now();
    let answer = open(send_large(&server, LARGE)).rest();
    assert!(answer.refused(413, "body_too_large", None).contains("1048576 bytes"));
    assert!(before.elapsed() < Duration::from_secs(20), "it is not read to its end: {:?}", before.elapsed());
    assert_eq!(events(&going.rest()).last().unwrap()["choices"][0]["finish_reason"], "length");
    drop(server);

    let mut setup = Setup::default();
    setup.options.max_body_bytes = 128 << 20;
    let server = Server::start(setup);
    std::thread::scope(|scope| {
        let large = scope.spawn(|| open(send_large(&server, LARGE)).rest());
        for _ in 0..3 {
            assert_eq!(post(server.address, PATH, &body(&ids(20, 1), 10)).status, 200);
        }
        let message = large.join().unwrap().refused(400, "context_length_exceeded", None);
        assert!(message.contains("32768"), "{message}");
    });
}

/// Reads on until a stream has its error.
fn error_of(stream: Lines) -> Value {
    let answer = stream.rest();
    let last =
        answer.body.lines().filter_map(|line| line.strip_prefix("data: ")).next_back().expect("events");
    let last: Value = serde_json::from_str(last).unwrap_or_else(|_| panic!("it ended well: {answer:?}"));
    assert_eq!(last["error"]["type"], "server_error", "{last}");
    last["error"].clone()
}

/// The system refuses host memory while requests decode: the last to come makes room, with an error that says so; the others' answers are whole.
#[test]
fn host_memory_that_ends_in_mid_batch() {
    let server = Server::start(Setup::default());
    let prompts = [ids(60, 1), ids(60, 2), ids(60, 3)];
    let expected = post(server.address, PATH, &body(&prompts[0], 1500)).json()["choices"][0]["text"].clone();
    server.wait_for_nothing();
    let first = begin(server.address, PATH, &streamed(&prompts[0], 1500));
    server.wait("the first one decodes", |status| status["requests"]["decoding"] == 1);
    let growing = begin(server.address, PATH, &streamed(&prompts[1], 30_000));
    server.wait("two decode", |status| status["requests"]["decoding"] == 2);
    let last = begin(server.address, PATH, &streamed(&prompts[2], 30_000));
    server.wait("three decode", |status| status["requests"]["decoding"] == 3);
    server.allocator.refuse_after(0);
    let error = error_of(last);
    server.allocator.refuse_after(ALL);
    assert_eq!(error["code"], "out_of_memory", "{error}");
    assert!(
        error["message"].as_str().is_some_and(|message| message.contains("the system refused")),
        "{error}"
    );
    assert_eq!(json!(text(&first.rest())), expected);
    drop(growing);
    server.wait_for_nothing();
    // What was refused is taken again.
    assert_eq!(post(server.address, PATH, &body(&prompts[0], 1500)).json()["choices"][0]["text"], expected);
}

/// The system refuses GPU memory to one that comes while others decode: it waits for what they have, and hears of it only if nobody has anything.
#[test]
fn gpu_memory_that_ends_when_a_request_begins() {
    let server = Server::start(Setup::default());
    let (long, tokens) = (ids(30, 9), 1200);
    let ask = |prompt: &Value, tokens| post(server.address, PATH, &body(prompt, tokens));
    let mut refused = Vec::new();
    for grants in 0..200 {
        server.allocator.refuse_after(grants);
        let answer = ask(&long, 4);
        if answer.status == 200 {
            break;
        }
        refused.push(answer.refused(503, "out_of_memory", None));
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert_eq!(get(server.address, "/health/ready").status, 200);
    }
    server.allocator.refuse_after(ALL);
    assert!(refused.iter().any(|message| message.contains("bytes for GPU pages")), "{refused:?}");
    let whole = ask(&long, tokens).json()["choices"][0]["text"].clone();

    // What the one under way grows into is there already, so that what is refused is refused to the other.
    let going = begin(server.address, PATH, &streamed(&long, tokens));
    server.wait("one decodes", |status| status["requests"]["decoding"] == 1);
    server.allocator.refuse_after(0);
    let waiting = send_only(server.address, PATH, &body(&long, tokens));
    server.wait("the other waits", |status| status["requests"]["waiting"] == 1);
    server.allocator.refuse_after(ALL);
    assert_eq!(json!(text(&going.rest())), whole);
    assert_eq!(open(waiting).rest().json()["choices"][0]["text"], whole);
}

//! The load generator: against an endpoint whose delays and faults are known, and against the server.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use spinkv_engine::bench::Prompts;
use spinkv_engine::bench::load::{
    self, Client, Fault, LoadPoint, Plan, PlanOptions, Record, RunOptions, Scrape, Session, Slo, Texts, Turn,
};

use crate::fake::{Behaviour, Fake, Ill, answer};
use crate::server::{Server, Setup, TOKENIZER, dir};

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn options() -> RunOptions {
    RunOptions {
        model: "needle-tiny".to_owned(),
        ignore_eos: true,
        request_timeout: None,
        time_limit: None,
        first_prompt: 0,
    }
}

fn texts(as_text: bool) -> Texts {
    let prompts = Prompts::open(&dir(), TOKENIZER.vocab_size(), 0).unwrap();
    Texts::new(prompts, Some(TOKENIZER.clone()), as_text).unwrap()
}

/// Runs a plan; the records in the order of sessions and turns.
fn run(url: &str, plan: &Plan, texts: Texts, options: &RunOptions) -> Vec<Record> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let client = Client::new(url, Some("a key")).unwrap();
    let mut heard = 0;
    let texts = Arc::new(texts);
    let mut records =
        runtime.block_on(load::run(&client, plan, &texts, options, &mut |_| heard += 1)).unwrap();
    assert_eq!(heard, records.len());
    records.sort_by_key(|record| (record.session, record.turn));
    records
}

/// Sessions of one turn that arrive at these milliseconds.
fn arriving(at: &[u64], turn: Turn) -> Plan {
    let session = |at: &u64| Session { arrival: millis(*at), turns: vec![turn] };
    Plan { sessions: at.iter().map(session).collect(), think: Duration::ZERO }
}

const TURN: Turn = Turn { question: 20, output: 5 };

#[test]
fn times_are_those_of_the_endpoint() {
    let fake = Fake::start(Behaviour { first: millis(300), each: millis(60), ..Behaviour::default() });
    let records = run(&fake.url(), &arriving(&[0, 0, 400], TURN), texts(false), &options());
    let point = LoadPoint::of(None, 3, &records, &Slo::default(), None);
    assert_eq!((point.sent, point.completed, point.output_tokens, point.prompt_tokens), (3, 3, 15, 60));
    // Nothing is ever early; how late it may be is left to the machine.
    let (ttft, itl, tpot) = (point.ttft_ms.unwrap(), point.itl_ms.unwrap(), point.tpot_ms.unwrap());
    assert!(ttft.p50 >= 300.0 && ttft.p50 < 600.0, "{ttft:?}");
    assert_eq!((ttft.count, itl.count, tpot.count), (3, 12, 3));
    assert!(itl.mean >= 55.0 && itl.mean < 160.0, "{itl:?}");
    // All tokens have text here: both means are over the same gaps.
    assert!((tpot.mean - itl.mean).abs() < 1e-6, "{tpot:?} {itl:?}");
    let e2e = point.e2e_ms.unwrap();
    assert!(e2e.p50 >= 300.0 + 4.0 * 60.0, "{e2e:?}");
    // The third one begins 400 ms later and takes as long as the others.
    assert!(point.seconds >= 0.4 + 0.54 && records[2].sent >= 0.4, "{records:?}");
    let decoding: f64 = records.iter().map(|record| record.chunks[4] - record.chunks[0]).sum();
    assert!((point.mean_batch * point.seconds - decoding).abs() < 1e-9);
    let (headers, body) = &fake.seen()[0];
    assert_eq!(headers["authorization"], "Bearer a key");
    let expected = json!({"model": "needle-tiny", "prompt": body["prompt"], "max_tokens": 5, "temperature": 0, "stream": true,
        "stream_options": {"include_usage": true}, "ignore_eos": true});
    assert_eq!(body, &expected);
    assert_eq!(body["prompt"].as_array().map(Vec::len), Some(20));
}

/// An endpoint that answers one at a time cannot hide that others wait: they arrive by the clock, and their time runs from then.
#[test]
fn arrivals_wait_for_nobody() {
    let fake = Fake::start(Behaviour { first: millis(250), at_a_time: 1, ..Behaviour::default() });
    let turn = Turn { question: 8, output: 1 };
    let records = run(&fake.url(), &arriving(&[0, 50, 100, 150], turn), texts(false), &options());
    for (record, (arrival, answered)) in
        records.iter().zip([(0.0, 0.25), (0.05, 0.5), (0.1, 0.75), (0.15, 1.0)])
    {
        assert!((record.scheduled - arrival).abs() < 1e-3, "{record:?}");
        assert!(record.sent >= arrival && record.sent < arrival + 0.15, "sent when it arrives: {record:?}");
        assert!(record.ttft().unwrap() >= answered - arrival - 1e-3, "{record:?}");
    }
    let point = LoadPoint::of(None, 4, &records, &Slo { ttft_ms: Some(600.0), ..Slo::default() }, None);
    assert!(point.ttft_ms.unwrap().max >= 849.0 && point.good_share.unwrap() <= 0.5, "{point:?}");
    // 0.25, 0.45, 0.65 and 0.85 s in one.
    assert!(point.mean_in_flight >= 2.0, "{point:?}");
}

#[test]
fn faults_are_told_apart_and_spoil_no_figure() {
    let ills = vec![
        Ill::None,
        Ill::Full,
        Ill::Gateway,
        Ill::Ends,
        Ill::Breaks,
        Ill::Fails,
        Ill::Babbles,
        Ill::Hangs,
    ];
    let fake = Fake::start(Behaviour { each: millis(5), ills, ..Behaviour::default() });
    let plan = arriving(&[0, 60, 120, 180, 240, 300, 360, 420], TURN);
    let options = RunOptions { request_timeout: Some(millis(700)), ..options() };
    let records = run(&fake.url(), &plan, texts(false), &options);
    let point = LoadPoint::of(Some(1.0), 8, &records, &Slo { ttft_ms: Some(1e6), ..Slo::default() }, None);
    let kinds: Vec<_> = point.faults.iter().map(|(kind, count)| (kind.as_str(), *count)).collect();
    let expected = [
        ("429 queue_full", 1),
        ("502", 1),
        ("broken_stream", 2),
        ("client_timeout", 1),
        ("in_stream out_of_memory", 1),
        ("unreadable", 1),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(point.messages["429 queue_full"], "status 429: the queue is full");
    assert!(point.messages["502"].contains("no upstream") && point.messages["unreadable"].contains("<html>"));
    // A whole answer of 5, and the one text that came before each of 5 faults.
    assert_eq!((point.sent, point.completed, point.output_tokens), (8, 1, 10));
    assert_eq!((point.ttft_ms.unwrap().count, point.e2e_ms.unwrap().count), (6, 1));
    assert_eq!((point.good_share, point.tokens_by_chunk), (Some(0.125), false));

    // Nobody listens any more.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let records = run(&format!("http://{nobody}"), &arriving(&[0], TURN), texts(false), &options);
    assert!(matches!(&records[0].fault, Some(Fault::Connect(why)) if why.contains("refused")), "{records:?}");
}

#[test]
fn a_run_ends_at_its_limit() {
    let fake = Fake::start(Behaviour { ills: vec![Ill::None, Ill::Hangs], ..Behaviour::default() });
    let options = RunOptions { time_limit: Some(millis(800)), ..options() };
    let records = run(&fake.url(), &arriving(&[0, 100, 60_000], TURN), texts(false), &options);
    assert_eq!((records.len(), &records[1].fault), (2, &Some(Fault::CutOff)), "{records:?}");
    assert!(records[1].end >= 0.8 && records[1].end < 5.0, "{records:?}");
    let point = LoadPoint::of(None, 3, &records, &Slo::default(), None);
    // Of the one that was cut off, the text that had come counts, and so does its time.
    assert_eq!((point.planned, point.sent, point.completed, point.output_tokens), (3, 2, 1, 6));
    assert!(point.mean_batch > 0.5, "{point:?}");
}

/// A chunk stands for a token where nobody counts them.
#[test]
fn an_endpoint_that_counts_no_tokens() {
    let fake = Fake::start(Behaviour { usage: false, ..Behaviour::default() });
    let records = run(&fake.url(), &arriving(&[0], TURN), texts(false), &options());
    assert_eq!((records[0].usage, records[0].fault.clone()), (None, None));
    let point = LoadPoint::of(None, 1, &records, &Slo::default(), None);
    assert_eq!((point.tokens_by_chunk, point.output_tokens, point.prompt_tokens), (true, 5, 20));
}

/// Each turn has all that was said before it, token for token.
#[test]
fn sessions_grow_by_answer_and_question() {
    let turns = vec![
        Turn { question: 12, output: 3 },
        Turn { question: 4, output: 2 },
        Turn { question: 4, output: 2 },
    ];
    let plan = Plan { sessions: vec![Session { arrival: Duration::ZERO, turns }], think: millis(120) };
    let fake = Fake::start(Behaviour::default());
    let records = run(&fake.url(), &plan, texts(false), &options());
    let prompts: Vec<Vec<u32>> =
        fake.seen().iter().map(|(_, body)| serde_json::from_value(body["prompt"].clone()).unwrap()).collect();
    for (turn, tokens) in [(1, 3), (2, 2)] {
        let mut expected = prompts[turn - 1].clone();
        expected.extend(TOKENIZER.encode(&answer(tokens)).unwrap());
        assert_eq!(prompts[turn][..expected.len()], expected);
        assert_eq!(prompts[turn].len(), expected.len() + 4, "and a question");
        // It arrives when the session has thought.
        assert!((records[turn].scheduled - records[turn - 1].end - 0.12).abs() < 1e-3, "{records:?}");
        assert!(records[turn].sent >= records[turn].scheduled);
    }
    assert_ne!(prompts[1][prompts[1].len() - 4..], prompts[2][prompts[2].len() - 4..], "another question");

    let fake = Fake::start(Behaviour::default());
    run(&fake.url(), &plan, texts(true), &options());
    let said: Vec<String> =
        fake.seen().iter().map(|(_, body)| body["prompt"].as_str().unwrap().to_owned()).collect();
    assert!(
        said[1].starts_with(&(said[0].clone() + &answer(3)))
            && said[1].len() > said[0].len() + answer(3).len()
    );

    // A session whose turn went wrong says no more.
    let fake = Fake::start(Behaviour { ills: vec![Ill::None, Ill::Full], ..Behaviour::default() });
    assert_eq!(run(&fake.url(), &plan, texts(false), &options()).len(), 2);
    let ids = Texts::new(Prompts::random(100, 0), None, false).unwrap();
    assert!(ids.check_turns(1).is_ok());
    assert!(ids.check_turns(2).unwrap_err().to_string().contains("--tokenizer"));
    assert!(Texts::new(Prompts::random(100, 0), None, true).is_err());
}

/// What the client counts is what the server counts.
#[test]
fn the_server_and_its_load_agree() {
    let server = Server::start(Setup::default());
    let url = format!("http://{}", server.address);
    let planned = PlanOptions {
        lengths: "longbench-v2".parse().unwrap(),
        scale: 0.003,
        sessions: 6,
        turns: 2,
        question: 16,
        think: Duration::ZERO,
        seed: 1,
    };
    let plan = Plan::draw(&planned, Some(4.0)).unwrap();
    let scrape = || Scrape::parse(&crate::http::get(server.address, "/metrics").body).expect("its metrics");
    let before = scrape();
    let records = run(&url, &plan, texts(false), &options());
    server.wait_for_nothing();
    let after = scrape();
    let mut point = LoadPoint::of(Some(4.0), plan.requests(), &records, &Slo::default(), None);
    let figures = before.until(&after, point.seconds);
    point.server = Some(figures);
    assert_eq!((point.completed, point.sent, point.faults.len()), (12, 12, 0), "{point:?}");
    let outputs: usize =
        plan.sessions.iter().flat_map(|session| &session.turns).map(|turn| turn.output).sum();
    assert_eq!(point.output_tokens, outputs as u64);
    assert_eq!(
        (figures.generated_tokens, figures.prompt_tokens),
        (outputs as f64, point.prompt_tokens as f64)
    );
    for (session, pair) in plan.sessions.iter().zip(records.chunks(2)) {
        assert_eq!(pair[0].prompt_tokens, session.turns[0].question as u64);
        // The second prompt is the first one, an answer and a question.
        assert!(pair[1].prompt_tokens >= pair[0].prompt_tokens + 1 + 16, "{pair:?}");
        for record in pair {
            assert!(record.sent >= record.scheduled && record.end >= *record.chunks.last().unwrap());
            assert!(record.chunks.windows(2).all(|pair| pair[0] <= pair[1]));
            assert!(record.chunks.len() as u64 <= record.usage.unwrap(), "a chunk is at least a token");
        }
    }
    let (ttft, e2e, itl) = (point.ttft_ms.unwrap(), point.e2e_ms.unwrap(), point.itl_ms.unwrap());
    assert!(ttft.p50 <= e2e.p50 && ttft.p50 <= ttft.p90 && ttft.p90 <= ttft.p99 && ttft.p99 <= ttft.max);
    assert!(itl.p50 > 0.0 && point.mean_batch > 0.0 && point.mean_in_flight >= point.mean_batch);
    // The server's tokens and the client's texts span about the same time.
    assert!((figures.mean_batch - point.mean_batch).abs() <= 0.5 * figures.mean_batch.max(0.2), "{point:?}");
    assert!((point.output_tokens_per_s * point.seconds - outputs as f64).abs() < 1e-6);
    let json: Value = serde_json::to_value(&point).unwrap();
    assert_eq!(serde_json::from_value::<LoadPoint>(json).unwrap(), point);
}

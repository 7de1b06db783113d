//! Many requests under a memory budget that is far too small for all: each gets the answer that it gets alone.

use serde_json::json;
use spinkv::memory::{MemoryLimits, RequestPlan};
use spinkv::pipeline::DEFAULT_BUFFERING;
use spinkv_engine::serve::SchedulerOptions;

use crate::http::{events, get, post};
use crate::server::{Server, Setup, TOKENIZER, kv, needle};

const PATH: &str = "/v1/completions";
const NOUNS: [&str; 12] = [
    "tiger", "wolf", "crane", "radish", "beacon", "desert", "oak", "garden", "jungle", "turtle", "shark",
    "marble",
];
/// Lines of held-out text of each prompt: from a sentence to thousands of tokens.
const LINES: [usize; 12] = [0, 40, 5, 200, 0, 90, 15, 60, 130, 2, 30, 10];
const GENERATED: usize = 9;

#[test]
fn concurrent_clients_under_a_tenth_of_their_demand_get_what_they_get_alone() {
    let code = |client: usize| 1_234_567 + 711_131 * client as u32;
    let prompts: Vec<_> =
        (0..NOUNS.len()).map(|client| needle(NOUNS[client], code(client), LINES[client])).collect();
    let plans: Vec<_> = prompts
        .iter()
        .map(|prompt| {
            let tokens = TOKENIZER.encode(prompt).unwrap().len() + GENERATED - 1;
            RequestPlan::new(&kv(), tokens, DEFAULT_BUFFERING).unwrap()
        })
        .collect();
    let demand: usize = plans.iter().map(RequestPlan::gpu_pages).sum();
    let largest = plans.iter().map(RequestPlan::least_gpu_pages).max().unwrap_or(0);
    let pages = demand / 10;
    assert!(largest <= pages && plans.iter().map(RequestPlan::least_gpu_pages).sum::<usize>() > 2 * pages);
    let body = |client: usize, stream: bool| {
        json!({"model": "needle-tiny", "prompt": prompts[client], "max_tokens": GENERATED, "temperature": 0,
            "ignore_eos": true, "stream": stream, "priority": client % 2})
    };

    let alone = Server::start(Setup::default());
    let answers: Vec<_> = (0..prompts.len())
        .map(|client| post(alone.address, PATH, &body(client, false)).json()["choices"][0]["text"].clone())
        .collect();
    drop(alone);
    let right = (0..prompts.len()).filter(|client| answers[*client] == format!(" {}.\n", code(*client)));
    let right: Vec<_> = right.collect();
    println!("{demand} pages wanted, {pages} there are; right alone: {right:?}");
    assert!(right.len() >= 10, "{answers:?}");

    let server = Server::start(Setup {
        limits: MemoryLimits { gpu_pages: Some(pages), ..MemoryLimits::default() },
        scheduling: SchedulerOptions { patience: 2, ..SchedulerOptions::default() },
        ..Setup::default()
    });
    std::thread::scope(|scope| {
        for client in 0..prompts.len() {
            let (server, body, answers) = (&server, &body, &answers);
            scope.spawn(move || {
                for round in 0..2 {
                    let stream = (client + round) % 2 == 0;
                    let answer = post(server.address, PATH, &body(client, stream));
                    let text = if stream {
                        let chunks = events(&answer);
                        let text: String =
                            chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
                        json!(text)
                    } else {
                        answer.json()["choices"][0]["text"].clone()
                    };
                    assert_eq!(text, answers[client], "client {client}, round {round}");
                }
            });
        }
    });
    server.wait_for_nothing();
    let metrics = get(server.address, "/metrics").body;
    let preemptions = metrics.lines().find_map(|line| line.strip_prefix("spinkv_preemptions_total "));
    assert!(preemptions.is_some_and(|count| count != "0"), "nobody was parked: {preemptions:?}");
}

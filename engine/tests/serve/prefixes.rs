//! Prompts that begin alike: what was there already is not computed, is told, and changes no answer.

use serde_json::{Value, json};

use crate::http::{events, get, post};
use crate::protocol::chat_template;
use crate::server::{Server, Setup, TOKENIZER, needle};

const PATH: &str = "/v1/completions";
/// Tokens of a block at pages of 8.
const BLOCK: usize = 128;

fn metric(server: &Server, name: &str) -> f64 {
    let text = get(server.address, "/metrics").body;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is missing in {text}")).parse().expect("a number")
}

fn cached(usage: &Value) -> usize {
    usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number") as usize
}

fn whole_blocks(prompt: &str) -> usize {
    (TOKENIZER.encode(prompt).unwrap().len() - 1) / BLOCK * BLOCK
}

#[test]
fn answers_say_what_was_cached_and_are_the_same() {
    let first = needle("tiger", 2_286_315, 60);
    let (context, question) = first.rsplit_once("Question:").unwrap();
    let second = format!("{context}Somebody else asks now.\nQuestion:{question}");
    let body = |prompt: &str, stream: bool| {
        json!({"model": "needle-tiny", "prompt": prompt, "max_tokens": 9, "temperature": 0, "logprobs": 1,
            "stream": stream, "stream_options": if stream { json!({"include_usage": true}) } else { Value::Null }})
    };
    let alone = Server::start(Setup { prefixes: false, ..Setup::default() });
    let alone_answers = [&first, &second].map(|prompt| {
        let answer = post(alone.address, PATH, &body(prompt, false)).json();
        assert_eq!(
            (answer["choices"][0]["text"].as_str(), cached(&answer["usage"])),
            (Some(" 2286315.\n"), 0)
        );
        answer["choices"][0].clone()
    });
    assert!(get(alone.address, "/status").json()["prefixes"].is_null());
    drop(alone);

    let server = Server::start(Setup::default());
    let ask = |prompt: &str| post(server.address, PATH, &body(prompt, false)).json();
    let answers = [ask(&first), ask(&second), ask(&first)];
    let of_context = whole_blocks(context);
    assert!(of_context >= 4 * BLOCK, "{of_context}");
    assert_eq!(cached(&answers[0]["usage"]), 0);
    let of_second = cached(&answers[1]["usage"]);
    assert!((of_context..=whole_blocks(&second)).contains(&of_second), "{of_second}");
    assert_eq!(cached(&answers[2]["usage"]), whole_blocks(&first));
    assert_eq!(answers[0]["choices"], answers[2]["choices"], "to the last bit of its log-probabilities");
    for (answer, alone) in answers.iter().zip(&alone_answers) {
        assert_eq!(answer["choices"][0]["text"], alone["text"]);
    }
    // A stream tells it at its end.
    let chunks = events(&post(server.address, PATH, &body(&second, true)));
    assert_eq!(cached(&chunks[chunks.len() - 1]["usage"]), whole_blocks(&second));

    let told = of_second + whole_blocks(&first) + whole_blocks(&second);
    assert_eq!(metric(&server, "spinkv_tokens_total{kind=\"cached\"}"), told as f64);
    assert_eq!(metric(&server, "spinkv_prefix_lookups_total"), 4.0);
    assert_eq!(metric(&server, "spinkv_prefix_evictions_total"), 0.0);
    server.wait_for_nothing();
    let status = get(server.address, "/status").json();
    let blocks = status["prefixes"]["blocks"].as_u64().unwrap() as usize;
    assert_eq!(status["prefixes"]["cached_tokens"], told);
    assert!((whole_blocks(&first) / BLOCK..2 * whole_blocks(&second) / BLOCK).contains(&blocks), "{status}");
    assert_eq!(metric(&server, "spinkv_prefix_blocks"), blocks as f64);
    assert_eq!(
        metric(&server, "spinkv_prefix_bytes"),
        metric(&server, "spinkv_kv_bytes{tier=\"host\",kind=\"pages\"}")
    );
}

#[test]
fn a_chat_goes_on_from_what_it_said() {
    let server = Server::start(Setup { template: Some(chat_template()), ..Setup::default() });
    let ask = |messages: &[Value]| {
        let body = json!({"model": "needle-tiny", "messages": messages, "max_tokens": 4, "temperature": 0});
        post(server.address, "/v1/chat/completions", &body).json()["usage"].clone()
    };
    let context = needle("tiger", 2_286_315, 40);
    let mut messages =
        vec![json!({"role": "system", "content": context}), json!({"role": "user", "content": "One?"})];
    assert_eq!(cached(&ask(&messages)), 0);
    messages.push(json!({"role": "user", "content": "Two?"}));
    let usage = ask(&messages);
    assert!(cached(&usage) >= whole_blocks(&context) - BLOCK && cached(&usage) > 0, "{usage}");
}

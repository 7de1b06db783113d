//! OpenAI's API: answers, streams, and one clear refusal for each bad request.

use serde_json::{Value, json};
use spinkv_engine::serve::ChatTemplate;

use crate::http::{self, events, get, post, request};
use crate::server::{Server, Setup, TOKENIZER, needle};

const PATH: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn body(prompt: impl Into<Value>, more: Value) -> Value {
    let mut body = json!({"model": "needle-tiny", "prompt": prompt.into(), "temperature": 0});
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    body
}

fn text(answer: &http::Answer) -> String {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["choices"][0]["text"].as_str().expect("a text").to_owned()
}

/// The text of a stream's chunks, and its last finish reason.
fn streamed(chunks: &[Value]) -> (String, String) {
    let text = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    let reason = chunks.iter().filter_map(|chunk| chunk["choices"][0]["finish_reason"].as_str()).collect();
    (text, reason)
}

pub fn chat_template() -> ChatTemplate {
    let source = "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\
                  {% elif message.role == 'user' %}Question: {{ message.content }} Answer:{% else %}\
                  {{ raise_exception('only questions') }}{% endif %}{% endfor %}";
    ChatTemplate::new("test.jinja".into(), source.to_owned(), "<|bos|>".to_owned(), "<|eos|>".to_owned())
        .unwrap()
}

#[test]
fn completions() {
    let server = Server::start(Setup::default());
    let ask = |body: &Value| post(server.address, PATH, body);
    let prompt = needle("tiger", 2_286_315, 10);

    let answer = ask(&body(prompt.as_str(), json!({"max_tokens": 9})));
    assert_eq!(text(&answer), " 2286315.\n");
    let whole = answer.json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["model"], "needle-tiny");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(answer.header("x-request-id"), whole["id"].as_str());
    let tokens = TOKENIZER.encode(&prompt).unwrap();
    let expected = json!({"prompt_tokens": tokens.len(), "completion_tokens": 9, "total_tokens": tokens.len() + 9,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(whole["usage"], expected);
    // Prompts in every form that means one prompt.
    for prompt in [json!(tokens), json!([tokens]), json!([prompt])] {
        assert_eq!(text(&ask(&body(prompt, json!({"max_tokens": 9, "n": 1, "user": "me"})))), " 2286315.\n");
    }

    // A stop text over several tokens ends the answer before it, in a stream, too.
    let stopping = body(prompt.as_str(), json!({"max_tokens": 9, "stop": ["6315", "zzz"]}));
    let answer = ask(&stopping).json();
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["choices"][0]["finish_reason"]),
        (&json!(" 228"), &json!("stop"))
    );
    let mut streaming = stopping.clone();
    streaming["stream"] = json!(true);
    let chunks = events(&ask(&streaming));
    assert_eq!(streamed(&chunks), (" 228".to_owned(), "stop".to_owned()));
    assert!(chunks.len() > 3, "text comes as it is generated: {chunks:?}");
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));

    // Usage in a stream's last chunk, if asked for.
    streaming["stream_options"] = json!({"include_usage": true});
    let chunks = events(&ask(&streaming));
    let last = chunks.last().expect("chunks");
    assert_eq!((&last["choices"], &last["usage"]["prompt_tokens"]), (&json!([]), &json!(tokens.len())));
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk["usage"].is_null()));

    // Draws depend on the seed alone.
    let drawn = |seed: i64| {
        text(&ask(&body(
            "<|bos|>The Vec type",
            json!({"temperature": 1, "top_p": 0.9, "max_tokens": 16, "seed": seed}),
        )))
    };
    assert_eq!(drawn(7), drawn(7));
    assert_ne!(drawn(7), drawn(-8));

    // The default is 16 tokens, with a temperature and a seed that nobody chose.
    let answer = ask(&json!({"model": "needle-tiny", "prompt": "<|bos|>Vec", "ignore_eos": true}));
    assert_eq!(answer.json()["usage"]["completion_tokens"], 16, "{answer:?}");
}

#[test]
fn logprobs_of_both_forms() {
    let server = Server::start(Setup { template: Some(chat_template()), ..Setup::default() });
    let prompt = needle("tiger", 2_286_315, 0);
    let answer =
        post(server.address, PATH, &body(prompt.as_str(), json!({"max_tokens": 9, "logprobs": 3}))).json();
    let (choice, found) = (&answer["choices"][0], &answer["choices"][0]["logprobs"]);
    let tokens: Vec<&str> = found["tokens"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(tokens.concat(), choice["text"]);
    let mut offset = 0;
    for (index, token) in tokens.iter().enumerate() {
        assert_eq!(found["text_offset"][index], offset);
        offset += token.chars().count();
        let top = found["top_logprobs"][index].as_object().unwrap();
        let logprob = found["token_logprobs"][index].as_f64().unwrap();
        assert!(top.len() <= 3 && logprob <= 0.0);
        // Greedily, the token is the likeliest.
        let best = top.values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
        assert_eq!((best, top[*token].as_f64()), (logprob, Some(logprob)));
    }
    // Sums of shares stay below 1.
    let shares: f64 =
        found["top_logprobs"][0].as_object().unwrap().values().filter_map(Value::as_f64).map(f64::exp).sum();
    assert!(shares > 0.5 && shares <= 1.0 + 1e-5, "{shares}");

    let asked = json!({"model": "needle-tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 0,
        "max_completion_tokens": 5, "logprobs": true, "top_logprobs": 2, "stream": true, "ignore_eos": true});
    let chunks = events(&post(server.address, CHAT, &asked));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let entries: Vec<&Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .flatten()
        .collect();
    let content: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8))
        .collect();
    assert_eq!((entries.len(), String::from_utf8_lossy(&bytes).into_owned()), (5, content), "{chunks:?}");
    assert_eq!(entries[0]["top_logprobs"].as_array().map(Vec::len), Some(2));
}

#[test]
fn chats_go_through_the_template() {
    let server = Server::start(Setup { template: Some(chat_template()), ..Setup::default() });
    let ask = |more: Value| {
        let mut body = json!({"model": "needle-tiny", "temperature": 0, "max_tokens": 9, "messages": [
            {"role": "developer", "content": "The secret code for tiger is 2286315."},
            {"role": "user", "content": [{"type": "text", "text": "what is the secret code for tiger?"},
                {"type": "text", "text": ""}]}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        post(server.address, CHAT, &body)
    };
    let answer = ask(json!({}));
    let message = answer.json()["choices"][0]["message"].clone();
    assert_eq!(
        (&message["role"], answer.json()["object"].as_str()),
        (&json!("assistant"), Some("chat.completion"))
    );
    let content = message["content"].as_str().unwrap().to_owned();
    // The template leaves the answer's beginning to the model.
    let direct = body(
        "<|bos|>The secret code for tiger is 2286315.\nQuestion: what is the secret code for tiger? Answer:",
        json!({"max_tokens": 9}),
    );
    assert_eq!(content, text(&post(server.address, PATH, &direct)));
    let chunks = events(&ask(json!({"stream": true})));
    let streamed: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(streamed, content);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    // Without a limit of its own, a chat has the server's.
    let answer = ask(json!({"max_tokens": null, "ignore_eos": true}));
    assert_eq!(answer.json()["usage"]["completion_tokens"], 32);

    let refused = ask(json!({"messages": [{"role": "assistant", "content": "x"}]}));
    assert!(refused.refused(400, "chat_template", Some("messages")).contains("only questions"));
    let part = json!([{"type": "image_url", "image_url": {"url": "http://x"}}]);
    ask(json!({"messages": [{"role": "user", "content": part}]})).refused(
        400,
        "unsupported_parameter",
        Some("messages[0]"),
    );
    ask(json!({"messages": [{"role": "tool", "content": "x"}]})).refused(
        400,
        "unsupported_parameter",
        Some("messages[0]"),
    );
    ask(json!({"messages": [{"role": "user"}]})).refused(400, "invalid_type", Some("messages[0]"));
    ask(json!({"messages": []})).refused(400, "empty_array", Some("messages"));
    ask(json!({"tools": [{"type": "function"}]})).refused(400, "unsupported_parameter", Some("tools"));
    ask(json!({"response_format": {"type": "json_object"}})).refused(
        400,
        "unsupported_parameter",
        Some("response_format"),
    );
    ask(json!({"top_logprobs": 2})).refused(400, "invalid_value", Some("top_logprobs"));
    assert_eq!(ask(json!({"tools": [], "response_format": {"type": "text"}})).status, 200);

    let without = Server::start(Setup::default());
    let refused = post(
        without.address,
        CHAT,
        &json!({"model": "needle-tiny", "messages": [{"role": "user", "content": "x"}]}),
    );
    let message = refused.refused(400, "chat_template", Some("messages"));
    assert!(message.contains("no chat template") && message.contains("/v1/completions"), "{message}");
}

#[test]
fn bad_requests_are_refused_one_by_one() {
    let server = Server::start(Setup::default());
    let raw = |body: &str| request(server.address, "POST", PATH, &[], body);
    for broken in ["{\"model\":", "", "\u{1}", "{'model': 1}"] {
        raw(broken).refused(400, "invalid_json", None);
    }
    raw("[1, 2]").refused(400, "invalid_json", None);
    raw(&format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000))).refused(400, "invalid_json", None);

    let with = |more: Value| post(server.address, PATH, &body("<|bos|>x", more));
    for (field, value, code) in [
        ("prompt", json!(null), "missing_parameter"),
        ("prompt", json!({"a": 1}), "invalid_type"),
        ("prompt", json!(["a", "b"]), "unsupported_parameter"),
        ("prompt", json!([]), "empty_prompt"),
        ("prompt", json!(""), "empty_prompt"),
        ("prompt", json!([-1]), "invalid_type"),
        ("model", json!(null), "missing_parameter"),
        ("max_tokens", json!(0), "invalid_value"),
        ("max_tokens", json!(1.5), "invalid_type"),
        ("max_tokens", json!("9"), "invalid_type"),
        ("temperature", json!(2.1), "invalid_value"),
        ("temperature", json!(-0.1), "invalid_value"),
        ("temperature", json!("hot"), "invalid_type"),
        ("top_p", json!(1.5), "invalid_value"),
        ("n", json!(2), "unsupported_parameter"),
        ("best_of", json!(3), "unsupported_parameter"),
        ("echo", json!(true), "unsupported_parameter"),
        ("suffix", json!("end"), "unsupported_parameter"),
        ("logit_bias", json!({"5": 3}), "unsupported_parameter"),
        ("presence_penalty", json!(0.5), "unsupported_parameter"),
        ("logprobs", json!(21), "invalid_value"),
        ("stop", json!(["a", "b", "c", "d", "e"]), "invalid_value"),
        ("stop", json!([""]), "invalid_value"),
        ("stop", json!(7), "invalid_type"),
        ("stream", json!("yes"), "invalid_type"),
        ("stream_options", json!({"include_usage": true}), "invalid_value"),
        ("seed", json!(1.25), "invalid_type"),
        ("temprature", json!(1), "unknown_parameter"),
    ] {
        let message = with(json!({field: value.clone()})).refused(400, code, Some(field));
        assert!(message.contains(field) || code == "empty_prompt", "{field} {value}: {message}");
    }
    assert_eq!(
        with(json!({"presence_penalty": 0.0, "n": 1, "echo": false, "max_tokens": 1, "top_k": null})).status,
        200
    );
    with(json!({"top_p": 0})).refused(400, "invalid_value", Some("top_p"));
    with(json!({"model": "gpt-9"})).refused(404, "model_not_found", Some("model"));
    let outside = with(json!({"prompt": [4096]}));
    assert_eq!(outside.status, 400, "{outside:?}");
    assert!(outside.json()["error"]["message"].as_str().unwrap().contains("4095"));
    // Longer than the context, by its tokens and by its bytes alone.
    with(json!({"prompt": vec![5; 32_769]})).refused(400, "context_length_exceeded", None);
    with(json!({"prompt": "x ".repeat(500_000)})).refused(400, "context_length_exceeded", None);

    request(server.address, "POST", "/v1/embeddings", &[], "{}").refused(404, "not_found", None);
    request(server.address, "GET", PATH, &[], "").refused(405, "method_not_allowed", None);
    // A stream that cannot begin is refused as any other.
    with(json!({"stream": true, "prompt": []})).refused(400, "empty_prompt", Some("prompt"));
}

#[test]
fn models_health_metrics_and_the_page() {
    let server = Server::start(Setup::default());
    let list = get(server.address, "/v1/models").json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("needle-tiny")));
    assert_eq!(get(server.address, "/v1/models/needle-tiny").json()["owned_by"], "spinkv");
    get(server.address, "/v1/models/other").refused(404, "model_not_found", Some("model"));
    assert_eq!(get(server.address, "/health").json(), json!({"status": "ready"}));
    assert_eq!(get(server.address, "/health/ready").status, 200);
    let page = get(server.address, "/");
    assert!(
        page.body.contains("<title>SpinKV</title>")
            && page.header("content-type") == Some("text/html; charset=utf-8")
    );

    let prompt = needle("tiger", 2_286_315, 60);
    let tokens = TOKENIZER.encode(&prompt).unwrap().len();
    post(server.address, PATH, &body(prompt.as_str(), json!({"max_tokens": 9})));
    server.wait_for_nothing();
    let metrics = get(server.address, "/metrics");
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let value = |name: &str| -> f64 {
        let line = metrics.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is missing in {}", metrics.body)).parse().unwrap()
    };
    assert_eq!(value("spinkv_tokens_total{kind=\"prompt\"}"), tokens as f64);
    assert_eq!(value("spinkv_tokens_total{kind=\"generated\"}"), 9.0);
    assert_eq!(value("spinkv_requests_finished_total{reason=\"length\"}"), 1.0);
    assert_eq!(value("spinkv_time_to_first_token_seconds_count"), 1.0);
    assert_eq!(value("spinkv_time_per_output_token_seconds_count"), 8.0);
    assert_eq!(value("spinkv_kv_bytes{tier=\"gpu\",kind=\"cache_pages\"}"), 0.0);
    // Each full page of the 8 rows went to the host, in pages of 4 KiB.
    let pages = (tokens + 8) / 8 * 8;
    assert_eq!(value("spinkv_moved_bytes_total{direction=\"to_host\"}"), (pages * 4096) as f64);
    assert!(value("spinkv_selected_pages_total{found=\"hit\"}") > 0.0);
    let status = get(server.address, "/status").json();
    assert_eq!(status["cache"]["hits"].as_f64(), Some(value("spinkv_selected_pages_total{found=\"hit\"}")));
}

//! The bodies of both generating endpoints as jobs.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use crate::sampling::SamplingParams;
use crate::serve::job::Job;
use crate::serve::template::ChatMessage;

type Result<T> = std::result::Result<T, ApiError>;

/// The most stop texts, as in OpenAI's API.
const MAX_STOPS: usize = 4;
/// Bytes of the longest stop text: so much of an answer may be held back.
const MAX_STOP_BYTES: usize = 1024;
/// The most likeliest tokens beside a token.
const MAX_TOP_LOGPROBS: usize = 20;

/// What is asked for.
#[derive(Debug)]
pub(super) struct Asked {
    pub model: String,
    pub prompt: Prompt,
    /// All but the prompt's tokens and the deadline.
    pub job: Job,
    /// Whether `max_tokens` was given.
    pub bounded: bool,
    pub stream: bool,
    /// Whether a stream ends with the tokens' numbers.
    pub include_usage: bool,
}

/// What is to be gone on from.
#[derive(Debug)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Chat(Vec<ChatMessage>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PromptField {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum StopField {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
    /// Padding against eavesdroppers who count bytes; there is none here, and none is missed.
    #[serde(default, rename = "include_obfuscation")]
    _obfuscation: Option<bool>,
}

/// The body of `/v1/completions`.
pub(super) fn completion(body: &[u8]) -> Result<Asked> {
    let mut fields = Fields::parse(body)?;
    let model = required(fields.take("model", "a model's name")?, "model")?;
    let expected = "a text or a list of token ids, or a list of one of either";
    let only = "a list of one prompt: this server answers one at a time";
    let one = |count: usize| {
        if count == 1 {
            return Ok(());
        }
        let message = format!("prompt is a list of {count} prompts; expected {only}");
        Err(ApiError::invalid(message, Some("prompt"), Some("unsupported_parameter")))
    };
    let prompt = match required(fields.take::<PromptField>("prompt", expected)?, "prompt")? {
        PromptField::Text(text) => Prompt::Text(text),
        PromptField::Tokens(tokens) => Prompt::Tokens(tokens),
        PromptField::Texts(mut texts) => one(texts.len()).map(|()| Prompt::Text(texts.remove(0)))?,
        PromptField::TokenLists(mut lists) => one(lists.len()).map(|()| Prompt::Tokens(lists.remove(0)))?,
    };
    let logprobs = fields.count("logprobs", 0, MAX_TOP_LOGPROBS)?;
    let max_tokens = fields.count("max_tokens", 1, u32::MAX as usize)?;
    for (name, harmless) in [("best_of", json!(1)), ("echo", json!(false)), ("suffix", json!(""))] {
        fields.unsupported(name, &[harmless])?;
    }
    common(fields, model, prompt, max_tokens.or(Some(16)), logprobs)
}

/// The body of `/v1/chat/completions`.
pub(super) fn chat(body: &[u8]) -> Result<Asked> {
    let mut fields = Fields::parse(body)?;
    let model = required(fields.take("model", "a model's name")?, "model")?;
    let messages: Vec<Value> = required(fields.take("messages", "a list of messages")?, "messages")?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages is empty", Some("messages"), Some("empty_array")));
    }
    let messages = (0..).zip(messages).map(|(index, value)| message(index, value)).collect::<Result<_>>()?;
    let wanted: Option<bool> = fields.take("logprobs", "true or false")?;
    let top = fields.count("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
    let logprobs = match (wanted, top) {
        (Some(true), top) => Some(top.unwrap_or(0)),
        (_, None | Some(0)) => None,
        (_, Some(_)) => {
            let message = "top_logprobs is set; expected logprobs: true beside it";
            return Err(ApiError::invalid(message, Some("top_logprobs"), Some("invalid_value")));
        }
    };
    let most = u32::MAX as usize;
    let of_completion = fields.count("max_completion_tokens", 1, most)?;
    let max_tokens = fields.count("max_tokens", 1, most)?;
    let nothing = [json!([])];
    for (name, harmless) in [
        ("tools", &nothing[..]),
        ("tool_choice", &[json!("none"), json!("auto")]),
        ("functions", &nothing),
        ("function_call", &[json!("none"), json!("auto")]),
        ("parallel_tool_calls", &[json!(true), json!(false)]),
        ("response_format", &[json!({"type": "text"})]),
        ("modalities", &[json!(["text"])]),
        ("audio", &[]),
        ("prediction", &[]),
        ("reasoning_effort", &[]),
        ("verbosity", &[]),
        ("web_search_options", &[]),
    ] {
        fields.unsupported(name, harmless)?;
    }
    common(fields, model, Prompt::Chat(messages), of_completion.or(max_tokens), logprobs)
}

fn common(
    mut fields: Fields,
    model: String,
    prompt: Prompt,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
) -> Result<Asked> {
    let temperature = fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32;
    let top_p = fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0) as f32;
    let min_p = fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0) as f32;
    let top_k = fields.count("top_k", 1, u32::MAX as usize)?;
    let seed: Option<i64> = fields.take("seed", "a whole number")?;
    let seed = seed.map_or_else(drawn_seed, |seed| seed as u64);
    let priority: i32 = fields.take("priority", "a whole number")?.unwrap_or(0);
    let ignore_eos = fields.take("ignore_eos", "true or false")?.unwrap_or(false);
    let stop = match fields.take::<StopField>("stop", "a text or a list of texts")? {
        None => Vec::new(),
        Some(StopField::One(stop)) => vec![stop],
        Some(StopField::Many(stops)) => stops,
    };
    if stop.len() > MAX_STOPS || stop.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        let message = format!("stop: expected up to {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::invalid(message, Some("stop"), Some("invalid_value")));
    }
    let stream = fields.take("stream", "true or false")?.unwrap_or(false);
    let options: Option<StreamOptions> = fields.take("stream_options", "an object with include_usage")?;
    if options.is_some() && !stream {
        let message = "stream_options is set; expected stream: true beside it";
        return Err(ApiError::invalid(message, Some("stream_options"), Some("invalid_value")));
    }
    for (name, harmless) in [
        ("n", json!(1)),
        ("presence_penalty", json!(0)),
        ("frequency_penalty", json!(0)),
        ("logit_bias", json!({})),
        ("service_tier", json!("auto")),
    ] {
        let float = harmless.as_i64().map_or(Value::Null, |number| json!(number as f64));
        fields.unsupported(name, &[harmless, float, json!("default")])?;
    }
    fields.finish()?;
    let sampling = SamplingParams { temperature, top_k, top_p, min_p, seed };
    sampling.validate()?;
    Ok(Asked {
        model,
        prompt,
        job: Job {
            max_tokens: max_tokens.unwrap_or(0),
            sampling,
            stop,
            ignore_eos,
            logprobs,
            priority,
            ..Job::default()
        },
        bounded: max_tokens.is_some(),
        stream,
        include_usage: options.is_some_and(|options| options.include_usage),
    })
}

/// A message whose content is text, or parts that are all text.
fn message(index: usize, value: Value) -> Result<ChatMessage> {
    let param = format!("messages[{index}]");
    let refuse = |what: &str, code| ApiError::invalid(format!("{param}{what}"), Some(&param), Some(code));
    let Some(role) = value["role"].as_str() else {
        return Err(refuse(": expected an object with role and content", "invalid_type"));
    };
    if !["system", "developer", "user", "assistant"].contains(&role) {
        return Err(refuse(
            &format!(" has the role {role:?}; supported: system, developer, user, assistant"),
            "unsupported_parameter",
        ));
    }
    let part = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        _ => {
            Err(refuse(" has a part that is not text; this server takes text alone", "unsupported_parameter"))
        }
    };
    let content = match &value["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(part).collect::<Result<Vec<_>>>()?.concat(),
        _ => return Err(refuse(": expected content as a text or a list of text parts", "invalid_type")),
    };
    if value.get("tool_calls").is_some_and(|calls| !calls.is_null() && *calls != json!([])) {
        return Err(refuse(" calls tools, which this server does not support", "unsupported_parameter"));
    }
    // Templates know the older name.
    let role = if role == "developer" { "system" } else { role };
    Ok(ChatMessage { role: role.to_owned(), content })
}

fn required<T>(field: Option<T>, name: &str) -> Result<T> {
    field
        .ok_or_else(|| ApiError::invalid(format!("{name} is missing"), Some(name), Some("missing_parameter")))
}

/// A seed that nobody chose. Hash maps are seeded by the system's random numbers.
fn drawn_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

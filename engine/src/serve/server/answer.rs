//! What is sent back: one object, or a stream of chunks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event as Sse, KeepAlive, Sse as SseBody};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;
use crate::serve::engine::Submission;
use crate::serve::job::{Event, Finished, Piece, Reason, ScoredToken};
use crate::tokenizer::Tokenizer;

/// How often a stream without news shows that it is alive; what also finds out that nobody listens.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// An answer under way.
pub(super) struct Answer {
    pub submission: Submission,
    pub tokenizer: Tokenizer,
    /// The request's name, as clients see it.
    pub id: String,
    pub created: u64,
    pub model: String,
    pub chat: bool,
    pub scored: bool,
    pub include_usage: bool,
    /// Given back when the answer is sent, or nobody wants it any more.
    pub _permit: OwnedSemaphorePermit,
}

impl Answer {
    /// Waits for all of it.
    pub async fn whole(mut self) -> Result<Response, ApiError> {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let finished = loop {
            match self.submission.next().await {
                Some(Event::Started { .. }) => {}
                Some(Event::Token(piece)) => {
                    text.push_str(&piece.text);
                    tokens.extend(piece.tokens);
                }
                Some(Event::Finished(finished)) => break finished,
                Some(Event::Failed(error)) => return Err(error.into()),
                None => return Err(crate::Error::EngineStopped.into()),
            }
        };
        let reason = finish_reason(&finished)?;
        text.push_str(&finished.rest.text);
        tokens.extend(finished.rest.tokens.iter().cloned());
        let logprobs = self.logprobs(&tokens);
        let choice = if self.chat {
            json!({"index": 0, "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": logprobs, "finish_reason": reason})
        } else {
            json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason})
        };
        let object = if self.chat { "chat.completion" } else { "text_completion" };
        let mut body = self.envelope(object, json!([choice]));
        body["usage"] = usage(&finished);
        let mut response = (StatusCode::OK, body.to_string()).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }

    /// Sends it as it comes, from the first event on.
    pub fn stream(self) -> Response {
        let mut ready = VecDeque::new();
        if self.chat {
            let delta = json!({"role": "assistant", "content": "", "refusal": null});
            ready.push_back(self.chunk(delta, Value::Null, Value::Null).to_string());
        }
        let chunks = stream::unfold((self, ready), |(mut answer, mut ready)| async move {
            loop {
                if let Some(data) = ready.pop_front() {
                    return Some((Ok::<_, Infallible>(Sse::default().data(data)), (answer, ready)));
                }
                let event = answer.submission.next().await?;
                answer.chunks(event, &mut ready);
            }
        });
        let mut response =
            SseBody::new(chunks).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
        // Proxies that collect would hold the answer back.
        response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    /// What an event makes clients hear.
    fn chunks(&self, event: Event, ready: &mut VecDeque<String>) {
        let mut piece = |piece: &Piece| {
            if !piece.text.is_empty() || !piece.tokens.is_empty() {
                let logprobs = self.logprobs(&piece.tokens);
                let content = if self.chat { json!({"content": piece.text}) } else { json!(piece.text) };
                ready.push_back(self.chunk(content, logprobs, Value::Null).to_string());
            }
        };
        let failure = match event {
            Event::Started { .. } => return,
            Event::Token(text) => return piece(&text),
            Event::Failed(error) => error.into(),
            Event::Finished(finished) => match finish_reason(&finished) {
                Err(error) => error,
                Ok(reason) => {
                    piece(&finished.rest);
                    let content = if self.chat { json!({}) } else { json!("") };
                    ready.push_back(self.chunk(content, Value::Null, json!(reason)).to_string());
                    if self.include_usage {
                        let mut last = self.envelope(self.chunk_object(), json!([]));
                        last["usage"] = usage(&finished);
                        ready.push_back(last.to_string());
                    }
                    ready.push_back("[DONE]".to_owned());
                    return;
                }
            },
        };
        // The status was sent long ago.
        ready.push_back(failure.body().to_string());
    }

    fn chunk_object(&self) -> &'static str {
        if self.chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn chunk(&self, content: Value, logprobs: Value, reason: Value) -> Value {
        let name = if self.chat { "delta" } else { "text" };
        let choice = json!({"index": 0, name: content, "logprobs": logprobs, "finish_reason": reason});
        let mut chunk = self.envelope(self.chunk_object(), json!([choice]));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": concat!("spinkv-", env!("CARGO_PKG_VERSION")), "choices": choices})
    }

    fn logprobs(&self, tokens: &[ScoredToken]) -> Value {
        if !self.scored {
            return Value::Null;
        }
        let text = |id: u32| String::from_utf8_lossy(&self.tokenizer.token_bytes(id)).into_owned();
        if self.chat {
            let entry = |id: u32, logprob: f32| json!({"token": text(id), "logprob": logprob, "bytes": self.tokenizer.token_bytes(id)});
            let token = |token: &ScoredToken| {
                let mut found = entry(token.id, token.logprob);
                found["top_logprobs"] = token.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
                found
            };
            return json!({"content": tokens.iter().map(token).collect::<Vec<_>>(), "refusal": null});
        }
        let top = |token: &ScoredToken| -> Value {
            token
                .top
                .iter()
                .map(|(id, logprob)| (text(*id), json!(logprob)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        json!({
            "tokens": tokens.iter().map(|token| text(token.id)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": tokens.iter().map(|token| token.text_offset).collect::<Vec<_>>(),
        })
    }
}

/// OpenAI's word for an end, where the text is what was asked for.
fn finish_reason(finished: &Finished) -> Result<&'static str, ApiError> {
    match finished.reason {
        Reason::EndToken | Reason::StopText => Ok("stop"),
        Reason::Length => Ok("length"),
        Reason::Cancelled => Err(crate::Error::EngineStopped.into()),
        Reason::Deadline => {
            let message =
                format!("the request ran out of time after {} of its tokens", finished.generated_tokens);
            Err(ApiError::of_server(StatusCode::GATEWAY_TIMEOUT, message, "timeout"))
        }
    }
}

fn usage(finished: &Finished) -> Value {
    let (prompt, generated) = (finished.prompt_tokens, finished.generated_tokens);
    json!({"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens}})
}

//! A client of OpenAI's API: streamed completions, each on a connection of its own, with the time of every chunk.

use std::fmt;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use futures_util::StreamExt;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::Value;
use sse_stream::SseStream;
use tokio::time::Instant;

use super::LoadError;

/// The most bytes of an answer that is no stream.
const MAX_BYTES: usize = 64 << 20;
/// The most characters that are quoted of an answer that cannot be read.
const QUOTED: usize = 120;

/// A way to one endpoint.
#[derive(Clone, Debug)]
pub struct Client {
    http: legacy::Client<HttpConnector, Body>,
    /// Without `/v1`.
    base: String,
    authorization: Option<HeaderValue>,
}

/// Why a request was not answered, or not to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No connection, or one that broke off before the answer's head.
    Connect(String),
    /// Another status than 200.
    Status {
        /// The status.
        status: u16,
        /// OpenAI's code, if there is one.
        code: Option<String>,
        /// What the server says.
        message: String,
    },
    /// An error in a stream that had begun.
    InStream {
        /// OpenAI's code, if there is one.
        code: Option<String>,
        /// What the server says.
        message: String,
    },
    /// A stream that ended without its `[DONE]`.
    Broken(String),
    /// Something that is not the API's.
    Unreadable(String),
    /// It took longer than a request may.
    Timeout,
    /// The run was over first.
    CutOff,
}

impl Fault {
    /// What faults of its kind are counted under.
    pub fn kind(&self) -> String {
        let with = |name: String, code: &Option<String>| match code {
            Some(code) => format!("{name} {code}"),
            None => name,
        };
        match self {
            Self::Connect(_) => "connect".to_owned(),
            Self::Status { status, code, .. } => with(status.to_string(), code),
            Self::InStream { code, .. } => with("in_stream".to_owned(), code),
            Self::Broken(_) => "broken_stream".to_owned(),
            Self::Unreadable(_) => "unreadable".to_owned(),
            Self::Timeout => "client_timeout".to_owned(),
            Self::CutOff => "cut_off".to_owned(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(why) => write!(f, "no connection: {why}"),
            Self::Status { status, message, .. } => write!(f, "status {status}: {message}"),
            Self::InStream { message, .. } => write!(f, "in the middle of the answer: {message}"),
            Self::Broken(why) => write!(f, "the stream broke off: {why}"),
            Self::Unreadable(what) => write!(f, "not OpenAI's API: {what}"),
            Self::Timeout => f.write_str("it took longer than --request-timeout"),
            Self::CutOff => f.write_str("the time limit of the run came first"),
        }
    }
}

/// What came of a request. Holds what has come so far, so that breaking off loses nothing.
#[derive(Clone, Debug, Default)]
pub struct Exchange {
    /// When each chunk with text came.
    pub chunks: Vec<Instant>,
    /// The text.
    pub text: String,
    /// Tokens of the prompt and of the answer, as the server counts them.
    pub usage: Option<(u64, u64)>,
    /// When the answer's end was announced, whether or not text came with it.
    pub finished: Option<Instant>,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: Option<String>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl Client {
    /// A client of the endpoint at `url`, with or without `/v1` at its end.
    ///
    /// # Errors
    /// [`LoadError::Url`] and [`LoadError::Key`].
    pub fn new(url: &str, key: Option<&str>) -> Result<Self, LoadError> {
        let refuse = |reason: &str| LoadError::Url { url: url.to_owned(), reason: reason.to_owned() };
        let base = url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let parsed: Uri = base.parse().map_err(|error| refuse(&format!("{error}")))?;
        match parsed.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(refuse("there is no TLS here: ask behind what ends it")),
            _ => return Err(refuse("its scheme is not http")),
        }
        let authorization = match key {
            Some(key) => {
                let mut value =
                    HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| LoadError::Key)?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        // A connection that is kept may be closed by the server just when it is used again; and so many clients have one each.
        let http = legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
        Ok(Self { http, base: base.to_owned(), authorization })
    }

    /// The endpoint, without `/v1`.
    pub fn base(&self) -> &str {
        &self.base
    }

    async fn send(&self, path: &str, body: Option<String>) -> Result<Response<Body>, Fault> {
        let mut request = Request::builder().uri(format!("{}{path}", self.base));
        if let Some(key) = &self.authorization {
            request = request.header(header::AUTHORIZATION, key);
        }
        let request = match body {
            Some(body) => {
                let request = request.method("POST").header(header::CONTENT_TYPE, "application/json");
                request.body(Body::from(body))
            }
            None => request.body(Body::empty()),
        };
        let request = request.map_err(|error| Fault::Connect(error.to_string()))?;
        let answer = self.http.request(request).await.map_err(|error| Fault::Connect(chain(&error)))?;
        Ok(answer.map(Body::new))
    }

    /// A path's answer.
    ///
    /// # Errors
    /// The [`Fault`], if it is no text under the status 200.
    pub async fn get(&self, path: &str) -> Result<String, Fault> {
        let answer = self.send(path, None).await?;
        let status = answer.status();
        let text = whole(answer).await?;
        if status == StatusCode::OK { Ok(text) } else { Err(refusal(status, &text)) }
    }

    /// Models that the endpoint has.
    ///
    /// # Errors
    /// The [`Fault`], if there is no list of them.
    pub async fn models(&self) -> Result<Vec<String>, Fault> {
        let text = self.get("/v1/models").await?;
        let list: Value = serde_json::from_str(&text).map_err(|_| Fault::Unreadable(quote(&text)))?;
        let models = list["data"].as_array().ok_or_else(|| Fault::Unreadable(quote(&text)))?;
        Ok(models.iter().filter_map(|model| Some(model["id"].as_str()?.to_owned())).collect())
    }

    /// Asks for a streamed completion and notes into `exchange` what comes, as it comes.
    ///
    /// # Errors
    /// The [`Fault`], if it does not come to its end.
    pub async fn complete(&self, body: String, exchange: &mut Exchange) -> Result<(), Fault> {
        let answer = self.send("/v1/completions", Some(body)).await?;
        let status = answer.status();
        if status != StatusCode::OK {
            return Err(refusal(status, &whole(answer).await?));
        }
        let kind = answer.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        if !kind.is_some_and(|kind| kind.starts_with("text/event-stream")) {
            return Err(Fault::Unreadable(format!("a stream was asked for, {kind:?} came")));
        }
        let mut events = SseStream::new(answer.into_body());
        while let Some(event) = events.next().await {
            let now = Instant::now();
            let data = match event {
                Ok(event) => event.data.unwrap_or_default(),
                Err(sse_stream::Error::Body(error)) => return Err(Fault::Broken(chain(&*error))),
                Err(error) => return Err(Fault::Unreadable(error.to_string())),
            };
            if data == "[DONE]" {
                return Ok(());
            }
            let chunk: Chunk = match serde_json::from_str(&data) {
                Ok(chunk) => chunk,
                Err(_) => return Err(Fault::Unreadable(quote(&data))),
            };
            if let Some(error) = chunk.error {
                let (code, message) = told(&error);
                return Err(Fault::InStream { code, message });
            }
            let text: String = chunk.choices.iter().filter_map(|choice| choice.text.as_deref()).collect();
            if !text.is_empty() {
                exchange.chunks.push(now);
                exchange.text += &text;
            }
            if chunk.choices.iter().any(|choice| choice.finish_reason.is_some()) {
                exchange.finished = Some(now);
            }
            if let Some(usage) = chunk.usage {
                exchange.usage = Some((usage.prompt_tokens, usage.completion_tokens));
            }
        }
        Err(Fault::Broken("it ended without [DONE]".to_owned()))
    }
}

async fn whole(answer: Response<Body>) -> Result<String, Fault> {
    let bytes = to_bytes(answer.into_body(), MAX_BYTES).await;
    let bytes = bytes.map_err(|error| Fault::Connect(chain(&error)))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn refusal(status: StatusCode, text: &str) -> Fault {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    let (code, message) = match body.get("error") {
        Some(error) => told(error),
        None => (None, quote(text)),
    };
    Fault::Status { status: status.as_u16(), code, message }
}

/// Code and message of an error. Some servers have none, or write the status there.
fn told(error: &Value) -> (Option<String>, String) {
    let code = error["code"].as_str().map(str::to_owned);
    let message = error["message"].as_str().map_or_else(|| quote(&error.to_string()), str::to_owned);
    (code, message)
}

fn quote(text: &str) -> String {
    let cut: String = text.chars().take(QUOTED).collect();
    if cut.len() < text.len() { cut + "…" } else { cut }
}

/// An error with what is behind it: the outer ones of HTTP clients say little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut inner = error.source();
    while let Some(error) = inner {
        text += &format!(": {error}");
        inner = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_with_and_without_v1() {
        for url in ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"] {
            assert_eq!(Client::new(url, None).unwrap().base(), "http://a:1");
        }
        assert_eq!(Client::new("http://a/proxy/v1", None).unwrap().base(), "http://a/proxy");
        for (url, reason) in
            [("https://a", "no TLS"), ("a:1", "not http"), ("http://", "URL"), ("ftp://a", "not http")]
        {
            let error = Client::new(url, None).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(url), "{error}");
        }
        assert_eq!(Client::new("http://a", Some("a\nb")).unwrap_err(), LoadError::Key);
    }

    #[test]
    fn refusals_are_counted_by_status_and_code() {
        let text = r#"{"error": {"message": "the queue is full", "code": "queue_full"}}"#;
        let fault = refusal(StatusCode::TOO_MANY_REQUESTS, text);
        assert_eq!(
            (fault.kind().as_str(), fault.to_string().as_str()),
            ("429 queue_full", "status 429: the queue is full")
        );
        let fault = refusal(StatusCode::BAD_GATEWAY, "<html>no upstream</html>");
        assert_eq!(
            (fault.kind().as_str(), fault.to_string().as_str()),
            ("502", "status 502: <html>no upstream</html>")
        );
        assert_eq!(refusal(StatusCode::BAD_REQUEST, r#"{"error": {"code": 400}}"#).kind(), "400");
    }
}

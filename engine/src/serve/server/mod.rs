//! The API over HTTP: OpenAI's `/v1/completions`, `/v1/chat/completions` and `/v1/models`; `/health`, `/health/ready`, `/metrics`, `/status` and
//! a page at `/` for operators.

mod answer;
mod error;
mod fields;
mod monitor;
mod request;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use self::answer::Answer;
use self::error::ApiError;
use self::request::{Asked, Prompt};
use super::engine::{EngineHandle, Phase};
use super::template::ChatTemplate;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// How the API answers.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The model's name, as clients give it.
    pub model: String,
    /// Tokens of the model's longest context.
    pub context: usize,
    /// Keys of which a request to `/v1` must bring one; none are asked for if there are none.
    pub api_keys: Vec<String>,
    /// Bytes of the largest body.
    pub max_body_bytes: usize,
    /// The most requests to `/v1` at a time, from the first byte of the body to the last of the answer.
    pub max_concurrent: usize,
    /// How long a request may take from the end of its body on.
    pub request_timeout: Option<Duration>,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// The most tokens of a chat's answer, if the request does not say.
    pub default_max_tokens: usize,
}

/// What all handlers share.
#[derive(Clone)]
struct Shared {
    engine: EngineHandle,
    tokenizer: Tokenizer,
    template: Arc<Option<ChatTemplate>>,
    options: Arc<ServerOptions>,
    places: Arc<Semaphore>,
    started: Instant,
    created: u64,
}

/// Checks that an address may be listened on: one that others can reach needs a key, unless that is said to be meant.
///
/// # Errors
/// [`Error::InvalidSetting`].
pub fn check_bind(address: &SocketAddr, api_keys: &[String], open: bool) -> Result<()> {
    if address.ip().is_loopback() || !api_keys.is_empty() || open {
        return Ok(());
    }
    Err(Error::InvalidSetting {
        name: "host",
        value: address.ip().to_string(),
        allowed: "an address that others can reach needs --api-key or --api-key-file, or --allow-open if everybody may use it",
    })
}

/// Reads a body as `/v1/completions` does, or as `/v1/chat/completions` with `chat`, without a model behind it.
///
/// # Errors
/// The status and the body that refuse it.
pub fn check_body(body: &[u8], chat: bool) -> std::result::Result<(), (u16, Value)> {
    let asked = if chat { request::chat(body) } else { request::completion(body) };
    asked.map(drop).map_err(|error| (error.status.as_u16(), error.body()))
}

/// The API in front of an engine.
pub fn router(
    engine: EngineHandle,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    options: ServerOptions,
) -> Router {
    let shared = Shared {
        engine,
        tokenizer,
        template: Arc::new(template),
        places: Arc::new(Semaphore::new(options.max_concurrent)),
        options: Arc::new(options),
        started: Instant::now(),
        created: unix_time(),
    };
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/", get(monitor::page))
        .route("/status", get(monitor::status))
        .route("/health", get(monitor::health))
        .route("/health/ready", get(monitor::ready))
        .route("/metrics", get(monitor::metrics))
        .fallback(|| async { not_found("no such path") })
        .method_not_allowed_fallback(|| async {
            ApiError::invalid("this path does not take this method", None, Some("method_not_allowed"))
                .with_status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .with_state(shared)
}

/// Serves until `shutdown` is done, and then until the requests that are there are answered.
///
/// # Errors
/// What the system says of the socket.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, router).with_graceful_shutdown(shutdown).await
}

async fn completions(State(shared): State<Shared>, request: Request) -> Response {
    respond(shared, request, false).await.unwrap_or_else(IntoResponse::into_response)
}

async fn chat_completions(State(shared): State<Shared>, request: Request) -> Response {
    respond(shared, request, true).await.unwrap_or_else(IntoResponse::into_response)
}

async fn respond(shared: Shared, request: Request, chat: bool) -> std::result::Result<Response, ApiError> {
    shared.authorize(request.headers())?;
    match shared.engine.status().phase {
        Phase::Ready => {}
        Phase::Loading => {
            let message = "the model is being loaded";
            return Err(ApiError::of_server(StatusCode::SERVICE_UNAVAILABLE, message, "loading"));
        }
        Phase::Draining | Phase::Stopped(_) => return Err(Error::EngineStopped.into()),
    }
    let permit = Arc::clone(&shared.places).try_acquire_owned().map_err(|_| {
        let message = format!("{} requests are under way, as many as may be", shared.options.max_concurrent);
        ApiError::of_server(StatusCode::TOO_MANY_REQUESTS, message, "too_many_requests")
    })?;
    let body = shared.body(request).await?;
    let deadline = shared.options.request_timeout.map(|timeout| Instant::now() + timeout);
    let asked = if chat { request::chat(&body)? } else { request::completion(&body)? };
    drop(body);
    shared.check_model(&asked.model)?;
    let Asked { prompt, mut job, bounded, stream, include_usage, .. } = asked;
    // Cutting a long text into tokens takes a while.
    let encode = {
        let shared = shared.clone();
        tokio::task::spawn_blocking(move || shared.encode(prompt))
    };
    job.prompt = encode.await.map_err(|_| Error::EngineStopped)??;
    if !bounded {
        job.max_tokens = shared.options.default_max_tokens;
    }
    job.deadline = deadline;
    let scored = job.logprobs.is_some();
    let submission = shared.engine.submit(job).await?;
    let name = if chat { "chatcmpl" } else { "cmpl" };
    let answer = Answer {
        id: format!("{name}-{:x}-{:x}", shared.created, submission.id().0),
        submission,
        tokenizer: shared.tokenizer.clone(),
        created: unix_time(),
        model: shared.options.model.clone(),
        chat,
        scored,
        include_usage,
        _permit: permit,
    };
    let id = HeaderValue::from_str(&answer.id);
    let mut response = if stream { answer.stream() } else { answer.whole().await? };
    if let Ok(id) = id {
        response.headers_mut().insert("x-request-id", id);
    }
    Ok(response)
}

async fn models(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    match shared.authorize(&headers) {
        Ok(()) => json_response(&json!({"object": "list", "data": [shared.card()]})),
        Err(error) => error.into_response(),
    }
}

async fn model(State(shared): State<Shared>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    match shared.authorize(&headers).and_then(|()| shared.check_model(&name)) {
        Ok(()) => json_response(&shared.card()),
        Err(error) => error.into_response(),
    }
}

impl Shared {
    fn card(&self) -> Value {
        json!({"id": self.options.model, "object": "model", "created": self.created, "owned_by": "spinkv",
            "context_length": self.options.context})
    }

    fn authorize(&self, headers: &HeaderMap) -> std::result::Result<(), ApiError> {
        if self.options.api_keys.is_empty() {
            return Ok(());
        }
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(given) = given.and_then(|value| value.strip_prefix("Bearer ")) else {
            return Err(ApiError::unauthorized("no API key: send Authorization: Bearer KEY"));
        };
        // All keys are compared in full, so that time tells nothing of them.
        let known = self
            .options
            .api_keys
            .iter()
            .fold(false, |known, key| known | same(key.as_bytes(), given.as_bytes()));
        if known { Ok(()) } else { Err(ApiError::unauthorized("the API key is not valid")) }
    }

    fn check_model(&self, name: &str) -> std::result::Result<(), ApiError> {
        if name == self.options.model {
            return Ok(());
        }
        let message = format!("the model {name:?} does not exist; this server has {:?}", self.options.model);
        let error = ApiError::invalid(message, Some("model"), Some("model_not_found"));
        Err(error.with_status(StatusCode::NOT_FOUND))
    }

    /// All of a request's body, if it is small and quick enough.
    async fn body(&self, request: Request) -> std::result::Result<Vec<u8>, ApiError> {
        let limit = self.options.max_body_bytes;
        let timeout = self.options.body_timeout;
        match tokio::time::timeout(timeout, read(request.into_body(), limit)).await {
            Ok(body) => body,
            Err(_) => {
                let message = format!("the body did not arrive within {} s", timeout.as_secs_f64());
                let error = ApiError::invalid(message, None, Some("timeout"));
                Err(error.with_status(StatusCode::REQUEST_TIMEOUT))
            }
        }
    }

    fn encode(&self, prompt: Prompt) -> Result<Vec<u32>> {
        let text = match prompt {
            Prompt::Tokens(tokens) => return Ok(tokens),
            Prompt::Text(text) => text,
            Prompt::Chat(messages) => match &*self.template {
                Some(template) => template.render(&messages)?,
                None => {
                    return Err(Error::ChatTemplate {
                        path: self.options.model.clone().into(),
                        message: "the checkpoint has no chat template (chat_template.jinja, or a field of \
                                  tokenizer_config.json); /v1/completions takes a prompt as it is"
                            .to_owned(),
                    });
                }
            },
        };
        let (tokens, limit) = (self.tokenizer.least_tokens(&text), self.options.context);
        if tokens > limit {
            return Err(Error::PromptTooLong { tokens, limit });
        }
        self.tokenizer.encode(&text)
    }
}

async fn read(body: Body, limit: usize) -> std::result::Result<Vec<u8>, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {limit} bytes");
        ApiError::invalid(message, None, Some("body_too_large")).with_status(StatusCode::PAYLOAD_TOO_LARGE)
    };
    let mut bytes = Vec::new();
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|error| {
            ApiError::invalid(format!("the body broke off: {error}"), None, Some("incomplete_body"))
        })?;
        if part.len() > limit - bytes.len() {
            return Err(too_large());
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

fn not_found(message: &str) -> ApiError {
    ApiError::invalid(message, None, Some("not_found")).with_status(StatusCode::NOT_FOUND)
}

fn json_response(body: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

/// Whether two keys are the same, in a time that depends on their lengths alone.
fn same(key: &[u8], given: &[u8]) -> bool {
    key.len() == given.len()
        && key.iter().zip(given).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

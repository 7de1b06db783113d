//! An endpoint of OpenAI's API without a model, which answers when and as a test wants.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::time::sleep;

/// What becomes of a request, beyond an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ill {
    /// Nothing.
    None,
    /// 429 with a code.
    Full,
    /// 502 from something that is no server of models.
    Gateway,
    /// The stream ends after its first text.
    Ends,
    /// The connection breaks after its first text.
    Breaks,
    /// An error is the second thing in the stream.
    Fails,
    /// Something else than JSON is in the stream.
    Babbles,
    /// It never comes to an end.
    Hangs,
}

#[derive(Clone)]
pub struct Behaviour {
    /// Before the first text.
    pub first: Duration,
    /// Before each further one.
    pub each: Duration,
    /// Whether tokens are counted at the end.
    pub usage: bool,
    /// Answers at a time.
    pub at_a_time: usize,
    /// What becomes of requests, in their order, over and over.
    pub ills: Vec<Ill>,
}

impl Default for Behaviour {
    fn default() -> Self {
        let none = Duration::ZERO;
        Self { first: none, each: none, usage: true, at_a_time: 1000, ills: vec![Ill::None] }
    }
}

struct Shared {
    behaviour: Behaviour,
    places: Arc<Semaphore>,
    seen: Mutex<Vec<(HeaderMap, Value)>>,
}

pub struct Fake {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _runtime: Runtime,
}

impl Fake {
    pub fn start(behaviour: Behaviour) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let places = Arc::new(Semaphore::new(behaviour.at_a_time));
        let shared = Arc::new(Shared { behaviour, places, seen: Mutex::new(Vec::new()) });
        let models = || async { json!({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}).to_string() };
        let router = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/completions", post(complete))
            .with_state(Arc::clone(&shared));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async { axum::serve(listener, router).await });
        Self { address, shared, _runtime: runtime }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// What was asked, in order.
    pub fn seen(&self) -> Vec<(HeaderMap, Value)> {
        self.shared.seen.lock().unwrap().clone()
    }
}

/// Word number `index` of every answer.
fn word(index: usize) -> String {
    format!(" word{index}")
}

/// All of an answer of so many tokens.
pub fn answer(tokens: usize) -> String {
    (0..tokens).map(word).collect()
}

async fn complete(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    let number = {
        let mut seen = shared.seen.lock().unwrap();
        seen.push((headers, body.clone()));
        seen.len() - 1
    };
    let behaviour = shared.behaviour.clone();
    let ill = behaviour.ills[number % behaviour.ills.len()];
    let permit = Arc::clone(&shared.places).acquire_owned().await.expect("it is never closed");
    match ill {
        Ill::Full => {
            let error = json!({"error": {"message": "the queue is full", "code": "queue_full"}});
            return (StatusCode::TOO_MANY_REQUESTS, error.to_string()).into_response();
        }
        Ill::Gateway => return (StatusCode::BAD_GATEWAY, "<html>no upstream").into_response(),
        _ => {}
    }
    let tokens = body["max_tokens"].as_u64().expect("a number") as usize;
    let prompt = body["prompt"].as_array().map_or(0, Vec::len);
    let parts = stream::unfold((0, permit), move |(step, permit)| {
        let behaviour = behaviour.clone();
        async move {
            let event = |value: Value| format!("data: {value}\n\n");
            let text = |index| {
                event(json!({"choices": [{"text": word(index), "finish_reason": null}], "usage": null}))
            };
            if step == 1 && ill != Ill::None {
                // What was sent before arrives before.
                sleep(Duration::from_millis(20)).await;
            }
            let part = match (step, ill) {
                (0, _) => {
                    sleep(behaviour.first).await;
                    // A comment keeps connections alive, and is no text.
                    format!(": alive\n\n{}", text(0))
                }
                (1, Ill::Ends) => return None,
                (1, Ill::Breaks) => return Some((Err("the connection breaks".into()), (step + 1, permit))),
                (1, Ill::Fails) => event(json!({"error": {"message": "no memory", "code": "out_of_memory"}})),
                (1, Ill::Babbles) => "data: <html>\n\n".to_owned(),
                (1, Ill::Hangs) => std::future::pending().await,
                (step, _) if step < tokens => {
                    sleep(behaviour.each).await;
                    text(step)
                }
                (step, _) if step == tokens => {
                    event(json!({"choices": [{"text": "", "finish_reason": "length"}]}))
                }
                (step, _) if step == tokens + 1 && behaviour.usage => event(
                    json!({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}}),
                ),
                (step, _) if step <= tokens + 2 => "data: [DONE]\n\n".to_owned(),
                _ => return None,
            };
            Some((Ok::<_, Box<dyn std::error::Error + Send + Sync>>(part), (step + 1, permit)))
        }
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(parts)).into_response()
}

//! What operators look at.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Shared;
use crate::serve::engine::{Phase, Status};

/// The page at `/`: one file, which asks `/status`.
const PAGE: &str = include_str!("status.html");

pub(super) async fn page() -> impl IntoResponse {
    let policy =
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8"), (header::CONTENT_SECURITY_POLICY, policy)], PAGE)
}

/// Whether the process lives: not so once the engine has failed.
pub(super) async fn health(State(shared): State<Shared>) -> Response {
    let status = shared.engine.status();
    let code = match status.phase {
        Phase::Stopped(Some(_)) => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::OK,
    };
    answer(code, &phase(&status))
}

/// Whether requests are taken.
pub(super) async fn ready(State(shared): State<Shared>) -> Response {
    let status = shared.engine.status();
    let ready = status.phase == Phase::Ready;
    answer(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &phase(&status))
}

pub(super) async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.engine.metrics())
}

pub(super) async fn status(State(shared): State<Shared>) -> Response {
    let status = shared.engine.status();
    let (load, counters, gpu, host) = (status.load, status.counters, status.usage.gpu, status.usage.host);
    let mut body = phase(&status);
    body["model"] = json!(shared.options.model);
    body["version"] = json!(env!("CARGO_PKG_VERSION"));
    body["uptime_seconds"] = json!(shared.started.elapsed().as_secs());
    body["requests"] = json!({"waiting": load.waiting, "prompt": load.prompts, "decoding": load.decoding,
        "parked": load.parked});
    body["cache"] = json!({"hits": counters.hits, "misses": counters.misses, "hit_ratio": counters.hit_ratio(),
        "evicted_pages": counters.evicted_pages, "shrunk_pages": counters.shrunk_pages,
        "bytes_to_gpu": counters.fetched_pages() * status.page_bytes as u64,
        "bytes_to_host": counters.offloaded_pages * status.page_bytes as u64});
    if let Some(prefixes) = status.prefixes {
        body["prefixes"] = json!({"blocks": prefixes.blocks, "bytes": prefixes.bytes, "lookups": prefixes.lookups,
            "prompt_tokens": prefixes.prompt_tokens, "cached_tokens": prefixes.cached_tokens,
            "evicted_blocks": prefixes.evicted_blocks});
    }
    body["bytes"] = json!({
        "gpu": {"steady_pages": gpu.steady_pages, "cache_pages": gpu.cache_pages,
            "in_flight_pages": gpu.in_flight_pages, "tables": gpu.tables(), "summaries": gpu.summaries,
            "key_factors": gpu.key_factors()},
        "host": {"pages": host.pages, "tables": host.tables()}});
    answer(StatusCode::OK, &body)
}

fn phase(status: &Status) -> Value {
    match &status.phase {
        Phase::Loading => json!({"status": "loading"}),
        Phase::Ready => json!({"status": "ready"}),
        Phase::Draining => json!({"status": "draining"}),
        Phase::Stopped(None) => json!({"status": "stopped"}),
        Phase::Stopped(Some(error)) => json!({"status": "failed", "error": error}),
    }
}

fn answer(code: StatusCode, body: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

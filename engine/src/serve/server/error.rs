use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::Error;

/// A refusal in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` under an HTTP status.
#[derive(Debug)]
pub(super) struct ApiError {
    pub status: StatusCode,
    /// OpenAI's class of errors.
    kind: &'static str,
    message: String,
    /// The field at fault.
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    /// A request that is at fault itself.
    pub fn invalid(message: impl Into<String>, param: Option<&str>, code: Option<&'static str>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            message: message.into(),
            param: param.map(str::to_owned),
            code,
        }
    }

    /// The same with another status.
    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// Something that may work later, or elsewhere.
    pub fn of_server(status: StatusCode, message: impl Into<String>, code: &'static str) -> Self {
        let kind = if status == StatusCode::TOO_MANY_REQUESTS { "rate_limit_error" } else { "server_error" };
        Self { status, kind, message: message.into(), param: None, code: Some(code) }
    }

    /// A missing or wrong key.
    pub fn unauthorized(message: &str) -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            kind: "authentication_error",
            message: message.to_owned(),
            param: None,
            code: Some("invalid_api_key"),
        }
    }

    /// The object that goes into the body, or into a stream that has begun.
    pub fn body(&self) -> Value {
        let Self { kind, message, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let invalid = |param: Option<&str>, code| Self::invalid(message.clone(), param, code);
        match error {
            Error::QueueFull { .. } => Self::of_server(StatusCode::TOO_MANY_REQUESTS, message, "queue_full"),
            Error::EngineStopped => {
                Self::of_server(StatusCode::SERVICE_UNAVAILABLE, message, "shutting_down")
            }
            Error::EmptyPrompt => invalid(Some("prompt"), Some("empty_prompt")),
            Error::PromptTooLong { .. } => invalid(None, Some("context_length_exceeded")),
            Error::NothingToGenerate => invalid(Some("max_tokens"), None),
            Error::TokenOutOfVocabulary { .. } => invalid(Some("prompt"), None),
            Error::InvalidSampling { name, .. } => invalid(Some(name), Some("invalid_value")),
            Error::ChatTemplate { .. } => invalid(Some("messages"), Some("chat_template")),
            Error::Kv(
                spinkv::Error::ContextTooLong { .. }
                | spinkv::Error::TooManySlots { .. }
                | spinkv::Error::OutOfGpuPages { .. }
                | spinkv::Error::OutOfGpuMemory { .. }
                | spinkv::Error::OutOfHostMemory { .. },
            ) => invalid(None, Some("context_length_exceeded")),
            Error::Kv(spinkv::Error::AllocationFailed { .. }) => {
                Self::of_server(StatusCode::SERVICE_UNAVAILABLE, message, "out_of_memory")
            }
            _ => Self::of_server(StatusCode::INTERNAL_SERVER_ERROR, message, "internal_error"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let json = HeaderValue::from_static("application/json");
        let mut response = (self.status, self.body().to_string()).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

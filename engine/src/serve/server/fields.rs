//! The fields of a request's body, each taken once: a wrong one is named, and one that nobody knows is refused.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

type Result<T> = std::result::Result<T, ApiError>;

/// What clients send along and what has no meaning here.
const IGNORED: [&str; 5] = ["user", "metadata", "store", "safety_identifier", "prompt_cache_key"];

/// The body's fields that were not taken yet.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// The fields of a JSON object.
    pub fn parse(body: &[u8]) -> Result<Self> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::invalid("the body is not a JSON object", None, Some("invalid_json"))),
            Err(error) => {
                Err(ApiError::invalid(format!("the body is not JSON: {error}"), None, Some("invalid_json")))
            }
        }
    }

    /// A field; null counts as missing. `expected` says what it should be.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value.clone()) {
                Ok(value) => Ok(Some(value)),
                Err(_) => {
                    let message = format!("{name} is {}; expected {expected}", short(&value));
                    Err(ApiError::invalid(message, Some(name), Some("invalid_type")))
                }
            },
        }
    }

    /// A number in a range.
    pub fn number(&mut self, name: &str, least: f64, most: f64) -> Result<Option<f64>> {
        let expected = format!("a number from {least} to {most}");
        let number: Option<f64> = self.take(name, &expected)?;
        match number {
            Some(number) if !(least..=most).contains(&number) => {
                let message = format!("{name} is {number}; expected {expected}");
                Err(ApiError::invalid(message, Some(name), Some("invalid_value")))
            }
            number => Ok(number),
        }
    }

    /// A whole number in a range.
    pub fn count(&mut self, name: &str, least: usize, most: usize) -> Result<Option<usize>> {
        let expected = format!("a whole number from {least} to {most}");
        let count: Option<usize> = self.take(name, &expected)?;
        match count {
            Some(count) if !(least..=most).contains(&count) => {
                let message = format!("{name} is {count}; expected {expected}");
                Err(ApiError::invalid(message, Some(name), Some("invalid_value")))
            }
            count => Ok(count),
        }
    }

    /// A field of the API that this server does not have: allowed if its value is one of `harmless`, which ask for nothing.
    pub fn unsupported(&mut self, name: &str, harmless: &[Value]) -> Result<()> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if harmless.contains(&value) => Ok(()),
            Some(value) => {
                let message = format!("{name} is {}: this server does not support it", short(&value));
                Err(ApiError::invalid(message, Some(name), Some("unsupported_parameter")))
            }
        }
    }

    /// Refuses what is left.
    pub fn finish(mut self) -> Result<()> {
        IGNORED.iter().for_each(|name| drop(self.0.remove(*name)));
        match self.0.iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => {
                let message = format!("unknown parameter {name:?}");
                Err(ApiError::invalid(message, Some(name), Some("unknown_parameter")))
            }
            None => Ok(()),
        }
    }
}

/// A value as an error quotes it.
fn short(value: &Value) -> String {
    let text = value.to_string();
    let cut: String = text.chars().take(60).collect();
    if cut.len() < text.len() { cut + "…" } else { cut }
}

//! The methods that come with the crate, one file each: its Index and its Select, nothing else.

mod dense;
mod shadowkv;
mod streaming_llm;

use std::sync::Arc;

pub use dense::Dense;
pub use shadowkv::ShadowKv;
pub use streaming_llm::StreamingLlm;

use crate::pipeline::{Budget, Method, SteadyZone};
use crate::{Error, Result, nearest_name};

/// What a user may choose about a method; each method takes what it needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MethodOptions {
    /// How much a step may select.
    pub budget: Budget,
    /// What it always reads.
    pub steady: SteadyZone,
}

impl Default for MethodOptions {
    /// 1024 tokens beside the default steady zone.
    fn default() -> Self {
        Self { budget: Budget::Tokens(1024), steady: SteadyZone::default() }
    }
}

/// The names of the methods.
pub const NAMES: [&str; 3] = ["dense", "streaming-llm", "shadowkv"];

/// The method of a name, as users give it.
///
/// # Errors
/// [`Error::UnknownMethod`], with the nearest name if one is near; [`Error::InvalidBudget`] for a budget that no
/// method could run with. [`KvConfig::new`](crate::KvConfig::new) checks the rest.
pub fn by_name(name: &str, options: &MethodOptions) -> Result<Arc<dyn Method>> {
    let MethodOptions { budget, steady } = *options;
    let method: Arc<dyn Method> = match name {
        "dense" => Arc::new(Dense { steady }),
        "streaming-llm" => Arc::new(StreamingLlm { steady }),
        "shadowkv" => Arc::new(ShadowKv { budget, steady }),
        _ => {
            let suggestion = nearest_name(name, &NAMES);
            return Err(Error::UnknownMethod { name: name.to_owned(), known: NAMES.to_vec(), suggestion });
        }
    };
    budget.check_range()?;
    Ok(method)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_its_methods_name() {
        for name in NAMES {
            assert_eq!(by_name(name, &MethodOptions::default()).unwrap().name(), name);
        }
    }

    #[test]
    fn a_misspelt_name_gets_a_suggestion_and_nonsense_none() {
        for (name, expected) in [
            ("shadow-kv", Some("shadowkv")),
            ("SHADOWKV", Some("shadowkv")),
            ("Dense", Some("dense")),
            ("snapkv", None),
            ("xyz", None),
        ] {
            match by_name(name, &MethodOptions::default()).unwrap_err() {
                Error::UnknownMethod { suggestion, .. } => assert_eq!(suggestion, expected, "{name}"),
                other => panic!("{other}"),
            }
        }
    }
}

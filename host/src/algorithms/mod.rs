//! The methods that come with the crate, one file each: its Index and its Select, nothing else.

mod dense;
mod options;
mod per_row;
mod shadowkv;
mod streaming_llm;

use std::sync::Arc;

pub use dense::Dense;
pub use options::{MethodOptions, OwnOptions, OwnOptionsReader};
pub use per_row::{HeadRule, PerRow, RowRules};
pub use shadowkv::ShadowKv;
pub use streaming_llm::StreamingLlm;

use crate::pipeline::Method;
use crate::{Error, Result, nearest_name};

/// The names of the methods.
pub const NAMES: [&str; 3] = ["dense", "streaming-llm", "shadowkv"];

/// The method of a name, as users give it.
///
/// # Errors
/// [`Error::UnknownMethod`], with the nearest name if one is near; [`Error::InvalidBudget`] for a budget that no
/// method could run with; [`Error::UnknownMethodOption`] and [`Error::InvalidMethodOption`] for options of its own.
/// [`KvConfig::new`](crate::KvConfig::new) checks the rest.
pub fn by_name(name: &str, options: &MethodOptions) -> Result<Arc<dyn Method>> {
    let MethodOptions { budget, steady, ref own, ref rules } = *options;
    let own = own.read(name);
    let method: Arc<dyn Method> = match name {
        "dense" => Arc::new(Dense { steady }),
        "streaming-llm" => Arc::new(StreamingLlm { steady }),
        "shadowkv" => Arc::new(ShadowKv { budget, steady }),
        _ => {
            let suggestion = nearest_name(name, &NAMES);
            return Err(Error::UnknownMethod { name: name.to_owned(), known: NAMES.to_vec(), suggestion });
        }
    };
    own.finish()?;
    budget.check_range()?;
    if rules.is_empty() {
        return Ok(method);
    }
    Ok(Arc::new(PerRow::new(method, rules.clone())))
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

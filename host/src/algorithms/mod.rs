//! The methods that come with the crate, one file each: its Index and its Select, nothing else.

mod dense;
mod low_rank_keys;
mod options;
mod per_row;
mod quest;
mod retroinfer;
mod seer_attention;
mod shadowkv;
mod streaming_llm;
mod token_topk;

use std::sync::Arc;

pub use dense::Dense;
pub use low_rank_keys::{LowRankKeys, RANK};
pub use options::{MethodOptions, OwnOptions, OwnOptionsReader};
pub use per_row::{HeadRule, PerRow, RowRules};
pub use quest::Quest;
pub use retroinfer::RetroInfer;
pub use seer_attention::{SeerAttention, TRAINED_BLOCK};
pub use shadowkv::ShadowKv;
pub use streaming_llm::StreamingLlm;
pub use token_topk::TokenTopK;

use crate::pipeline::Method;
use crate::{Error, Result, nearest_name};

/// The names of the methods.
pub const NAMES: [&str; 7] =
    ["dense", "streaming-llm", "shadowkv", "retroinfer", "quest", "token-topk", SEER_ATTENTION];

/// The name of [`SeerAttention`], which needs [gates](MethodOptions::gates).
pub const SEER_ATTENTION: &str = "seer-attention";

/// The method of a name, as users give it.
///
/// # Errors
/// [`Error::UnknownMethod`], with the nearest name if one is near; [`Error::InvalidBudget`] for a budget that no
/// method could run with; [`Error::UnknownMethodOption`] and [`Error::InvalidMethodOption`] for options of its own;
/// [`Error::NoGates`] and [`Error::NoRotary`] for a method that needs them.
/// [`KvConfig::new`](crate::KvConfig::new) checks the rest.
pub fn by_name(name: &str, options: &MethodOptions) -> Result<Arc<dyn Method>> {
    let MethodOptions { budget, steady, ref own, ref rules, ref gates, ref rotary } = *options;
    let mut own = own.read(name);
    let method: Arc<dyn Method> = match name {
        "dense" => Arc::new(Dense { steady }),
        "streaming-llm" => Arc::new(StreamingLlm { steady }),
        "shadowkv" => {
            let method = Arc::new(ShadowKv::new(budget, steady).with_options(&mut own)?);
            LowRankKeys::from_options(method, rotary.as_ref(), &mut own)?
        }
        "retroinfer" => Arc::new(RetroInfer::new(budget, steady).with_options(&mut own)?),
        "quest" => Arc::new(Quest::new(budget, steady).with_options(&mut own)?),
        "token-topk" => Arc::new(TokenTopK { budget, steady }),
        SEER_ATTENTION => {
            let gates = gates.clone().ok_or_else(|| Error::NoGates { method: name.to_owned() })?;
            Arc::new(SeerAttention::from_options(gates, budget, steady, &mut own)?)
        }
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
    use crate::pipeline::Budget;

    #[test]
    fn every_name_is_its_methods_name() {
        for name in NAMES {
            match by_name(name, &MethodOptions::default()) {
                Ok(method) => assert_eq!(method.name(), name),
                Err(error) => {
                    assert_eq!((error, name), (Error::NoGates { method: name.to_owned() }, SEER_ATTENTION))
                }
            }
        }
    }

    /// A method with options of its own as users give them.
    fn with(name: &str, options: &[&str]) -> Result<String> {
        let mut own = OwnOptions::default();
        options.iter().for_each(|option| own.add(option).unwrap());
        let options = MethodOptions { own, ..MethodOptions::default() };
        by_name(name, &options).map(|method| format!("{method:?}"))
    }

    #[test]
    fn methods_take_options_of_their_own() {
        for (name, options, part) in [
            ("shadowkv", &[][..], "outliers: 48"),
            ("shadowkv", &["outliers=0"], "outliers: 0"),
            ("shadowkv", &["outliers=7"], "outliers: 7"),
            ("retroinfer", &[], "estimated: 0.232, update: 256"),
            ("retroinfer", &["estimated=0", "update=1024"], "estimated: 0.0, update: 1024"),
            ("quest", &[], "chunk: 16, merge: Max"),
            ("quest", &["chunk=32", "merge=sum"], "chunk: 32, merge: Sum"),
            ("quest", &["merge=Mean"], "merge: Mean"),
        ] {
            let method = with(name, options).unwrap();
            assert!(method.contains(part), "{method}");
        }
    }

    #[test]
    fn options_that_are_wrong_are_named() {
        for (name, given, expected) in [
            ("shadowkv", "outliers=-1", "outliers"),
            ("shadowkv", "outliers=all", "outliers"),
            ("retroinfer", "estimated=1.01", "estimated"),
            ("retroinfer", "estimated=NaN", "estimated"),
            ("retroinfer", "update=0", "update"),
            ("retroinfer", "update=130", "update"),
            ("quest", "chunk=0", "chunk"),
            ("quest", "chunk=1.5", "chunk"),
            ("quest", "merge=min", "merge"),
        ] {
            match with(name, &[given]).unwrap_err() {
                Error::InvalidMethodOption { method, option, value, .. } => {
                    let (_, given) = given.split_once('=').unwrap();
                    assert_eq!((&*method, option, &*value), (name, expected, given));
                }
                other => panic!("{other}"),
            }
        }
        for (name, given, suggestion) in [
            ("shadowkv", "outlier=1", Some("outliers")),
            ("quest", "chunks=1", Some("chunk")),
            ("token-topk", "chunk=1", None),
            ("dense", "outliers=1", None),
        ] {
            match with(name, &[given]).unwrap_err() {
                Error::UnknownMethodOption { method, suggestion: found, .. } => {
                    assert_eq!((&*method, found), (name, suggestion));
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn outliers_are_48_or_in_proportion_to_the_budget() {
        for (tokens, outliers) in [(128, 48), (1024, 48), (2048, 48), (4096, 96)] {
            assert_eq!(ShadowKv::outliers_of(Budget::Tokens(tokens)), outliers);
        }
        assert_eq!(ShadowKv::outliers_of(Budget::Fraction(0.1)), 48);
    }

    #[test]
    fn a_misspelt_name_gets_a_suggestion_and_nonsense_none() {
        for (name, expected) in [
            ("shadow-kv", Some("shadowkv")),
            ("SHADOWKV", Some("shadowkv")),
            ("Dense", Some("dense")),
            ("tokentopk", Some("token-topk")),
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

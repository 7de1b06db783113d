use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;

use super::RowRules;
use crate::gates::Gates;
use crate::pipeline::{Budget, SteadyZone};
use crate::{Error, Result, Rotary, nearest_name};

/// What a user may choose about a method; each method takes what it needs.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodOptions {
    /// How much a step may select.
    pub budget: Budget,
    /// What it always reads.
    pub steady: SteadyZone,
    /// What only some methods know.
    pub own: OwnOptions,
    /// Rows that do otherwise than the method says.
    pub rules: RowRules,
    /// Learned gates, for methods that need them.
    pub gates: Option<Arc<Gates>>,
    /// How the model turns keys, for methods that turn them back.
    pub rotary: Option<Arc<Rotary>>,
}

impl Default for MethodOptions {
    /// 1024 tokens beside the default steady zone, and nothing else chosen.
    fn default() -> Self {
        Self {
            budget: Budget::Tokens(1024),
            steady: SteadyZone::default(),
            own: OwnOptions::default(),
            rules: RowRules::default(),
            gates: None,
            rotary: None,
        }
    }
}

/// Options that only some methods know, as users give them: `NAME=VALUE`. Of one that is given twice the last counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnOptions(Vec<(String, String)>);

impl OwnOptions {
    /// Adds an option, written as `NAME=VALUE`.
    ///
    /// # Errors
    /// [`Error::MethodOptionSyntax`] without a name or an equals sign.
    pub fn add(&mut self, text: &str) -> Result<()> {
        match text.split_once('=') {
            Some((name, value)) if !name.trim().is_empty() => {
                self.0.push((name.trim().to_owned(), value.trim().to_owned()));
                Ok(())
            }
            _ => Err(Error::MethodOptionSyntax { text: text.to_owned() }),
        }
    }

    /// Whether none is given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The options, to be taken one by one by `method`.
    pub fn read<'a>(&'a self, method: &'a str) -> OwnOptionsReader<'a> {
        OwnOptionsReader { method, options: &self.0, known: Vec::new() }
    }
}

/// Takes the options that a method knows; those that are left over are errors.
#[derive(Debug)]
pub struct OwnOptionsReader<'a> {
    method: &'a str,
    options: &'a [(String, String)],
    known: Vec<&'static str>,
}

impl OwnOptionsReader<'_> {
    /// The value of option `name`, or `None` where it is not given.
    ///
    /// # Errors
    /// [`Error::InvalidMethodOption`] for a value that is none of this type.
    pub fn take<T: FromStr<Err: Display>>(&mut self, name: &'static str) -> Result<Option<T>> {
        self.known.push(name);
        let given = self.options.iter().rev().find(|(given, _)| given == name);
        given
            .map(|(_, value)| value.parse().map_err(|error: T::Err| self.invalid(name, &error.to_string())))
            .transpose()
    }

    /// That the value of option `name` is refused, for `reason`.
    pub fn invalid(&self, name: &'static str, reason: &str) -> Error {
        let given = self.options.iter().rev().find(|(given, _)| given == name);
        Error::InvalidMethodOption {
            method: self.method.to_owned(),
            option: name,
            value: given.map(|(_, value)| value.clone()).unwrap_or_default(),
            reason: reason.to_owned(),
        }
    }

    /// Nothing else may be given.
    ///
    /// # Errors
    /// [`Error::UnknownMethodOption`] for an option that was not taken.
    pub fn finish(self) -> Result<()> {
        let Some((option, _)) = self.options.iter().find(|(name, _)| !self.known.contains(&name.as_str()))
        else {
            return Ok(());
        };
        Err(Error::UnknownMethodOption {
            method: self.method.to_owned(),
            option: option.clone(),
            suggestion: nearest_name(option, &self.known),
            known: self.known,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(texts: &[&str]) -> OwnOptions {
        let mut own = OwnOptions::default();
        texts.iter().for_each(|text| own.add(text).unwrap());
        own
    }

    #[test]
    fn options_are_read_as_people_write_them_and_the_last_counts() {
        let own = own(&["chunk=8", " chunk = 16", "ratio=0.5"]);
        let mut reader = own.read("m");
        assert_eq!(reader.take("chunk"), Ok(Some(16_usize)));
        assert_eq!(reader.take("ratio"), Ok(Some(0.5_f64)));
        assert_eq!(reader.take::<usize>("absent"), Ok(None));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn what_a_method_does_not_know_or_cannot_read_is_named() {
        for text in ["chunk", "=8", ""] {
            let refused = OwnOptions::default().add(text);
            assert_eq!(refused, Err(Error::MethodOptionSyntax { text: text.to_owned() }));
        }
        let given = own(&["chunks=8"]);
        let mut reader = given.read("m");
        assert_eq!(reader.take::<usize>("chunk"), Ok(None));
        let unknown = reader.finish().unwrap_err();
        assert!(
            matches!(&unknown, Error::UnknownMethodOption { option, suggestion: Some("chunk"), .. } if option == "chunks"),
            "{unknown}"
        );
        assert!(own(&["chunk=8"]).read("m").finish().unwrap_err().to_string().contains("has none"));

        let given = own(&["chunk=many"]);
        let error = given.read("m").take::<usize>("chunk").unwrap_err();
        assert!(
            matches!(&error, Error::InvalidMethodOption { option: "chunk", value, .. } if value == "many"),
            "{error}"
        );
    }
}

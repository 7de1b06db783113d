use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use spinkv::Rotary;
use spinkv::algorithms::{self, MethodOptions, OwnOptions};
use spinkv::gates::Gates;
use spinkv::pipeline::{Budget, Method, SteadyZone};

use crate::error::{Error, Result};

/// A method by name, with options of its own: `shadowkv`, or `NAME:OPTION=VALUE:OPTION=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodChoice {
    name: String,
    own: OwnOptions,
    /// As it is written in tables and files.
    label: String,
}

impl MethodChoice {
    /// The method's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Name and options, as they were given but for white space.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// What it is made from.
    pub fn options(
        &self,
        budget: Budget,
        steady: SteadyZone,
        gates: Option<Arc<Gates>>,
        rotary: Arc<Rotary>,
    ) -> MethodOptions {
        let (own, rotary) = (self.own.clone(), Some(rotary));
        MethodOptions { budget, steady, own, gates, rotary, ..MethodOptions::default() }
    }

    /// The method.
    ///
    /// # Errors
    /// Those of [`algorithms::by_name`].
    pub fn build(
        &self,
        budget: Budget,
        steady: SteadyZone,
        gates: Option<Arc<Gates>>,
        rotary: Arc<Rotary>,
    ) -> Result<Arc<dyn Method>> {
        Ok(algorithms::by_name(&self.name, &self.options(budget, steady, gates, rotary))?)
    }
}

impl FromStr for MethodChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':').map(str::trim);
        let name = parts.next().unwrap_or_default().to_owned();
        let (mut own, mut label) = (OwnOptions::default(), name.clone());
        for option in parts {
            own.add(option)?;
            label.push(':');
            label.extend(option.split_whitespace());
        }
        Ok(Self { name, own, label })
    }
}

impl fmt::Display for MethodChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)
    }
}

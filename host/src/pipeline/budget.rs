use std::fmt;
use std::str::FromStr;

use super::SteadyZone;
use crate::{Error, Result};

/// How many tokens a step may select for each KV head, beyond the steady zone: as many whole partitions as
/// fit, and at least one.
///
/// Written as `1024` (tokens), `1.56%` or `0.0156` (of the context).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// A number of tokens.
    Tokens(usize),
    /// A fraction of the context, above 0 and at most 1; grows with it.
    Fraction(f64),
}

impl Budget {
    /// Checks the budget by itself.
    ///
    /// # Errors
    /// [`Error::InvalidBudget`] for 0 tokens or a fraction outside (0, 1].
    pub fn check_range(&self) -> Result<()> {
        match *self {
            Self::Tokens(0) => Err(invalid("0", "0 tokens select nothing; at least 1 partition is needed")),
            Self::Fraction(fraction) if !(fraction > 0.0 && fraction <= 1.0) => {
                Err(invalid(&fraction.to_string(), "a fraction of the context is above 0 and at most 1"))
            }
            _ => Ok(()),
        }
    }

    /// Checks the budget, and a number of tokens against the steady zone. A fraction is exempt from that: of a
    /// short context it may well be less.
    ///
    /// # Errors
    /// Those of [`check_range`](Self::check_range); [`Error::BudgetBelowSteady`] for fewer tokens than `steady`
    /// asks for.
    pub fn check(&self, steady: &SteadyZone) -> Result<()> {
        self.check_range()?;
        match *self {
            Self::Tokens(budget) if budget < steady.tokens() => Err(Error::BudgetBelowSteady {
                budget,
                steady: steady.tokens(),
                sinks: steady.sinks,
                window: steady.window,
            }),
            _ => Ok(()),
        }
    }

    /// Partitions of `partition_tokens` tokens that a step may select at a context of `context` tokens: whole
    /// ones, and at least one.
    pub fn partitions(&self, context: usize, partition_tokens: usize) -> usize {
        let tokens = match *self {
            Self::Tokens(tokens) => tokens,
            // A hair more, so that 0.1 of 80 tokens is 8 of them.
            Self::Fraction(fraction) => (fraction * context as f64 + 1e-6) as usize,
        };
        (tokens / partition_tokens).max(1)
    }
}

impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let expected = "expected tokens (1024), a percentage (1.56%) or a fraction (0.0156)";
        let number = |digits: &str| digits.trim().parse::<f64>().map_err(|_| invalid(text, expected));
        if let Some(percent) = text.strip_suffix('%') {
            Ok(Self::Fraction(number(percent)? / 100.0))
        } else if let Ok(tokens) = text.trim().parse() {
            Ok(Self::Tokens(tokens))
        } else {
            Ok(Self::Fraction(number(text)?))
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tokens(tokens) => write!(f, "{tokens} tokens"),
            // Rounded, so that 1.56% does not print as 1.5599999999999998%.
            Self::Fraction(fraction) => write!(f, "{}%", (fraction * 1e6).round() / 1e4),
        }
    }
}

fn invalid(value: &str, reason: &str) -> Error {
    Error::InvalidBudget { value: value.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_as_people_write_them() {
        assert_eq!("1024".parse(), Ok(Budget::Tokens(1024)));
        assert_eq!("50%".parse(), Ok(Budget::Fraction(0.5)));
        assert_eq!("0.25".parse(), Ok(Budget::Fraction(0.25)));
        for text in ["", "many", "-3", "10 tokens", "%", "1e999%"] {
            let parsed = text.parse::<Budget>().and_then(|budget| budget.check(&SteadyZone::default()));
            assert!(matches!(parsed, Err(Error::InvalidBudget { .. })), "{text:?}: {parsed:?}");
        }
    }

    #[test]
    fn a_budget_is_whole_partitions_and_at_least_one() {
        assert_eq!(Budget::Tokens(1024).partitions(9, 8), 128);
        assert_eq!(Budget::Tokens(100).partitions(9, 8), 12);
        assert_eq!(Budget::Fraction(0.1).partitions(80, 8), 1);
        assert_eq!(Budget::Fraction(0.0156).partitions(32768, 8), 63);
        assert_eq!(Budget::Fraction(0.01).partitions(10, 8), 1);
    }

    #[test]
    fn a_budget_below_the_steady_zone_names_both() {
        let steady = SteadyZone::default();
        assert_eq!(
            Budget::Tokens(67).check(&steady),
            Err(Error::BudgetBelowSteady { budget: 67, steady: 68, sinks: 4, window: 64 })
        );
        assert_eq!(Budget::Tokens(68).check(&steady), Ok(()));
        assert!(Budget::Tokens(0).check(&steady).is_err());
        assert_eq!(Budget::Fraction(1e-7).check(&steady), Ok(()), "a fraction is exempt");
        assert!(Budget::Fraction(0.0).check(&steady).is_err());
        assert!(Budget::Fraction(f64::NAN).check(&steady).is_err());
    }
}

use std::ops::Range;

use crate::{Error, Result};

/// The longest row, in tokens: page keys and partition ids are 32 bits wide, and no sum of a few lengths may
/// overflow.
pub const MAX_TOKENS: usize = 1 << 30;

/// The tokens that every step attends to, whatever a method selects: the first ones (attention sinks) and
/// the last ones (the local window). They stay on the GPU and do not count in the budget.
///
/// The zone is rounded outwards to whole partitions and pages, so at least these tokens are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SteadyZone {
    /// Tokens at the start of the sequence.
    pub sinks: usize,
    /// Tokens at its end, the newest included; at least 1.
    pub window: usize,
}

impl Default for SteadyZone {
    /// 4 sinks and a window of 64 tokens, as RetroInfer has them.
    fn default() -> Self {
        Self { sinks: 4, window: 64 }
    }
}

impl SteadyZone {
    /// Tokens asked for, before rounding.
    pub fn tokens(&self) -> usize {
        self.sinks + self.window
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::WindowZero`] if the newest token would not be attended to; [`Error::SteadyZoneTooLarge`] beyond
    /// [`MAX_TOKENS`].
    pub fn check(&self) -> Result<()> {
        let Self { sinks, window } = *self;
        if window == 0 {
            return Err(Error::WindowZero);
        }
        let tokens = sinks.saturating_add(window);
        if tokens > MAX_TOKENS {
            return Err(Error::SteadyZoneTooLarge { tokens, sinks, window, limit: MAX_TOKENS });
        }
        Ok(())
    }

    /// The most pages that the zone holds at any length, where both units are multiples of `page_tokens`.
    ///
    /// Sinks fill whole units; the tail starts on a unit's border and is shorter than `window` and a unit.
    pub fn max_pages(&self, unit: ZoneUnit, page_tokens: usize) -> usize {
        let sinks = self.sinks.next_multiple_of(unit.sinks);
        sinks / page_tokens + (self.window + unit.context - 1).div_ceil(page_tokens)
    }
}

/// What the zones' borders are multiples of, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneUnit {
    /// Of the first border, from the start of the sequence.
    pub sinks: usize,
    /// Of the second border, from the first: so many tokens leave the steady zone at a time.
    pub context: usize,
}

impl ZoneUnit {
    /// The same unit at both borders.
    pub fn even(tokens: usize) -> Self {
        Self { sinks: tokens, context: tokens }
    }
}

/// The zones of a row that holds a number of tokens. They are disjoint and cover the sequence; the tokens
/// `0..retrievable.start` and `retrievable.end..tokens` are steady.
///
/// A pure function of the length, so that a host and a device that count tokens agree on every zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zones {
    /// Tokens of the row.
    pub tokens: usize,
    /// The tokens that can be selected, and leave the GPU. Its borders are those of the [unit](ZoneUnit), so partitions and pages lie
    /// wholly within or without.
    pub retrievable: Range<usize>,
}

impl Zones {
    /// The zones at a length of `tokens`.
    pub fn at(tokens: usize, steady: &SteadyZone, unit: ZoneUnit) -> Self {
        let start = steady.sinks.next_multiple_of(unit.sinks).min(tokens);
        let units = tokens.saturating_sub(steady.window).saturating_sub(start) / unit.context;
        Self { tokens, retrievable: start..start + units * unit.context }
    }

    /// Whether `token` is attended to in every step.
    pub fn is_steady(&self, token: usize) -> bool {
        token < self.tokens && !self.retrievable.contains(&token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_shorter_than_sinks_and_window_is_all_steady() {
        let at = |tokens| Zones::at(tokens, &SteadyZone::default(), ZoneUnit::even(8));
        for tokens in 0..=72 {
            let zones = at(tokens);
            assert!(zones.retrievable.is_empty(), "{zones:?}");
        }
        // The second chunk leaves when the window no longer reaches it: 16 + 64 tokens.
        assert_eq!(at(79).retrievable, 8..8);
        assert_eq!(at(80).retrievable, 8..16);
        assert_eq!(at(87).retrievable, 8..16);
        assert_eq!(at(88).retrievable, 8..24);
    }
}

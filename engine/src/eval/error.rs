use std::io;
use std::path::PathBuf;

use super::LEAST_CONTEXT;

/// Why an evaluation is refused, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// Nothing to compare.
    #[error("no {what}: at least 1 is needed")]
    Nothing {
        /// What there is none of.
        what: &'static str,
    },

    /// A context that is no number of tokens.
    #[error("context {text:?}: expected tokens, such as 4096 or 4k")]
    InvalidContext {
        /// As it was given.
        text: String,
    },

    /// A context beyond the model's.
    #[error("context of {context} tokens: the model takes {limit} (max_position_embeddings)")]
    ContextTooLong {
        /// Tokens asked for.
        context: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },

    /// A context that a prompt with needles, or one with scored tokens after it, does not fit.
    #[error("context of {context} tokens: at least {least} are needed")]
    ContextTooShort {
        /// Tokens asked for.
        context: usize,
        /// The least that do.
        least: usize,
    },

    /// The files that prompts are made from are not there.
    #[error(
        "{}: {source}; prompts are made from haystack.txt and nouns.txt beside the model, or in the folder that --haystack names",
        path.display()
    )]
    MissingHaystack {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The files that prompts are made from hold too little.
    #[error("{}: {found} {what}; at least {least} are needed", path.display())]
    HaystackTooSmall {
        /// The file.
        path: PathBuf,
        /// What there is too little of.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many are needed.
        least: usize,
    },

    /// A prompt that cannot be fitted to its length.
    #[error("no prompt of {target} tokens could be made: the nearest has {found}")]
    CannotFit {
        /// Tokens wanted.
        target: usize,
        /// Tokens of the nearest.
        found: usize,
    },

    /// A file of finished results that cannot be read.
    #[error("{}:{line}: {reason}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl EvalError {
    pub(super) fn context_too_short(context: usize) -> Self {
        Self::ContextTooShort { context, least: LEAST_CONTEXT }
    }
}

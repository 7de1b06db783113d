/// Why a load cannot be put on a server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A URL that nothing can be asked at.
    #[error("the URL {url:?}: {reason}; expected one such as http://127.0.0.1:8000")]
    Url {
        /// The URL.
        url: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A key that no header can carry.
    #[error("the API key has characters that a header cannot have")]
    Key,

    /// An endpoint that does not answer a first request: no load is put on it.
    #[error("{url} does not answer a first request: {fault}")]
    NoAnswer {
        /// What was asked.
        url: String,
        /// What became of it.
        fault: String,
    },

    /// An endpoint with no model, or with several.
    #[error("{url} has {}: name one with --model", named(models))]
    Models {
        /// The endpoint.
        url: String,
        /// Their names.
        models: Vec<String>,
    },

    /// Something that a tokenizer is needed for.
    #[error("{what} needs a tokenizer: give a checkpoint's directory with --tokenizer")]
    NoTokenizer {
        /// What needs one.
        what: &'static str,
    },

    /// A request that is longer than can be asked for.
    #[error(
        "a request of {tokens} tokens is beyond {limit}: a smaller --scale or fewer --turns make it shorter"
    )]
    TooLong {
        /// Tokens of the longest one, its last answer included.
        tokens: usize,
        /// The most that the server takes.
        limit: usize,
    },

    /// A setting out of its range.
    #[error("{name} is {value}: {allowed}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is accepted.
        allowed: &'static str,
    },
}

fn named(models: &[String]) -> String {
    match models {
        [] => "no models in its list".to_owned(),
        models => format!("the models {}", models.join(", ")),
    }
}

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Command, FromArgMatches};
use spinkv_engine::serve::{EngineHandle, Phase, server};
use spinkv_engine::{Error, Result};
use tokio::sync::oneshot;

use super::{LAST_WAIT, ServeArguments, Source, Started, start};

/// How often is looked whether the model is loaded.
const POLL: Duration = Duration::from_millis(50);

/// A server of this process, as `spinkv serve` would run it.
pub(crate) struct OwnServer {
    pub url: String,
    pub model: String,
    pub key: Option<String>,
    /// Where its weights come from.
    pub source: Source,
    /// Its tokens.
    pub vocab_size: usize,
    /// Tokens of its longest context.
    pub context: usize,
    handle: EngineHandle,
    ended: oneshot::Receiver<Result<()>>,
}

impl OwnServer {
    /// Starts one on a free port, with the flags of `spinkv serve`, and waits until it takes requests.
    pub async fn start(flags: &[OsString]) -> Result<Self> {
        let command =
            ServeArguments::augment_args(Command::new("spinkv bench serve --").no_binary_name(true));
        let parsed = command
            .try_get_matches_from(flags)
            .and_then(|mut matches| ServeArguments::from_arg_matches_mut(&mut matches));
        let arguments = match parsed {
            Ok(arguments) => arguments.with_file()?,
            // As for any other flag that is wrong.
            Err(error) => error.exit(),
        };
        // A line for each request would be a part of what is measured.
        arguments.start_log("warn")?;
        let settings = arguments.settings()?;
        let (source, context) = (settings.source, settings.config.max_position_embeddings);
        let vocab_size = settings.config.vocab_size;
        let key = arguments.keys()?.into_iter().next();
        let Started { address, listener, router, handle, mut ended, model } = start(&arguments, 0).await?;
        tokio::spawn(server::serve(listener, router, std::future::pending()));
        loop {
            match handle.status().phase {
                Phase::Ready => break,
                Phase::Loading => {}
                Phase::Draining | Phase::Stopped(_) => {
                    return Err((&mut ended).await.unwrap_or(Ok(())).err().unwrap_or(Error::EngineStopped));
                }
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(Self { url: format!("http://{address}"), model, key, source, vocab_size, context, handle, ended })
    }

    /// Ends it.
    pub async fn stop(self) -> Result<()> {
        self.handle.stop();
        match tokio::time::timeout(LAST_WAIT, self.ended).await {
            Ok(Ok(outcome)) => outcome,
            // It ends with the process.
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }
}

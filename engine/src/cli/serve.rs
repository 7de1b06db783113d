//! `spinkv serve`.

mod arguments;
mod engine;
mod own;
mod settings;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use spinkv_engine::serve::server;
use spinkv_engine::serve::{ChatTemplate, Engine, EngineHandle};
use spinkv_engine::{Error, Result};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};

pub(crate) use self::arguments::ServeArguments;
pub(super) use self::own::OwnServer;
pub(super) use self::settings::Source;

/// How long is waited for clients that do not take in the end of their answers.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// A server whose port is open, and whose engine loads the model on a thread of its own.
struct Started {
    address: SocketAddr,
    listener: TcpListener,
    router: axum::Router,
    handle: EngineHandle,
    /// How the engine ended.
    ended: oneshot::Receiver<Result<()>>,
    model: String,
}

/// Runs `spinkv serve`.
pub(crate) fn run(arguments: ServeArguments) -> Result<()> {
    let arguments = arguments.with_file()?;
    arguments.start_log("info")?;
    let drain = Duration::from_secs(arguments.drain_timeout.unwrap_or(30));
    runtime()?.block_on(async {
        let Started { address, listener, router, handle, mut ended, model } = start(&arguments, 8000).await?;
        let failed = |source| Error::Io { path: address.to_string().into(), source };
        tracing::info!(model, "listening on http://{address}");
        let closing = Arc::new(Notify::new());
        let told = Arc::clone(&closing);
        let mut serving = Box::pin(server::serve(listener, router, async move { told.notified().await }));
        let early = tokio::select! {
            outcome = &mut serving => return outcome.map_err(failed),
            outcome = &mut ended => Some(outcome.unwrap_or(Err(Error::EngineStopped))),
            () = terminated() => None,
        };
        closing.notify_one();
        if let Some(outcome) = early {
            // Who asked hears of the failure.
            let _ = tokio::time::timeout(LAST_WAIT, serving).await;
            return outcome;
        }
        tracing::info!(seconds = drain.as_secs(), "draining");
        handle.drain();
        close(handle, serving, ended, drain).await
    })
}

/// Threads for HTTP: the engine has its own.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| Error::Io { path: "the HTTP threads".into(), source })
}

/// Opens the port and begins to load the model, once all settings are seen to be right.
async fn start(arguments: &ServeArguments, port: u16) -> Result<Started> {
    let settings = arguments.settings()?;
    let address = SocketAddr::new(
        arguments.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        arguments.port.unwrap_or(port),
    );
    let options = arguments.server(&settings)?;
    server::check_bind(&address, &options.api_keys, arguments.allow_open.unwrap_or(false))?;
    let tokenizer = settings.source.tokenizer(settings.config.vocab_size)?;
    let template = settings.source.directory().map(ChatTemplate::open).transpose()?.flatten();
    if template.is_none() {
        tracing::warn!("the checkpoint has no chat template: /v1/chat/completions will refuse");
    }
    let failed = |source| Error::Io { path: address.to_string().into(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    // The port is open while the model is loaded, and says so.
    let (engine, handle) = Engine::new();
    let (over, ended) = oneshot::channel();
    let for_engine = tokenizer.clone();
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || {
            // If nobody hears of it, everything is over already.
            let _ = over.send(engine::run_engine(engine, settings, for_engine));
        })
        .map_err(|source| Error::Io { path: "the engine's thread".into(), source })?;
    let model = options.model.clone();
    let router = server::router(handle.clone(), tokenizer, template, options);
    Ok(Started { address, listener, router, handle, ended, model })
}

/// Waits for the requests that are there, as long as `drain` and nobody's second signal say.
async fn close(
    handle: EngineHandle,
    serving: impl Future<Output = std::io::Result<()>> + Unpin,
    ended: oneshot::Receiver<Result<()>>,
    drain: Duration,
) -> Result<()> {
    let mut serving = serving;
    let answered = tokio::select! {
        _ = &mut serving => true,
        () = tokio::time::sleep(drain) => false,
        () = terminated() => false,
    };
    if !answered {
        tracing::warn!("requests are cancelled");
        handle.stop();
        let _ = tokio::time::timeout(LAST_WAIT, &mut serving).await;
    }
    match tokio::time::timeout(LAST_WAIT, ended).await {
        Ok(Ok(outcome)) => outcome?,
        Ok(Err(_)) => return Err(Error::EngineStopped),
        Err(_) => tracing::warn!("the engine is still in a step"),
    }
    tracing::info!("closed");
    Ok(())
}

/// The next SIGTERM or SIGINT.
async fn terminated() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

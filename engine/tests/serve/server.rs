//! A server of its own for a test: the router over an engine with a bundled model on the CPU.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use spinkv::algorithms::{self, MethodOptions};
use spinkv::backend::cpu::CpuBackend;
use spinkv::memory::{Allocator, KvDtype, MemoryLimits, PageLayout};
use spinkv::pipeline::{Budget, Pipeline};
use spinkv::{KvConfig, KvShape};
use spinkv_engine::config::ModelConfig;
use spinkv_engine::model::Model;
use spinkv_engine::runner::CpuRunner;
use spinkv_engine::serve::server::{self, ServerOptions};
use spinkv_engine::serve::{ChatTemplate, Engine, EngineHandle, Scheduler, SchedulerOptions};
use spinkv_engine::tokenizer::Tokenizer;

use crate::http;

pub static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let config = ModelConfig::open(dir()).expect("the configuration is bundled");
    Model::open(dir(), config, |_, _| {}).expect("the model is bundled")
});

pub static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::open(dir()).expect("the tokenizer is bundled"));

pub fn dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/needle-tiny"))
}

pub fn kv() -> KvConfig {
    let config = MODEL.config();
    let shape = KvShape::new(config.layers, config.query_heads, config.kv_heads, config.head_dim).unwrap();
    let layout = PageLayout::new(8, config.head_dim, KvDtype::Bf16).unwrap();
    let options = MethodOptions { budget: Budget::Tokens(256), ..MethodOptions::default() };
    KvConfig::new(shape, layout, algorithms::by_name("shadowkv", &options).unwrap()).unwrap()
}

pub struct Setup {
    pub limits: MemoryLimits,
    /// Whether prompts share pages.
    pub prefixes: bool,
    pub scheduling: SchedulerOptions,
    pub options: ServerOptions,
    pub template: Option<ChatTemplate>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            limits: MemoryLimits::default(),
            prefixes: true,
            scheduling: SchedulerOptions::default(),
            options: ServerOptions {
                model: "needle-tiny".to_owned(),
                context: MODEL.config().max_position_embeddings,
                api_keys: Vec::new(),
                max_body_bytes: 1 << 20,
                max_concurrent: 64,
                request_timeout: None,
                body_timeout: Duration::from_secs(60),
                default_max_tokens: 32,
            },
            template: None,
        }
    }
}

/// Ends, and checks that everything is free, when it is dropped.
pub struct Server {
    pub address: SocketAddr,
    pub engine: EngineHandle,
    /// Where the storage of both tiers comes from: a test can let it refuse.
    pub allocator: Allocator,
    thread: Option<JoinHandle<()>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Server {
    pub fn start(setup: Setup) -> Self {
        let Setup { limits, prefixes, scheduling, options, template } = setup;
        let (engine, handle) = Engine::new();
        let mut backend = CpuBackend::new(kv(), limits);
        if prefixes {
            backend = backend.with_prefixes(None).unwrap();
        }
        let allocator = backend.allocator().clone();
        let thread = std::thread::spawn(move || {
            let pipeline = Pipeline::new(backend);
            let runner = CpuRunner::new(&MODEL, pipeline);
            engine.run(Scheduler::new(runner, Some(TOKENIZER.clone()), scheduling), 4096);
        });
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let router = server::router(handle.clone(), TOKENIZER.clone(), template, options);
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(server::serve(listener, router, std::future::pending()));
        let server =
            Self { address, engine: handle, allocator, thread: Some(thread), runtime: Some(runtime) };
        server.wait("the engine is ready", |status| status["status"] == "ready");
        server
    }

    /// Waits until the status is as it should be.
    #[track_caller]
    pub fn wait(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        let begin = Instant::now();
        loop {
            let status = http::get(self.address, "/status").json();
            if holds(&status) {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(120), "{what}: {status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until nobody is there and nothing is held.
    #[track_caller]
    pub fn wait_for_nothing(&self) {
        self.wait("all memory is free", is_free);
    }
}

/// Whether nobody is there and no byte is held, but for what is kept of prompts.
pub fn is_free(status: &Value) -> bool {
    let zero = |value: &Value| value.as_object().expect("numbers").values().all(|number| *number == 0);
    let (host, kept) = (&status["bytes"]["host"], status["prefixes"]["bytes"].as_u64().unwrap_or(0));
    zero(&status["requests"]) && zero(&status["bytes"]["gpu"]) && host["tables"] == 0 && host["pages"] == kept
}

impl Drop for Server {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.wait_for_nothing();
        }
        self.engine.stop();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let ended = self.thread.take().expect("a thread").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the engine panicked");
    }
}

/// Held-out text of `lines` lines with a secret code in its middle, and the question for it.
pub fn needle(noun: &str, code: u32, lines: usize) -> String {
    static HAYSTACK: LazyLock<String> =
        LazyLock::new(|| std::fs::read_to_string(dir().join("haystack.txt")).expect("held-out text"));
    let mut text = "<|bos|>".to_owned();
    for (number, line) in HAYSTACK.lines().skip(code as usize % 500).take(lines).enumerate() {
        if number == lines / 2 {
            text += &format!("The secret code for {noun} is {code}.\n");
        }
        text += line;
        text.push('\n');
    }
    if lines == 0 {
        text += &format!("The secret code for {noun} is {code}.\n");
    }
    text + &format!("Question: what is the secret code for {noun}? Answer: The secret code for {noun} is")
}

//! What SpinKV reads from others, one function for each kind of input: none of them may panic, whatever the bytes are. What cannot be used is a typed error that
//! says so.
//!
//! `cargo +nightly fuzz run request` fuzzes one of them; `engine/tests/fuzz.rs` feeds all of them with mutated seeds on any toolchain.

use std::cell::RefCell;
use std::path::Path;

use spinkv_engine::checkpoint::Checkpoint;
use spinkv_engine::config::ModelConfig;
use spinkv_engine::serve::server::check_body;
use spinkv_engine::tokenizer::Tokenizer;
use spinkv_engine::{Error, Result};
use tempfile::TempDir;

thread_local! {
    /// One folder a thread, since making one for each input would take most of the time.
    static FOLDER: RefCell<TempDir> = RefCell::new(TempDir::new().expect("a temporary folder"));
}

/// Writes `data` to a file of this name and hands its folder on.
fn in_folder(name: &str, data: &[u8], check: impl FnOnce(&Path)) {
    FOLDER.with_borrow(|folder| {
        std::fs::write(folder.path().join(name), data).expect("the folder takes files");
        check(folder.path());
    });
}

/// An error says something, and which file is at fault.
fn is_typed(error: &Error, file: &str) {
    let message = error.to_string();
    assert!(message.contains(file), "{message:?} does not name {file}");
    assert!(message.len() > file.len() + 2 && message.len() < 100_000, "{message:?}");
}

/// The bodies of both endpoints that generate.
pub fn request(data: &[u8]) {
    for chat in [false, true] {
        let Err((status, body)) = check_body(data, chat) else { continue };
        assert!((400..500).contains(&status), "{status}: a body is its sender's fault");
        let error = &body["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        assert!(error["type"].as_str().is_some_and(|kind| kind.ends_with("_error")), "{body}");
        assert!(error["code"].is_string() || error["code"].is_null(), "{body}");
    }
}

/// A safetensors file, and every tensor that its header names.
pub fn checkpoint(data: &[u8]) {
    in_folder("model.safetensors", data, |folder| {
        let checkpoint = match Checkpoint::open(folder) {
            Ok(checkpoint) => checkpoint,
            Err(error) => return is_typed(&error, "model.safetensors"),
        };
        assert_eq!(checkpoint.file_bytes(), data.len() as u64);
        for name in checkpoint.names() {
            let shape = checkpoint.shape(name).expect("it is named").to_vec();
            match checkpoint.tensor_f32(name, &shape) {
                Ok(elements) => assert_eq!(elements.len(), shape.iter().product::<usize>()),
                Err(error) => is_typed(&error, "model.safetensors"),
            }
            if let Err(error) = checkpoint.tensor_i64(name) {
                is_typed(&error, "model.safetensors");
            }
            let other = [shape.as_slice(), &[3]].concat();
            assert!(checkpoint.raw(name, &other).is_err(), "a shape that it has not");
        }
        assert!(checkpoint.shape("no such tensor").is_err());
    });
}

/// A tokenizer, and texts through it.
pub fn tokenizer(data: &[u8]) {
    in_folder("tokenizer.json", data, |folder| {
        let tokenizer = match Tokenizer::open(folder) {
            Ok(tokenizer) => tokenizer,
            Err(error) => return is_typed(&error, "tokenizer.json"),
        };
        let through = |text: &str| -> Result<()> {
            let ids = tokenizer.encode(text)?;
            tokenizer.decode(&ids)?;
            let mut stream = tokenizer.stream();
            let ids = ids.iter().take(64).copied().chain([0, 7, u32::MAX]);
            for id in ids {
                tokenizer.token_bytes(id);
                stream.push(id)?;
            }
            Ok(())
        };
        for text in ["", "a", "Hello, world! \u{1f980} \u{fffd}\0 abc  \n 123", "<|bos|>ab<|eos|>"] {
            tokenizer.least_tokens(text);
            if let Err(error) = through(text) {
                is_typed(&error, "tokenizer.json");
            }
        }
    });
}

/// A model's configuration, and what is worked out from it.
pub fn config(data: &[u8]) {
    in_folder("config.json", data, |folder| {
        let config = match ModelConfig::open(folder) {
            Ok(config) => config,
            Err(error) => return is_typed(&error, "config.json"),
        };
        let least = [config.layers, config.query_heads, config.kv_heads, config.head_dim, config.vocab_size];
        assert!(least.iter().all(|size| *size > 0), "{config:?}");
        assert!(config.query_heads.is_multiple_of(config.kv_heads), "{config:?}");
        config.rotary();
    });
}

//! The fuzz targets without a fuzzer: each is fed with seeds, mutated from a fixed random seed, and must neither panic nor fail without saying why. Finds less
//! than `cargo +nightly fuzz run` (see fuzz/), but runs with every test.

#![cfg(feature = "serve")]

#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What parsers are likeliest to stumble over.
const TOKENS: [&str; 22] = [
    "null",
    "true",
    "[]",
    "{}",
    "-1",
    "0",
    "1e999",
    "1.5",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "\"\"",
    "\"\\ud800\"",
    "[[[[",
    "]",
    "}",
    ",",
    ":",
    "\u{1f980}",
    "\0",
    "\"data_offsets\":[0,8]",
    "NaN",
];

fn below(rng: &mut ChaCha8Rng, limit: usize) -> usize {
    rng.next_u64() as usize % limit.max(1)
}

/// Changes `data` in one to eight places.
fn mutate(rng: &mut ChaCha8Rng, data: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=below(rng, 8) {
        let at = below(rng, data.len() + 1);
        let end = (at + 1 + below(rng, 16)).min(data.len());
        match below(rng, 8) {
            0 if at < data.len() => data[at] ^= 1 << below(rng, 8),
            1 if at < data.len() => data[at] = rng.next_u32() as u8,
            2 if at < end => drop(data.drain(at..end)),
            3 if at < end => {
                let again = data[at..end].to_vec();
                data.splice(at..at, again);
            }
            4 => data.truncate(at),
            5 => {
                let from = below(rng, other.len());
                let piece = &other[from..(from + 1 + below(rng, 64)).min(other.len())];
                data.splice(at..at, piece.iter().copied());
            }
            // A number for a number keeps JSON valid, and so comes further.
            6 => {
                let digits = |byte: &u8| byte.is_ascii_digit();
                if let Some(first) = data[at..].iter().position(digits).map(|first| at + first) {
                    let length = data[first..].iter().take_while(|byte| digits(byte)).count();
                    let number = TOKENS[4 + below(rng, 7)];
                    data.splice(first..first + length, number.bytes());
                }
            }
            _ => {
                let token = TOKENS[below(rng, TOKENS.len())];
                data.splice(at..at, token.bytes());
            }
        }
    }
}

fn feed(target: &str, rounds: usize, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let mut paths: Vec<_> =
        std::fs::read_dir(&folder).expect("seeds").map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(seeds.len() > 1, "{target} has seeds");
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for round in 0..rounds + seeds.len() {
        let mut data = seeds[round % seeds.len()].clone();
        // The seeds themselves first.
        if round >= seeds.len() {
            let other = below(&mut rng, seeds.len());
            mutate(&mut rng, &mut data, &seeds[other]);
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(&data))) {
            println!("{target}, round {round}: {:?}", String::from_utf8_lossy(&data));
            resume_unwind(panic);
        }
    }
}

#[test]
fn requests() {
    feed("request", 20_000, targets::request);
}

#[test]
fn checkpoints() {
    feed("checkpoint", 5_000, targets::checkpoint);
}

#[test]
fn tokenizers() {
    feed("tokenizer", 1_500, targets::tokenizer);
}

#[test]
fn configurations() {
    feed("config", 5_000, targets::config);
}

/// Seeds that are refused would test nothing but refusals.
#[test]
fn seeds_are_accepted() {
    let seed = |name: &str| {
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(name)).unwrap()
    };
    use spinkv_engine::checkpoint::Checkpoint;
    use spinkv_engine::config::ModelConfig;
    use spinkv_engine::serve::server::check_body;
    use spinkv_engine::tokenizer::Tokenizer;
    assert_eq!(check_body(&seed("request/completion.json"), false), Ok(()));
    assert_eq!(check_body(&seed("request/ids.json"), false), Ok(()));
    assert_eq!(check_body(&seed("request/chat.json"), true), Ok(()));
    let dir = tempfile::TempDir::new().unwrap();
    let put = |name: &str, of: &str| std::fs::write(dir.path().join(name), seed(of)).unwrap();
    for of in ["needle-tiny", "llama", "yarn"] {
        put("config.json", &format!("config/{of}.json"));
        ModelConfig::open(&dir).unwrap();
    }
    for of in ["byte-level", "fallback"] {
        put("tokenizer.json", &format!("tokenizer/{of}.json"));
        Tokenizer::open(&dir).unwrap();
    }
    put("model.safetensors", "checkpoint/all.safetensors");
    let names = Checkpoint::open(dir.path()).unwrap().names().count();
    assert_eq!(names, 5);
}

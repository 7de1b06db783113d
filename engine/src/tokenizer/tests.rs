use std::sync::LazyLock;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::Checkpoint;

const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models");

fn needle() -> Tokenizer {
    static NEEDLE: LazyLock<Tokenizer> =
        LazyLock::new(|| Tokenizer::open(format!("{MODELS}/needle-tiny")).unwrap());
    NEEDLE.clone()
}

fn read(file: &str) -> Value {
    serde_json::from_slice(&fs::read(format!("{MODELS}/{file}")).unwrap()).unwrap()
}

fn open(json: &Value) -> Result<Tokenizer> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::open(dir.path())
}

/// The checkpoint's tokenizer with a post-processor like Llama 3.1's, which puts BOS first, and an EOS last.
fn with_template() -> Tokenizer {
    let mut json = read("needle-tiny/tokenizer.json");
    let special = |token: &str, id: u32| json!({ "id": token, "ids": [id], "tokens": [token] });
    let template = json!({
        "type": "TemplateProcessing",
        "single": [
            { "SpecialToken": { "id": "<|bos|>", "type_id": 0 } },
            { "Sequence": { "id": "A", "type_id": 0 } },
            { "SpecialToken": { "id": "<|eos|>", "type_id": 0 } },
        ],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<|bos|>": special("<|bos|>", 0), "<|eos|>": special("<|eos|>", 1) },
    });
    json["post_processor"] = json!({ "type": "Sequence", "processors": [json["post_processor"], template] });
    open(&json).unwrap()
}

/// A SentencePiece-style tokenizer as in Llama 2: spaces as U+2581, bytes as `<0xNN>`, one leading space
/// removed.
fn byte_fallback() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    let words = ["<unk>", "<s>", "▁Hello", "▁world", "▁", "x", "\u{fffd}"].map(String::from);
    for (id, token) in words.into_iter().chain((0..=255).map(|byte| format!("<0x{byte:02X}>"))).enumerate() {
        vocab.insert(token, id.into());
    }
    let added = json!({ "id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true });
    let replace = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
    let strip = json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 });
    open(&json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders":
            [replace, { "type": "ByteFallback" }, { "type": "Fuse" }, strip] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": [] },
    }))
    .unwrap()
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream();
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    pieces.extend(stream.finish().unwrap());
    pieces
}

#[test]
fn prompts_encode_as_the_references_say() {
    for model in ["needle-tiny", "tiny-llama31-random"] {
        let tokenizer = Tokenizer::open(format!("{MODELS}/{model}")).unwrap();
        let reference = Checkpoint::open_file(format!("{MODELS}/{model}/reference.safetensors")).unwrap();
        assert_eq!(tokenizer.vocab_size(), 4096);
        for prompt in read(&format!("{model}/prompts.json"))["prompts"].as_array().unwrap() {
            let name = prompt["name"].as_str().unwrap();
            let stored = reference.tensor_i64(&format!("{name}.input_ids")).unwrap();
            let expected: Vec<u32> = stored.into_iter().map(|id| u32::try_from(id).unwrap()).collect();
            // Long prompts are in the reference file only.
            if prompt["input_ids"].is_array() {
                assert_eq!(prompt["input_ids"], json!(expected), "{name}");
            }
            if let Some(text) = prompt["text"].as_str() {
                assert_eq!(tokenizer.encode(text).unwrap(), expected, "{name}");
                assert_eq!(tokenizer.decode(&expected).unwrap(), text.strip_prefix("<|bos|>").unwrap());
            }
            if let Some(text) = prompt["greedy_text"].as_str() {
                let ids: Vec<u32> = serde_json::from_value(prompt["greedy_ids"].clone()).unwrap();
                assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace("<|eos|>", ""), "{name}");
            }
        }
    }
}

#[test]
fn special_tokens_are_read_but_not_shown() {
    let tokenizer = needle();
    assert_eq!(tokenizer.token_id("<|eos|>"), Some(1));
    assert_eq!(tokenizer.token_id("no such token"), None);
    let ids = tokenizer.encode("<|bos|>a<|eos|>b").unwrap();
    assert_eq!((ids[0], ids[2]), (0, 1));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "ab");
    assert_eq!(streamed(&tokenizer, &ids).concat(), "ab");
    assert_eq!(tokenizer.decode(&[0, 1, 2]).unwrap(), "");
}

#[test]
fn ids_without_a_token_give_no_text() {
    let tokenizer = needle();
    let mut ids = tokenizer.encode("one").unwrap();
    ids.extend([4096, u32::MAX]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "one");
    assert_eq!(streamed(&tokenizer, &ids).concat(), "one");
}

#[test]
fn the_post_processors_tokens_come_once() {
    let (plain, template) = (needle(), with_template());
    let body = plain.encode("fn main").unwrap();
    let expected = [&[0][..], &body, &[1]].concat();
    assert_eq!(template.encode("fn main").unwrap(), expected);
    assert_eq!(template.encode("<|bos|>fn main").unwrap(), expected);
    assert_eq!(template.encode("").unwrap(), [0, 1]);
    assert_eq!(template.encode("<|bos|>").unwrap(), [0, 1]);
    // Nothing to add, nothing to take away.
    assert!(plain.encode("").unwrap().is_empty());
    assert_eq!(plain.encode("<|bos|><|bos|>").unwrap(), [0, 0]);
}

#[test]
fn stored_truncation_and_padding_are_ignored() {
    let mut json = read("needle-tiny/tokenizer.json");
    json["truncation"] =
        json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
    json["padding"] = json!({ "strategy": { "Fixed": 64 }, "direction": "Left", "pad_to_multiple_of": null,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>" });
    let text = "The quick brown fox jumps over the lazy dog, again and again.";
    assert_eq!(open(&json).unwrap().encode(text).unwrap(), needle().encode(text).unwrap());
}

#[test]
fn bad_files_name_themselves() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::open(dir.path()), Err(Error::Io { .. })));
    for json in [json!(null), json!({}), json!({ "version": "1.0", "model": { "type": "Cipher" } })] {
        let error = open(&json).unwrap_err();
        assert!(matches!(error, Error::Tokenizer { .. }), "{error:?}");
        assert!(error.to_string().contains("tokenizer.json: "));
    }
    let whole = read("needle-tiny/tokenizer.json").to_string();
    fs::write(dir.path().join("tokenizer.json"), &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(Tokenizer::open(dir.path()), Err(Error::Json { .. })));
    // Cut short inside of the decoder, at which the library panics.
    let cut = whole.find("\"decoder\":{").unwrap() + 20;
    fs::write(dir.path().join("tokenizer.json"), &whole[..cut]).unwrap();
    assert!(matches!(Tokenizer::open(dir.path()), Err(Error::Json { .. })));
    // The same of JSON that is whole, but for a character that is none.
    let broken = whole.replace("\"decoder\":{", "\"decoder\":{\"x\":\"\\ud800\",");
    fs::write(dir.path().join("tokenizer.json"), broken).unwrap();
    assert!(Tokenizer::open(dir.path()).unwrap_err().to_string().contains("tokenizer.json: "));
}

#[test]
fn characters_are_held_back_until_complete() {
    let tokenizer = needle();
    for text in ["🦀", "a🦀b", "é漢字🦀\u{fffd}!", "👩\u{200d}💻 ok"] {
        let ids = tokenizer.encode(text).unwrap();
        let pieces = streamed(&tokenizer, &ids);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| !piece.is_empty()));
        assert!(text.contains('\u{fffd}') || !pieces.concat().contains('\u{fffd}'));
    }
    let crab = tokenizer.encode("🦀").unwrap();
    assert!(crab.len() > 1, "the test needs a character of several tokens");
    let mut stream = tokenizer.stream();
    for &id in &crab[..crab.len() - 1] {
        assert_eq!(stream.push(id).unwrap(), None);
    }
    // Cut off, the character becomes a mark; a finished stream starts afresh.
    assert_eq!(stream.finish().unwrap().unwrap(), tokenizer.decode(&crab[..crab.len() - 1]).unwrap());
    assert_eq!(stream.finish().unwrap(), None);
    let again: String = crab.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(again, "🦀");
}

#[test]
fn every_token_streams_as_it_decodes() {
    let tokenizer = needle();
    for id in 0..4096 {
        assert_eq!(streamed(&tokenizer, &[id]).concat(), tokenizer.decode(&[id]).unwrap(), "{id}");
    }
}

#[test]
fn byte_fallback_tokens_stream_as_they_decode() {
    let tokenizer = byte_fallback();
    let id = |token: &str| tokenizer.token_id(token).unwrap();
    let [s, hello, world, space, x] = ["<s>", "▁Hello", "▁world", "▁", "x"].map(id);
    let crab = "🦀".bytes().map(|byte| id(&format!("<0x{byte:02X}>"))).collect::<Vec<_>>();
    assert_eq!(streamed(&tokenizer, &[s, hello, world]), ["Hello", " world"]);
    assert_eq!(streamed(&tokenizer, &[hello, s, world]).concat(), "Hello world");
    assert_eq!(streamed(&tokenizer, &[&crab[..], &[x]].concat()), ["🦀x"]);
    assert_eq!(streamed(&tokenizer, &crab), ["🦀"]);
    assert_eq!(streamed(&tokenizer, &[space, x, space, world]).concat(), "x  world");
}

#[test]
fn long_streams_take_linear_time() {
    let tokenizer = needle();
    let text = fs::read_to_string(format!("{MODELS}/needle-tiny/haystack.txt")).unwrap();
    let mut ids = tokenizer.encode(&text).unwrap();
    // A run that never becomes a character: the bytes of 🦀 without its last.
    let crab = tokenizer.encode("🦀").unwrap();
    ids.extend(crab[..crab.len() - 1].iter().cycle().take(50_000));
    let start = Instant::now();
    let pieces = streamed(&tokenizer, &ids);
    // A quadratic decoder would take minutes.
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(pieces.concat() == tokenizer.decode(&ids).unwrap());
    assert!(pieces.len() > ids.len() / 4, "text should flow");
}

proptest! {
    #[test]
    fn text_survives_the_round_trip(text in any::<String>()) {
        let tokenizer = needle();
        prop_assume!(!text.contains("<|"));
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), &text);
        prop_assert_eq!(streamed(&tokenizer, &ids).concat(), text);
    }

    /// Any ids, so mostly bytes that are not UTF-8.
    #[test]
    fn pieces_join_to_the_whole(ids in prop::collection::vec(prop_oneof![0u32..300, 0u32..4100], 0..40)) {
        let tokenizer = needle();
        prop_assert_eq!(streamed(&tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn byte_fallback_pieces_join_to_the_whole(
        ids in prop::collection::vec(prop_oneof![0u32..10, 0u32..270, 200u32..270], 0..20)
    ) {
        static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(byte_fallback);
        let tokenizer = &*TOKENIZER;
        prop_assert_eq!(streamed(tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
    }
}

#[test]
fn numbers_are_the_text_of_tokens_that_mean_nothing() {
    let numbered = Tokenizer::numbered(151_936).unwrap();
    assert_eq!(numbered.vocab_size(), 151_936);
    let ids = [17, 0, 151_935, 17];
    assert_eq!(numbered.encode("17 0 151935 17").unwrap(), ids);
    assert_eq!(numbered.decode(&ids).unwrap(), "17 0 151935 17");
    let mut stream = numbered.stream();
    let mut text: String = ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
    text += &stream.finish().unwrap().unwrap_or_default();
    assert_eq!(text, "17 0 151935 17");
    assert!(Tokenizer::numbered(0).is_err());
}

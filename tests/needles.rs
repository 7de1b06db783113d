//! Facts hidden in long prompts, found through the pipeline: the proof that a method reads what matters.

use std::ops::ControlFlow;

use spinkv::algorithms::{MethodOptions, OwnOptions};
use spinkv::pipeline::Budget;
use spinkv_engine::generate::{GenerateOptions, Prepared, generate};
use spinkv_tests::checkpoints::Bundled;

/// The prompts, of those whose names begin with `group`, that `method` answers.
fn answered(bundled: &Bundled, method: &str, group: &str) -> Vec<String> {
    answered_with(bundled, method, &[], group)
}

/// The same with options of the method's own.
fn answered_with(bundled: &Bundled, method: &str, options: &[&str], group: &str) -> Vec<String> {
    let mut own = OwnOptions::default();
    options.iter().for_each(|option| own.add(option).expect("an option"));
    let options = GenerateOptions {
        method: method.to_owned(),
        method_options: MethodOptions { budget: Budget::Tokens(1024), own, ..MethodOptions::default() },
        max_tokens: 9,
        ignore_eos: true,
        ..GenerateOptions::default()
    };
    let prompts = bundled.prompts.iter().filter(|prompt| prompt.name.starts_with(group));
    let mut answered = Vec::new();
    for prompt in prompts {
        let (model, tokenizer) = (&bundled.model, &bundled.tokenizer);
        let prepared = Prepared::new(model.config(), tokenizer, &prompt.text, &options).unwrap();
        let generation = generate(model, tokenizer, prepared, |_| ControlFlow::Continue(())).unwrap();
        let right = generation.text == format!(" {}.\n", prompt.answer);
        println!(
            "{method} {}: {} s, hit ratio {:?}, {:?} {}",
            prompt.name,
            generation.prefill_time.as_secs_f32(),
            generation.counters.hit_ratio(),
            generation.text,
            if right { "" } else { "WRONG" },
        );
        if right {
            // The method's answer is the reference's first eight tokens, which no rounding can change.
            assert_eq!(generation.tokens[..8], bundled.greedy_ids(&prompt.name)[..8]);
            answered.push(prompt.name.clone());
        }
    }
    answered
}

#[test]
fn dense_answers_every_4k_prompt() {
    assert_eq!(answered(&Bundled::open("needle-tiny"), "dense", "needle_4k").len(), 8);
}

#[test]
fn shadowkv_answers_every_4k_prompt_with_1024_tokens() {
    assert_eq!(answered(&Bundled::open("needle-tiny"), "shadowkv", "needle_4k").len(), 8);
}

/// The test can fail: without the middle of the prompt the facts are gone.
#[test]
fn streaming_llm_answers_almost_none() {
    let answered = answered(&Bundled::open("needle-tiny"), "streaming-llm", "needle_4k");
    assert!(answered.len() <= 1, "{answered:?}");
}

#[test]
fn dense_answers_every_16k_prompt() {
    assert_eq!(answered(&Bundled::open("needle-tiny"), "dense", "needle_16k").len(), 4);
}

#[test]
fn shadowkv_answers_every_16k_prompt_with_1024_tokens() {
    assert_eq!(answered(&Bundled::open("needle-tiny"), "shadowkv", "needle_16k").len(), 4);
}

/// What its outlier chunks are for: no landmark leads to the fact.
#[test]
fn shadowkv_without_outliers_misses_the_one_that_needs_them() {
    let answered = answered_with(&Bundled::open("needle-tiny"), "shadowkv", &["outliers=0"], "needle_16k_1");
    assert!(answered.is_empty(), "{answered:?}");
}

#[test]
fn quest_answers_every_4k_prompt_with_1024_tokens() {
    assert_eq!(answered(&Bundled::open("needle-tiny"), "quest", "needle_4k").len(), 8);
}

#[test]
fn token_topk_answers_every_4k_prompt_with_1024_tokens() {
    assert_eq!(answered(&Bundled::open("needle-tiny"), "token-topk", "needle_4k").len(), 8);
}

#[test]
#[ignore = "slow: 32K tokens"]
fn dense_answers_every_32k_prompt() {
    assert_eq!(answered(&Bundled::open("needle-tiny"), "dense", "needle_32k").len(), 2);
}

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use spinkv::Rotary;
use spinkv::backend::cpu::CpuBackend;
use spinkv::gates::{Gates, LayerGate};
use spinkv::memory::{KvDtype, MemoryLimits};
use spinkv::pipeline::{Budget, Counters, Pipeline};

use super::*;
use crate::config::ModelConfig;
use crate::error::Error;
use crate::model::{DecodeToken, Model};
use crate::pages::PageOptions;
use crate::runner::{CpuRunner, Runner};
use crate::tokenizer::Tokenizer;

struct Bundled {
    dir: PathBuf,
    model: Model,
    tokenizer: Tokenizer,
}

fn bundled() -> &'static Bundled {
    static BUNDLED: OnceLock<Bundled> = OnceLock::new();
    BUNDLED.get_or_init(|| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/needle-tiny");
        let model = Model::open(&dir, ModelConfig::open(&dir).unwrap(), |_, _| {}).unwrap();
        let tokenizer = Tokenizer::open(&dir).unwrap();
        Bundled { dir, model, tokenizer }
    })
}

fn haystack() -> Haystack {
    Haystack::open(&bundled().dir, &bundled().tokenizer).unwrap()
}

fn methods(texts: &[&str]) -> Vec<MethodChoice> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn small() -> EvalOptions {
    EvalOptions {
        tasks: vec![Task::Needle, Task::Perplexity],
        methods: methods(&["dense", "shadowkv"]),
        budgets: vec![Budget::Tokens(128)],
        contexts: vec![1024],
        prompts: 2,
        scored_tokens: 4,
        ..EvalOptions::default()
    }
}

fn evaluation(options: EvalOptions) -> Result<Evaluation, Error> {
    let Bundled { dir, model, tokenizer } = bundled();
    Evaluation::new(dir, model.config(), tokenizer, dir, options)
}

fn run_all(evaluation: &Evaluation, journal: &mut Journal, jobs: usize) {
    let Bundled { model, tokenizer, .. } = bundled();
    run(evaluation, model, tokenizer, journal, (jobs, 1 << 30), |_| ControlFlow::Continue(())).unwrap();
}

/// A report without the times, which alone differ between runs.
fn timeless(evaluation: &Evaluation, journal: &Journal) -> String {
    let mut report = Report::new(evaluation, "needle-tiny".to_owned(), "cpu", journal);
    report.cells.iter_mut().for_each(|cell| cell.seconds = Seconds::default());
    report.json()
}

#[test]
fn a_prompt_has_the_format_of_the_models_own() {
    let (haystack, tokenizer) = (haystack(), &bundled().tokenizer);
    let text = std::fs::read_to_string(bundled().dir.join("haystack.txt")).unwrap();
    let lines_of_text: HashSet<&str> = text.lines().collect();
    let mut counts = HashSet::new();
    for prompt in 0..12 {
        let Question { prompt: ids, answer } = haystack.needle(tokenizer, 7, 4096, prompt).unwrap();
        let Answer::Code { digits, noun, depth, needles } = answer else { panic!("a code is asked for") };
        assert_eq!((ids[0], ids.iter().filter(|id| **id == 0).count()), (0, 1), "<|bos|>, once");
        let text = tokenizer.decode(&ids).unwrap();
        let question =
            format!("\nQuestion: what is the secret code for {noun}? Answer: The secret code for {noun} is");
        let body = text.strip_suffix(&question).expect("the question is last");

        let codes = body.lines().filter_map(|line| {
            let (noun, code) =
                line.strip_prefix("The secret code for ")?.strip_suffix('.')?.split_once(" is ")?;
            assert!(code.len() == 7 && code.bytes().all(|byte| byte.is_ascii_digit()), "{line}");
            Some((noun, code))
        });
        let codes: Vec<_> = codes.collect();
        assert_eq!(codes.len(), needles);
        assert!((8..=32).contains(&needles), "{needles}");
        let nouns: HashSet<_> = codes.iter().map(|(noun, _)| noun).collect();
        assert_eq!(nouns.len(), needles, "each noun once");
        assert!(codes.contains(&(noun.as_str(), digits.as_str())));
        let at = text.find(&format!("The secret code for {noun} is {digits}.\n")).unwrap();
        assert!((depth - at as f64 / text.len() as f64).abs() < 0.01, "{depth}");
        // Every other line is one of the text, but for the last, which may be cut.
        let others: Vec<_> = body.lines().filter(|line| !line.starts_with("The secret code for ")).collect();
        let cut = others.iter().filter(|line| !lines_of_text.contains(*line)).count();
        assert!(cut <= 1, "{cut} lines are not of the text");
        counts.insert(needles);
    }
    assert!(counts.len() > 4, "the number of codes varies: {counts:?}");
}

#[test]
fn depths_cover_the_prompt() {
    let (haystack, tokenizer) = (haystack(), &bundled().tokenizer);
    let depths = (0..24).map(|prompt| match haystack.needle(tokenizer, 0, 1024, prompt).unwrap().answer {
        Answer::Code { depth, .. } => depth,
        Answer::Text(_) => panic!("a code is asked for"),
    });
    let depths: Vec<f64> = depths.collect();
    assert!(depths.iter().any(|depth| *depth < 0.25), "{depths:?}");
    assert!(depths.iter().any(|depth| *depth > 0.7), "{depths:?}");
}

#[test]
fn a_prompt_and_its_answer_fill_the_context_within_a_few_tokens() {
    let (haystack, tokenizer) = (haystack(), &bundled().tokenizer);
    for context in [LEAST_CONTEXT, 1024, 4096, 32768] {
        for prompt in 0..if context > 4096 { 2 } else { 8 } {
            let tokens = haystack.needle(tokenizer, 1, context, prompt).unwrap().prompt.len();
            assert!((context - 8 - 4..=context - 8).contains(&tokens), "{context}, {prompt}: {tokens}");
        }
    }
    let short = haystack.needle(tokenizer, 1, LEAST_CONTEXT - 1, 0).unwrap_err();
    assert!(matches!(short, Error::Eval(EvalError::ContextTooShort { least: LEAST_CONTEXT, .. })), "{short}");
}

/// The digest is part of what a published figure means: the same prompts on every machine, for good.
#[test]
fn prompts_follow_from_the_seed_alone() {
    let (haystack, tokenizer) = (haystack(), &bundled().tokenizer);
    let needle = |seed, prompt| haystack.needle(tokenizer, seed, 1024, prompt).unwrap();
    assert_eq!(needle(3, 1), needle(3, 1));
    assert_ne!(needle(3, 1).prompt, needle(3, 2).prompt);
    assert_ne!(needle(3, 1).prompt, needle(4, 1).prompt);
    let window = |seed| haystack.window(tokenizer, seed, 1024, 4, 0).unwrap();
    assert_eq!(window(3), window(3));
    assert_ne!(window(3), window(4));

    let mut digest = fingerprint::Fingerprint::new();
    for prompt in 0..4 {
        for id in needle(0, prompt).prompt.into_iter().chain(window(prompt as u64).prompt) {
            digest = digest.add(&id.to_le_bytes());
        }
    }
    assert_eq!(digest.hex(), "c3a737e330047b2e");
}

#[test]
fn a_window_is_text_as_it_stands() {
    let (haystack, tokenizer) = (haystack(), &bundled().tokenizer);
    let text = std::fs::read_to_string(bundled().dir.join("haystack.txt")).unwrap();
    for prompt in 0..6 {
        let Question { prompt: ids, answer } = haystack.window(tokenizer, 5, 1024, 16, prompt).unwrap();
        let Answer::Text(after) = answer else { panic!("text is to follow") };
        assert_eq!((ids.len(), after.len()), (1024 - 16, 17));
        assert_eq!(ids[0], 0, "<|bos|>");
        let all = tokenizer.decode(&[&ids[1..], &after[..]].concat()).unwrap();
        let twice = format!("{}\n{text}", text.trim_end());
        assert!(twice.contains(&all), "{all:?}");
    }
}

/// What a cell takes over is what generation has: the same logits and the same movements at every step.
#[test]
fn a_stored_prompt_is_the_plain_path_bit_for_bit() {
    let Bundled { model, tokenizer, .. } = bundled();
    for dtype in [KvDtype::Bf16, KvDtype::F32] {
        let pages = PageOptions { dtype, ..PageOptions::default() };
        let evaluation = evaluation(EvalOptions { pages, ..small() }).unwrap();
        let Question { prompt, .. } = evaluation.question(tokenizer, Task::Needle, 1024, 0).unwrap();
        let stored = StoredPrompt::new(model, &evaluation.dense, &prompt, |_, _| ControlFlow::Continue(()));
        let stored = stored.unwrap();
        for cell in evaluation.cells().iter().filter(|cell| cell.task == Task::Needle) {
            let backend = CpuBackend::new(cell.kv.clone(), MemoryLimits::default());
            let plain = CpuRunner::new(model, Pipeline::new(backend).with_buffering(0.5));
            let expected = steps(plain, &prompt);
            for stored in [None, Some(&stored)] {
                let runner = CellRunner::new(model, cell.kv.clone(), 0.5, true, stored);
                assert!(steps(runner, &prompt) == expected, "{} {dtype:?} {}", cell.method, stored.is_some());
            }
        }
    }
}

/// The logits of a prompt and of some steps after it, and what had happened to pages by then.
fn steps(mut runner: impl Runner, prompt: &[u32]) -> Vec<(Vec<f32>, Counters)> {
    let request = runner.admit(1024).unwrap();
    let logits = runner.prefill(request, prompt, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let mut steps = vec![(logits, runner.counters().unwrap())];
    for token in [223, 22, 18, 25, 19] {
        let logits = runner.decode(&[DecodeToken { request, token }]).unwrap();
        steps.push((logits, runner.counters().unwrap()));
    }
    assert!(steps[5].1.hits > 0);
    steps
}

/// On a GPU all prompts of a cell use one memory: each result is that prompt's alone.
#[test]
fn prompts_on_one_memory_are_counted_one_by_one() {
    let Bundled { model, tokenizer, .. } = bundled();
    let evaluation = evaluation(small()).unwrap();
    let cell = evaluation.cells().iter().find(|cell| cell.method.name() == "shadowkv").unwrap();
    let questions = [0, 1].map(|prompt| evaluation.question(tokenizer, cell.task, 1024, prompt).unwrap());
    let new = || CellRunner::new(model, cell.kv.clone(), 0.5, true, None);
    let measured = |runner: &mut CellRunner<'_>, question| {
        let (mut measured, _) = measure(runner, tokenizer, question, 1024, None).unwrap();
        assert_eq!(runner.usage().host.pages, 0, "nothing stays admitted");
        measured.seconds = Seconds::default();
        measured.recall.as_mut().unwrap().time = Default::default();
        measured
    };
    let apart = questions.each_ref().map(|question| measured(&mut new(), question));
    let mut runner = new();
    let together = questions.each_ref().map(|question| measured(&mut runner, question));
    assert_eq!(together, apart);
    assert!(apart.iter().all(|one| one.misses > 0 && one.warm_pages > 0));
}

#[test]
fn dense_reads_all_attention_and_a_budget_part_of_it() {
    let methods = methods(&["dense", "shadowkv:outliers=0"]);
    let evaluation = evaluation(EvalOptions { methods, ..small() }).unwrap();
    let mut journal = Journal::in_memory();
    run_all(&evaluation, &mut journal, 1);
    let report = Report::new(&evaluation, String::new(), "cpu", &journal);
    assert_eq!(report.cells.len(), 4);
    for cell in &report.cells {
        let recall = cell.recall.unwrap();
        assert_eq!(cell.prompts, 2);
        if cell.method == "dense" {
            assert!((recall - 1.0).abs() < 1e-9, "{recall}");
            assert!(cell.read_tokens.unwrap() > 980.0, "{cell:?}");
            assert_eq!((cell.budget.as_deref(), cell.hit_ratio, cell.misses), (None, Some(1.0), 0));
        } else {
            assert!((0.5..0.999).contains(&recall), "{recall}");
            // The budget, sinks rounded to 8, and 64 to 71 of the newest.
            assert!((200.0..=208.0).contains(&cell.read_tokens.unwrap()), "{cell:?}");
            assert_eq!(cell.budget.as_deref(), Some("128 tokens"));
            let fetched = cell.misses as f64 * 4096.0 / cell.steps as f64;
            assert!(cell.misses > 0 && cell.fetched_bytes_per_token == fetched, "{cell:?}");
        }
        match cell.task {
            Task::Needle => {
                assert_eq!((cell.steps, cell.nats), (14, None), "seven steps each");
                if cell.method == "dense" {
                    assert_eq!((cell.right, cell.exact_match), (Some(2), Some(1.0)));
                }
            }
            Task::Perplexity => {
                assert_eq!((cell.steps, cell.right), (8, None));
                let (over, divergence) = (cell.nats_over_dense.unwrap(), cell.divergence.unwrap());
                if cell.method == "dense" {
                    assert_eq!((over, divergence), (0.0, 0.0));
                    assert!((0.01..4.0).contains(&cell.nats.unwrap()), "{cell:?}");
                } else {
                    assert!(over != 0.0 && divergence > 0.0, "{cell:?}");
                }
            }
        }
    }
}

/// The test can fail: what only reads both ends does not find what is between.
#[test]
fn the_ends_alone_miss_the_code() {
    let options = EvalOptions {
        tasks: vec![Task::Needle],
        methods: methods(&["streaming-llm"]),
        contexts: vec![2048],
        prompts: 3,
        ..small()
    };
    let evaluation = evaluation(options).unwrap();
    let mut journal = Journal::in_memory();
    run_all(&evaluation, &mut journal, 2);
    let cell = &Report::new(&evaluation, String::new(), "cpu", &journal).cells[0];
    assert!(cell.right.unwrap() <= 1, "{cell:?}");
    assert_eq!(cell.wrong.as_ref().unwrap().len() + cell.right.unwrap(), 3);
    assert_eq!(cell.hit_ratio, None);
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_report() {
    let Bundled { model, tokenizer, .. } = bundled();
    let evaluation = evaluation(small()).unwrap();
    let mut whole = Journal::in_memory();
    run_all(&evaluation, &mut whole, 2);
    let expected = timeless(&evaluation, &whole);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("eval.jsonl");
    for stop in [1, 3] {
        let mut journal = Journal::open(&path).unwrap();
        let stopped = run(&evaluation, model, tokenizer, &mut journal, (1, 1 << 30), |progress| {
            if progress.results >= stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
        let mut text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), stop);
        // Killed in the middle of the next line.
        text.push_str("{\"key\":{\"format\":1,\"ver");
        std::fs::write(&path, text).unwrap();
    }
    let mut journal = Journal::open(&path).unwrap();
    let mut first = None;
    run(&evaluation, model, tokenizer, &mut journal, (1, 1 << 30), |progress| {
        first.get_or_insert(progress.results);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(first, Some(3), "what is there is not measured again");
    assert_eq!(timeless(&evaluation, &journal), expected);
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 8);

    // Read back from the file, and nothing is left to do.
    let mut journal = Journal::open(&path).unwrap();
    run(&evaluation, model, tokenizer, &mut journal, (1, 1 << 30), |progress| {
        assert_eq!((progress.results, progress.total), (8, 0));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(timeless(&evaluation, &journal), expected);
}

#[test]
fn results_of_other_settings_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("eval.jsonl");
    let one = || EvalOptions {
        tasks: vec![Task::Needle],
        methods: methods(&["streaming-llm"]),
        contexts: vec![LEAST_CONTEXT],
        prompts: 1,
        ..small()
    };
    run_all(&evaluation(one()).unwrap(), &mut Journal::open(&path).unwrap(), 1);
    let journal = Journal::open(&path).unwrap();
    let base = evaluation(one()).unwrap();
    let known =
        |evaluation: &Evaluation| journal.get(&evaluation.key(&evaluation.cells[0], 0, "cpu")).is_some();
    assert!(known(&base));
    assert!(
        known(&evaluation(EvalOptions { prompts: 5, ..one() }).unwrap()),
        "more prompts change no prompt"
    );
    for changed in [
        EvalOptions { seed: 1, ..one() },
        EvalOptions { pages: PageOptions { tokens: 4, ..one().pages }, ..one() },
        EvalOptions { buffering: 1.0, ..one() },
        EvalOptions { pages: PageOptions { dtype: KvDtype::F32, ..one().pages }, ..one() },
        EvalOptions { pages: PageOptions { host: "fp8".parse().unwrap(), ..one().pages }, ..one() },
        EvalOptions { recall: false, ..one() },
        EvalOptions { contexts: vec![LEAST_CONTEXT + 1], ..one() },
        EvalOptions { methods: methods(&["dense"]), ..one() },
        EvalOptions { steady: spinkv::pipeline::SteadyZone { sinks: 4, window: 65 }, ..one() },
    ] {
        let evaluation = evaluation(changed).unwrap();
        assert!(!known(&evaluation), "{:?}", evaluation.options());
    }
    assert!(journal.get(&base.key(&base.cells[0], 0, "cuda")).is_none());
}

/// One weight of other gates is enough; methods without gates do not mind.
#[test]
fn results_of_other_gates_are_left_alone() {
    let Bundled { dir, model, .. } = bundled();
    let gates = crate::gates::open(dir.join(crate::gates::FILE), model.config()).unwrap();
    let with = |gates: &Gates| {
        evaluation(EvalOptions {
            tasks: vec![Task::Needle],
            methods: methods(&["seer-attention", "quest"]),
            contexts: vec![LEAST_CONTEXT],
            pages: PageOptions { tokens: 16, ..PageOptions::default() },
            gates: Some(Arc::new(gates.clone())),
            ..small()
        })
        .unwrap()
    };
    let keys = |evaluation: &Evaluation| -> Vec<Key> {
        evaluation.cells.iter().map(|cell| evaluation.key(cell, 0, "cpu")).collect()
    };
    let base = keys(&with(&gates));
    assert_eq!(keys(&with(&gates)), base);
    assert_eq!(base.iter().map(|key| key.gates.is_some()).collect::<Vec<_>>(), [true, false]);

    let changed = |change: &dyn Fn(&mut LayerGate)| {
        let mut layers = gates.layers().to_vec();
        change(layers.last_mut().unwrap());
        let (model, gate) = (gates.model_rotary().clone(), gates.gate_rotary().clone());
        Gates::new(*gates.shape(), gates.rank(), model, gate, layers).unwrap()
    };
    let frequencies = gates.gate_rotary().frequencies().to_vec();
    let slower = Rotary::new(frequencies, 0.5 * gates.gate_rotary().magnitude());
    let (shape, model) = (*gates.shape(), gates.model_rotary().clone());
    for other in [
        changed(&|layer| *layer.query.last_mut().unwrap() += 1.0),
        changed(&|layer| *layer.key.last_mut().unwrap() += 1.0),
        Gates::new(shape, gates.rank(), model, slower, gates.layers().to_vec()).unwrap(),
    ] {
        let found = keys(&with(&other));
        assert_ne!(found[0], base[0]);
        assert_eq!(found[1], base[1]);
    }
}

/// Lines that were written before keys knew of gates: still those of methods without gates, and of no others.
#[test]
fn a_line_without_gates_is_one_of_a_method_without() {
    let evaluation = evaluation(small()).unwrap();
    let key = evaluation.key(&evaluation.cells[0], 0, "cpu");
    let mut line = serde_json::to_value(&key).unwrap();
    line.as_object_mut().unwrap().remove("gates").expect("keys have it");
    let read: Key = serde_json::from_value(line).unwrap();
    assert_eq!(read, key);
    assert_ne!(read, Key { gates: Some(String::new()), ..key });
}

#[test]
fn a_file_of_something_else_is_refused_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    for (text, line) in [("notes\n", 1), ("no end of line", 1), ("\n{\"key\": 3}\n", 2)] {
        let path = dir.path().join("notes.txt");
        std::fs::write(&path, text).unwrap();
        let error = Journal::open(&path).unwrap_err();
        assert!(
            matches!(&error, Error::Eval(EvalError::Journal { line: found, .. }) if *found == line),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

/// A prompt that is too large to keep passes through the model for every method, with the same results.
#[test]
fn without_room_for_stored_prompts_results_are_the_same() {
    let Bundled { model, tokenizer, .. } = bundled();
    let evaluation = evaluation(small()).unwrap();
    let reports = [0, 1 << 30].map(|keep| {
        let mut journal = Journal::in_memory();
        run(&evaluation, model, tokenizer, &mut journal, (1, keep), |_| ControlFlow::Continue(())).unwrap();
        timeless(&evaluation, &journal)
    });
    assert_eq!(reports[0], reports[1]);
}

#[test]
fn what_cannot_run_is_refused_before_any_work() {
    let refused = |options| evaluation(options).unwrap_err().to_string();
    for (options, parts) in [
        (EvalOptions { methods: vec![], ..small() }, ["no method", "at least 1"]),
        (EvalOptions { budgets: vec![], ..small() }, ["no budget", "at least 1"]),
        (EvalOptions { contexts: vec![], ..small() }, ["no context", "at least 1"]),
        (EvalOptions { prompts: 0, ..small() }, ["no prompt", "at least 1"]),
        (EvalOptions { contexts: vec![1024, 65536], ..small() }, ["65536", "takes 32768"]),
        (EvalOptions { contexts: vec![100], ..small() }, ["100", "at least 512"]),
        (EvalOptions { scored_tokens: 1024, ..small() }, ["1024", "at least 1025"]),
        (EvalOptions { methods: methods(&["shadow-kv"]), ..small() }, ["shadow-kv", "\"shadowkv\""]),
        (EvalOptions { methods: methods(&["dense:chunk=8"]), ..small() }, ["\"dense\"", "\"chunk\""]),
        (EvalOptions { budgets: vec![Budget::Tokens(60)], ..small() }, ["60", "steady zone"]),
        (
            EvalOptions { pages: PageOptions { tokens: 16, ..small().pages }, ..small() },
            ["page size 16", "shadowkv"],
        ),
        (EvalOptions { buffering: -1.0, ..small() }, ["buffering of -1", "at least 0"]),
    ] {
        let error = refused(options);
        parts.iter().for_each(|part| assert!(error.contains(part), "{part:?} is missing in {error:?}"));
    }
    assert!(matches!("dense:chunk".parse::<MethodChoice>(), Err(Error::Kv(_))));

    let Bundled { dir, model, tokenizer } = bundled();
    let empty = tempfile::tempdir().unwrap();
    let missing =
        |folder: &Path| Evaluation::new(dir, model.config(), tokenizer, folder, small()).unwrap_err();
    let error = missing(empty.path());
    assert!(matches!(error, Error::Eval(EvalError::MissingHaystack { .. })), "{error}");
    std::fs::write(empty.path().join("haystack.txt"), "some text\n".repeat(1000)).unwrap();
    std::fs::write(empty.path().join("nouns.txt"), "river\nriver\n").unwrap();
    let error = missing(empty.path());
    assert!(matches!(error, Error::Eval(EvalError::HaystackTooSmall { found: 1, least: 32, .. })), "{error}");
}

#[test]
fn lists_lose_what_they_repeat_and_methods_without_budget_run_once() {
    let evaluation = evaluation(EvalOptions {
        tasks: vec![Task::Needle, Task::Needle],
        methods: methods(&["shadowkv", " dense ", "dense", "streaming-llm"]),
        budgets: vec![Budget::Tokens(512), Budget::Tokens(256), Budget::Tokens(512)],
        contexts: vec![2048, 1024, 2048],
        ..small()
    })
    .unwrap();
    let cells = evaluation.cells().iter().map(|cell| (cell.context, cell.method.label(), cell.budget));
    let (some, of) = (|tokens| Some(Budget::Tokens(tokens)), |context: usize| context);
    let each = |context| {
        [
            (of(context), "shadowkv", some(512)),
            (of(context), "shadowkv", some(256)),
            (of(context), "dense", None),
            (of(context), "streaming-llm", None),
        ]
    };
    assert_eq!(cells.collect::<Vec<_>>(), [each(1024), each(2048)].concat());
}

#[test]
fn tables_and_plot_have_every_method_and_context() {
    let evaluation = evaluation(EvalOptions { contexts: vec![1024, 1536], prompts: 1, ..small() }).unwrap();
    let mut journal = Journal::in_memory();
    run_all(&evaluation, &mut journal, 2);
    let report = Report::new(&evaluation, "needle-tiny".to_owned(), "cpu", &journal);
    let text = report.to_string();
    for part in ["| method   | budget | 1024 | 1536 |", "| dense    |      - | 1.00 | 1.00 |", "n = 1 a cell"]
    {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
    assert_eq!(text.matches("| shadowkv |    128 |").count(), 12, "{text}");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plot.svg");
    plot::plot(&path, &report).unwrap();
    let svg = std::fs::read_to_string(&path).unwrap();
    for part in ["shadowkv", "dense", "needle, 1024 tokens", "perplexity, 1536 tokens", "KiB fetched a token"]
    {
        assert!(svg.contains(part), "{part:?} is missing");
    }
    assert!(plot::plot(Path::new("/nowhere/plot.svg"), &report).is_err());
}

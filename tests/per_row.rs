//! Layers that stay dense and heads that read the steady zone alone, beside rows that select: each row does what it would in a
//! pipeline where all rows do.

use std::sync::Arc;

use spinkv::algorithms::{Dense, HeadRule, PerRow, RowRules, StreamingLlm};
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout};
use spinkv::pipeline::{Method, Reach};
use spinkv::{Error, KvConfig};
use spinkv_tests::small::{SPARSE, STEADY, assert_all_returned, sequence, shape};
use spinkv_tests::{Layers, Setup, close};

/// Layer 0 is dense, KV head 1 of layer 1 reads the ends alone, KV head 0 of layer 1 selects.
fn rules() -> RowRules {
    RowRules { dense_layers: 1, steady_heads: vec![HeadRule { layer: None, kv_head: 1 }] }
}

fn ruled(method: impl Method + 'static) -> PerRow {
    PerRow::new(Arc::new(method), rules())
}

fn generate(setup: &Setup, prompt: usize) -> Vec<Layers> {
    let mut run = setup.start();
    let id = run.start(&sequence(300, 5), prompt);
    let mut outputs = Vec::new();
    for _ in prompt..300 {
        outputs.extend(run.generate(id, 1));
        run.audit(id);
    }
    let plan = run.pipeline.admitted(id).unwrap();
    let pages = (plan.gpu_pages() * run.pipeline.config().layout().page_bytes()) as u64;
    assert_eq!(run.pipeline.usage().gpu.pages(), pages);
    run.pipeline.release(id);
    assert_all_returned(&run);
    outputs
}

#[test]
fn each_row_does_what_it_would_where_all_rows_do() {
    for page_tokens in [4, 8] {
        for prompt in [0, 25, 130] {
            let setup =
                |method: Arc<dyn Method>| Setup { method, ..Setup::new(shape(), page_tokens, SPARSE) };
            let mixed = generate(&setup(Arc::new(ruled(SPARSE))), prompt);
            let selected = generate(&setup(Arc::new(SPARSE)), prompt);
            let everything = generate(&setup(Arc::new(Dense { steady: STEADY })), prompt);
            let steady = generate(&setup(Arc::new(StreamingLlm { steady: STEADY })), prompt);
            let half = shape().query_heads / 2 * shape().head_dim;
            for (step, mixed) in mixed.iter().enumerate() {
                // Tokens leave the others' steady zones page by page, not chunk by chunk, so what they read is the same only at whole
                // chunks; what everything is never changes.
                let all: Vec<f64> = everything[step][0].iter().map(|element| f64::from(*element)).collect();
                close(&mixed[0], &all, 1e-5).unwrap();
                assert_eq!(mixed[1][..half], selected[step][1][..half], "step {step}");
                if page_tokens == 8 {
                    assert_eq!(mixed[1][half..], steady[step][1][half..], "step {step}");
                }
            }
        }
    }
}

/// Dense rows have slots for all that can be selected, the others' buffering is shared out as ever.
#[test]
fn pages_are_planned_by_row() {
    let setup = Setup { method: Arc::new(ruled(SPARSE)), ..Setup::new(shape(), 8, SPARSE) };
    let run = setup.start();
    let plan = run.pipeline.plan(300).unwrap();
    let selectable = run.pipeline.config().retrievable_pages(300).len();
    let slots = [Reach::Selected, Reach::Everything, Reach::Steady].map(|reach| plan.slots(reach));
    assert_eq!(slots, [3 + 15, selectable, 0]);
    assert_eq!(plan.gpu_pages(), 4 * plan.row.steady_pages + 2 * selectable + 3 + 15);
    assert_eq!(plan.least_gpu_pages(), plan.gpu_pages() - 15);

    // With room for all but 5 of the buffering pages, and for one request alone.
    let limits = MemoryLimits { gpu_pages: Some(plan.gpu_pages() - 5), ..MemoryLimits::default() };
    let mut run = Setup { limits, ..setup }.start();
    let id = run.start(&sequence(300, 1), 200);
    assert_eq!(run.pipeline.admitted(id).unwrap().row.buffering_pages, 10);
    let refused = run.pipeline.admit(300).unwrap_err();
    assert!(
        matches!(refused, Error::OutOfGpuPages { needed, free, .. } if needed == plan.least_gpu_pages() && free == 10),
        "{refused}"
    );
    run.generate(id, 100);
}

#[test]
fn rows_that_the_model_does_not_have_are_refused() {
    let layout = PageLayout::new(8, 16, KvDtype::F32).unwrap();
    let new = |rules| KvConfig::new(shape(), layout, Arc::new(PerRow::new(Arc::new(SPARSE), rules)));
    assert!(new(rules()).is_ok());
    for (rules, part) in [
        (RowRules { dense_layers: 3, ..RowRules::default() }, "3 dense layers, the model has 2"),
        (RowRules { steady_heads: vec!["*:2".parse().unwrap()], ..RowRules::default() }, "head *:2"),
        (RowRules { steady_heads: vec!["2:0".parse().unwrap()], ..RowRules::default() }, "head 2:0"),
    ] {
        let error = new(rules).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidMethod { method, reason } if method == "shadowkv" && reason.contains(part)),
            "{error}"
        );
    }
}

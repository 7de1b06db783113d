//! What does not fit is refused by name and costs nobody anything.

use spinkv::Error;
use spinkv::memory::{KvDtype, MemoryLimits, PageLayout, SLAB_PAGES};
use spinkv::pipeline::{MAX_TOKENS, RequestId};
use spinkv_tests::small::{SPARSE, alone, assert_all_returned, sequence, setups, shape};
use spinkv_tests::{Run, Setup};

#[test]
fn admission_beyond_the_gpu_pages_is_refused_and_costs_nobody_anything() {
    let setup = Setup::new(shape(), 8, SPARSE);
    let wanted = setup.start().pipeline.plan(200).unwrap();
    let least = wanted.least_gpu_pages();
    assert!(least < wanted.gpu_pages());
    // One page less than three requests need at the least: two of them share what is left over.
    let total = 3 * least - 1;
    let limits = MemoryLimits { gpu_pages: Some(total), ..MemoryLimits::default() };
    let mut run = Setup { limits, ..setup.clone() }.start();
    let sequences = [sequence(200, 1), sequence(200, 2), sequence(200, 3)];
    let expected = sequences.each_ref().map(|sequence| alone(&setup, sequence, 150).1);
    let first = run.start(&sequences[0], 150);
    let second = run.start(&sequences[1], 150);
    let shares =
        |run: &Run, ids: [RequestId; 2]| ids.map(|id| run.pipeline.admitted(id).unwrap().row.buffering_pages);
    let left = (total - 2 * least) / wanted.rows;
    assert_eq!(shares(&run, [first, second]), [left.div_ceil(2), left / 2]);

    let before = run.pipeline.usage();
    let error = run.admit(&sequences[2]).unwrap_err();
    let expected_error = Error::OutOfGpuPages {
        max_tokens: 200,
        needed: least,
        rows: 4,
        // 8 tokens of sinks; a tail of 12 to 19.
        steady: 1 + 3,
        mandatory: 4 * 3,
        free: least - 1,
        total,
    };
    assert_eq!(error, expected_error);
    assert_eq!(run.pipeline.usage(), before);
    assert_eq!(shares(&run, [first, second]), [left.div_ceil(2), left / 2]);
    let expected = |index: usize, step: usize| expected[index][step].clone();
    for step in 0..25 {
        let outputs = run.step(&[second, first]).unwrap();
        assert_eq!(outputs, [expected(1, step), expected(0, step)], "step {step}");
    }
    run.pipeline.release(first);
    let third = run.start(&sequences[2], 150);
    assert_eq!(shares(&run, [second, third]), [left.div_ceil(2), left / 2]);
    for step in 25..50 {
        let outputs = run.step(&[second, third]).unwrap();
        assert_eq!(outputs, [expected(1, step), expected(2, step - 25)], "step {step}");
    }
    run.pipeline.release(second);
    run.pipeline.release(third);
    assert_all_returned(&run);
}

#[test]
fn admission_beyond_the_host_memory_is_refused_and_costs_nobody_anything() {
    let setup = Setup::new(shape(), 1, SPARSE);
    // 200 pages of one token for each of 4 rows.
    let layout = PageLayout::new(1, 16, KvDtype::F32).unwrap();
    let slab = (SLAB_PAGES * layout.page_bytes()) as u64;
    let slabs = 4 * 200u64.div_ceil(SLAB_PAGES as u64);
    let limit = 2 * slabs * slab + slab / 2;
    let limits = MemoryLimits { host_bytes: Some(limit), ..MemoryLimits::default() };
    let mut run = Setup { limits, ..setup.clone() }.start();
    let sequences = [sequence(200, 1), sequence(200, 2), sequence(200, 3)];
    let expected = sequences.each_ref().map(|sequence| alone(&setup, sequence, 100).1);
    let first = run.start(&sequences[0], 100);
    let second = run.start(&sequences[1], 100);
    let before = run.pipeline.usage();
    match run.admit(&sequences[2]).unwrap_err() {
        Error::OutOfHostMemory { needed, free, limit: reported, .. } => {
            assert_eq!((needed, free, reported), (slabs * slab, slab / 2, limit));
        }
        other => panic!("{other}"),
    }
    assert_eq!(run.pipeline.usage(), before);
    for (step, (of_first, of_second)) in expected[0].iter().zip(&expected[1]).enumerate() {
        let outputs = run.step(&[first, second]).unwrap();
        assert_eq!([&outputs[0], &outputs[1]], [of_first, of_second], "step {step}");
    }
    assert_eq!(run.pipeline.usage().host.pages, 2 * slabs * slab);
    run.pipeline.release(second);
    let third = run.start(&sequences[2], 100);
    assert_eq!(run.generate(third, 100), expected[2]);
    run.pipeline.release(first);
    run.pipeline.release(third);
    assert_all_returned(&run);
}

#[test]
fn a_request_fits_exactly_under_the_limits_of_its_plan() {
    for setup in setups() {
        let sequence = sequence(150, 1);
        let start = setup.start();
        let (plan, layout) = (start.pipeline.plan(150).unwrap(), start.pipeline.config().layout());
        let limits = plan.limits(start.pipeline.config());
        let mut run = Setup { limits, ..setup.clone() }.start();
        let id = run.admit(&sequence).unwrap();
        assert_eq!(run.pipeline.admitted(id).unwrap(), &plan);
        assert_eq!(run.prompt(id, 100, 100).unwrap(), alone(&setup, &sequence, 100).0);
        assert_eq!(run.generate(id, 50), alone(&setup, &sequence, 100).1);
        assert_eq!(run.pipeline.usage().gpu.pages(), (plan.gpu_pages() * layout.page_bytes()) as u64);
        assert!(run.pipeline.usage().host.pages <= limits.host_bytes.unwrap());
        let fewer = MemoryLimits { gpu_pages: Some(plan.rows * plan.row.steady_pages), ..limits };
        if plan.row.mandatory_pages > 0 {
            let error = Setup { limits: fewer, ..setup.clone() }.start().admit(&sequence).unwrap_err();
            assert!(matches!(error, Error::OutOfGpuPages { .. }), "{error}");
        }
        let less = MemoryLimits { host_bytes: limits.host_bytes.map(|bytes| bytes - 1), ..limits };
        let error = Setup { limits: less, ..setup.clone() }.start().admit(&sequence).unwrap_err();
        assert!(matches!(error, Error::OutOfHostMemory { .. }), "{error}");
    }
}

/// Room for one request on the GPU and for two on the host: what a refusal left reserved there would show as
/// another error the next time.
#[test]
fn a_refused_admission_leaves_nothing_reserved_on_the_other_tier() {
    for setup in setups() {
        let start = setup.start();
        let plan = start.pipeline.plan(150).unwrap();
        let two = |bytes| 2 * bytes;
        let host_bytes = plan.limits(start.pipeline.config()).host_bytes.map(two);
        let limits =
            MemoryLimits { gpu_pages: Some(plan.least_gpu_pages()), host_bytes, ..MemoryLimits::default() };
        let mut run = Setup { limits, ..setup.clone() }.start();
        let first = run.pipeline.admit(150).unwrap();
        let empty = run.pipeline.usage();
        for _ in 0..5 {
            let error = run.pipeline.admit(150).unwrap_err();
            assert!(matches!(error, Error::OutOfGpuPages { .. }), "{error}");
            assert_eq!(run.pipeline.usage(), empty);
        }
        run.pipeline.release(first);
        let again = run.pipeline.admit(150).unwrap();
        run.pipeline.release(again);
        assert_all_returned(&run);
    }
}

#[test]
fn a_request_too_long_for_any_machine_is_a_typed_error() {
    for setup in setups() {
        for tokens in [1 << 50, usize::MAX / 2, usize::MAX] {
            let limits =
                MemoryLimits { gpu_pages: Some(1000), gpu_bytes: Some(1 << 30), host_bytes: Some(1 << 30) };
            let mut run = Setup { limits, ..setup.clone() }.start();
            let error = run.pipeline.admit(tokens).unwrap_err();
            assert_eq!(error, Error::ContextTooLong { max_tokens: tokens, limit: MAX_TOKENS });
            assert_all_returned(&run);
        }
    }
}

#[test]
fn buffering_that_is_no_amount_is_refused() {
    for buffering in [-1.0, f64::NAN, f64::NEG_INFINITY] {
        let mut run = Setup { buffering, ..Setup::new(shape(), 8, SPARSE) }.start();
        let error = run.admit(&sequence(80, 1)).unwrap_err();
        assert!(matches!(error, Error::InvalidBuffering { .. }), "{error}");
    }
}

//! Requests come, go and share a machine, and no other request notices.

use spinkv::Error;
use spinkv::memory::MemoryLimits;
use spinkv::pipeline::RequestId;
use spinkv_tests::small::{SPARSE, alone, assert_all_returned, sequence, setups, shape};
use spinkv_tests::{Layers, Run, Setup};

#[test]
fn a_ragged_batch_gives_each_request_what_it_gets_alone() {
    for setup in setups() {
        let requests = [(1, 1), (17, 2), (64, 3), (90, 4), (131, 5)]
            .map(|(prompt, seed)| (sequence(prompt + 40, seed), prompt));
        let mut run = setup.start();
        let mut live: Vec<(RequestId, Vec<Layers>)> = Vec::new();
        let mut batch = Vec::new();
        let mut steps = vec![0; requests.len()];
        for round in 0..60 {
            // One more request every four rounds, and the order changes all the time.
            if round % 4 == 0 && live.len() < requests.len() {
                let (sequence, prompt) = &requests[live.len()];
                let (prompt_out, out) = alone(&setup, sequence, *prompt);
                let id = run.admit(sequence).unwrap();
                assert_eq!(run.prompt(id, *prompt, *prompt).unwrap(), prompt_out);
                live.push((id, out));
            }
            batch.clear();
            batch.extend((0..live.len()).filter(|index| steps[*index] < 40 && (index + round) % 5 != 0));
            batch.reverse();
            let rotate = round % batch.len().max(1);
            batch.rotate_left(rotate);
            let ids: Vec<_> = batch.iter().map(|index| live[*index].0).collect();
            for (index, output) in batch.iter().zip(run.step(&ids).unwrap()) {
                assert_eq!(output, live[*index].1[steps[*index]], "request {index}, step {}", steps[*index]);
                steps[*index] += 1;
            }
        }
        assert!(steps.iter().all(|steps| *steps >= 30), "{steps:?}");
        live.iter().for_each(|(id, _)| run.pipeline.release(*id));
        assert_all_returned(&run);
    }
}

#[test]
fn a_request_cancelled_anywhere_leaves_the_others_as_they_were() {
    for setup in setups() {
        let kept = [sequence(70, 1), sequence(100, 2)];
        let expected = kept.each_ref().map(|sequence| alone(&setup, sequence, 40).1);
        let mut run = setup.start();
        let ids = kept.each_ref().map(|sequence| run.start(sequence, 40));
        let check = |run: &mut Run, steps: std::ops::Range<usize>| {
            for step in steps {
                for (index, output) in run.step(&ids).unwrap().into_iter().enumerate() {
                    assert_eq!(output, expected[index][step], "request {index}, step {step}");
                }
            }
        };

        // Before its first token, within a prompt's layer, between a prompt's layers.
        let other = sequence(120, 3);
        let id = run.admit(&other).unwrap();
        run.pipeline.release(id);
        let id = run.admit(&other).unwrap();
        let all = 0..100;
        let (keys, values) = (other.keys(0, all.clone()), other.values(0, all));
        let mut prefill = run.pipeline.prefill(id, 0, 100, keys, values).unwrap();
        let mut out = vec![0.0; other.queries(0, 0..30).len()];
        prefill.attend(30, other.queries(0, 0..30), &mut out).unwrap();
        run.pipeline.release(id);
        check(&mut run, 0..5);
        let id = run.admit(&other).unwrap();
        run.prompt_layer(id, 0, 100, 100).unwrap();
        check(&mut run, 5..10);
        run.pipeline.release(id);

        // Between steps, and between the layers of a step that it shares.
        let id = run.start(&other, 60);
        run.step(&[id]).unwrap();
        check(&mut run, 10..15);
        run.pipeline.release(id);
        let id = run.start(&other, 60);
        run.step_layer(&[ids[1], id], 0).unwrap();
        run.pipeline.release(id);
        let last = run.step_layer(&[ids[1]], 1).unwrap().remove(0);
        assert_eq!(last, expected[1][15][1]);
        run.step(&[ids[0]]).unwrap();
        check(&mut run, 16..30);

        assert!(matches!(run.step(&[id]), Err(Error::UnknownRequest(unknown)) if unknown == id));
        run.pipeline.release(id); // Twice is ignored.
        ids.iter().for_each(|id| run.pipeline.release(*id));
        assert_all_returned(&run);
    }
}

/// Memory of freed requests is used again by others; what they left in it must not show.
#[test]
fn a_long_traffic_of_requests_never_leaks_and_never_changes_a_result() {
    for setup in setups() {
        let sequences: Vec<_> = (0..6).map(|seed| sequence(30 + 20 * seed as usize, seed)).collect();
        let expected: Vec<_> = sequences.iter().map(|sequence| alone(&setup, sequence, 20)).collect();
        let start = setup.start();
        let most = start.pipeline.plan(130).unwrap();
        let one = most.limits(start.pipeline.config());
        // Room for the two longest: nothing may leak in 24 requests.
        let limits = MemoryLimits {
            gpu_pages: one.gpu_pages.map(|pages| 2 * pages),
            host_bytes: one.host_bytes.map(|bytes| 2 * bytes),
            ..one
        };
        let mut run = Setup { limits, ..setup.clone() }.start();
        let mut previous: Option<RequestId> = None;
        for index in (0..24).map(|turn| turn * 5 % 6) {
            let id = run.admit(&sequences[index]).unwrap();
            assert_eq!(run.prompt(id, 20, 20).unwrap(), expected[index].0);
            let half = expected[index].1.len() / 2;
            assert_eq!(run.generate(id, half), expected[index].1[..half], "request {index}");
            if let Some(previous) = previous.replace(id) {
                run.pipeline.release(previous);
            }
            assert_eq!(run.generate(id, half), expected[index].1[half..2 * half], "request {index}");
        }
        run.pipeline.release(previous.unwrap());
        assert_all_returned(&run);
    }
}

#[test]
fn request_ids_are_never_used_twice() {
    let mut run = Setup::new(shape(), 8, SPARSE).start();
    let mut seen = Vec::new();
    for _ in 0..5 {
        let id = run.pipeline.admit(10).unwrap();
        assert!(!seen.contains(&id));
        seen.push(id);
        run.pipeline.release(id);
    }
    assert_all_returned(&run);
}

/// A request that gives its cache to another goes on as if nothing had been, without computing anything again, and the other has room that there
/// was not.
#[test]
fn a_parked_request_makes_room_and_goes_on_as_before() {
    for setup in setups() {
        let sequences = [sequence(120, 1), sequence(120, 2)];
        let expected = sequences.each_ref().map(|sequence| alone(&setup, sequence, 60).1);
        let plan = setup.start().pipeline.plan(120).unwrap();
        // One of them, and the steady zone of the other.
        let pages = plan.least_gpu_pages() + plan.rows * plan.row.steady_pages;
        let limits = MemoryLimits { gpu_pages: Some(pages), ..MemoryLimits::default() };
        let mut run = Setup { limits, ..setup }.start();
        let first = run.start(&sequences[0], 60);
        assert_eq!(run.generate(first, 10), expected[0][..10]);
        let selects = plan.row.mandatory_pages > 0;
        assert_eq!(run.admit(&sequences[1]).is_err(), selects);
        if !selects {
            continue;
        }
        let host = run.pipeline.usage().host;
        run.pipeline.park(first).unwrap();
        let usage = run.pipeline.usage();
        assert_eq!((usage.gpu.cache_pages, usage.host), (0, host), "the context stays on the host");
        run.pipeline.backend().check_tables();

        let second = run.start(&sequences[1], 60);
        assert_eq!(run.generate(second, 10), expected[1][..10]);
        assert!(matches!(run.pipeline.resume(first), Err(Error::OutOfGpuPages { .. })));
        assert!(matches!(run.step(&[first, second]), Err(Error::RequestParked(parked)) if parked == first));
        run.pipeline.park(second).unwrap();
        run.pipeline.resume(first).unwrap();
        assert_eq!(run.generate(first, 20), expected[0][10..30]);
        run.pipeline.release(first);
        run.pipeline.resume(second).unwrap();
        assert_eq!(run.generate(second, 50), expected[1][10..]);
        run.audit(second);
        // Who is parked can be cancelled.
        run.pipeline.park(second).unwrap();
        run.pipeline.release(second);
        assert_all_returned(&run);
    }
}

#[test]
fn parking_is_refused_where_it_makes_no_sense() {
    let mut run = Setup::new(shape(), 8, SPARSE).start();
    let id = run.start(&sequence(90, 1), 60);
    assert!(matches!(run.pipeline.park(RequestId(9)), Err(Error::UnknownRequest(_))));
    assert!(matches!(run.pipeline.resume(RequestId(9)), Err(Error::UnknownRequest(_))));
    assert!(matches!(run.pipeline.resume(id), Err(Error::RequestNotParked(found)) if found == id));
    run.step_layer(&[id], 0).unwrap();
    assert!(matches!(run.pipeline.park(id), Err(Error::LayerOrder { expected: 1, found: 0, .. })));
    run.step_layer(&[id], 1).unwrap();
    run.pipeline.park(id).unwrap();
    assert!(matches!(run.pipeline.park(id), Err(Error::RequestParked(found)) if found == id));
}

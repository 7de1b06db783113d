//! What holds for all inputs, each against a naive model written here.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use spinkv::algorithms::ShadowKv;
use spinkv::backend::cpu::{bound, key_bounds, mean_key, score_bounds, top_k};
use spinkv::memory::{KvDtype, PageLayout, RequestPlan, SLAB_PAGES};
use spinkv::partition::{PartitionKind, PartitionMap, SelectedPage};
use spinkv::pipeline::{Budget, GroupMerge, SteadyZone, ZoneUnit, Zones};
use spinkv::{Error, KvConfig, KvShape};

/// A steady zone, the pages' tokens and the units, which are multiples of them.
fn zone_parts() -> impl Strategy<Value = (SteadyZone, usize, ZoneUnit)> {
    let pages = 1usize..=4;
    (0usize..40, 1usize..80, 1usize..=16, pages.clone(), pages).prop_map(
        |(sinks, window, page_tokens, of_sinks, of_context)| {
            let unit = ZoneUnit { sinks: of_sinks * page_tokens, context: of_context * page_tokens };
            (SteadyZone { sinks, window }, page_tokens, unit)
        },
    )
}

proptest! {
    #[test]
    fn zones_cover_each_token_once_and_keep_sinks_and_window((steady, _, unit) in zone_parts(), tokens in 0usize..600) {
        let zones = Zones::at(tokens, &steady, unit);
        let range = zones.retrievable.clone();
        prop_assert_eq!(zones.tokens, tokens);
        prop_assert!(range.start <= range.end && range.end <= tokens);
        let border = steady.sinks.next_multiple_of(unit.sinks);
        if !range.is_empty() {
            prop_assert_eq!((range.start, (range.end - border) % unit.context), (border, 0));
        }
        for token in 0..tokens {
            let leaves = |of: usize| border + of / unit.context * unit.context + unit.context + steady.window <= tokens;
            let retrievable = token >= border && leaves(token - border);
            prop_assert_eq!(range.contains(&token), retrievable, "token {}", token);
            prop_assert_eq!(zones.is_steady(token), !retrievable);
            if token < steady.sinks || token + steady.window >= tokens {
                prop_assert!(zones.is_steady(token));
            }
        }
        prop_assert!(!zones.is_steady(tokens), "a token that is not there has no zone");
    }

    #[test]
    fn a_token_never_comes_back_to_the_steady_zone((steady, _, unit) in zone_parts()) {
        let mut last = Zones::at(0, &steady, unit).retrievable;
        for tokens in 1..400 {
            let next = Zones::at(tokens, &steady, unit).retrievable;
            prop_assert!(last.is_empty() || next.start == last.start && next.end >= last.end);
            prop_assert!(next.len() - last.len() == 0 || next.len() - last.len() == unit.context);
            last = next;
        }
    }

    #[test]
    fn the_bound_on_steady_pages_holds_at_all_lengths_and_is_reached((steady, page_tokens, unit) in zone_parts()) {
        let bound = steady.max_pages(unit, page_tokens);
        let most = (0..=steady.sinks + unit.sinks + steady.window + 4 * unit.context).map(|tokens| {
            let zones = Zones::at(tokens, &steady, unit);
            (0..tokens.div_ceil(page_tokens)).filter(|page| zones.is_steady(page * page_tokens)).count()
        });
        prop_assert_eq!(most.max().unwrap(), bound);
    }

    #[test]
    fn chunks_expand_to_all_their_pages(page_tokens in 1usize..=16, pages in 1u32..=8, ids in prop::collection::btree_set(0u32..200, 0..40)) {
        let kind = PartitionKind::Chunk { tokens: pages as usize * page_tokens };
        let map = PartitionMap::new(kind, page_tokens, "m").unwrap();
        let ids: Vec<_> = ids.into_iter().collect();
        let mut found = Vec::new();
        map.expand(&ids, &mut found);
        let mut expected = Vec::new();
        for token in 0..200 * pages as usize * page_tokens {
            let partition = (token / (pages as usize * page_tokens)) as u32;
            if token % page_tokens == 0 && ids.contains(&partition) {
                expected.push(SelectedPage { key: (token / page_tokens) as u32, tokens: page_tokens as u32 });
            }
        }
        prop_assert_eq!(&found, &expected);
        prop_assert_eq!(map.max_pages(ids.len()), found.len());
        prop_assert_eq!(kind.zone_unit(page_tokens), ZoneUnit::even(pages as usize * page_tokens));
    }

    #[test]
    fn tokens_expand_to_each_of_their_pages_once(page_tokens in 1usize..=16, ids in prop::collection::btree_set(0u32..500, 0..100)) {
        let map = PartitionMap::new(PartitionKind::Token, page_tokens, "m").unwrap();
        let ids: Vec<_> = ids.into_iter().collect();
        let mut found = Vec::new();
        map.expand(&ids, &mut found);
        let keys: BTreeSet<u32> = ids.iter().map(|id| id / page_tokens as u32).collect();
        prop_assert!(found.iter().map(|page| page.key).eq(keys));
        prop_assert!(found.iter().all(|page| page.tokens as usize == page_tokens));
        prop_assert!(found.len() <= map.max_pages(ids.len()));
    }

    #[test]
    fn a_chunk_is_whole_pages_or_refused(page_tokens in 1usize..=16, tokens in 0usize..=64) {
        let map = PartitionMap::new(PartitionKind::Chunk { tokens }, page_tokens, "m");
        if tokens > 0 && tokens % page_tokens == 0 {
            prop_assert!(map.is_ok());
        } else {
            let method = "m".to_owned();
            let error = Error::PageSizeDoesNotDivide { method, page_tokens, partition_tokens: tokens };
            prop_assert_eq!(map, Err(error));
        }
    }
}

/// Round to nearest, ties to even, on the bits.
fn bf16_of(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

proptest! {
    #[test]
    fn pages_read_back_what_was_written_rounded_to_their_type(
        (page_tokens, head_dim) in (1usize..=16, (1usize..=6).prop_map(|eights| eights * 8)),
        dtype in prop_oneof![Just(KvDtype::F32), Just(KvDtype::Bf16)],
        writes in prop::collection::vec((any::<prop::sample::Index>(), -1e4f32..1e4), 1..40),
    ) {
        let layout = PageLayout::new(page_tokens, head_dim, dtype).unwrap();
        prop_assert_eq!(layout.page_words() * 16, layout.page_bytes());
        let round = |value: f32| if dtype == KvDtype::F32 { value } else { bf16_of(value) };
        let mut page = vec![0; layout.page_words()];
        let (mut keys, mut values) = (vec![vec![0f32; head_dim]; page_tokens], vec![vec![0f32; head_dim]; page_tokens]);
        for (token, seed) in writes {
            let token = token.index(page_tokens);
            let key: Vec<f32> = (0..head_dim).map(|i| seed + 0.37 * i as f32).collect();
            let value: Vec<f32> = (0..head_dim).map(|i| -1.7 * seed * i as f32).collect();
            layout.write_token(&mut page, token, &key, &value);
            keys[token] = key.into_iter().map(round).collect();
            values[token] = value.into_iter().map(round).collect();
        }
        for token in 0..page_tokens {
            let mut out = vec![f32::NAN; head_dim];
            layout.read_key(&page, token, &mut out);
            prop_assert_eq!(&out, &keys[token]);
            prop_assert!(keys[token].iter().all(|element| dtype.round(*element) == *element));
            let mut out = vec![f32::NAN; (token + 1) * head_dim];
            layout.read_keys(&page, &mut out);
            prop_assert_eq!(&out, &keys[..=token].concat());
            layout.read_values(&page, &mut out);
            prop_assert_eq!(&out, &values[..=token].concat());
        }
    }

    #[test]
    fn a_pages_bytes_are_those_of_its_tokens(page_tokens in 1usize..=16, tokens in 0usize..300) {
        let layout = PageLayout::new(page_tokens, 8, KvDtype::Bf16).unwrap();
        let touched: BTreeSet<_> = (0..tokens).map(|token| token / page_tokens).collect();
        prop_assert_eq!(layout.pages(tokens), touched.len());
        prop_assert_eq!(layout.page_bytes(), page_tokens * (8 * 2 + 8 * 2));
    }

    #[test]
    fn budgets_are_whole_partitions_of_the_context(
        context in 0usize..200_000, partition in 1usize..=64, tokens in 1usize..10_000, thousandths in 1usize..=1000,
    ) {
        prop_assert_eq!(Budget::Tokens(tokens).partitions(context, partition), (tokens / partition).max(1));
        let fraction = Budget::Fraction(thousandths as f64 / 1000.0);
        // In whole numbers, so without rounding.
        let exact = thousandths * context / 1000 / partition;
        prop_assert_eq!(fraction.partitions(context, partition), exact.max(1));
        prop_assert!(fraction.partitions(context + 1, partition) >= fraction.partitions(context, partition));
        prop_assert_eq!(format!("{}%", thousandths as f64 / 10.0).parse::<Budget>().map(|b| b.partitions(context, partition)), Ok(exact.max(1)));
        prop_assert_eq!(tokens.to_string().parse(), Ok(Budget::Tokens(tokens)));
    }

    #[test]
    fn a_budget_that_passes_its_check_is_sound(tokens in 0usize..100, fraction in -0.5f64..1.5, sinks in 0usize..40, window in 1usize..40) {
        let steady = SteadyZone { sinks, window };
        prop_assert_eq!(Budget::Tokens(tokens).check(&steady).is_ok(), tokens >= sinks + window);
        prop_assert_eq!(Budget::Fraction(fraction).check(&steady).is_ok(), fraction > 0.0 && fraction <= 1.0);
    }

    /// Few distinct scores, so that ties are everywhere.
    #[test]
    fn top_k_is_the_head_of_a_full_sort_with_ties_to_the_lower_index(
        scores in prop::collection::vec((0i8..5).prop_map(|score| f32::from(score) / 2.0), 0..80),
        k in 0usize..90,
        already in prop::collection::vec(any::<u32>(), 0..3),
    ) {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).unwrap().then(a.cmp(b)));
        let mut best: Vec<u32> = order.into_iter().take(k).map(|index| index as u32).collect();
        best.sort();
        let mut found = already.clone();
        top_k(&scores, k, &mut found);
        prop_assert_eq!(&found[..already.len()], &already);
        prop_assert_eq!(&found[already.len()..], best);
    }

    /// Also after bounds and queries are rounded alike: what is never below stays so but for the rounding of sums.
    #[test]
    fn a_bound_is_never_below_a_dot_product_with_any_of_the_keys(
        tokens in 1usize..20, head_dim in 1usize..70, seed in any::<u64>(), scale in -3i32..4,
    ) {
        let mut state = seed | 1;
        let mut number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * (scale as f32).exp2()
        };
        let keys: Vec<f32> = (0..tokens * head_dim).map(|_| number()).collect();
        let query: Vec<f32> = (0..head_dim).map(|_| number()).collect();
        let mut bounds = vec![f32::NAN; 2 * head_dim];
        key_bounds(&keys, &mut bounds);
        let found = f64::from(bound(&query, &bounds));
        let size = |key: &[f32]| -> f64 {
            query.iter().zip(key).map(|(q, k)| (f64::from(*q) * f64::from(*k)).abs()).sum()
        };
        let mut corner = 0.0;
        for (channel, q) in query.iter().enumerate() {
            let ends = [bounds[channel], bounds[head_dim + channel]];
            corner += ends.map(|end| f64::from(*q) * f64::from(end)).into_iter().fold(f64::NEG_INFINITY, f64::max);
        }
        let (least, greatest) = bounds.split_at(head_dim);
        let room = 1e-6 * (size(least) + size(greatest)) + 1e-30;
        prop_assert!((found - corner).abs() <= room, "{found} where the corner has {corner}");
        for key in keys.chunks_exact(head_dim) {
            let product: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            prop_assert!(product <= found + room, "{product} above the bound {found}");
        }
        // Several heads: merged as they are.
        let mut scores = [f32::NAN];
        score_bounds(&[query.clone(), query.clone()].concat(), &bounds, head_dim, GroupMerge::Sum, &mut scores);
        prop_assert!((f64::from(scores[0]) - 2.0 * found).abs() <= 2.0 * room);
    }

    #[test]
    fn a_landmark_is_the_mean_of_its_keys(tokens in 1usize..20, head_dim in 1usize..40, seed in 0u32..1000) {
        let keys: Vec<f32> = (0..(tokens * head_dim) as u32).map(|i| ((i * 37 + seed) % 101) as f32 / 7.0).collect();
        let mut summary = vec![f32::NAN; head_dim];
        mean_key(&keys, &mut summary);
        for (element, found) in summary.iter().enumerate() {
            let sum: f64 = (0..tokens).map(|token| f64::from(keys[token * head_dim + element])).sum();
            prop_assert!((f64::from(*found) - sum / tokens as f64).abs() < 1e-5);
        }
    }

}

proptest! {
    #[test]
    fn a_plan_covers_every_length_up_to_its_own(
        (sinks, window) in (0usize..20, 1usize..40),
        page_tokens in prop_oneof![Just(1usize), Just(2), Just(4), Just(8)],
        budget in prop_oneof![(60usize..300).prop_map(Budget::Tokens), (1u32..=100).prop_map(|p| Budget::Fraction(f64::from(p) / 100.0))],
        (max_tokens, outliers) in (1usize..500, 0usize..30),
        buffering in 0.0f64..8.0,
        (free, total) in (0usize..2000, 2000usize..3000),
    ) {
        let shape = KvShape::new(3, 4, 2, 8).unwrap();
        let layout = PageLayout::new(page_tokens, 8, KvDtype::Bf16).unwrap();
        let steady = SteadyZone { sinks, window };
        let method = ShadowKv { budget, steady, outliers };
        let config = KvConfig::new(shape, layout, Arc::new(method)).unwrap();
        let plan = RequestPlan::new(&config, max_tokens, buffering).unwrap();
        let (mut most_selectable, mut most_selected) = (0, 0);
        for tokens in 1..=max_tokens {
            let steady_token = |token: &usize| {
                let chunk = token / 8 * 8;
                chunk < sinks || chunk + 8 + window > tokens
            };
            let steady_pages: BTreeSet<_> = (0..tokens).filter(steady_token).map(|token| token / page_tokens).collect();
            prop_assert!(steady_pages.len() <= plan.row.steady_pages);
            let chunks = (0..tokens / 8).filter(|chunk| !steady_token(&(chunk * 8))).count();
            let wanted = match budget {
                Budget::Tokens(wanted) => wanted / 8,
                Budget::Fraction(fraction) => ((fraction * tokens as f64 + 1e-6) as usize / 8).max(1),
            };
            most_selectable = most_selectable.max(chunks * 8 / page_tokens);
            most_selected = most_selected.max((wanted + outliers).min(chunks) * 8 / page_tokens);
        }
        prop_assert_eq!(plan.row.mandatory_pages, most_selected);
        let wanted = (most_selected as f64 * buffering) as usize;
        prop_assert_eq!(plan.row.buffering_pages, wanted.min(most_selectable - most_selected));
        prop_assert_eq!(plan.row.host_slabs, (max_tokens / page_tokens).div_ceil(SLAB_PAGES));
        prop_assert_eq!(plan.gpu_pages(), 6 * (plan.row.steady_pages + plan.row.slots()));
        prop_assert_eq!(plan.host_slabs(), 6 * plan.row.host_slabs);

        let least = 6 * (plan.row.steady_pages + plan.row.mandatory_pages);
        prop_assert_eq!(plan.least_gpu_pages(), least);
        match plan.check_gpu_pages(free, total) {
            Ok(()) => prop_assert!(least <= free),
            Err(Error::OutOfGpuPages { needed, free: reported, total: of, .. }) => {
                prop_assert!(least > free);
                prop_assert_eq!((needed, reported, of), (least, free, total));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

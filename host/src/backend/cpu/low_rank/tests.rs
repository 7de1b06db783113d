use super::*;

/// Numbers of a fixed sequence, about normal.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        (0..4).map(|_| self.uniform()).sum::<f64>() * 3.0_f64.sqrt() / 2.0
    }

    /// From -1 to 1.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}

/// `[tokens, width]`: a sum of random outer products, the `i`th of weight `weight(i)`, and noise.
fn keys(seed: u64, tokens: usize, width: usize, noise: f64, weights: &[f64]) -> Vec<f32> {
    let mut numbers = Numbers(seed);
    let mut keys: Vec<f64> = (0..tokens * width).map(|_| noise * numbers.next()).collect();
    for weight in weights {
        let direction: Vec<f64> =
            (0..width).map(|_| weight * numbers.next() / (width as f64).sqrt()).collect();
        for key in keys.chunks_exact_mut(width) {
            let coefficient = numbers.next();
            key.iter_mut().zip(&direction).for_each(|(element, of)| *element += coefficient * of);
        }
    }
    keys.into_iter().map(|element| element as f32).collect()
}

/// What is left of the keys, in squares.
fn lost(keys: &[f32], factors: &LowRankFactors, kv_heads: usize, head_dim: usize) -> f64 {
    let mut sum = 0.0;
    let mut rebuilt = vec![0.0; head_dim];
    for (at, key) in keys.chunks_exact(head_dim).enumerate() {
        factors.rebuild(at / kv_heads, at % kv_heads, &mut rebuilt, |_| ());
        sum += key.iter().zip(&rebuilt).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    }
    sum
}

fn squares(keys: &[f32]) -> f64 {
    keys.iter().map(|element| f64::from(*element).powi(2)).sum()
}

#[test]
fn a_basis_is_orthonormal_over_all_heads() {
    let (kv_heads, head_dim, rank) = (3, 32, 40);
    let keys = keys(8, 300, kv_heads * head_dim, 0.1, &[5.0; 30]);
    let factors = LowRankFactors::new(&keys, kv_heads, head_dim, rank).unwrap();
    let element = |vector: usize, at: usize| {
        let (head, of_head) = (at / head_dim, at % head_dim);
        f64::from(factors.basis()[(head * rank + vector) * head_dim + of_head])
    };
    for i in 0..rank {
        for j in 0..=i {
            let dot: f64 = (0..kv_heads * head_dim).map(|at| element(i, at) * element(j, at)).sum();
            assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-6, "{i}, {j}: {dot}");
        }
    }
}

#[test]
fn keys_of_a_lower_rank_are_rebuilt_as_they_were() {
    // Fewer tokens than the rank; more, of 6 dimensions; the same key again and again; one token; zeroes.
    let repeated = keys(11, 1, 32, 1.0, &[]).repeat(20);
    let cases = [
        (keys(9, 5, 32, 1.0, &[]), 5),
        (keys(10, 100, 32, 0.0, &[3.0; 6]), 6),
        (repeated, 1),
        (keys(12, 1, 32, 1.0, &[]), 1),
        (vec![0.0; 32 * 4], 0),
    ];
    for (keys, own) in cases {
        let factors = LowRankFactors::new(&keys, 2, 16, 12).unwrap();
        assert_eq!(factors.tokens(), keys.len() / 32);
        let lost = lost(&keys, &factors, 2, 16);
        assert!(lost <= 1e-10 * squares(&keys), "rank {own}: {lost}");
        // Directions that nobody needs are zero, or say nothing.
        let of_vector = |vector: usize| {
            factors.coefficients().iter().skip(vector).step_by(12).copied().collect::<Vec<_>>()
        };
        let idle = (0..12).filter(|vector| squares(&of_vector(*vector)) <= 1e-10 * squares(&keys)).count();
        assert_eq!(idle, 12 - own, "{factors:?}");
    }
}

#[test]
fn a_full_rank_loses_nothing_and_no_token_is_no_fault() {
    let keys = keys(13, 60, 24, 1.0, &[4.0; 3]);
    let factors = LowRankFactors::new(&keys, 2, 12, 24).unwrap();
    assert!(lost(&keys, &factors, 2, 12) < 1e-9 * squares(&keys));
    let mut none = LowRankFactors::new(&[], 2, 12, 24).unwrap();
    assert_eq!((none.tokens(), none.coefficients().len(), none.rank()), (0, 0, 24));
    none.append(&[]).unwrap();
}

#[test]
fn later_tokens_get_what_the_basis_has_of_them() {
    let all = keys(14, 200, 32, 0.01, &[3.0; 6]);
    let mut factors = LowRankFactors::new(&all[..150 * 32], 2, 16, 6).unwrap();
    factors.append(&all[150 * 32..]).unwrap();
    assert_eq!(factors.tokens(), 200);
    assert!(lost(&all, &factors, 2, 16) < 1e-3 * squares(&all));
    let mut other = factors.clone();
    let refused = LowRankError::NotFinite { token: 1, element: 0 };
    let mut wrong = vec![0.0; 64];
    wrong[32] = f32::NAN;
    assert_eq!(other.append(&wrong), Err(refused));
    assert_eq!(other, factors);
}

#[test]
fn a_key_is_turned_after_it_is_rebuilt() {
    let keys = keys(15, 30, 32, 1.0, &[]);
    let factors = LowRankFactors::new(&keys, 2, 16, 32).unwrap();
    let mut key = [0.0; 16];
    factors.rebuild(7, 1, &mut key, |key| key.reverse());
    let right = &keys[7 * 32 + 16..][..16];
    assert!(key.iter().rev().zip(right).all(|(a, b)| (a - b).abs() < 1e-5), "{key:?} {right:?}");
}

#[test]
fn factors_are_the_same_each_time() {
    let keys = keys(16, 100, 32, 0.1, &[2.0; 9]);
    assert_eq!(LowRankFactors::new(&keys, 2, 16, 8), LowRankFactors::new(&keys, 2, 16, 8));
}

#[test]
fn what_cannot_be_is_refused() {
    for rank in [0, 33] {
        let refused = LowRankFactors::new(&[0.0; 64], 2, 16, rank).unwrap_err();
        assert_eq!(refused, LowRankError::Rank { rank, width: 32 });
    }
    assert_eq!(LowRankFactors::new(&[], 0, 16, 1).unwrap_err(), LowRankError::Rank { rank: 1, width: 0 });
    let refused = LowRankFactors::new(&[0.0; 33], 2, 16, 4).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "33 elements are not whole tokens of 32, the KV heads times the head dimension"
    );
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut keys = vec![1.0; 96];
        keys[70] = wrong;
        let refused = LowRankError::NotFinite { token: 2, element: 6 };
        assert_eq!(LowRankFactors::new(&keys, 2, 16, 4).unwrap_err(), refused);
    }
}

#[test]
fn an_inverse_factor_makes_vectors_orthonormal_and_drops_what_depends() {
    // The third is the sum of the first two, the fourth is 0, the fifth is large.
    let vectors = [[3.0, 0.0, 4.0], [0.0, 2.0, 1.0], [3.0, 2.0, 5.0], [0.0; 3], [1e6, 0.0, 0.0]];
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let products: Vec<f64> = vectors.iter().flat_map(|a| vectors.map(|b| dot(a, &b))).collect();
    let factor = inverse_factor(&products, 5, Pivots::Dropped);
    let made: Vec<[f64; 3]> = factor
        .chunks_exact(5)
        .map(|row| std::array::from_fn(|at| row.iter().zip(&vectors).map(|(f, v)| f * v[at]).sum()))
        .collect();
    for (i, a) in made.iter().enumerate() {
        for (j, b) in made.iter().enumerate() {
            let right = f64::from(u8::from(i == j && i != 2 && i != 3));
            assert!((dot(a, b) - right).abs() < 1e-9, "{i}, {j}: {made:?}");
        }
    }
    // A raised pivot leaves a vector that depends on another short, and takes nothing of it from a third.
    let raised = inverse_factor(&[1.0, 1.0, 0.0, 1.0, 1.0, 1e-3, 0.0, 1e-3, 1.0], 3, Pivots::Raised);
    let root = LEAST_RAISED.sqrt().recip();
    assert!((raised[3] + root).abs() < 1e-9 && (raised[4] - root).abs() < 1e-9, "{raised:?}");
    assert_eq!(raised[6..], [0.0, 0.0, 1.0]);
}

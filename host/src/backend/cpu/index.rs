use multiversion::multiversion;

use super::math::{axpy, dot};
use super::select::top_k;

/// The mean of `keys`, `[tokens, head_dim]`, into `summary`, `[head_dim]`: summed in token order, times 1 / tokens.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn mean_key(keys: &[f32], summary: &mut [f32]) {
    let head_dim = summary.len();
    summary.fill(0.0);
    for key in keys.chunks_exact(head_dim) {
        axpy(1.0, key, summary);
    }
    let scale = 1.0 / (keys.len() / head_dim) as f32;
    summary.iter_mut().for_each(|element| *element *= scale);
}

/// The bounds of `keys`, `[tokens, head_dim]`, into `summary`, `[2, head_dim]`: of each channel the least, then of each the
/// greatest. -0 is less than +0; a channel with a NaN has NaN for both.
pub fn key_bounds(keys: &[f32], summary: &mut [f32]) {
    let (least, greatest) = summary.split_at_mut(summary.len() / 2);
    let head_dim = least.len();
    for (channel, (least, greatest)) in least.iter_mut().zip(greatest).enumerate() {
        let mut elements: Vec<f32> = keys.iter().skip(channel).step_by(head_dim).copied().collect();
        elements.sort_unstable_by(f32::total_cmp);
        let nan = elements.iter().any(|element| element.is_nan());
        // In the total order -0 comes before +0.
        *least = if nan { f32::NAN } else { elements[0] };
        *greatest = if nan { f32::NAN } else { elements[elements.len() - 1] };
    }
}

/// The least cosine between any of `keys`, `[tokens, head_dim]`, and their mean: how badly the mean stands for them. What has
/// squares that add up to less than the least normal number, such as 0, has a cosine of 0 with anything; a NaN, and what overflows, makes
/// it NaN.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn least_cosine(keys: &[f32], head_dim: usize) -> f32 {
    // Of the direction of the mean, which is all that counts.
    let mut sum = vec![0.0; head_dim];
    keys.chunks_exact(head_dim).for_each(|key| axpy(1.0, key, &mut sum));
    let of_sum = dot(&sum, &sum);
    let mut least = f32::INFINITY;
    for key in keys.chunks_exact(head_dim) {
        let of_key = dot(key, key);
        let cosine = if of_key < f32::MIN_POSITIVE || of_sum < f32::MIN_POSITIVE {
            0.0
        } else {
            dot(key, &sum) / (of_key.sqrt() * of_sum.sqrt())
        };
        // Not f32::min, which would hide a NaN.
        least = if cosine < least || cosine.is_nan() { cosine } else { least };
    }
    least
}

/// Of partitions whose [`least_cosine`]s are `cosines` the `count` with the least, a NaN before all numbers, ties to the lower index:
/// appends their indices to `ids`, ascending.
pub fn outliers(cosines: &[f32], count: usize, ids: &mut Vec<u32>) {
    // From 0, so that both zeroes are one.
    let spread = |cosine: &f32| if cosine.is_nan() { f32::from_bits(0x7fff_ffff) } else { 0.0 - cosine };
    top_k(&cosines.iter().map(spread).collect::<Vec<_>>(), count, ids);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two channels, three tokens.
    const KEYS: [f32; 6] = [1.0, -0.0, -4.0, 0.0, 6.0, -0.0];

    #[test]
    fn a_mean_is_of_each_channel() {
        let mut summary = [9.0; 2];
        mean_key(&KEYS, &mut summary);
        assert_eq!(summary, [1.0, 0.0]);
    }

    #[test]
    fn bounds_are_exact_and_tell_the_zeroes_apart() {
        let mut summary = [9.0; 4];
        key_bounds(&KEYS, &mut summary);
        assert_eq!(summary.map(f32::to_bits), [-4.0, -0.0, 6.0, 0.0].map(f32::to_bits));
        key_bounds(&[-0.0, -0.0, -0.0, -0.0], &mut summary);
        assert_eq!(summary.map(f32::to_bits), [-0.0_f32; 4].map(f32::to_bits));
    }

    #[test]
    fn a_nan_is_not_hidden_and_stays_in_its_channel() {
        let mut summary = [9.0; 4];
        for token in 0..3 {
            let mut keys = KEYS;
            keys[2 * token] = f32::NAN;
            key_bounds(&keys, &mut summary);
            assert!(summary[0].is_nan() && summary[2].is_nan());
            assert_eq!([summary[1], summary[3]], [0.0, 0.0]);
        }
        key_bounds(&[f32::INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::INFINITY], &mut summary);
        let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
        assert_eq!(summary, [low, low, high, high]);
    }

    #[test]
    fn a_mean_stands_well_for_keys_of_its_direction() {
        assert_eq!(least_cosine(&[3.0, 4.0, 6.0, 8.0, 0.3, 0.4], 2), 1.0);
        // The mean of these two lies between them.
        approx::assert_relative_eq!(least_cosine(&[1.0, 0.0, 0.0, 1.0], 2), 0.5_f32.sqrt());
        // One against two: the mean is (1, 0) / 3.
        assert_eq!(least_cosine(&[1.0, 0.0, 1.0, 0.0, -1.0, 0.0], 2), -1.0);
        approx::assert_relative_eq!(least_cosine(&[1e-15, 0.0, 0.0, 1e-15], 2), 0.5_f32.sqrt());
    }

    #[test]
    fn zeroes_have_no_direction_and_nans_are_not_hidden() {
        assert_eq!(least_cosine(&[0.0; 6], 2), 0.0);
        assert_eq!(least_cosine(&[1.0, 0.0, -1.0, 0.0], 2), 0.0, "their mean is 0");
        assert_eq!(least_cosine(&[1.0, 0.0, 0.0, 0.0], 2), 0.0, "one is 0");
        for token in 0..3 {
            let mut keys = [1.0; 6];
            keys[2 * token] = f32::NAN;
            assert!(least_cosine(&keys, 2).is_nan());
        }
        assert!(least_cosine(&[f32::MAX; 4], 2).is_nan());
    }

    #[test]
    fn outliers_have_the_least_cosines() {
        let cosines = [0.9, 0.2, -0.0, 0.0, f32::NAN, -0.5, 0.2];
        for (count, expected) in [
            (0, &[][..]),
            (1, &[4]),
            (2, &[4, 5]),
            (3, &[2, 4, 5]),
            (5, &[1, 2, 3, 4, 5]),
            (9, &[0, 1, 2, 3, 4, 5, 6]),
        ] {
            let mut ids = Vec::new();
            outliers(&cosines, count, &mut ids);
            assert_eq!(ids, expected, "{count}");
        }
    }
}

//! Inner loops, written so that the compiler vectorises them, and so that the result does not depend on the
//! vector width: sums run over 16 fixed lanes.

const LANES: usize = 16;

/// The dot product of two equally long slices.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut lanes = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The greatest dot product that `q` can have with what lies between `least` and `greatest`, channel by channel. For each channel
/// `max(q * least, q * greatest)`, which is `q * greatest` where q is not negative, else `q * least`: so a NaN is not hidden.
#[inline(always)]
pub fn upper_bound(q: &[f32], least: &[f32], greatest: &[f32]) -> f32 {
    debug_assert!(q.len() == least.len() && q.len() == greatest.len());
    let corner = |q: f32, low: f32, high: f32| q * if q < 0.0 { low } else { high };
    let mut lanes = [0.0; LANES];
    let whole = q.len() / LANES * LANES;
    for first in (0..whole).step_by(LANES) {
        let (q, low) = (&q[first..first + LANES], &least[first..first + LANES]);
        let high = &greatest[first..first + LANES];
        for lane in 0..LANES {
            lanes[lane] += corner(q[lane], low[lane], high[lane]);
        }
    }
    let rest: f32 = (whole..q.len()).map(|at| corner(q[at], least[at], greatest[at])).sum();
    lanes.iter().sum::<f32>() + rest
}

/// `y += factor * x`.
#[inline(always)]
pub fn axpy(factor: f32, x: &[f32], y: &mut [f32]) {
    debug_assert_eq!(x.len(), y.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// The largest element, or negative infinity of none. A NaN is larger than all.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let chunks = x.chunks_exact(LANES);
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    lanes.into_iter().fold(rest, larger)
}

/// `f32::max` hides NaNs; a reference must not.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// Replaces each element by `exp(element - shift)` and returns their sum.
#[inline(always)]
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - shift);
            lanes[lane] += chunk[lane];
        }
    }
    let mut rest = 0.0;
    for element in chunks.into_remainder() {
        *element = exp(*element - shift);
        rest += *element;
    }
    lanes.iter().sum::<f32>() + rest
}

/// `e^x` to within 2 units in the last place for `x` in -87 to 88, 0 below -87.3, infinity above 88.3, NaN of NaN.
///
/// Range reduction to `|r| <= ln 2 / 2` and the polynomial of Cephes' `expf`. Without branches or library
/// calls, so that it vectorises.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // ln 2 in two parts; the product of the first with any exponent is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits; subtracting it again gives the
    // integer as a float.
    const ROUND: f32 = 12_582_912.0;

    let clamped = if x > -87.3 { x } else { -87.3 };
    let clamped = if clamped < 88.3 { clamped } else { 88.3 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let exponent = shifted - ROUND;
    let r = clamped - exponent * LN_2_HIGH - exponent * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let mantissa = p * r * r + r + 1.0;
    let value = mantissa * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = if x < -87.3 { 0.0 } else { value };
    let value = if x > 88.3 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            let relative = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(relative < 2.5e-7, "exp({x}): off by {relative:e}");
            x += 0.003_7;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(max(&[1.0, f32::NAN, 2.0]).is_nan());
    }

    #[test]
    fn sums_take_lengths_that_are_no_multiple_of_the_lanes() {
        for len in [0, 1, 15, 16, 17, 40] {
            let a: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let expected: f32 = (0..len).map(|i| (i * i) as f32).sum();
            assert_eq!(dot(&a, &a), expected);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut b = a.clone();
            axpy(2.0, &a, &mut b);
            assert!(b.iter().zip(&a).all(|(b, a)| *b == 3.0 * a));
            let mut zeros = vec![0.0; len];
            assert_eq!(exp_sum(&mut zeros, 0.0), len as f32);
        }
    }
}

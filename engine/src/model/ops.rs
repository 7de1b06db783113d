use multiversion::multiversion;
use spinkv::backend::cpu::math::{dot, exp};

/// Divides each row of `x`, `[rows, width]`, by its root mean square and multiplies it by `weight`, `[width]`.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let factor = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }
}

/// [`rms_norm`] in place.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    for x in x.chunks_exact_mut(width) {
        let factor = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * factor * weight;
        }
    }
}

/// `gate = silu(gate) * up`, the gated activation of the MLP.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// Rows of a weight, `[rows, inputs]`, times few tokens, `[tokens, inputs]`: `[rows, tokens]`. Each product is summed in one order,
/// whatever the number of tokens.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn dots(weight: &[f32], x: &[f32], inputs: usize, out: &mut [f32]) {
    let tokens = x.len() / inputs;
    for (row, out) in weight.chunks_exact(inputs).zip(out.chunks_exact_mut(tokens)) {
        for (x, out) in x.chunks_exact(inputs).zip(out) {
            *out = dot(row, x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_is_right_at_the_ends() {
        let mut gate = [-200.0, -1.0, 0.0, 1.0, 200.0];
        silu_mul(&mut gate, &[1.0, 1.0, 1.0, 2.0, 1.0]);
        let expected = [0.0, -0.268_941_43, 0.0, 1.462_117_2, 200.0];
        for (found, expected) in gate.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn rms_norm_gives_rows_of_unit_mean_square() {
        let x: Vec<f32> = (1..=40).map(|i| i as f32).collect();
        let mut out = vec![0.0; 40];
        rms_norm(&x, &[2.0; 20], 0.0, &mut out);
        for row in out.chunks_exact(20) {
            let mean_square = row.iter().map(|x| x * x).sum::<f32>() / 20.0;
            assert!((mean_square - 4.0).abs() < 1e-5);
        }
        let mut in_place = x;
        rms_norm_in_place(&mut in_place, &[2.0; 20], 0.0);
        assert_eq!(in_place, out);
    }
}

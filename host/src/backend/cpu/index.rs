use multiversion::multiversion;

use super::math::axpy;

/// The mean of `keys`, `[tokens, head_dim]`, into `summary`, `[head_dim]`; summed in token order.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn mean_key(keys: &[f32], summary: &mut [f32]) {
    let head_dim = summary.len();
    summary.fill(0.0);
    for key in keys.chunks_exact(head_dim) {
        axpy(1.0, key, summary);
    }
    let tokens = keys.len() / head_dim;
    summary.iter_mut().for_each(|element| *element /= tokens as f32);
}

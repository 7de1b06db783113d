use multiversion::multiversion;

use super::math::{axpy, dot, exp_sum, max};
use crate::memory::{PageLayout, Word};

/// Attention of one group's queries over a list of pages: the exact softmax over all listed tokens, summed in
/// the order of the list.
///
/// `queries` and `out` are `[group, head_dim]`; each page comes with the number of its valid tokens. No token
/// at all gives an output of zeros.
pub fn attend(queries: &[f32], pages: &[(&[Word], usize)], layout: &PageLayout, out: &mut [f32]) {
    attend_with_estimates(queries, pages, &[], layout, out);
}

/// A partition of which nothing is read: it counts as `tokens` tokens that all have its mean key and its mean value.
///
/// Since e^x is convex, tokens together have at least this weight in the softmax: an estimate never makes what is read count for less than it does
/// (RetroInfer, arXiv 2505.02922, section 4.2).
#[derive(Clone, Copy, Debug)]
pub struct Estimate<'a> {
    /// The mean key.
    pub key: &'a [f32],
    /// The mean value.
    pub value: &'a [f32],
    /// Tokens of the partition.
    pub tokens: f32,
}

/// [`attend`] with `estimates` beside the pages, after them.
#[multiversion(targets("x86_64+avx2+fma"))]
pub fn attend_with_estimates(
    queries: &[f32],
    pages: &[(&[Word], usize)],
    estimates: &[Estimate<'_>],
    layout: &PageLayout,
    out: &mut [f32],
) {
    let head_dim = layout.head_dim();
    let group = queries.len() / head_dim;
    let tokens: usize = pages.iter().map(|(_, tokens)| tokens).sum::<usize>() + estimates.len();
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut block = vec![0.0; layout.page_tokens() * head_dim];
    let mut weights = vec![0.0; group * tokens]; // [group, tokens]

    let mut position = 0;
    for (page, valid) in pages {
        let keys = &mut block[..valid * head_dim];
        layout.read_keys(page, keys);
        for (head, query) in queries.chunks_exact(head_dim).enumerate() {
            let row = &mut weights[head * tokens + position..][..*valid];
            for (weight, key) in row.iter_mut().zip(keys.chunks_exact(head_dim)) {
                *weight = dot(query, key) * scale;
            }
        }
        position += valid;
    }

    for estimate in estimates {
        for (head, query) in queries.chunks_exact(head_dim).enumerate() {
            weights[head * tokens + position] = dot(query, estimate.key) * scale + estimate.tokens.ln();
        }
        position += 1;
    }

    let mut sums = vec![0.0; group];
    for (row, sum) in weights.chunks_exact_mut(tokens.max(1)).zip(&mut sums) {
        *sum = exp_sum(row, max(row));
    }

    out.fill(0.0);
    let mut position = 0;
    for (page, valid) in pages {
        let values = &mut block[..valid * head_dim];
        layout.read_values(page, values);
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let row = &weights[head * tokens + position..][..*valid];
            for (weight, value) in row.iter().zip(values.chunks_exact(head_dim)) {
                axpy(*weight, value, out);
            }
        }
        position += valid;
    }
    for estimate in estimates {
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            axpy(weights[head * tokens + position], estimate.value, out);
        }
        position += 1;
    }
    for (out, sum) in out.chunks_exact_mut(head_dim).zip(&sums) {
        let factor = if tokens > 0 { 1.0 / sum } else { 0.0 };
        out.iter_mut().for_each(|element| *element *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::KvDtype;

    #[test]
    fn no_token_gives_zeros_and_a_nan_is_never_hidden() {
        let layout = PageLayout::new(2, 8, KvDtype::F32).unwrap();
        let mut out = [7.0; 8];
        attend(&[1.0; 8], &[], &layout, &mut out);
        assert_eq!(out, [0.0; 8]);

        let mut page = vec![0; layout.page_words()];
        layout.write_token(&mut page, 0, &[1.0; 8], &[1.0; 8]);
        layout.write_token(&mut page, 1, &[f32::NAN; 8], &[1.0; 8]);
        attend(&[1.0; 8], &[(&page, 1)], &layout, &mut out);
        assert_eq!(out, [1.0; 8], "the second token is not valid");
        attend(&[1.0; 8], &[(&page, 2)], &layout, &mut out);
        assert!(out.iter().all(|element| element.is_nan()), "{out:?}");
    }
}

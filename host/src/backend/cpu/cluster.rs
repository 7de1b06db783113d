use multiversion::multiversion;
use spinkv_kernels::abi::cluster::{ITERATIONS, NO_TOKEN, span_centroids, span_start, spans, start_token};

use super::math::{axpy, dot};

/// Puts tokens with like keys together (RetroInfer, arXiv 2505.02922, with the iterations of its published code): the tokens of each page, `[pages,
/// page_tokens]`, ascending within a cluster; where a cluster's last page has none, [`NO_TOKEN`]. `keys` are `[tokens, head_dim]`.
///
/// Spherical k-means on keys less their mean, in equal spans of about 8,192 tokens, each with a centroid for every 16 of its tokens; centroids start as keys
/// at even distances. In each of [`ITERATIONS`] iterations a token joins the centroid of its span with the greatest dot product, ties to the lower one, and
/// centroids become the directions of their tokens' means. At last every token joins the best centroid of all spans. A cluster of more tokens than a page
/// has several pages, one without tokens has none.
pub fn cluster(keys: &[f32], head_dim: usize, page_tokens: usize) -> Vec<u32> {
    let tokens = keys.len() / head_dim;
    let of_spans = spans(tokens as u32);
    let of_span = span_centroids(tokens as u32, of_spans);
    let centred = centred(keys, head_dim);
    let mut centroids = Vec::with_capacity((of_spans * of_span) as usize * head_dim);
    for span in 0..of_spans {
        let [first, end] = [span, span + 1].map(|span| span_start(tokens as u32, of_spans, span));
        let of_tokens = &centred[first as usize * head_dim..end as usize * head_dim];
        let keys: Vec<&[f32]> = of_tokens.chunks_exact(head_dim).collect();
        let starts = (0..of_span).map(|at| keys[start_token(end - first, of_span, at) as usize]);
        let mut own = starts.collect::<Vec<_>>().concat();
        for _ in 0..ITERATIONS {
            let assigned: Vec<u32> = keys.iter().map(|key| best(key, &own)).collect();
            directions(&keys, &assigned, &mut own, head_dim);
        }
        centroids.extend(own);
    }
    let mut clusters = vec![Vec::new(); centroids.len() / head_dim];
    for (token, key) in centred.chunks_exact(head_dim).enumerate() {
        clusters[best(key, &centroids) as usize].push(token as u32);
    }
    let mut members = Vec::with_capacity(clusters.len() * page_tokens);
    for cluster in clusters {
        members.extend(cluster);
        members.resize(members.len().next_multiple_of(page_tokens), NO_TOKEN);
    }
    members
}

/// Keys less their mean.
fn centred(keys: &[f32], head_dim: usize) -> Vec<f32> {
    let mut mean = vec![0.0; head_dim];
    keys.chunks_exact(head_dim).for_each(|key| axpy(1.0, key, &mut mean));
    let scale = head_dim as f32 / keys.len() as f32;
    let mut centred = keys.to_vec();
    centred.chunks_exact_mut(head_dim).for_each(|key| axpy(-scale, &mean, key));
    centred
}

/// The centroid with the greatest product.
#[multiversion(targets("x86_64+avx2+fma"))]
fn best(key: &[f32], centroids: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (centroid, of_centroid) in centroids.chunks_exact(key.len()).enumerate() {
        let product = dot(key, of_centroid);
        if product > best.1 {
            best = (centroid as u32, product);
        }
    }
    best.0
}

/// Centroids become the directions of the means of their tokens; without tokens, or with a mean of no length, they stay.
fn directions(keys: &[&[f32]], assigned: &[u32], centroids: &mut [f32], head_dim: usize) {
    let mut sums = vec![0.0; centroids.len()];
    for (key, centroid) in keys.iter().zip(assigned) {
        axpy(1.0, key, &mut sums[*centroid as usize * head_dim..][..head_dim]);
    }
    for (sum, centroid) in sums.chunks_exact(head_dim).zip(centroids.chunks_exact_mut(head_dim)) {
        let square = dot(sum, sum);
        if (f32::MIN_POSITIVE..f32::INFINITY).contains(&square) {
            let scale = 1.0 / square.sqrt();
            centroid.iter_mut().zip(sum).for_each(|(to, sum)| *to = sum * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of `kinds` directions in turn, far from the origin.
    fn kinds(tokens: usize, kinds: usize) -> Vec<f32> {
        let mut keys = Vec::new();
        for token in 0..tokens {
            let angle = std::f32::consts::TAU * (token % kinds) as f32 / kinds as f32;
            let noise = 0.01 * (token as f32 * 7.3).sin();
            keys.extend([40.0 + angle.cos() + noise, -9.0 + angle.sin() - noise]);
        }
        keys
    }

    #[test]
    fn tokens_of_a_kind_are_together() {
        // 128 tokens, 8 centroids, of which token 8 + 16 i starts centroid i; 16 tokens of a kind after each other, so each starts as another.
        let kinds = kinds(128, 8);
        let kind = |token: usize| 2 * (token / 16 + 8 * (token % 16));
        let keys: Vec<f32> = (0..128).flat_map(|token| kinds[kind(token)..][..2].to_vec()).collect();
        for page_tokens in [4, 8, 32] {
            let members = cluster(&keys, 2, page_tokens);
            let mut seen = [false; 128];
            for page in members.chunks(page_tokens) {
                let tokens: Vec<u32> = page.iter().copied().filter(|token| *token != NO_TOKEN).collect();
                assert!(!tokens.is_empty() && page[..tokens.len()] == tokens, "{page:?}");
                assert!(
                    tokens.is_sorted() && tokens.iter().all(|token| token / 16 == tokens[0] / 16),
                    "{page:?}"
                );
                tokens.iter().for_each(|token| assert!(!std::mem::replace(&mut seen[*token as usize], true)));
            }
            assert!(seen.iter().all(|seen| *seen));
            assert_eq!(members.len() / page_tokens, 8 * 16_usize.div_ceil(page_tokens));
        }
    }

    #[test]
    fn keys_that_are_all_alike_are_one_cluster_and_a_nan_ends_nothing() {
        let members = cluster(&[3.0; 2 * 128], 2, 8);
        assert_eq!(members, (0..128).collect::<Vec<u32>>());
        let mut keys = kinds(128, 8);
        keys[77] = f32::NAN;
        let members = cluster(&keys, 2, 8);
        assert_eq!(members.iter().filter(|token| **token != NO_TOKEN).count(), 128);
    }
}

use multiversion::multiversion;

use super::math::dot;
use crate::gates::{GATE_EPS, Gates};
use crate::pipeline::Place;

/// The gate key of a block into `key`, `[rank]`: `keys`, `[tokens, head_dim]`, as they are stored and turned, are turned back; the
/// greatest, the least and the mean of each channel are projected, normed if there is a norm, and turned to the block's first token
/// (SeerAttention-R, arXiv 2506.08889: AttnGate with Kmaxminavg).
pub fn gate_key(gates: &Gates, place: Place, first_token: usize, keys: &[f32], key: &mut [f32]) {
    let (head, head_dim) = (gates.head(place.layer, place.kv_head), gates.shape().head_dim);
    let mut pooled = vec![0.0; 3 * head_dim];
    let (greatest, rest) = pooled.split_at_mut(head_dim);
    let (least, mean) = rest.split_at_mut(head_dim);
    greatest.fill(f32::NEG_INFINITY);
    least.fill(f32::INFINITY);
    let mut straight = vec![0.0; head_dim];
    for (token, key) in keys.chunks_exact(head_dim).enumerate() {
        straight.copy_from_slice(key);
        gates.model_rotary().turn_back(first_token + token, &mut straight);
        for (channel, element) in straight.iter().enumerate() {
            greatest[channel] = greatest[channel].max(*element);
            least[channel] = least[channel].min(*element);
            mean[channel] += element;
        }
    }
    let share = 1.0 / (keys.len() / head_dim) as f32;
    mean.iter_mut().for_each(|element| *element *= share);
    project(head.key, &pooled, key);
    norm(head.key_norm, key);
    gates.gate_rotary().turn(first_token, key);
}

/// The gate query of a group into `query`, `[rank]`: `queries`, `[group, head_dim]`, which stand at `position`, are turned back, projected
/// as one vector, normed if there is a norm, and turned to their position (the same paper: Qproj).
pub fn gate_query(gates: &Gates, place: Place, position: usize, queries: &[f32], query: &mut [f32]) {
    let (head, head_dim) = (gates.head(place.layer, place.kv_head), gates.shape().head_dim);
    let mut straight = queries.to_vec();
    for head in straight.chunks_exact_mut(head_dim) {
        gates.model_rotary().turn_back(position, head);
    }
    project(head.query, &straight, query);
    norm(head.query_norm, query);
    gates.gate_rotary().turn(position, query);
}

/// `weights`, `[outputs, inputs]`, times `inputs`.
#[multiversion(targets("x86_64+avx2+fma"))]
fn project(weights: &[f32], inputs: &[f32], outputs: &mut [f32]) {
    for (output, row) in outputs.iter_mut().zip(weights.chunks_exact(inputs.len())) {
        *output = dot(row, inputs);
    }
}

fn norm(weights: Option<&[f32]>, x: &mut [f32]) {
    let Some(weights) = weights else { return };
    let mean_square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (mean_square + GATE_EPS).sqrt();
    x.iter_mut().zip(weights).for_each(|(x, weight)| *x *= scale * weight);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gates::LayerGate;
    use crate::{KvShape, Rotary};

    /// A head of 2 elements that turns a quarter a token, and a gate of 16 elements, of which all turn by half a turn a token.
    fn gates(norms: bool) -> Gates {
        let shape = KvShape::new(1, 2, 1, 2).unwrap();
        let mut layer =
            LayerGate { query: vec![0.0; 16 * 4], key: vec![0.0; 16 * 6], ..LayerGate::default() };
        // Element 0 of the gate's key: greatest of channel 0 + 10 times its least + 100 times the mean of channel 1.
        (layer.key[0], layer.key[2], layer.key[5]) = (1.0, 10.0, 100.0);
        // Element 1 of its query: channel 1 of the second head.
        layer.query[4 + 3] = 1.0;
        if norms {
            (layer.query_norm, layer.key_norm) = (Some(vec![0.5; 16]), Some(vec![0.25; 16]));
        }
        let quarter = Rotary::new(vec![std::f32::consts::FRAC_PI_2], 2.0);
        let half = Rotary::new(vec![std::f32::consts::PI; 8], 1.0);
        Gates::new(shape, 16, quarter, half, vec![layer]).unwrap()
    }

    const PLACE: Place = Place { layer: 0, kv_head: 0 };

    #[test]
    fn a_gate_key_is_made_by_hand() {
        // Before they were turned and doubled, at positions 3 and 4: (1, 4) and (-2, 6).
        let keys = [8.0, -2.0, -4.0, 12.0];
        let mut key = [f32::NAN; 16];
        gate_key(&gates(false), PLACE, 3, &keys, &mut key);
        let expected = -(1.0 + 10.0 * -2.0 + 100.0 * 5.0);
        assert!((key[0] - expected).abs() < 1e-3, "{key:?}");
        assert!(key[1..].iter().all(|element| element.abs() < 1e-3), "{key:?}");
        gate_key(&gates(true), PLACE, 3, &keys, &mut key);
        // One of 16 elements alone: its norm is 4.
        assert!((key[0] + 4.0 * 0.25).abs() < 1e-4, "{key:?}");
    }

    #[test]
    fn a_gate_query_is_made_by_hand() {
        // Before: (0, 0) and (5, 7), at position 2.
        let queries = [0.0, 0.0, -10.0, -14.0];
        let mut query = [f32::NAN; 16];
        gate_query(&gates(false), PLACE, 2, &queries, &mut query);
        assert!((query[1] - 7.0).abs() < 1e-4 && query[0].abs() < 1e-4, "{query:?}");
        gate_query(&gates(true), PLACE, 1, &[0.0, 0.0, -14.0, 10.0], &mut query);
        assert!((query[1] + 4.0 * 0.5).abs() < 1e-4, "{query:?}");
    }
}

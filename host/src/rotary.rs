/// Rotary position embedding of one head, half-split: element `i` turns with element `i + head_dim / 2`, by the position times
/// `frequencies[i]`, and both are lengthened by the magnitude.
///
/// Keys and queries come to the KV memory turned. What must see them as they were before turns them back: a rotation has an inverse, so no
/// second tensor is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// `[head_dim / 2]`.
    frequencies: Vec<f32>,
    magnitude: f32,
}

impl Rotary {
    /// The embedding with `frequencies`, in radians a token, `[head_dim / 2]`, and `magnitude`, the factor of every cosine and sine (1 unless
    /// YaRN lengthens them; not 0). Of what is no number there is none later either.
    pub fn new(frequencies: Vec<f32>, magnitude: f32) -> Self {
        Self { frequencies, magnitude }
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Radians a token of each pair of elements, `[head_dim / 2]`.
    pub fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// Factor of every cosine and sine.
    pub fn magnitude(&self) -> f32 {
        self.magnitude
    }

    /// The cosines and sines of a position, `head_dim / 2` pairs; without the magnitude.
    pub fn angles(&self, position: usize) -> impl ExactSizeIterator<Item = (f32, f32)> {
        self.frequencies.iter().map(move |frequency| {
            // The angle is rounded to f32 as PyTorch does: at 32K tokens that moves it by up to 0.002, and weights were trained with
            // it.
            let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
            (cosine as f32, sine as f32)
        })
    }

    /// Turns a head, `[head_dim]`, to `position`.
    ///
    /// # Panics
    /// For a head of another width.
    pub fn turn(&self, position: usize, head: &mut [f32]) {
        self.turn_by(position, head, self.magnitude, 1.0);
    }

    /// Turns a head, `[head_dim]`, that stands at `position`, back to what it was before [`turn`](Self::turn).
    ///
    /// # Panics
    /// For a head of another width.
    pub fn turn_back(&self, position: usize, head: &mut [f32]) {
        self.turn_by(position, head, 1.0 / self.magnitude, -1.0);
    }

    fn turn_by(&self, position: usize, head: &mut [f32], factor: f32, direction: f32) {
        assert_eq!(head.len(), self.head_dim(), "elements of a head");
        let (low, high) = head.split_at_mut(self.frequencies.len());
        for ((a, b), (cosine, sine)) in low.iter_mut().zip(high).zip(self.angles(position)) {
            let (cosine, sine) = (cosine * factor, direction * sine * factor);
            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_turned_by_hand_and_back() {
        let rotary = Rotary::new(vec![std::f32::consts::FRAC_PI_2, 0.25], 2.0);
        let head = [1.0, 3.0, -2.0, 5.0];
        let mut turned = head;
        rotary.turn(1, &mut turned);
        let (cosine, sine) = (0.25f32.cos(), 0.25f32.sin());
        let expected = [4.0, 2.0 * (3.0 * cosine - 5.0 * sine), 2.0, 2.0 * (5.0 * cosine + 3.0 * sine)];
        turned.iter().zip(expected).for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{turned:?}"));
        for position in [0, 1, 77, 32_767] {
            let mut there = head;
            rotary.turn(position, &mut there);
            rotary.turn_back(position, &mut there);
            there.iter().zip(head).for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{position}: {there:?}"));
        }
    }
}

/// A set of small numbers, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// Makes room for numbers below `len`.
    pub fn grow(&mut self, len: usize) {
        let words = len.div_ceil(64).max(self.words.len());
        self.words.resize(words, 0);
    }

    /// Adds `bit`; whether it was new.
    pub fn insert(&mut self, bit: usize) -> bool {
        let (word, mask) = (&mut self.words[bit / 64], 1 << (bit % 64));
        let new = *word & mask == 0;
        *word |= mask;
        new
    }

    pub fn remove(&mut self, bit: usize) {
        self.words[bit / 64] &= !(1 << (bit % 64));
    }

    pub fn contains(&self, bit: usize) -> bool {
        self.words[bit / 64] & (1 << (bit % 64)) != 0
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let rest = |left: &u64| Some(left & (left - 1)).filter(|left| *left != 0);
            let words = std::iter::successors(Some(*word).filter(|word| *word != 0), rest);
            words.map(move |left| index * 64 + left.trailing_zeros() as usize)
        })
    }

    pub fn bytes(&self) -> usize {
        size_of_val(self.words.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Words enough that neither a word's bits nor its index can be mistaken.
    const NUMBERS: usize = 200;

    proptest! {
        #[test]
        fn a_set_of_bits_is_a_set(turns in prop::collection::vec((0..NUMBERS, 0u8..8), 0..300)) {
            let (mut bits, mut set) = (Bits::default(), BTreeSet::new());
            bits.grow(NUMBERS);
            for (bit, turn) in turns {
                prop_assert_eq!(bits.contains(bit), set.contains(&bit));
                match turn {
                    0 => { bits.clear(); set.clear(); }
                    1..3 => { bits.remove(bit); set.remove(&bit); }
                    _ => prop_assert_eq!(bits.insert(bit), set.insert(bit)),
                }
                prop_assert!(bits.iter().eq(set.iter().copied()));
            }
            prop_assert_eq!(bits.bytes(), 8 * NUMBERS.div_ceil(64));
        }

        #[test]
        fn growing_keeps_the_members_and_nothing_shrinks(lengths in prop::collection::vec(0..NUMBERS, 1..6)) {
            let (mut bits, mut set) = (Bits::default(), BTreeSet::new());
            let mut longest = 0;
            for length in lengths {
                bits.grow(length);
                longest = longest.max(length);
                if let Some(last) = longest.checked_sub(1) {
                    prop_assert_eq!(bits.insert(last), set.insert(last));
                }
                prop_assert!(bits.iter().eq(set.iter().copied()));
                prop_assert_eq!(bits.bytes(), 8 * longest.div_ceil(64));
            }
        }
    }
}

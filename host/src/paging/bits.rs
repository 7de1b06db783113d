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

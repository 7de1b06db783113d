use crate::memory::{KvDtype, PageLayout, PagePool, Word};
use crate::paging::SteadyPages;

/// New keys or values of one row: token `i` is at `data[i * stride..][..head_dim]`.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct NewTokens<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub head_dim: usize,
}

impl NewTokens<'_> {
    pub fn get(&self, token: usize) -> &[f32] {
        &self.data[token * self.stride..][..self.head_dim]
    }
}

/// Where Index finds a row's tokens: the older ones in steady pages, those of the step as they came.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Tokens<'a> {
    pub pool: &'a PagePool,
    pub layout: &'a PageLayout,
    /// Tokens before the step.
    pub before: usize,
    /// The new ones' keys.
    pub keys: NewTokens<'a>,
}

impl Tokens<'_> {
    /// A token's key, as pages store it.
    pub fn key(&self, steady: &SteadyPages, token: usize, out: &mut [f32]) {
        self.read(steady, self.keys, PageLayout::read_key, token, out);
    }

    /// A token's value, as pages store it; `values` are the new ones'.
    pub fn value(&self, steady: &SteadyPages, values: NewTokens<'_>, token: usize, out: &mut [f32]) {
        self.read(steady, values, PageLayout::read_value, token, out);
    }

    fn read(
        &self,
        steady: &SteadyPages,
        new: NewTokens<'_>,
        read: fn(&PageLayout, &[Word], usize, &mut [f32]),
        token: usize,
        out: &mut [f32],
    ) {
        if token >= self.before {
            return store_rounded(self.layout.dtype(), new.get(token - self.before), out);
        }
        let page_tokens = self.layout.page_tokens();
        let page = steady.lookup((token / page_tokens) as u32).expect("a token before its index is steady");
        read(self.layout, self.pool.page(page), token % page_tokens, out);
    }
}

fn store_rounded(dtype: KvDtype, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = dtype.round(*from);
    }
}

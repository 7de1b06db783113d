//! Runs the cases under the emulator.

use cuda_std::emulator::{Buffer, Fault, Launch};
use spinkv_kernels::abi::model;
use spinkv_kernels::model::{argmax, embed, rms_norm, rotate, sample, swiglu};

use super::rotate::Rotated;
use super::{ArgmaxCase, EmbedCase, RmsNormCase, RotateCase, SampleCase, SwigluCase};
use crate::emulated::{entries, quads, to_words, words};

/// A global buffer of halves of words.
fn half_words(words: &[u128]) -> Buffer<u64> {
    Buffer::from_slice(bytemuck::cast_slice(words))
}

impl EmbedCase {
    /// The residual after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<f32>, Fault> {
        let (ids, embedding) = (Buffer::from_slice(&self.ids), half_words(&self.embedding()));
        let residual = quads(&self.residual());
        let (vocab, hidden) = (self.vocab as u32, self.hidden as u32);
        let blocks = self.ids.len() as u32 * model::embed::parts(hidden);
        let launch = Launch::new(blocks, model::embed::BLOCK);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe { embed(ids.view(), embedding.view(), vocab, hidden, residual.view_mut()) };
        })?;
        Ok(bytemuck::cast_slice(&to_words(&residual)).to_vec())
    }
}

impl RmsNormCase {
    /// The rows after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let (residual, weight) = (quads(&self.residual), quads(&self.weight));
        let normed = half_words(&self.normed());
        let (first_token, hidden) = (self.first_token as u32, self.hidden() as u32);
        let launch = Launch::new(self.tokens as u32, model::rms_norm::BLOCK)
            .shared(model::rms_norm::SHARED_BYTES as usize);
        launch.seed(schedule).run(|| {
            let (residual, weight, normed) = (residual.view(), weight.view(), normed.view_mut());
            // SAFETY: the emulator checks every access.
            unsafe { rms_norm(residual, weight, first_token, hidden, self.eps, normed) };
        })?;
        Ok(bytemuck::pod_collect_to_vec(&normed.to_vec()))
    }
}

impl SwigluCase {
    /// The rows after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u128>, Fault> {
        let (gate_up, activated) = (words(&self.gate_up()), words(&self.activated()));
        let row_words = self.width as u32 / 8;
        let blocks = self.tokens as u32 * model::swiglu::parts(row_words);
        let launch = Launch::new(blocks, model::swiglu::BLOCK);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe { swiglu(gate_up.view(), row_words, activated.view_mut()) };
        })?;
        Ok(to_words(&activated))
    }
}

impl RotateCase {
    /// The outputs after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Rotated, Fault> {
        let projected = words(&self.projected());
        let step = entries(self.entries.as_deref().unwrap_or_default());
        let none = [vec![], vec![]];
        let [query_norm, key_norm] = self.norms.as_ref().unwrap_or(&none).each_ref().map(|norm| quads(norm));
        let frequencies = quads(&self.frequencies);
        let Rotated { queries, keys, values } = self.outputs();
        let [queries, keys, values] = [queries, keys, values].map(|output| words(&output));
        let sizes = [self.tokens, self.query_heads, self.kv_heads, self.head_words, self.first_token];
        let [tokens, query_heads, kv_heads, head_words, first_token] = sizes.map(|size| size as u32);
        let blocks = model::rotate::grid(u64::from(tokens) * u64::from(self.warps_of_token)) as u32;
        let launch = Launch::new(blocks, model::rotate::BLOCK);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe {
                rotate(
                    projected.view(),
                    tokens,
                    query_heads,
                    kv_heads,
                    head_words,
                    step.view(),
                    self.entries.is_some().into(),
                    self.first_position,
                    frequencies.view(),
                    self.factor,
                    query_norm.view(),
                    key_norm.view(),
                    self.norms.is_some().into(),
                    self.eps,
                    self.warps_of_token,
                    queries.view_mut(),
                    first_token,
                    keys.view_mut(),
                    values.view_mut(),
                );
            }
        })?;
        Ok(Rotated { queries: to_words(&queries), keys: to_words(&keys), values: to_words(&values) })
    }
}

impl ArgmaxCase {
    /// The ids after the kernel ran in the order of `schedule`, twice: the second time on what the first left of the scratch.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<[Vec<u32>; 2], Fault> {
        let logits = quads(&self.logits);
        let greatest = Buffer::from_slice(&vec![0_u64; self.batch]);
        let arrivals = Buffer::from_slice(&vec![0_u32; self.batch]);
        let (vocab, stride) = (self.vocab as u32, self.stride as u32);
        let blocks = self.batch as u32 * model::argmax::parts(vocab);
        let mut found = [const { Vec::new() }; 2];
        for (round, found) in (0..).zip(&mut found) {
            let ids = Buffer::poisoned(self.batch);
            let launch =
                Launch::new(blocks, model::argmax::BLOCK).shared(model::argmax::SHARED_BYTES as usize);
            launch.seed(schedule + round).run(|| {
                let (greatest, arrivals) = (greatest.view_mut(), arrivals.view_mut());
                // SAFETY: the emulator checks every access.
                unsafe { argmax(logits.view(), vocab, stride, greatest, arrivals, ids.view_mut()) };
            })?;
            *found = ids.to_vec();
        }
        Ok(found)
    }
}

impl SampleCase {
    /// The ids after the kernel ran in the order of `schedule`.
    ///
    /// # Errors
    /// What the emulator found wrong.
    pub fn emulate(&self, schedule: u64) -> Result<Vec<u32>, Fault> {
        let (logits, ids) = (quads(&self.logits), Buffer::poisoned(self.batch()));
        let params = words(&bytemuck::pod_collect_to_vec(&self.params));
        let (vocab, stride) = (self.vocab as u32, self.stride as u32);
        let launch = Launch::new(self.batch() as u32, model::sample::BLOCK)
            .shared(model::sample::SHARED_BYTES as usize);
        launch.seed(schedule).run(|| {
            // SAFETY: the emulator checks every access.
            unsafe { sample(logits.view(), vocab, stride, params.view(), ids.view_mut()) };
        })?;
        Ok(ids.to_vec())
    }
}

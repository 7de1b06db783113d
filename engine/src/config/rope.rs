use serde::Deserialize;
use serde_json::Value;

use super::{Check, MAX_SIZE, RawConfig};
use crate::error::Result;

/// The "llama3" stretch of RoPE: each frequency by how often it turns within the first training's context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// Divisor of the low frequencies; at least 1.
    pub factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` stay; greater than
    /// `low_freq_factor`.
    pub high_freq_factor: f64,
    /// Context length, in tokens, of the first training.
    pub original_max_position_embeddings: usize,
}

/// YaRN (Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023), as transformers computes
/// it: dimensions that turn often within the original context keep their frequency, those that hardly turn are divided by
/// the factor, those between are blended by a linear ramp over the dimensions; all rotations are lengthened a little.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct YarnScaling {
    /// Divisor of the low frequencies; at least 1.
    pub factor: f64,
    /// Context length, in tokens, of the first training.
    pub original_max_position_embeddings: usize,
    /// Dimensions that turn at least this often within the original context stay; greater than `beta_slow`.
    pub beta_fast: f64,
    /// Dimensions that turn at most this often are divided.
    pub beta_slow: f64,
    /// Factor of all cosines and sines, so that logits are its square times as large.
    pub attention_factor: f64,
    /// Whether the ramp's ends are rounded outwards to whole dimensions.
    pub truncate: bool,
}

/// How RoPE is stretched for contexts longer than the first training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As Llama 3.1 does.
    Llama3(Llama3Scaling),
    /// As Qwen3 does beyond its trained context.
    Yarn(YarnScaling),
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies `theta^(-2i / head_dim)`.
    pub theta: f64,
    /// Scaling for long contexts; `None` leaves the frequencies as they are.
    pub scaling: Option<RopeScaling>,
}

impl RopeConfig {
    /// Tokens that YaRN stretches the original context to; 0 without YaRN, where the file's own number says it.
    pub(super) fn stretched_context(&self) -> usize {
        match self.scaling {
            Some(RopeScaling::Yarn(yarn)) => {
                ((yarn.original_max_position_embeddings as f64 * yarn.factor) as usize).min(MAX_SIZE)
            }
            _ => 0,
        }
    }
}

#[derive(Deserialize)]
pub(super) struct RawRope {
    rope_type: Option<String>,
    /// The older spelling of `rope_type`.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
}

const ORIGINAL: &str = "original_max_position_embeddings";

impl Check {
    /// RoPE from either spelling: `rope_theta` with `rope_scaling`, or transformers 5's `rope_parameters`.
    /// Where a file has both, `rope_scaling` decides the scaling, as in transformers.
    pub(super) fn rope(&self, raw: &RawConfig) -> Result<RopeConfig> {
        let (field, dict) = match (&raw.rope_scaling, &raw.rope_parameters) {
            (Some(dict), _) => ("rope_scaling", Some(dict)),
            (None, dict) => ("rope_parameters", dict.as_ref()),
        };
        let theta = [&raw.rope_scaling, &raw.rope_parameters]
            .into_iter()
            .find_map(|dict| dict.as_ref()?.rope_theta)
            .or(raw.rope_theta)
            // What transformers takes for both architectures; Llama 2's files leave it out.
            .unwrap_or(10_000.0);
        self.positive("rope_theta", theta)?;
        let partial = dict.and_then(|dict| dict.partial_rotary_factor).or(raw.partial_rotary_factor);
        if let Some(partial) = partial.filter(|&partial| partial != 1.0) {
            return Err(self.unsupported("partial_rotary_factor", partial, "1"));
        }
        let scaling = match dict {
            Some(dict) => self.rope_scaling(field, dict, theta, raw.max_position_embeddings)?,
            None => None,
        };
        Ok(RopeConfig { theta, scaling })
    }

    fn rope_scaling(
        &self,
        field: &'static str,
        dict: &RawRope,
        theta: f64,
        context: usize,
    ) -> Result<Option<RopeScaling>> {
        match dict.rope_type.as_deref().or(dict.r#type.as_deref()) {
            Some("llama3") => Ok(Some(RopeScaling::Llama3(self.llama3(field, dict)?))),
            Some("yarn") => Ok(Some(RopeScaling::Yarn(self.yarn(field, dict, theta, context)?))),
            Some("default") => Ok(None),
            None if dict.factor.is_none() => Ok(None),
            None => Err(self.inconsistent(format!("{field} has a factor but no rope_type"))),
            Some(other) => Err(self.unsupported("rope_type", Value::from(other), "default, llama3, yarn")),
        }
    }

    fn llama3(&self, field: &'static str, dict: &RawRope) -> Result<Llama3Scaling> {
        let need = |name: &'static str, value: Option<f64>| self.need(field, "llama3", name, value);
        // Positions as f64 only to share the check; the value itself stays an integer.
        need(ORIGINAL, dict.original_max_position_embeddings.map(|tokens| tokens as f64))?;
        let scaling = Llama3Scaling {
            factor: need("factor", dict.factor)?,
            low_freq_factor: need("low_freq_factor", dict.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", dict.high_freq_factor)?,
            original_max_position_embeddings: dict.original_max_position_embeddings.unwrap_or_default(),
        };
        self.size(ORIGINAL, scaling.original_max_position_embeddings)?;
        self.stretch(scaling.factor)?;
        if scaling.low_freq_factor >= scaling.high_freq_factor {
            return Err(self.inconsistent(format!(
                "low_freq_factor is {}; must be less than high_freq_factor, {}",
                scaling.low_freq_factor, scaling.high_freq_factor
            )));
        }
        Ok(scaling)
    }

    /// The defaults are those of transformers: without an original context the model's own is taken, a `beta` of 0 counts as
    /// none, and `mscale` counts only beside `mscale_all_dim`.
    fn yarn(&self, field: &'static str, dict: &RawRope, theta: f64, context: usize) -> Result<YarnScaling> {
        let factor = self.need(field, "yarn", "factor", dict.factor)?;
        self.stretch(factor)?;
        let original_max_position_embeddings = dict.original_max_position_embeddings.unwrap_or(context);
        self.size(ORIGINAL, original_max_position_embeddings)?;
        if theta <= 1.0 {
            // The ramp's ends are logarithms to this base.
            return Err(self.unsupported("rope_theta", theta, "more than 1 with rope_type \"yarn\""));
        }
        let given = |name: &'static str, value: Option<f64>| -> Result<Option<f64>> {
            let value = value.filter(|&value| value != 0.0);
            value.map(|value| self.positive(name, value).map(|()| value)).transpose()
        };
        let beta_fast = given("beta_fast", dict.beta_fast)?.unwrap_or(32.0);
        let beta_slow = given("beta_slow", dict.beta_slow)?.unwrap_or(1.0);
        if beta_slow >= beta_fast {
            let reason = format!("beta_slow is {beta_slow}; must be less than beta_fast, {beta_fast}");
            return Err(self.inconsistent(reason));
        }
        let mscales = (given("mscale", dict.mscale)?, given("mscale_all_dim", dict.mscale_all_dim)?);
        // The paper's temperature, for logits of a context `factor` times as long.
        let lengthened = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let attention_factor = match (dict.attention_factor, mscales) {
            (Some(given), _) => given,
            (None, (Some(mscale), Some(all))) => lengthened(mscale) / lengthened(all),
            (None, _) => lengthened(1.0),
        };
        self.positive("attention_factor", attention_factor)?;
        Ok(YarnScaling {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate: dict.truncate.unwrap_or(true),
        })
    }

    fn need(&self, field: &'static str, kind: &str, name: &'static str, value: Option<f64>) -> Result<f64> {
        let value = value
            .ok_or_else(|| self.inconsistent(format!("{field} has rope_type \"{kind}\" but no {name}")))?;
        self.positive(name, value)?;
        Ok(value)
    }

    fn stretch(&self, factor: f64) -> Result<()> {
        if factor < 1.0 { Err(self.unsupported("factor", factor, "1 or more")) } else { Ok(()) }
    }
}

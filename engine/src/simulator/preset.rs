use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;

use super::adversary;
use super::calibrate::bisect;
use super::cluster_table::ClusterTable;
use super::generator::{Layer, single_row};
use super::noise::Noise;
use super::{Locality, Trace, TraceRow};

/// Tokens that the methods of fixed budget select.
const BUDGET_TOKENS: usize = 2048;

/// A kind of trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Preset {
    /// Pages of 8 tokens, 256 a step, with the miss ratios that HiSparse measured.
    Calibrated,
    /// ShadowKV: chunks of 8 tokens, 256 a step; heads keep 60 % of a step's chunks on average.
    ShadowKv,
    /// RetroInfer: clusters of 16 tokens on average, at most 64, on pages of 8; 1.8 % of the clusters a step.
    RetroInfer,
    /// SeerAttention-R: blocks of 64 tokens, as many as pass a threshold: 32 on average, each head its own number.
    Seer,
    /// Quest: pages of 16 tokens, 128 a step.
    Quest,
    /// Adversary: each step draws 256 pages from all, without locality.
    Uniform,
    /// Adversary: three selections in turn, the worst case of LRU in a cache for two.
    Cyclic,
    /// Adversary: a working set that is replaced by another every 100 steps.
    Phase,
    /// Adversary: the first head of each layer selects 4 times as much as the others, without locality.
    HotHead,
}

impl Preset {
    /// All presets.
    pub const ALL: [Self; 9] = [
        Self::Calibrated,
        Self::ShadowKv,
        Self::RetroInfer,
        Self::Seer,
        Self::Quest,
        Self::Uniform,
        Self::Cyclic,
        Self::Phase,
        Self::HotHead,
    ];

    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Calibrated => "calibrated",
            Self::ShadowKv => "shadowkv",
            Self::RetroInfer => "retroinfer",
            Self::Seer => "seer",
            Self::Quest => "quest",
            Self::Uniform => "uniform",
            Self::Cyclic => "cyclic",
            Self::Phase => "phase",
            Self::HotHead => "hot-head",
        }
    }

    fn page_tokens(self) -> usize {
        match self {
            Self::Quest => 16,
            Self::Seer => 64,
            _ => 8,
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|preset| preset.name() == name);
        found.ok_or_else(|| format!("known: {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// How large a trace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceSize {
    /// Tokens of the context at the first step.
    pub context: usize,
    /// Steps, of one token each.
    pub steps: usize,
    /// Layers. The first ones of a model, which are not sparse and which Quest keeps dense, are not modelled.
    pub layers: usize,
    /// KV heads of a layer.
    pub heads: usize,
}

impl Trace {
    /// Generates the trace that `seed` stands for, always the same.
    pub fn generate(preset: Preset, size: TraceSize, seed: u64) -> Self {
        let setting = Setting::new(preset, size, seed);
        let layers: Vec<_> =
            (0..size.layers as u32).into_par_iter().map(|layer| setting.layer(layer)).collect();
        Self {
            name: preset.name().to_owned(),
            page_tokens: preset.page_tokens() as u32,
            context: size.context as u32,
            rows: layers.into_iter().flatten().collect(),
        }
    }
}

/// What all layers of a trace have in common.
struct Setting {
    preset: Preset,
    size: TraceSize,
    seed: u64,
    partition_tokens: usize,
    /// Partitions of a step, before heads differ.
    count: usize,
    paces: Option<Paces>,
}

impl Setting {
    fn new(preset: Preset, size: TraceSize, seed: u64) -> Self {
        let partition_tokens = if preset == Preset::RetroInfer { 16 } else { preset.page_tokens() };
        let partitions = size.context / partition_tokens;
        let count = match preset {
            Preset::RetroInfer => (partitions as f64 * 0.018).round() as usize,
            _ => BUDGET_TOKENS / partition_tokens,
        };
        let count = count.clamp(1, partitions.max(1));
        let differs = matches!(preset, Preset::ShadowKv | Preset::RetroInfer | Preset::Seer | Preset::Quest);
        let paces = differs.then(|| Paces::new((size.context, partition_tokens), count, seed));
        Self { preset, size, seed, partition_tokens, count, paces }
    }

    /// How much of a step the next one keeps, on average over the heads of a middle layer. Early layers keep two
    /// thirds of that. Measured: 60 % for ShadowKV's chunks of 8 tokens; expected: 75 to 90 % for blocks of 64.
    fn overlap(&self, layer: u32) -> f64 {
        let middle = match self.preset {
            Preset::Seer => 0.82,
            Preset::Quest => 0.68,
            _ => 0.6,
        };
        let early = (layer as usize) < self.size.layers / 4;
        if early { middle * 2.0 / 3.0 } else { middle }
    }

    fn layer(&self, layer: u32) -> Vec<TraceRow> {
        let mut noise = Noise::new(&[self.seed, u64::from(layer), u64::MAX]);
        match self.preset {
            Preset::Uniform | Preset::Cyclic | Preset::Phase => self.adversaries(layer, &mut noise),
            Preset::HotHead => {
                let mut rows = self.heads(layer, &mut noise);
                let (keys, hot) = (rows[0].keys(), 4 * self.count);
                rows[0] = adversary::uniform((layer, 0, keys), hot, self.size.steps, &mut noise);
                rows
            }
            _ => self.heads(layer, &mut noise),
        }
    }

    fn adversaries(&self, layer: u32, noise: &mut Noise) -> Vec<TraceRow> {
        let (keys, steps) = ((self.size.context / self.partition_tokens) as u32, self.size.steps);
        let row = |head| {
            let place = (layer, head, keys);
            match self.preset {
                Preset::Cyclic => adversary::cyclic(place, self.count, steps, noise),
                Preset::Phase => adversary::phase(place, self.count, steps, noise),
                _ => adversary::uniform(place, self.count, steps, noise),
            }
        };
        (0..self.size.heads as u32).map(row).collect()
    }

    fn heads(&self, layer: u32, noise: &mut Noise) -> Vec<TraceRow> {
        let TraceSize { context, steps, heads, .. } = self.size;
        let pace = |noise: &mut Noise| match &self.paces {
            Some(paces) => paces.pace(beta(self.overlap(layer), noise)),
            None => 1.0,
        };
        let localities: Vec<_> = (0..heads).map(|_| Locality::CALIBRATED.at_pace(pace(noise))).collect();
        let mut scores = Layer::new(self.seed, layer, context, self.partition_tokens, steps, &localities);
        // Thresholds let a head select what its scores are worth: half to twice the mean, a little different in
        // each step.
        let varies = self.preset == Preset::Seer;
        let mean = |noise: &mut Noise| if varies { 0.5 + 1.5 * noise.uniform().powi(2) } else { 1.0 };
        let means: Vec<f64> = (0..heads).map(|_| mean(noise)).collect();

        let partitions = (context + steps) / self.partition_tokens;
        let clusters: Vec<_> = (0..heads).map(|_| self.clusters(partitions, noise)).collect();
        let keys = |head: usize| clusters[head].as_ref().map_or(partitions as u32, ClusterTable::pages);
        let mut rows: Vec<_> = (0..heads).map(|head| TraceRow::new(layer, head as u32, keys(head))).collect();
        let mut selected = vec![Vec::new(); heads];
        let mut pages = Vec::new();
        for _ in 0..steps {
            let around = |noise: &mut Noise| if varies { 0.8 + 0.4 * noise.uniform() } else { 1.0 };
            let count = |mean: &f64| (self.count as f64 * mean * around(noise)).round().max(1.0) as usize;
            let counts: Vec<_> = means.iter().map(count).collect();
            selected.iter_mut().for_each(Vec::clear);
            scores.step(&counts, &mut selected);
            for ((row, ids), clusters) in rows.iter_mut().zip(&selected).zip(&clusters) {
                match clusters {
                    Some(table) => {
                        pages.clear();
                        pages.extend(ids.iter().flat_map(|id| table.keys(*id)));
                        row.push(&pages);
                    }
                    None => row.push(ids),
                }
            }
        }
        rows
    }

    /// Clusters of lognormal size: mean 16 tokens, at most 64.
    fn clusters(&self, count: usize, noise: &mut Noise) -> Option<ClusterTable> {
        const SIGMA: f64 = 0.7;
        if self.preset != Preset::RetroInfer {
            return None;
        }
        let mut table = ClusterTable::default();
        for _ in 0..count {
            let size = 16.0 * (SIGMA * f64::from(noise.normal()) - SIGMA * SIGMA / 2.0).exp();
            table.push(size.round().clamp(1.0, 64.0) as u32, self.preset.page_tokens() as u32);
        }
        Some(table)
    }
}

/// From the overlap of consecutive steps to the pace of a [`Locality`] that has it, by bisection of trials.
struct Paces {
    /// Overlap and pace, by descending overlap.
    known: Vec<(f64, f32)>,
}

impl Paces {
    fn new(place: (usize, usize), count: usize, seed: u64) -> Self {
        const STEPS: usize = 24;
        let overlap = |pace: f32| {
            let rows = vec![single_row(seed, Locality::CALIBRATED.at_pace(pace), place, count, STEPS)];
            Trace { name: String::new(), page_tokens: 1, context: 0, rows }.overlap()
        };
        let targets: Vec<_> = (1..10).rev().map(|tenths| f64::from(tenths) / 10.0).collect();
        let solve = |target: &f64| {
            // In logarithms: paces of interest lie between a fiftieth and fifty.
            let pace = bisect(-4.0, 4.0, 7, |log| overlap(log.exp()) > *target).exp();
            (*target, pace)
        };
        Self { known: targets.par_iter().map(solve).collect() }
    }

    fn pace(&self, overlap: f64) -> f32 {
        let (slow, fast) = (self.known[0], self.known[self.known.len() - 1]);
        let overlap = overlap.clamp(fast.0, slow.0);
        let after = self.known.iter().position(|(known, _)| *known <= overlap).unwrap_or(0).max(1);
        let ((high, slower), (low, faster)) = (self.known[after - 1], self.known[after]);
        let share = ((high - overlap) / (high - low)) as f32;
        slower + share * (faster - slower)
    }
}

/// A draw from a Beta distribution of this mean: of as many uniform numbers, the one of that rank.
fn beta(mean: f64, noise: &mut Noise) -> f64 {
    const DRAWS: usize = 15;
    let mut draws = [(); DRAWS].map(|()| noise.uniform());
    draws.sort_by(f64::total_cmp);
    let rank = (mean * (DRAWS + 1) as f64).round() as usize;
    draws[rank.clamp(1, DRAWS) - 1]
}

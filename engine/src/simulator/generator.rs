use super::noise::Noise;
use super::{Locality, TraceRow};

/// Diagonals of a row.
const SLASHES: usize = 4;
/// Tokens of a topic's region.
const REGION_TOKENS: std::ops::Range<usize> = 512..4097;
/// Steps that a topic lasts, on average: drawn anew for each topic.
const DWELL_STEPS: std::ops::Range<usize> = 20..201;

/// Picks the partitions of the rows of one layer, step by step.
///
/// The scores follow [`Locality`]; the number of partitions grows as tokens are generated, and a new partition
/// starts like any other.
#[derive(Debug)]
pub(super) struct Layer {
    noise: Noise,
    partition_tokens: usize,
    /// Tokens of the context at step 0.
    context: usize,
    step: usize,
    /// The innovations that the heads share: `[partitions]` each.
    shared_fast: Vec<f32>,
    shared_slow: Vec<f32>,
    heads: Vec<Head>,
}

#[derive(Debug)]
struct Head {
    noise: Noise,
    locality: Locality,
    popularity: Vec<f32>,
    fast: Vec<f32>,
    slow: Vec<f32>,
    scores: Vec<f32>,
    order: Vec<u32>,
    /// Tokens from the newest one back to each diagonal.
    slashes: [usize; SLASHES],
    topic: Topic,
}

#[derive(Debug, Default)]
struct Topic {
    regions: Vec<std::ops::Range<usize>>,
    steps_left: usize,
}

impl Layer {
    /// A layer of as many heads as there are localities, at a context of `context` tokens in partitions of
    /// `partition_tokens` each, for at most `steps` steps.
    pub fn new(
        seed: u64,
        layer: u32,
        context: usize,
        partition_tokens: usize,
        steps: usize,
        heads: &[Locality],
    ) -> Self {
        let partitions = (context + steps) / partition_tokens;
        let head = |(head, locality): (usize, &Locality)| {
            let noise = Noise::new(&[seed, u64::from(layer), 1 + head as u64]);
            Head::new(noise, *locality, partitions, context)
        };
        Self {
            noise: Noise::new(&[seed, u64::from(layer), 0]),
            partition_tokens,
            context,
            step: 0,
            shared_fast: vec![0.0; partitions],
            shared_slow: vec![0.0; partitions],
            heads: heads.iter().enumerate().map(head).collect(),
        }
    }

    /// Partitions that can be selected in the next step.
    pub fn partitions(&self) -> usize {
        (self.context + self.step) / self.partition_tokens
    }

    /// Takes a step: appends to `selected` the `counts[h]` partitions of each head `h`, ascending.
    pub fn step(&mut self, counts: &[usize], selected: &mut [Vec<u32>]) {
        let partitions = self.partitions();
        self.shared_fast[..partitions].fill_with(|| self.noise.normal());
        self.shared_slow[..partitions].fill_with(|| self.noise.normal());
        let newest = self.context + self.step;
        for ((head, count), selected) in self.heads.iter_mut().zip(counts).zip(selected) {
            head.score(&self.shared_fast, &self.shared_slow, partitions, newest, self.partition_tokens);
            head.top(partitions, (*count).min(partitions), selected);
        }
        self.step += 1;
    }
}

impl Head {
    fn new(mut noise: Noise, locality: Locality, partitions: usize, context: usize) -> Self {
        let mut ranks: Vec<_> = (0..partitions).collect();
        for last in (1..partitions).rev() {
            ranks.swap(last, noise.below(last + 1));
        }
        let popularity = |rank: usize| -locality.popularity * ((rank + 1) as f32).ln();
        Self {
            locality,
            popularity: ranks.into_iter().map(popularity).collect(),
            fast: (0..partitions).map(|_| noise.normal()).collect(),
            slow: (0..partitions).map(|_| noise.normal()).collect(),
            scores: vec![0.0; partitions],
            order: Vec::with_capacity(partitions),
            slashes: [(); SLASHES].map(|()| 1 + noise.below(context.max(1))),
            topic: Topic::default(),
            noise,
        }
    }

    fn score(
        &mut self,
        shared_fast: &[f32],
        shared_slow: &[f32],
        partitions: usize,
        newest: usize,
        partition_tokens: usize,
    ) {
        let Locality { fast, slow, drift, flicker, slash, topic, shared, .. } = self.locality;
        let renew = |keeps: f32| (1.0 - keeps * keeps).sqrt();
        let (common, own) = (shared.sqrt(), (1.0 - shared).sqrt());
        let (renew_fast, renew_slow) = (renew(fast), renew(slow));
        for index in 0..partitions {
            let new = common * shared_fast[index] + own * self.noise.normal();
            self.fast[index] = fast * self.fast[index] + renew_fast * new;
            let new = common * shared_slow[index] + own * self.noise.normal();
            self.slow[index] = slow * self.slow[index] + renew_slow * new;
            self.scores[index] = self.popularity[index]
                + self.fast[index]
                + drift * self.slow[index]
                + flicker * self.noise.normal();
        }

        self.topic.step(&mut self.noise, partitions, partition_tokens);
        for region in &self.topic.regions {
            self.scores[region.clone()].iter_mut().for_each(|score| *score += topic);
        }
        for distance in &self.slashes {
            let on = newest.saturating_sub(*distance) / partition_tokens;
            if on < partitions {
                self.scores[on] += slash;
            }
        }
    }

    fn top(&mut self, partitions: usize, count: usize, selected: &mut Vec<u32>) {
        if count == 0 {
            return;
        }
        self.order.clear();
        self.order.extend(0..partitions as u32);
        let scores = &self.scores;
        let larger_first =
            |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
        if count < partitions {
            self.order.select_nth_unstable_by(count - 1, larger_first);
        }
        let first = selected.len();
        selected.extend(&self.order[..count]);
        selected[first..].sort_unstable();
    }
}

impl Topic {
    fn step(&mut self, noise: &mut Noise, partitions: usize, partition_tokens: usize) {
        if self.steps_left == 0 {
            self.steps_left = DWELL_STEPS.start + noise.below(DWELL_STEPS.len());
            self.regions.clear();
            for _ in 0..1 + noise.below(2) {
                let tokens = REGION_TOKENS.start + noise.below(REGION_TOKENS.len());
                let length = (tokens / partition_tokens).clamp(1, partitions.max(1)).min(partitions);
                let first = noise.below(partitions - length + 1);
                self.regions.push(first..first + length);
            }
        }
        self.steps_left -= 1;
    }
}

/// One row of one head that selects `count` partitions of one page each in every step.
pub(super) fn single_row(
    seed: u64,
    locality: Locality,
    (context, page_tokens): (usize, usize),
    count: usize,
    steps: usize,
) -> TraceRow {
    let mut layer = Layer::new(seed, 0, context, page_tokens, steps, &[locality]);
    let mut row = TraceRow::new(0, 0, ((context + steps) / page_tokens) as u32);
    let mut selected = [Vec::new()];
    for _ in 0..steps {
        selected[0].clear();
        layer.step(&[count], &mut selected);
        row.push(&selected[0]);
    }
    row
}

/// The pages that the steps of one request select, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// What it is a trace of.
    pub name: String,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Tokens of the sequence at the first step.
    pub context: u32,
    /// The rows, by layer and then by KV head.
    pub rows: Vec<TraceRow>,
}

impl Trace {
    /// Pages selected in all steps of all rows.
    pub fn probes(&self) -> u64 {
        self.rows.iter().map(|row| row.selected.len() as u64).sum()
    }

    /// Steps of the longest row.
    pub fn steps(&self) -> usize {
        self.rows.iter().map(TraceRow::steps).max().unwrap_or(0)
    }

    /// The mean share of a step's pages that the step before selected as well.
    pub fn overlap(&self) -> f64 {
        let (mut common, mut all) = (0, 0);
        for row in &self.rows {
            for step in 1..row.steps() {
                let before = row.step(step - 1);
                common += row.step(step).iter().filter(|key| before.binary_search(key).is_ok()).count();
                all += row.step(step).len();
            }
        }
        common as f64 / all.max(1) as f64
    }
}

/// The steps of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRow {
    /// The layer.
    pub layer: u32,
    /// The KV head.
    pub head: u32,
    /// Page keys are below this number.
    keys: u32,
    /// Where the steps begin in `selected`, and its length: `[steps + 1]`.
    offsets: Vec<usize>,
    /// Page keys, ascending within a step.
    selected: Vec<u32>,
}

impl TraceRow {
    /// A row without steps, for page keys below `keys`.
    pub fn new(layer: u32, head: u32, keys: u32) -> Self {
        Self { layer, head, keys, offsets: vec![0], selected: Vec::new() }
    }

    /// Adds a step that selects `keys`.
    ///
    /// # Panics
    /// If the keys do not ascend strictly or are out of range.
    pub fn push(&mut self, keys: &[u32]) {
        assert!(keys.is_sorted_by(|a, b| a < b), "the keys of a step ascend and are unique");
        assert!(keys.last().is_none_or(|key| *key < self.keys), "keys are below {}", self.keys);
        self.selected.extend(keys);
        self.offsets.push(self.selected.len());
    }

    /// The page keys that step `step` selects, ascending.
    pub fn step(&self, step: usize) -> &[u32] {
        &self.selected[self.offsets[step]..self.offsets[step + 1]]
    }

    /// The selections of all steps.
    pub fn selections(&self) -> impl Iterator<Item = &[u32]> + Clone {
        self.offsets.windows(2).map(|ends| &self.selected[ends[0]..ends[1]])
    }

    /// Steps of the row.
    pub fn steps(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Page keys are below this number.
    pub fn keys(&self) -> u32 {
        self.keys
    }

    /// Pages that the row must have slots for: those of its largest step.
    pub fn mandatory(&self) -> usize {
        self.selections().map(<[u32]>::len).max().unwrap_or(0)
    }
}

use std::cell::RefCell;

use serde::Serialize;
use spinkv::backend::cuda::CudaBackend;
use spinkv::backend::cuda::driver::Event;
use spinkv::pipeline::Stage;

use super::CudaModel;
use crate::error::Result;
use crate::model::DecodeToken;

/// A part of a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepPart {
    /// Norm, query, key and value projections, rotation; in the first layer the embedding, too.
    Projections,
    /// Index and Offload.
    Offload,
    /// Select.
    Select,
    /// Retrieve and Attention, which run beside each other.
    Attention,
    /// Attention's output projection and the MLP.
    Mlp,
    /// Last norm, logits and the likeliest token.
    Head,
}

impl StepPart {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Projections, Self::Offload, Self::Select, Self::Attention, Self::Mlp, Self::Head];

    pub(super) fn of(stage: Stage) -> Self {
        match stage {
            Stage::Index | Stage::Offload => Self::Offload,
            Stage::Select => Self::Select,
            Stage::Retrieve | Stage::Attention => Self::Attention,
        }
    }
}

/// Where the time of decode steps goes: means over some steps, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct StepProfile {
    /// By part, of graphs with an event behind each.
    pub parts: Vec<(StepPart, f64)>,
    /// A step's graph without events.
    pub graph_ms: f64,
}

impl StepProfile {
    /// All parts together.
    pub fn total_ms(&self) -> f64 {
        self.parts.iter().map(|(_, ms)| ms).sum()
    }
}

impl CudaModel {
    /// Takes a batch through `2 * steps` greedy steps, of which every other one is timed by parts. `batch` is left at its newest tokens.
    ///
    /// # Errors
    /// Those of [`decode`](Self::decode).
    pub fn profile(&mut self, batch: &mut [DecodeToken], steps: usize) -> Result<StepProfile> {
        self.profile_with(batch, steps, |_, _| Ok(()))
    }

    /// The same with `before` called before each step, with its number: what it enqueues is not timed.
    ///
    /// # Errors
    /// Those of [`profile`](Self::profile), and `before`'s.
    pub fn profile_with(
        &mut self,
        batch: &mut [DecodeToken],
        steps: usize,
        mut before: impl FnMut(&mut CudaBackend, usize) -> Result<()>,
    ) -> Result<StepProfile> {
        let (bucket, resident) = self.kind_of(batch);
        let context = self.stream().context().clone();
        let marks = RefCell::new(Vec::new());
        let timed = self.capture(bucket, resident, &|part| {
            let event = Event::new(&context)?;
            event.record_in_graph(self.stream())?;
            marks.borrow_mut().push((part, event));
            Ok(())
        })?;
        let marks: Vec<(StepPart, Event)> = marks.into_inner();
        let plain = self.capture(bucket, resident, &|_| Ok(()))?;
        let (end, mut sums, mut graph_ms) = (Event::new(&context)?, [0.0; StepPart::ALL.len()], 0.0);
        for step in 0..2 * steps {
            before(self.pipeline_mut().backend_mut(), step)?;
            self.step_as(batch, bucket, if step % 2 == 0 { &timed } else { &plain })?;
            end.record(self.stream())?;
            let ids = self.likeliest(batch.len())?;
            batch.iter_mut().zip(ids).for_each(|(part, id)| part.token = id);
            let mut mark = self.began();
            if step % 2 == 1 {
                graph_ms += f64::from(mark.elapsed_ms(&end)?) / steps as f64;
                continue;
            }
            for (part, event) in &marks {
                let number = StepPart::ALL.iter().position(|known| known == part).expect("one of all");
                sums[number] += f64::from(mark.elapsed_ms(event)?) / steps as f64;
                mark = event;
            }
        }
        Ok(StepProfile { parts: StepPart::ALL.into_iter().zip(sums).collect(), graph_ms })
    }
}

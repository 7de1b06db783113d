use super::job::{Job, JobId};

/// Jobs that wait for memory.
///
/// Those of a higher priority go first; of equals, who came first. One that has no room may be overtaken, by who came later and needs
/// less or has a higher priority, but not for ever: once it was overtaken `patience` times it goes before all others, and nobody goes before it. So
/// whoever waits is served after at most as many others as were there already and `patience` more.
#[derive(Debug)]
pub(super) struct Queue {
    /// By arrival.
    waiting: Vec<Waiting>,
    patience: usize,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub id: JobId,
    pub job: Job,
    overtaken: usize,
}

impl Queue {
    pub fn new(patience: usize) -> Self {
        Self { waiting: Vec::new(), patience }
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn push(&mut self, id: JobId, job: Job) {
        self.waiting.push(Waiting { id, job, overtaken: 0 });
    }

    /// Takes a job that is given up.
    pub fn remove(&mut self, id: JobId) -> Option<Job> {
        let place = self.waiting.iter().position(|waiting| waiting.id == id)?;
        Some(self.waiting.remove(place).job)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Waiting> {
        self.waiting.iter()
    }

    /// The jobs in the order in which they may be admitted: each with whether those behind it must wait until it is.
    pub fn order(&self) -> Vec<(JobId, bool)> {
        let mut order: Vec<_> = self.waiting.iter().collect();
        let out_of_patience = |waiting: &Waiting| waiting.overtaken >= self.patience;
        // The sort is stable: of equals, who came first.
        order.sort_by_key(|waiting| {
            if out_of_patience(waiting) { (false, 0) } else { (true, -i64::from(waiting.job.priority)) }
        });
        order.into_iter().map(|waiting| (waiting.id, out_of_patience(waiting))).collect()
    }

    /// Takes a job that is admitted; all who came before it are overtaken.
    pub fn admit(&mut self, id: JobId) -> Job {
        let place = self.waiting.iter().position(|waiting| waiting.id == id).expect("a job that waits");
        self.waiting[..place].iter_mut().for_each(|waiting| waiting.overtaken += 1);
        self.waiting.remove(place).job
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(patience: usize, priorities: &[i32]) -> Queue {
        let mut queue = Queue::new(patience);
        for (id, priority) in (0..).zip(priorities) {
            queue.push(JobId(id), Job { priority: *priority, ..Job::default() });
        }
        queue
    }

    fn ids(queue: &Queue) -> Vec<u64> {
        queue.order().into_iter().map(|(id, _)| id.0).collect()
    }

    #[test]
    fn priorities_go_first_and_then_who_came_first() {
        assert_eq!(ids(&queue(9, &[0, 5, 0, i32::MIN, 5, i32::MAX])), [5, 1, 4, 0, 2, 3]);
    }

    #[test]
    fn nobody_is_overtaken_more_often_than_patience_says() {
        let mut queue = queue(2, &[0, 1, 1, 1]);
        queue.admit(JobId(1));
        assert_eq!(ids(&queue), [2, 3, 0]);
        queue.admit(JobId(2));
        assert_eq!(
            queue.order(),
            [(JobId(0), true), (JobId(3), false)],
            "out of patience, it holds others up"
        );
        queue.admit(JobId(0));
        assert_eq!(ids(&queue), [3]);
        assert!(queue.remove(JobId(3)).is_some() && queue.remove(JobId(3)).is_none() && queue.is_empty());
    }
}

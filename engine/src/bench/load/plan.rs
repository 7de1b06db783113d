use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Exp1};

use super::{Length, Lengths, LoadError};

/// What is to arrive.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOptions {
    /// How long requests are; of a session the first prompt, and all answers.
    pub lengths: Lengths,
    /// That many times as long.
    pub scale: f64,
    /// Sessions that arrive.
    pub sessions: usize,
    /// Requests of a session, each with all that was said before.
    pub turns: usize,
    /// Tokens that each turn but the first one adds.
    pub question: usize,
    /// Between an answer and the next question.
    pub think: Duration,
    /// What all of it is drawn from.
    pub seed: u64,
}

/// One request of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Tokens behind those that were there before.
    pub question: usize,
    /// Tokens of the answer.
    pub output: usize,
}

/// Requests one after the other, the first of them at a time that depends on nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// From the begin on.
    pub arrival: Duration,
    /// Its requests.
    pub turns: Vec<Turn>,
}

/// Sessions in the order of their arrival.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The sessions.
    pub sessions: Vec<Session>,
    /// Between an answer and the next question.
    pub think: Duration,
}

impl PlanOptions {
    /// Tokens of the longest request that can be drawn, its answer included.
    pub fn longest(&self) -> usize {
        let Length { input, output } = self.lengths.longest(self.scale);
        let more = self.question.saturating_add(output).saturating_mul(self.turns.saturating_sub(1));
        input.saturating_add(output).saturating_add(more)
    }
}

impl Plan {
    /// Draws a plan: a Poisson process of `rate` sessions a second, or all at once.
    ///
    /// Lengths do not depend on the rate, and arrivals at another rate are the same ones, stretched: points of a sweep differ in their rate alone.
    ///
    /// # Errors
    /// [`LoadError::Setting`].
    pub fn draw(options: &PlanOptions, rate: Option<f64>) -> Result<Self, LoadError> {
        let refuse = |name, value: String, allowed| Err(LoadError::Setting { name, value, allowed });
        if let Some(rate) = rate.filter(|rate| !(1e-6..=1e6).contains(rate)) {
            return refuse("rate", rate.to_string(), "from 0.000001 to 1000000 sessions a second, or inf");
        }
        if !(1e-6..=1e3).contains(&options.scale) {
            return refuse("scale", options.scale.to_string(), "a factor from 0.000001 to 1000");
        }
        for (name, count) in
            [("requests", options.sessions), ("turns", options.turns), ("question", options.question)]
        {
            if !(1..=10_000_000).contains(&count) {
                return refuse(name, count.to_string(), "from 1 to 10000000");
            }
        }
        let mut lengths = ChaCha8Rng::seed_from_u64(options.seed);
        let mut gaps = ChaCha8Rng::seed_from_u64(options.seed);
        gaps.set_stream(1);
        let mut arrival = 0.0;
        let sessions = (0..options.sessions).map(|session| {
            if let (Some(rate), true) = (rate, session > 0) {
                let gap: f64 = Exp1.sample(&mut gaps);
                arrival += gap / rate;
            }
            let turns = (0..options.turns).map(|turn| {
                let Length { input, output } = options.lengths.draw(options.scale, &mut lengths);
                Turn { question: if turn == 0 { input } else { options.question }, output }
            });
            Session { arrival: Duration::from_secs_f64(arrival), turns: turns.collect() }
        });
        Ok(Self { sessions: sessions.collect(), think: options.think })
    }

    /// Requests of all sessions.
    pub fn requests(&self) -> usize {
        self.sessions.iter().map(|session| session.turns.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> PlanOptions {
        PlanOptions {
            lengths: Lengths::LongGenBench,
            scale: 0.01,
            sessions: 4000,
            turns: 2,
            question: 7,
            think: Duration::ZERO,
            seed: 5,
        }
    }

    #[test]
    fn arrivals_are_a_poisson_process_of_the_rate() {
        let plan = Plan::draw(&options(), Some(8.0)).unwrap();
        let arrivals: Vec<f64> = plan.sessions.iter().map(|session| session.arrival.as_secs_f64()).collect();
        assert_eq!(arrivals[0], 0.0);
        let gaps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| *gap >= 0.0));
        // Gaps are exponential: mean 1/rate, as large a deviation, and a share of 1/e is longer than the mean.
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        let longer = gaps.iter().filter(|gap| **gap > 0.125).count() as f64 / gaps.len() as f64;
        assert!((mean * 8.0 - 1.0).abs() < 0.05, "{mean}");
        assert!((deviation * 8.0 - 1.0).abs() < 0.07, "{deviation}");
        assert!((longer - (-1.0_f64).exp()).abs() < 0.03, "{longer}");
    }

    #[test]
    fn a_sweep_asks_the_same_at_every_rate() {
        let (slow, fast) =
            (Plan::draw(&options(), Some(1.0)).unwrap(), Plan::draw(&options(), Some(4.0)).unwrap());
        let at_once = Plan::draw(&options(), None).unwrap();
        for ((slow, fast), at_once) in slow.sessions.iter().zip(&fast.sessions).zip(&at_once.sessions) {
            assert_eq!((&slow.turns, &slow.turns), (&fast.turns, &at_once.turns));
            assert!((slow.arrival.as_secs_f64() - 4.0 * fast.arrival.as_secs_f64()).abs() < 1e-5);
            assert_eq!(at_once.arrival, Duration::ZERO);
        }
        assert_eq!(slow, Plan::draw(&options(), Some(1.0)).unwrap());
        assert_ne!(slow, Plan::draw(&PlanOptions { seed: 6, ..options() }, Some(1.0)).unwrap());
        assert_eq!(slow.requests(), 8000);
    }

    #[test]
    fn later_turns_add_a_question_each() {
        let options = PlanOptions {
            lengths: "100:10".parse().unwrap(),
            scale: 1.0,
            sessions: 1,
            turns: 3,
            ..options()
        };
        let plan = Plan::draw(&options, None).unwrap();
        let turn = |question| Turn { question, output: 10 };
        assert_eq!(plan.sessions[0].turns, [turn(100), turn(7), turn(7)]);
        // 100 and an answer of 10, then twice a question of 7 and an answer.
        assert_eq!(options.longest(), 144);
    }

    #[test]
    fn what_cannot_be_drawn_is_refused() {
        let refused = |options: PlanOptions, rate: Option<f64>, name: &str| {
            let error = Plan::draw(&options, rate).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        };
        refused(options(), Some(0.0), "rate is 0:");
        refused(options(), Some(-1.0), "rate is -1:");
        refused(options(), Some(f64::NAN), "rate is NaN:");
        refused(PlanOptions { scale: 0.0, ..options() }, None, "scale is 0:");
        refused(PlanOptions { turns: 0, ..options() }, None, "turns is 0:");
        refused(PlanOptions { sessions: 0, ..options() }, None, "requests is 0:");
    }
}

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Fault, Record, ServerFigures};

/// How some times are spread, in milliseconds. Between two ranks a percentile is interpolated, as NumPy does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// How many there are.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// Their median.
    pub p50: f64,
    /// Above it is a tenth.
    pub p90: f64,
    /// Above it is a hundredth.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Percentiles {
    /// Of some seconds; none of none.
    pub fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        let max = *seconds.last()?;
        let at = |share: f64| {
            let rank = share * (seconds.len() - 1) as f64;
            let (below, above) = (seconds[rank.floor() as usize], seconds[rank.ceil() as usize]);
            (below + (above - below) * rank.fract()) * 1e3
        };
        Some(Self {
            count: seconds.len(),
            mean: seconds.iter().sum::<f64>() / seconds.len() as f64 * 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: max * 1e3,
        })
    }
}

/// What an answer must not take longer than to count as good, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Slo {
    /// From arrival to the first token.
    pub ttft_ms: Option<f64>,
    /// From one token to the next, in the mean over the answer.
    pub tpot_ms: Option<f64>,
    /// From arrival to the end.
    pub e2e_ms: Option<f64>,
}

impl Slo {
    /// Whether anything is demanded.
    pub fn is_some(&self) -> bool {
        [self.ttft_ms, self.tpot_ms, self.e2e_ms].iter().any(Option::is_some)
    }

    /// Whether a request was answered, and in time.
    pub fn is_met(&self, record: &Record) -> bool {
        let within = |seconds: Option<f64>, limit: Option<f64>| match (seconds, limit) {
            (Some(seconds), Some(limit)) => seconds * 1e3 <= limit,
            // An answer of one token has no time between tokens.
            (None, _) | (_, None) => true,
        };
        record.fault.is_none()
            && within(record.ttft(), self.ttft_ms)
            && within(record.tpot(), self.tpot_ms)
            && within(Some(record.end - record.scheduled), self.e2e_ms)
    }
}

/// What the requests of one rate came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadPoint {
    /// Sessions that arrived a second; none if all came at once.
    pub rate: Option<f64>,
    /// Requests that were planned.
    pub planned: usize,
    /// Those that were sent.
    pub sent: usize,
    /// Those that were answered to their end.
    pub completed: usize,
    /// The others that were sent, by what went wrong.
    pub faults: BTreeMap<String, usize>,
    /// The first message of each kind.
    pub messages: BTreeMap<String, String>,
    /// From the first arrival to the last end.
    pub seconds: f64,
    /// Tokens of prompts that were answered, at least in part.
    pub prompt_tokens: u64,
    /// Tokens of answers, those of unfinished ones counted by chunk.
    pub output_tokens: u64,
    /// Whether the server counts no tokens, so that a chunk stands for one everywhere.
    pub tokens_by_chunk: bool,
    /// Completed requests a second.
    pub requests_per_s: f64,
    /// Tokens of answers a second.
    pub output_tokens_per_s: f64,
    /// Tokens of prompts and answers a second.
    pub total_tokens_per_s: f64,
    /// From arrival to the first text.
    pub ttft_ms: Option<Percentiles>,
    /// From the first text to the last over all tokens but one, of each completed request.
    pub tpot_ms: Option<Percentiles>,
    /// From one chunk of text to the next, of all requests together.
    pub itl_ms: Option<Percentiles>,
    /// From arrival to the end, of completed requests.
    pub e2e_ms: Option<Percentiles>,
    /// From the time at which a request should be sent to when it was: of this machine, not of the server.
    pub late_ms: Option<Percentiles>,
    /// Requests that decoded at a time, in the mean: from first to last text, over the time of the run.
    pub mean_batch: f64,
    /// Requests that were there at a time, in the mean, waiting ones included.
    pub mean_in_flight: f64,
    /// Requests a second that were answered in time, where that is demanded.
    pub goodput_per_s: Option<f64>,
    /// Their share of those that were planned.
    pub good_share: Option<f64>,
    /// What the server counted, if it is `spinkv serve`.
    pub server: Option<ServerFigures>,
}

impl LoadPoint {
    /// Works out what `records` come to.
    pub fn of(
        rate: Option<f64>,
        planned: usize,
        records: &[Record],
        slo: &Slo,
        server: Option<ServerFigures>,
    ) -> Self {
        let begin = records.iter().map(|record| record.scheduled).fold(f64::INFINITY, f64::min);
        let end = records.iter().map(|record| record.end).fold(0.0, f64::max);
        let seconds = (end - begin).max(1e-9);
        let per_s = |count: f64| count / seconds;
        let completed: Vec<_> = records.iter().filter(|record| record.fault.is_none()).collect();
        let (mut faults, mut messages) = (BTreeMap::new(), BTreeMap::new());
        for fault in records.iter().filter_map(|record| record.fault.as_ref()) {
            *faults.entry(fault.kind()).or_default() += 1;
            messages.entry(fault.kind()).or_insert_with(|| Fault::to_string(fault));
        }
        let answered = records.iter().filter(|record| !record.chunks.is_empty() || record.fault.is_none());
        let prompt_tokens: u64 = answered.map(|record| record.prompt_tokens).sum();
        let output_tokens: u64 = records.iter().map(Record::output_tokens).sum();
        let decoding: f64 = records.iter().filter_map(Record::decoding).sum();
        let there: f64 = records.iter().map(|record| record.end - record.scheduled).sum();
        let good = completed.iter().filter(|record| slo.is_met(record)).count() as f64;
        let gaps = records.iter().flat_map(|record| record.chunks.windows(2).map(|pair| pair[1] - pair[0]));
        Self {
            rate,
            planned,
            sent: records.len(),
            completed: completed.len(),
            faults,
            messages,
            seconds,
            prompt_tokens,
            output_tokens,
            tokens_by_chunk: completed.iter().any(|record| record.usage.is_none()),
            requests_per_s: per_s(completed.len() as f64),
            output_tokens_per_s: per_s(output_tokens as f64),
            total_tokens_per_s: per_s((prompt_tokens + output_tokens) as f64),
            ttft_ms: Percentiles::of(records.iter().filter_map(Record::ttft).collect()),
            tpot_ms: Percentiles::of(completed.iter().filter_map(|record| record.tpot()).collect()),
            itl_ms: Percentiles::of(gaps.collect()),
            e2e_ms: Percentiles::of(completed.iter().map(|record| record.end - record.scheduled).collect()),
            late_ms: Percentiles::of(records.iter().map(|record| record.sent - record.scheduled).collect()),
            mean_batch: per_s(decoding),
            mean_in_flight: per_s(there),
            goodput_per_s: slo.is_some().then(|| per_s(good)),
            good_share: slo.is_some().then(|| good / planned.max(1) as f64),
            server,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request that arrives at `scheduled`, with chunks at these times.
    fn record(scheduled: f64, chunks: &[f64], tokens: u64) -> Record {
        let end = chunks.last().copied().unwrap_or(scheduled);
        Record {
            session: 0,
            turn: 0,
            scheduled,
            sent: scheduled + 0.25,
            chunks: chunks.to_vec(),
            finished: Some(end),
            end,
            prompt_tokens: 100,
            usage: Some(tokens),
            fault: None,
        }
    }

    #[test]
    fn percentiles_are_interpolated() {
        let all = Percentiles::of(vec![0.004, 0.001, 0.003, 0.002, 0.010]).unwrap();
        // Ranks 2, 3.6 and 3.96 of 0 to 4.
        assert_eq!((all.count, all.max, all.p50), (5, 10.0, 3.0));
        assert!(
            (all.mean - 4.0).abs() < 1e-9 && (all.p90 - 7.6).abs() < 1e-9 && (all.p99 - 9.76).abs() < 1e-9
        );
        let one = Percentiles::of(vec![0.5]).unwrap();
        assert_eq!((one.p50, one.p90, one.p99), (500.0, 500.0, 500.0));
        assert_eq!(Percentiles::of(Vec::new()), None);
    }

    /// Two requests over 8 seconds, one of them cut off, worked out by hand.
    #[test]
    fn figures_follow_from_the_records() {
        // First text after 1 s, then 2 chunks of 2 tokens in 2 s each.
        let whole = record(0.0, &[1.0, 3.0, 5.0], 5);
        let mut cut = record(4.0, &[6.0, 7.0], 0);
        (cut.usage, cut.finished, cut.end, cut.fault) = (None, None, 8.0, Some(Fault::CutOff));
        let mut refused = record(2.0, &[], 0);
        (refused.usage, refused.finished, refused.end) = (None, None, 2.5);
        let (code, message) = (Some("queue_full".to_owned()), "full".to_owned());
        refused.fault = Some(Fault::Status { status: 429, code, message });
        let slo = Slo { ttft_ms: Some(1500.0), ..Slo::default() };
        let point = LoadPoint::of(Some(0.5), 4, &[whole, cut, refused], &slo, None);
        assert_eq!((point.planned, point.sent, point.completed, point.seconds), (4, 3, 1, 8.0));
        assert_eq!(
            point.faults,
            BTreeMap::from([("429 queue_full".to_owned(), 1), ("cut_off".to_owned(), 1)])
        );
        assert_eq!(point.messages["429 queue_full"], "status 429: full");
        // Usage says 5; of the one that was cut off, 2 chunks. What was refused read no prompt.
        assert_eq!((point.output_tokens, point.prompt_tokens, point.tokens_by_chunk), (7, 200, false));
        assert_eq!((point.output_tokens_per_s, point.total_tokens_per_s), (7.0 / 8.0, 207.0 / 8.0));
        assert_eq!(point.requests_per_s, 1.0 / 8.0);
        // From arrival, not from when it was sent.
        let ttft = point.ttft_ms.unwrap();
        assert_eq!((ttft.count, ttft.p50, ttft.max), (2, 1500.0, 2000.0));
        // 4 s for the 4 tokens behind the first one.
        assert_eq!(point.tpot_ms.unwrap().p50, 1000.0);
        let itl = point.itl_ms.unwrap();
        assert_eq!((itl.count, itl.p50, itl.max), (3, 2000.0, 2000.0));
        assert_eq!(point.e2e_ms.unwrap().max, 5000.0);
        assert_eq!(point.late_ms.unwrap().p99, 250.0);
        // In decode: 1 to 5 s, and 6 to 8 s. There: 5, 4 and half a second.
        assert_eq!((point.mean_batch, point.mean_in_flight), (6.0 / 8.0, 9.5 / 8.0));
        assert_eq!((point.goodput_per_s, point.good_share), (Some(1.0 / 8.0), Some(0.25)));
    }

    #[test]
    fn goodput_needs_every_demand() {
        let answer = record(1.0, &[2.0, 4.0], 3);
        let met = |ttft_ms, tpot_ms, e2e_ms| Slo { ttft_ms, tpot_ms, e2e_ms }.is_met(&answer);
        assert!(met(None, None, None));
        assert!(met(Some(1000.0), Some(1000.0), Some(3000.0)));
        assert!(
            !met(Some(999.0), None, None) && !met(None, Some(999.0), None) && !met(None, None, Some(2999.0))
        );
        let mut broken = answer.clone();
        broken.fault = Some(Fault::Broken(String::new()));
        assert!(!Slo::default().is_met(&broken), "what is not answered is never good");
        // One token: nothing between tokens to be late.
        assert!(Slo { tpot_ms: Some(1.0), ..Slo::default() }.is_met(&record(0.0, &[9.0], 1)));
        assert_eq!(LoadPoint::of(None, 1, &[answer], &Slo::default(), None).goodput_per_s, None);
    }

    /// An answer whose tokens have no text has its first token where its end is announced.
    #[test]
    fn an_answer_without_text_still_has_a_first_token() {
        let mut silent = record(1.0, &[], 1);
        (silent.finished, silent.end) = (Some(3.0), 3.0);
        assert_eq!((silent.ttft(), silent.tpot()), (Some(2.0), None));
        let point = LoadPoint::of(None, 1, &[silent], &Slo::default(), None);
        assert_eq!((point.output_tokens, point.prompt_tokens), (1, 100));
    }
}

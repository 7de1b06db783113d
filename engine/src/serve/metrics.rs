//! What the engine counts, as Prometheus reads it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use super::engine::{Phase, Status};
use super::job::Reason;

/// Upper bounds of the histograms' buckets, in seconds.
const BOUNDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// How often a duration fell below each bound.
#[derive(Clone, Debug, Default)]
pub(super) struct Histogram {
    /// The last one is of what is above all bounds.
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

impl Histogram {
    pub fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut below = 0;
        for (bound, count) in BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]).zip(self.counts) {
            below += count;
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {below}");
        }
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {below}", self.sum);
    }
}

/// Counts since the engine began.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    pub accepted: u64,
    pub refused: u64,
    pub failed: u64,
    pub finished: BTreeMap<Reason, u64>,
    pub prompt_tokens: u64,
    /// Of those, the ones that were not computed.
    pub cached_tokens: u64,
    pub generated_tokens: u64,
    /// From submission to the prompt's first layer.
    pub queue_time: Histogram,
    /// From submission to the first token.
    pub first_token: Histogram,
    /// Between two tokens of a request.
    pub per_token: Histogram,
    /// From submission to the end.
    pub whole: Histogram,
    /// Of a unit of work.
    pub step: Histogram,
}

pub(super) fn reason_name(reason: Reason) -> &'static str {
    match reason {
        Reason::EndToken => "end_token",
        Reason::StopText => "stop_text",
        Reason::Length => "length",
        Reason::Cancelled => "cancelled",
        Reason::Deadline => "deadline",
    }
}

impl Metrics {
    /// All of it, with what `status` says of the memory, in Prometheus' text format 0.0.4.
    pub fn render(&self, status: &Status) -> String {
        let mut out = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        let (load, counters, page) = (status.load, status.counters, status.page_bytes as f64);
        let ready = f64::from(u8::from(status.phase == Phase::Ready));
        family("spinkv_ready", "gauge", "Whether requests are taken.", &[("", ready)]);
        family(
            "spinkv_requests",
            "gauge",
            "Requests by state.",
            &[
                ("{state=\"waiting\"}", load.waiting as f64),
                ("{state=\"prompt\"}", load.prompts as f64),
                ("{state=\"decoding\"}", load.decoding as f64),
                ("{state=\"parked\"}", load.parked as f64),
            ],
        );
        let preemptions = status.preemptions as f64;
        family(
            "spinkv_preemptions_total",
            "counter",
            "Requests that were parked for others.",
            &[("", preemptions)],
        );
        family(
            "spinkv_requests_total",
            "counter",
            "Requests that were taken, refused for want of room or for good, or went wrong.",
            &[
                ("{outcome=\"accepted\"}", self.accepted as f64),
                ("{outcome=\"refused\"}", self.refused as f64),
                ("{outcome=\"failed\"}", self.failed as f64),
            ],
        );
        let finished: Vec<_> =
            [Reason::EndToken, Reason::StopText, Reason::Length, Reason::Cancelled, Reason::Deadline]
                .iter()
                .map(|reason| {
                    let count = self.finished.get(reason).copied().unwrap_or(0);
                    (format!("{{reason=\"{}\"}}", reason_name(*reason)), count as f64)
                })
                .collect();
        let finished: Vec<_> = finished.iter().map(|(labels, count)| (labels.as_str(), *count)).collect();
        family("spinkv_requests_finished_total", "counter", "Requests that ended, by why.", &finished);
        family(
            "spinkv_tokens_total",
            "counter",
            "Tokens of prompts, those of them whose pages were there already, and tokens that were generated.",
            &[
                ("{kind=\"prompt\"}", self.prompt_tokens as f64),
                ("{kind=\"cached\"}", self.cached_tokens as f64),
                ("{kind=\"generated\"}", self.generated_tokens as f64),
            ],
        );
        family(
            "spinkv_selected_pages_total",
            "counter",
            "Pages that decode steps selected, by whether the GPU had them.",
            &[("{found=\"hit\"}", counters.hits as f64), ("{found=\"miss\"}", counters.misses as f64)],
        );
        family(
            "spinkv_moved_bytes_total",
            "counter",
            "Bytes of KV pages that were moved between the tiers.",
            &[
                ("{direction=\"to_gpu\"}", counters.fetched_pages() as f64 * page),
                ("{direction=\"to_host\"}", counters.offloaded_pages as f64 * page),
            ],
        );
        family(
            "spinkv_evicted_pages_total",
            "counter",
            "Pages that left a cache, for others or since it shrank.",
            &[
                ("{cause=\"replaced\"}", counters.evicted_pages as f64),
                ("{cause=\"shrunk\"}", counters.shrunk_pages as f64),
            ],
        );
        let prefixes = status.prefixes.unwrap_or_default();
        family(
            "spinkv_prefix_blocks",
            "gauge",
            "Blocks of prompts that are kept for others.",
            &[("", prefixes.blocks as f64)],
        );
        family(
            "spinkv_prefix_bytes",
            "gauge",
            "Host memory of those blocks, what requests have of it as well included.",
            &[("", prefixes.bytes as f64)],
        );
        family(
            "spinkv_prefix_lookups_total",
            "counter",
            "Prompts that were looked up among those blocks.",
            &[("", prefixes.lookups as f64)],
        );
        family(
            "spinkv_prefix_evictions_total",
            "counter",
            "Blocks that were evicted, for others or for requests.",
            &[("", prefixes.evicted_blocks as f64)],
        );
        let (gpu, host) = (status.usage.gpu, status.usage.host);
        family(
            "spinkv_kv_bytes",
            "gauge",
            "KV memory in use, by tier and kind.",
            &[
                ("{tier=\"gpu\",kind=\"steady_pages\"}", gpu.steady_pages as f64),
                ("{tier=\"gpu\",kind=\"cache_pages\"}", gpu.cache_pages as f64),
                ("{tier=\"gpu\",kind=\"in_flight_pages\"}", gpu.in_flight_pages as f64),
                ("{tier=\"gpu\",kind=\"tables\"}", gpu.tables() as f64),
                ("{tier=\"gpu\",kind=\"summaries\"}", gpu.summaries as f64),
                ("{tier=\"gpu\",kind=\"key_factors\"}", gpu.key_factors() as f64),
                ("{tier=\"host\",kind=\"pages\"}", host.pages as f64),
                ("{tier=\"host\",kind=\"tables\"}", host.tables() as f64),
            ],
        );
        let histograms = [
            (&self.queue_time, "spinkv_queue_seconds", "From submission to the prompt's first layer."),
            (&self.first_token, "spinkv_time_to_first_token_seconds", "From submission to the first token."),
            (&self.per_token, "spinkv_time_per_output_token_seconds", "Between two tokens of a request."),
            (&self.whole, "spinkv_request_seconds", "From submission to the end."),
            (&self.step, "spinkv_step_seconds", "Of a unit of work: a decode step and a prompt's layers."),
        ];
        histograms.iter().for_each(|(histogram, name, help)| histogram.write(&mut out, name, help));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_what_is_below_each_bound() {
        let mut histogram = Histogram::default();
        for millis in [1, 2, 30, 70_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut out = String::new();
        histogram.write(&mut out, "x", "X.");
        for line in [
            "x_bucket{le=\"0.001\"} 1",
            "x_bucket{le=\"0.0025\"} 2",
            "x_bucket{le=\"0.025\"} 2",
            "x_bucket{le=\"0.05\"} 3",
            "x_bucket{le=\"60\"} 3",
            "x_bucket{le=\"+Inf\"} 4",
            "x_count 4",
            "x_sum 70.033",
        ] {
            assert!(out.lines().any(|found| found == line), "{line:?} is missing in {out}");
        }
    }

    #[test]
    fn every_sample_has_a_family() {
        let text = Metrics::default().render(&Status::default());
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().expect("a name");
            let family =
                ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(text.contains(&format!("# TYPE {family} ")), "{line}");
            assert!(line.rsplit(' ').next().is_some_and(|value| value.parse::<f64>().is_ok()), "{line}");
        }
    }
}

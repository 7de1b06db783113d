use serde::{Deserialize, Serialize};

/// What `/metrics` of `spinkv serve` says at one time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape {
    decode_seconds: f64,
    hits: f64,
    misses: f64,
    to_gpu_bytes: f64,
    to_host_bytes: f64,
    preemptions: f64,
    prompt_tokens: f64,
    cached_tokens: f64,
    generated_tokens: f64,
}

/// What the server itself counted while a load was on it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerFigures {
    /// Requests that decoded at a time, in the mean: the time between all tokens of all requests, over the time of the run.
    pub mean_batch: f64,
    /// Selected pages that were on the GPU; none if none was selected from a cache.
    pub hit_ratio: Option<f64>,
    /// Bytes of KV pages that came from the host.
    pub to_gpu_bytes: f64,
    /// Bytes of KV pages that went to the host.
    pub to_host_bytes: f64,
    /// Requests that were parked for others.
    pub preemptions: f64,
    /// Tokens of prompts that were begun.
    pub prompt_tokens: f64,
    /// Those of them whose pages were there already.
    #[serde(default)]
    pub cached_tokens: f64,
    /// Tokens that were generated.
    pub generated_tokens: f64,
}

impl Scrape {
    /// Reads Prometheus' text format; none if it is not this server's.
    pub fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| -> Option<f64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
            line.trim().parse().ok()
        };
        Some(Self {
            decode_seconds: value("spinkv_time_per_output_token_seconds_sum")?,
            hits: value("spinkv_selected_pages_total{found=\"hit\"}")?,
            misses: value("spinkv_selected_pages_total{found=\"miss\"}")?,
            to_gpu_bytes: value("spinkv_moved_bytes_total{direction=\"to_gpu\"}")?,
            to_host_bytes: value("spinkv_moved_bytes_total{direction=\"to_host\"}")?,
            preemptions: value("spinkv_preemptions_total")?,
            prompt_tokens: value("spinkv_tokens_total{kind=\"prompt\"}")?,
            cached_tokens: value("spinkv_tokens_total{kind=\"cached\"}")?,
            generated_tokens: value("spinkv_tokens_total{kind=\"generated\"}")?,
        })
    }

    /// What was counted from `self` to `later`, over the seconds of the run.
    pub fn until(&self, later: &Self, seconds: f64) -> ServerFigures {
        let (hits, misses) = (later.hits - self.hits, later.misses - self.misses);
        ServerFigures {
            mean_batch: (later.decode_seconds - self.decode_seconds) / seconds.max(1e-9),
            hit_ratio: (hits + misses > 0.0).then(|| hits / (hits + misses)),
            to_gpu_bytes: later.to_gpu_bytes - self.to_gpu_bytes,
            to_host_bytes: later.to_host_bytes - self.to_host_bytes,
            preemptions: later.preemptions - self.preemptions,
            prompt_tokens: later.prompt_tokens - self.prompt_tokens,
            cached_tokens: later.cached_tokens - self.cached_tokens,
            generated_tokens: later.generated_tokens - self.generated_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(seconds: f64, hits: u64) -> String {
        format!(
            "# TYPE spinkv_preemptions_total counter\nspinkv_preemptions_total 2\n\
             spinkv_time_per_output_token_seconds_sum {seconds}\nspinkv_selected_pages_total{{found=\"hit\"}} {hits}\n\
             spinkv_selected_pages_total{{found=\"miss\"}} 10\nspinkv_moved_bytes_total{{direction=\"to_gpu\"}} 4096\n\
             spinkv_moved_bytes_total{{direction=\"to_host\"}} 0\nspinkv_tokens_total{{kind=\"prompt\"}} 7\n\
             spinkv_tokens_total{{kind=\"cached\"}} {hits}\n\
             spinkv_tokens_total{{kind=\"generated\"}} 1e3\n"
        )
    }

    #[test]
    fn counters_are_read_and_subtracted() {
        let (before, after) =
            (Scrape::parse(&text(1.5, 20)).unwrap(), Scrape::parse(&text(7.5, 50)).unwrap());
        let figures = before.until(&after, 4.0);
        assert_eq!((figures.mean_batch, figures.hit_ratio), (1.5, Some(1.0)));
        assert_eq!(figures.cached_tokens, 30.0);
        assert_eq!(before.until(&before, 4.0).hit_ratio, None);
        assert_eq!((after.generated_tokens, figures.generated_tokens), (1000.0, 0.0));
        assert_eq!(Scrape::parse("vllm:num_requests_running 3\n"), None);
    }
}

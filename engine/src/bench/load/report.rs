use std::fmt;

use serde::{Deserialize, Serialize};

use super::{LoadPoint, Percentiles, Slo};

/// A sweep over rates, and what was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// What was measured, as plots name it.
    pub name: String,
    /// The endpoint.
    pub url: String,
    /// The model.
    pub model: String,
    /// How long requests are.
    pub lengths: String,
    /// That many times as long.
    pub scale: f64,
    /// Sessions that arrive at each rate.
    pub sessions: usize,
    /// Requests of a session.
    pub turns: usize,
    /// Seed of lengths, arrivals and prompts.
    pub seed: u64,
    /// What answers must keep to, to be good.
    pub slo: Slo,
    /// What the figures are to be read with.
    pub notes: Vec<String>,
    /// What came of each rate.
    pub points: Vec<LoadPoint>,
}

impl LoadReport {
    /// One report of each name, in order, with the points of all of that name: of two of one rate, the later.
    pub fn joined(reports: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut joined: Vec<Self> = Vec::new();
        for report in reports {
            let Some(same) = joined.iter_mut().find(|earlier| earlier.name == report.name) else {
                joined.push(report);
                continue;
            };
            same.points.retain(|point| report.points.iter().all(|later| later.rate != point.rate));
            same.points.extend(report.points);
        }
        joined
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, url, model, lengths, scale, sessions, turns, seed, slo, .. } = self;
        let of_turns = if *turns > 1 { format!(" of {turns} turns") } else { String::new() };
        writeln!(
            f,
            "{name}: {model} at {url}\n  {lengths} x {scale}, {sessions} sessions{of_turns} at each rate, seed {seed}"
        )?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  {note}"))?;
        writeln!(
            f,
            "\n  {:>6} {:>11} {:>8} {:>8} {:>9} {:>9} {:>7} {:>9} {:>9}",
            "rate", "answered", "seconds", "req/s", "out tok/s", "all tok/s", "batch", "in flight", "good/s"
        )?;
        for point in &self.points {
            writeln!(
                f,
                "  {:>6} {:>11} {:>8.2} {:>8.3} {:>9.1} {:>9.1} {:>7.2} {:>9.2} {:>9}",
                rate(point),
                format!("{}/{}", point.completed, point.planned),
                point.seconds,
                point.requests_per_s,
                point.output_tokens_per_s,
                point.total_tokens_per_s,
                point.mean_batch,
                point.mean_in_flight,
                point.goodput_per_s.map_or_else(|| "-".to_owned(), |good| format!("{good:.3}"))
            )?;
        }
        write!(f, "\n  {:>6} {:<5}", "rate", "ms")?;
        writeln!(f, " {:>7} {:>9} {:>9} {:>9} {:>9} {:>9}", "of", "mean", "p50", "p90", "p99", "max")?;
        for point in &self.points {
            for (name, times) in [
                ("TTFT", point.ttft_ms),
                ("TPOT", point.tpot_ms),
                ("ITL", point.itl_ms),
                ("E2E", point.e2e_ms),
            ] {
                let Some(Percentiles { count, mean, p50, p90, p99, max }) = times else { continue };
                writeln!(
                    f,
                    "  {:>6} {name:<5} {count:>7} {mean:>9.1} {p50:>9.1} {p90:>9.1} {p99:>9.1} {max:>9.1}",
                    rate(point)
                )?;
            }
        }
        self.server(f)?;
        self.faults(f)?;
        let demands = [("TTFT", slo.ttft_ms), ("TPOT", slo.tpot_ms), ("E2E", slo.e2e_ms)];
        let demands = demands.iter().filter_map(|(name, limit)| Some(format!("{name} {} ms", (*limit)?)));
        let demands: Vec<_> = demands.collect();
        if !demands.is_empty() {
            writeln!(f, "\n  good: {}", demands.join(", "))?;
        }
        Ok(())
    }
}

impl LoadReport {
    fn server(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.points.iter().all(|point| point.server.is_none()) {
            return Ok(());
        }
        writeln!(
            f,
            "\n  {:>6} {:>7} {:>9} {:>13} {:>13} {:>11} {:>13}   by the server",
            "rate", "batch", "hit ratio", "from host", "to host", "preemptions", "cached"
        )?;
        for point in &self.points {
            let Some(server) = point.server else { continue };
            let mib = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
            writeln!(
                f,
                "  {:>6} {:>7.2} {:>9} {:>13} {:>13} {:>11} {:>13}",
                rate(point),
                server.mean_batch,
                server.hit_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
                mib(server.to_gpu_bytes),
                mib(server.to_host_bytes),
                server.preemptions,
                format!("{} of {}", server.cached_tokens, server.prompt_tokens)
            )?;
        }
        Ok(())
    }

    fn faults(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for point in &self.points {
            for (kind, count) in &point.faults {
                let message = point.messages.get(kind).map_or("", String::as_str);
                writeln!(f, "\n  {}: {count} x {kind}: {message}", rate(point))?;
            }
            let unsent = point.planned - point.sent;
            if unsent > 0 {
                writeln!(f, "\n  {}: {unsent} requests were not sent", rate(point))?;
            }
        }
        Ok(())
    }
}

/// A point's rate, as it is given to `--rates`.
fn rate(point: &LoadPoint) -> String {
    point.rate.map_or_else(|| "inf".to_owned(), |rate| rate.to_string())
}

//! What a run of the GPU's bench found: as a table, and as JSON.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::sampling::Statistics;
use crate::units;

/// A run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    /// What its maker calls it.
    pub gpu: String,
    /// Newest CUDA that the driver knows.
    pub driver: String,
    /// Samples of each row.
    pub repeats: usize,
    /// In the order in which they ran.
    pub rows: Vec<Row>,
}

/// One measured line. JSON of before rows had all of these fields can still be read.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// Kernel or ceiling.
    pub what: String,
    /// Its sizes.
    pub shape: String,
    /// Tokens of a request, where one has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<u32>,
    /// Selected pages that were on the GPU, as the device counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hits: Option<u64>,
    /// Pages that were fetched, as the device counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub misses: Option<u64>,
    /// Bytes that must move.
    pub bytes: u64,
    /// Floating-point operations, where they bound the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops: Option<u64>,
    /// Median.
    pub us: f64,
    /// Where the median lies with 95% confidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_us: Option<[f64; 2]>,
    /// Fastest and slowest.
    pub range_us: [f64; 2],
    /// 10^9 bytes a second, of the median.
    pub gb_per_s: f64,
    /// 10^12 operations a second, of the median.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tflop_per_s: Option<f64>,
    /// Over the ceiling of the group, measured in the same run, if it has one.
    pub of_ceiling: Option<f64>,
}

/// Pages as the device counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Selected pages that were on the GPU, if selection took part.
    pub hits: Option<u64>,
    /// Pages that were fetched.
    pub misses: u64,
}

impl Row {
    /// The row of a launch that moves `bytes`.
    pub fn new(what: &str, shape: &str, bytes: u64, ceiling: Option<f64>, times: Statistics) -> Self {
        let gb_per_s = bytes as f64 / times.median_us / 1e3;
        Self {
            what: what.to_owned(),
            shape: shape.to_owned(),
            context_tokens: None,
            hits: None,
            misses: None,
            bytes,
            flops: None,
            us: times.median_us,
            interval_us: Some(times.interval_us),
            range_us: times.range_us,
            gb_per_s,
            tflop_per_s: None,
            of_ceiling: ceiling.map(|ceiling| gb_per_s / ceiling),
        }
    }

    /// The row of a launch that does `flops` floating-point operations, by which it is bound.
    pub fn with_flops(self, flops: u64) -> Self {
        Self { flops: Some(flops), tflop_per_s: Some(flops as f64 / self.us / 1e6), ..self }
    }

    /// The names of the table's columns.
    pub fn heading() -> String {
        format!(
            "{:14} {:42} {:>7} {:>7} {:>7} {:>8} {:>9} {:>17} {:>8} {:>7} {:>7}",
            "", "", "context", "hits", "misses", "bytes", "us", "range", "GB/s", "ceiling", "TFLOP/s"
        )
    }
}

/// A line of the table.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u64>| number.map_or(String::new(), |number| number.to_string());
        let context = number(self.context_tokens.map(u64::from));
        let bytes = units::bytes(self.bytes as f64);
        let range = format!("{:.1} - {:.1}", self.range_us[0], self.range_us[1]);
        let percent = self.of_ceiling.map_or(String::new(), |ratio| format!("{:.1}%", 100.0 * ratio));
        let tflop_per_s = self.tflop_per_s.map_or(String::new(), |rate| format!("{rate:.1}"));
        let Self { what, shape, us, gb_per_s, .. } = self;
        let (hits, misses) = (number(self.hits), number(self.misses));
        write!(
            f,
            "{what:14} {shape:42} {context:>7} {hits:>7} {misses:>7} {bytes:>8} {us:>9.1} {range:>17} {gb_per_s:>8.2} {percent:>7} {tflop_per_s:>7}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Statistics =
        Statistics { median_us: 285.6, interval_us: [285.0, 286.0], range_us: [284.9, 286.8] };

    #[test]
    fn a_row_has_its_rate_and_its_part_of_the_ceiling() {
        let row = Row::new("resolve+gather", "128 rows", 13_631_488, Some(55.38), TIMES);
        assert!((row.gb_per_s - 47.729).abs() < 1e-3, "{}", row.gb_per_s);
        let row = Row { context_tokens: Some(131_072), hits: Some(29_440), misses: Some(3_328), ..row };
        let line = row.to_string();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(
            words[3..],
            ["131072", "29440", "3328", "13.6", "MB", "285.6", "284.9", "-", "286.8", "47.73", "86.2%"]
        );
        assert_eq!(line.len(), Row::heading().len());

        let row = Row::new("prefill", "8192 tokens", 1 << 20, None, TIMES).with_flops(100_000_000_000);
        let line = row.to_string();
        assert_eq!(line.split_whitespace().last(), Some("350.1"));
        assert_eq!(line.len(), Row::heading().len());
        assert_eq!(serde_json::to_value(&row).unwrap()["flops"], 100_000_000_000_u64);
    }

    #[test]
    fn a_row_leaves_out_what_it_has_not_and_older_files_are_read() {
        let row = Row::new("copy", "512 MiB", 1 << 30, None, TIMES);
        let json = serde_json::to_value(&row).unwrap();
        assert!(
            json.get("hits").is_none()
                && json.get("flops").is_none()
                && json.get("tflop_per_s").is_none()
                && json.get("misses").is_none()
                && json.get("context_tokens").is_none()
        );
        let older = r#"{"what": "copy", "shape": "512 MiB", "bytes": 1, "us": 1.0, "range_us": [1.0, 2.0], "gb_per_s": 0.001, "of_ceiling": null}"#;
        assert_eq!(serde_json::from_str::<Row>(older).unwrap().interval_us, None);
    }
}

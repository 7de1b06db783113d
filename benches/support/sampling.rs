//! Criterion as the sampler of launches: how often each runs is given, not derived from a time, and what it found comes back.

use std::collections::HashSet;
use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::measurement::Measurement;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Samples that Criterion takes at least.
pub const LEAST_REPEATS: usize = 10;
/// Resamples of the bootstrap: few milliseconds a row, since a GPU waits meanwhile.
const RESAMPLES: usize = 2000;

/// A Criterion whose measurement is in nanoseconds, and where its files are.
pub struct Sampler<M: Measurement<Value = f64>> {
    criterion: Criterion<M>,
    folder: PathBuf,
    rows: HashSet<PathBuf>,
}

/// Who a row is: its folder among Criterion's.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a> {
    /// The rows that belong together.
    pub group: &'a str,
    /// What runs.
    pub what: &'a str,
    /// Its sizes.
    pub shape: &'a str,
}

/// What the samples of a row say, in us.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// Median.
    pub median_us: f64,
    /// Where the median lies with 95% confidence, by bootstrap.
    pub interval_us: [f64; 2],
    /// Fastest and slowest.
    pub range_us: [f64; 2],
}

impl<M: Measurement<Value = f64> + 'static> Sampler<M> {
    /// A sampler of `repeats` samples a row, at least [`LEAST_REPEATS`], that keeps Criterion's files in `folder`.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn new(measurement: M, repeats: usize, folder: &Path) -> Result<Self, Box<dyn Error>> {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        // Times of nothing, so that it warms up with one launch and takes each sample of one.
        let no_time = Duration::from_nanos(1);
        let criterion = Criterion::default()
            .with_measurement(measurement)
            .without_plots()
            .output_directory(folder)
            .sample_size(repeats.max(LEAST_REPEATS))
            .warm_up_time(no_time)
            .measurement_time(no_time)
            .nresamples(RESAMPLES);
        Ok(Self { criterion, folder: folder.to_owned(), rows: HashSet::new() })
    }

    /// Samples `once`, which gives the nanoseconds of one launch that moves `bytes`: a warm-up and the repeats. Criterion prints
    /// what it finds, and how it differs from what it found in this folder before.
    ///
    /// # Errors
    /// If Criterion could not write its files.
    pub fn sample(
        &mut self,
        name: Name<'_>,
        bytes: u64,
        mut once: impl FnMut() -> f64,
    ) -> Result<Statistics, Box<dyn Error>> {
        let group_name = file_name(name.group);
        let what = file_name(name.what);
        let mut shape = file_name(name.shape);
        while !self.rows.insert([&group_name, &what, &shape].iter().collect()) {
            shape.push('+');
        }
        let row: PathBuf = [&group_name, &what, &shape].iter().collect();
        let mut group = self.criterion.benchmark_group(&group_name);
        group.sampling_mode(SamplingMode::Flat);
        if bytes > 0 {
            group.throughput(Throughput::BytesDecimal(bytes));
        }
        group.bench_function(BenchmarkId::new(what, shape), |bencher| {
            bencher.iter_custom(|launches| (0..launches).map(|_| once()).sum());
        });
        group.finish();
        read(&self.folder.join(row).join("new"))
    }
}

/// The name as Criterion would write it, so that it leaves it as it is; it cuts at 64 bytes.
fn file_name(name: &str) -> String {
    name.replace(
        |letter: char| !(letter.is_ascii_graphic() || letter == ' ') || r#"?"/\*<>:|^"#.contains(letter),
        "_",
    )
    .chars()
    .take(60)
    .collect()
}

/// The statistics in Criterion's files.
fn read(folder: &Path) -> Result<Statistics, Box<dyn Error>> {
    #[derive(Deserialize)]
    struct Estimates {
        median: Estimate,
    }
    #[derive(Deserialize)]
    struct Estimate {
        confidence_interval: Interval,
        point_estimate: f64,
    }
    #[derive(Deserialize)]
    struct Interval {
        lower_bound: f64,
        upper_bound: f64,
    }
    #[derive(Deserialize)]
    struct Samples {
        iters: Vec<f64>,
        times: Vec<f64>,
    }
    let Estimates {
        median: Estimate { confidence_interval: Interval { lower_bound, upper_bound }, point_estimate },
    } = json(&folder.join("estimates.json"))?;
    let samples: Samples = json(&folder.join("sample.json"))?;
    let times = samples.times.iter().zip(&samples.iters).map(|(time, iterations)| time / iterations);
    let (least, most) =
        times.fold((f64::MAX, f64::MIN), |(least, most), time| (least.min(time), most.max(time)));
    Ok(Statistics {
        median_us: point_estimate / 1e3,
        interval_us: [lower_bound / 1e3, upper_bound / 1e3],
        range_us: [least / 1e3, most / 1e3],
    })
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T, Box<dyn Error>> {
    let failed = |error: String| format!("what Criterion found, {}: {error}", path.display());
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    Ok(serde_json::from_reader(file).map_err(|error| failed(error.to_string()))?)
}

#[cfg(test)]
mod tests {
    use criterion::measurement::ValueFormatter;

    use super::*;
    use crate::units::MicrosecondsAndGigabytes;

    /// Nothing measures here: the closures know their times.
    struct Told;

    impl Measurement for Told {
        type Intermediate = ();
        type Value = f64;

        fn start(&self) {}

        fn end(&self, (): ()) -> f64 {
            0.0
        }

        fn add(&self, one: &f64, other: &f64) -> f64 {
            one + other
        }

        fn zero(&self) -> f64 {
            0.0
        }

        fn to_f64(&self, value: &f64) -> f64 {
            *value
        }

        fn formatter(&self) -> &dyn ValueFormatter {
            &MicrosecondsAndGigabytes
        }
    }

    const NAME: Name<'_> =
        Name { group: "resolve", what: "resolve+gather", shape: "128 rows: 3/26 misses, ü" };

    #[test]
    fn the_launches_are_a_warm_up_and_the_repeats_and_their_statistics_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut sampler = Sampler::new(Told, 15, folder.path()).unwrap();
        let mut launches = 0;
        let found = sampler
            .sample(NAME, 4096, || {
                launches += 1;
                // The warm-up is the slowest by far; then 1 to 15 us.
                if launches == 1 { 1e9 } else { f64::from(launches - 1) * 1e3 }
            })
            .unwrap();
        assert_eq!(launches, 16);
        assert_eq!((found.median_us, found.range_us), (8.0, [1.0, 15.0]));
        let [low, high] = found.interval_us;
        assert!((1.0..8.0).contains(&low) && (8.0..15.1).contains(&high), "{low} to {high}");
    }

    #[test]
    fn rows_of_one_name_and_equal_times_are_rows_like_others() {
        let folder = tempfile::tempdir().unwrap();
        // A second run compares itself with the first.
        for us in [5.0, 7.0] {
            let mut sampler = Sampler::new(Told, 1, folder.path()).unwrap();
            for factor in [1.0, 2.0] {
                let found = sampler.sample(NAME, 0, || us * factor * 1e3).unwrap();
                assert_eq!((found.median_us, found.range_us), (us * factor, [us * factor; 2]));
            }
        }
    }

    #[test]
    fn long_names_differ_only_in_what_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let mut sampler = Sampler::new(Told, 10, folder.path()).unwrap();
        let long = "x".repeat(100);
        for (more, us) in [("a", 1.0), ("b", 2.0)] {
            let shape = format!("{long}{more}");
            let found = sampler.sample(Name { shape: &shape, ..NAME }, 1, || us * 1e3).unwrap();
            assert_eq!(found.median_us, us);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = Sampler::new(Told, 10, Path::new("/dev/null/criterion")).err().unwrap();
        assert!(error.to_string().contains("/dev/null/criterion"), "{error}");
    }
}

use std::fmt;
use std::str::FromStr;

use rand_chacha::ChaCha8Rng;
use rand_distr::{Beta, Distribution};

use super::LoadError;

/// Tokens of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Of the prompt.
    pub input: usize,
    /// Of the answer.
    pub output: usize,
}

/// How long requests are.
///
/// The two named ones have the least, the most and the mean of the workloads of these names in Spin's evaluation. Nothing else of them is published, so
/// between those they are drawn from Beta distributions with the right mean: synthetic, no data set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// Prompts of 32K to 120K tokens, 55K in the mean; answers of 500 to 15K, 5K in the mean.
    LongBenchV2,
    /// Prompts of 16K to 19K tokens, 18K in the mean; answers of 7K to 32K, 12K in the mean.
    LongGenBench,
    /// All of one length.
    Fixed(Length),
}

/// A Beta distribution stretched between two numbers of tokens.
struct Stretched {
    least: f64,
    most: f64,
    alpha: f64,
    beta: f64,
}

const K: f64 = 1024.0;

impl Stretched {
    fn draw(&self, rng: &mut ChaCha8Rng) -> f64 {
        let Self { least, most, alpha, beta } = *self;
        let beta = Beta::new(alpha, beta).expect("both parameters are positive constants");
        least + (most - least) * beta.sample(rng)
    }

    #[cfg(test)]
    fn mean(&self) -> f64 {
        self.least + (self.most - self.least) * self.alpha / (self.alpha + self.beta)
    }
}

impl Lengths {
    /// Input and output, where they are drawn.
    fn stretched(self) -> Option<[Stretched; 2]> {
        let of = |least, most, alpha, beta| Stretched { least, most, alpha, beta };
        match self {
            Self::LongBenchV2 => Some([of(32.0 * K, 120.0 * K, 1.2, 3.4), of(500.0, 15.0 * K, 1.2, 2.7)]),
            Self::LongGenBench => Some([of(16.0 * K, 19.0 * K, 4.0, 2.0), of(7.0 * K, 32.0 * K, 1.0, 4.0)]),
            Self::Fixed(_) => None,
        }
    }

    /// The next request's length, `scale` times as long; at least a token each.
    pub fn draw(self, scale: f64, rng: &mut ChaCha8Rng) -> Length {
        let [input, output] = match (self.stretched(), self) {
            (Some(drawn), _) => drawn.map(|drawn| drawn.draw(rng)),
            (None, Self::Fixed(Length { input, output })) => [input as f64, output as f64],
            (None, _) => unreachable!("what is not drawn is fixed"),
        };
        let scaled = |tokens: f64| ((tokens * scale).round() as usize).max(1);
        Length { input: scaled(input), output: scaled(output) }
    }

    /// The longest that can be drawn.
    pub fn longest(self, scale: f64) -> Length {
        let [input, output] = match (self.stretched(), self) {
            (Some(drawn), _) => drawn.map(|drawn| drawn.most),
            (None, Self::Fixed(Length { input, output })) => [input as f64, output as f64],
            (None, _) => unreachable!("what is not drawn is fixed"),
        };
        let scaled = |tokens: f64| ((tokens * scale).round() as usize).max(1);
        Length { input: scaled(input), output: scaled(output) }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LongBenchV2 => f.write_str("longbench-v2"),
            Self::LongGenBench => f.write_str("longgenbench"),
            Self::Fixed(Length { input, output }) => write!(f, "{input}:{output}"),
        }
    }
}

impl FromStr for Lengths {
    type Err = LoadError;

    fn from_str(text: &str) -> Result<Self, LoadError> {
        let refused = || LoadError::Setting {
            name: "lengths",
            value: format!("{text:?}"),
            allowed: "longbench-v2, longgenbench, or tokens of the prompt and of the answer, such as 4k:128",
        };
        match text {
            "longbench-v2" => Ok(Self::LongBenchV2),
            "longgenbench" => Ok(Self::LongGenBench),
            fixed => {
                let (input, output) = fixed.split_once(':').ok_or_else(refused)?;
                let tokens = |text| crate::bench::tokens(text).ok_or_else(refused);
                Ok(Self::Fixed(Length { input: tokens(input)?, output: tokens(output)? }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    /// The published means: 55K and 5K, 18K and 12K.
    #[test]
    fn named_lengths_have_the_published_ends_and_means() {
        for (lengths, means, ends) in [
            (Lengths::LongBenchV2, [54.96 * K, 5072.3], [(32_768, 122_880), (500, 15_360)]),
            (Lengths::LongGenBench, [18.0 * K, 12.0 * K], [(16_384, 19_456), (7_168, 32_768)]),
        ] {
            let mut rng = ChaCha8Rng::seed_from_u64(3);
            let drawn: Vec<_> = (0..4000).map(|_| lengths.draw(1.0, &mut rng)).collect();
            let parts: [fn(&Length) -> usize; 2] = [|length| length.input, |length| length.output];
            let stretched = lengths.stretched().expect("they are drawn");
            for (part, ((mean, (least, most)), stretched)) in
                parts.into_iter().zip(means.into_iter().zip(ends).zip(stretched))
            {
                assert!((stretched.mean() / mean - 1.0).abs() < 1e-3, "{lengths}: {}", stretched.mean());
                let found = drawn.iter().map(part).sum::<usize>() as f64 / drawn.len() as f64;
                assert!((found / mean - 1.0).abs() < 0.03, "{lengths}: {found}, expected {mean}");
                let of_all = || drawn.iter().map(part);
                assert!(of_all().min() >= Some(least) && of_all().max() <= Some(most), "{lengths}");
                // They are spread: not one value.
                let spread = (most - least) as f64;
                let range = (of_all().max().unwrap_or(0) - of_all().min().unwrap_or(0)) as f64;
                assert!(range > 0.6 * spread, "{lengths}: {range} of {spread}");
            }
            assert_eq!(lengths.longest(1.0), Length { input: ends[0].1, output: ends[1].1 });
        }
    }

    #[test]
    fn a_scale_makes_the_same_requests_shorter() {
        let draws = |scale| {
            let mut rng = ChaCha8Rng::seed_from_u64(9);
            (0..50).map(|_| Lengths::LongBenchV2.draw(scale, &mut rng)).collect::<Vec<_>>()
        };
        for (whole, hundredth) in draws(1.0).into_iter().zip(draws(0.01)) {
            assert!((whole.input as f64 / 100.0 - hundredth.input as f64).abs() <= 0.51);
            assert!((whole.output as f64 / 100.0 - hundredth.output as f64).abs() <= 0.51);
        }
        let fixed = Lengths::Fixed(Length { input: 100, output: 10 });
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        assert_eq!(fixed.draw(0.5, &mut rng), Length { input: 50, output: 5 });
        assert_eq!(fixed.draw(0.001, &mut rng), Length { input: 1, output: 1 });
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["longbench-v2", "longgenbench", "4096:128"] {
            assert_eq!(name.parse::<Lengths>().unwrap().to_string(), name);
        }
        let fixed = Lengths::Fixed(Length { input: 4096, output: 2048 });
        assert_eq!("4k:2K".parse::<Lengths>(), Ok(fixed));
        for wrong in ["longbench", "4k", "4k:", ":1", "0:1", "1:0", "1:2:3", "-1:2", "99999999k:1"] {
            let error = wrong.parse::<Lengths>().unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains("4k:128"), "{error}");
        }
    }
}

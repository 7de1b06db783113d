//! How times and rates are written.

use criterion::Throughput;
use criterion::measurement::ValueFormatter;

/// Nanoseconds as us, and bytes over them as GB/s of 10^9 bytes. One unit each, so that rows compare at sight.
#[derive(Clone, Copy, Debug)]
pub struct MicrosecondsAndGigabytes;

impl ValueFormatter for MicrosecondsAndGigabytes {
    fn scale_values(&self, _: f64, values: &mut [f64]) -> &'static str {
        values.iter_mut().for_each(|ns| *ns /= 1e3);
        "us"
    }

    fn scale_throughputs(&self, _: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        let (amount, unit) = match *throughput {
            Throughput::Bytes(bytes) | Throughput::BytesDecimal(bytes) => (bytes as f64, "GB/s"),
            Throughput::Bits(bits) => (bits as f64, "Gb/s"),
            Throughput::Elements(elements) | Throughput::ElementsAndBytes { elements, .. } => {
                (elements as f64, "Gelem/s")
            }
        };
        values.iter_mut().for_each(|ns| *ns = amount / *ns);
        unit
    }

    fn scale_for_machines(&self, _: &mut [f64]) -> &'static str {
        "ns"
    }
}

/// Bytes in decimal units, as the rates are.
pub fn bytes(bytes: f64) -> String {
    let (scaled, unit) = match bytes {
        bytes if bytes < 1e3 => (bytes, "B"),
        bytes if bytes < 1e6 => (bytes / 1e3, "kB"),
        bytes if bytes < 1e9 => (bytes / 1e6, "MB"),
        bytes => (bytes / 1e9, "GB"),
    };
    let digits = usize::from(scaled < 99.95 && scaled.fract() != 0.0);
    format!("{scaled:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_us_and_rates_gb_per_s() {
        let format = MicrosecondsAndGigabytes;
        assert_eq!(format.format_value(4_863_900.0).trim(), "4863.9 us");
        assert_eq!(
            format.format_throughput(&Throughput::Bytes(268_435_456), 4_863_900.0).trim(),
            "55.189 GB/s"
        );
        // Not of the typical value: of each.
        let mut values = [1e3, 2e3];
        assert_eq!(format.scale_throughputs(1e3, &Throughput::BytesDecimal(4000), &mut values), "GB/s");
        assert_eq!(values, [4.0, 2.0]);
    }

    #[test]
    fn bytes_are_decimal() {
        let written = [0.0, 512.0, 65_536.0, 1e6, 268_435_456.0, 1_073_741_824.0].map(bytes);
        assert_eq!(written, ["0 B", "512 B", "65.5 kB", "1 MB", "268 MB", "1.1 GB"]);
    }
}

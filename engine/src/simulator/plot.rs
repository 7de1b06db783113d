//! Curves over the cache's size, as SVG: text stays text, so no font is needed to write one.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{Outcome, Policy};

const SIZE: (u32, u32) = (760, 470);
const FONT: &str = "Helvetica, Arial, sans-serif";

/// What a plot shows over the cache's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Hits over probes, in percent.
    HitRatio,
    /// What a step of one request fetches, in MiB.
    Transfers,
    /// Modelled tokens a second; with overlap as full lines, without as dashed ones.
    Throughput,
}

impl Quantity {
    /// All plots.
    pub const ALL: [Self; 3] = [Self::HitRatio, Self::Transfers, Self::Throughput];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::HitRatio => "hit-ratio",
            Self::Transfers => "transfers",
            Self::Throughput => "throughput",
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::HitRatio => "hit ratio (%)",
            Self::Transfers => "MiB fetched per step and request",
            Self::Throughput => "modelled tokens/s",
        }
    }

    fn of(self, outcome: &Outcome) -> f64 {
        match self {
            Self::HitRatio => 100.0 * outcome.hit_ratio,
            Self::Transfers => outcome.pcie_bytes_per_step / f64::from(1 << 20),
            Self::Throughput => outcome.tokens_per_s_overlapped,
        }
    }
}

/// A horizontal line to compare with.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// What it is.
    pub label: String,
    /// Where it is.
    pub value: f64,
}

/// Draws `quantity` of one trace's outcomes to `path`, one curve a policy.
///
/// # Errors
/// What writing the file says, as text.
pub fn plot(
    path: &Path,
    quantity: Quantity,
    (title, subtitle): (&str, &str),
    outcomes: &[Outcome],
    reference: Option<&Reference>,
) -> Result<(), String> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    draw(&root, quantity, (title, subtitle), outcomes, reference).map_err(|error| error.to_string())?;
    root.present().map_err(|error| error.to_string())
}

type Failure = Box<dyn std::error::Error>;

fn draw(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    quantity: Quantity,
    (title, subtitle): (&str, &str),
    outcomes: &[Outcome],
    reference: Option<&Reference>,
) -> Result<(), Failure> {
    root.fill(&WHITE)?;
    let heading = (FONT, 19).into_font().style(FontStyle::Bold).color(&BLACK);
    let body = (FONT, 13).into_font().color(&RGBColor(60, 60, 60));
    root.draw(&Text::new(title, (20, 14), heading))?;
    root.draw(&Text::new(subtitle, (20, 40), body.clone()))?;

    let mut policies: Vec<Policy> = outcomes.iter().map(|outcome| outcome.policy).collect();
    policies.dedup();
    let sizes = outcomes.iter().map(|outcome| outcome.size);
    let (least, most) = (sizes.clone().fold(f64::MAX, f64::min), sizes.fold(f64::MIN, f64::max));
    let mut values: Vec<f64> = outcomes.iter().map(|outcome| quantity.of(outcome)).collect();
    values.extend(reference.map(|reference| reference.value));
    if quantity == Quantity::Throughput {
        values.extend(outcomes.iter().map(|outcome| outcome.tokens_per_s));
    }
    let (low, high) = range(quantity, &values);

    let mut chart = ChartBuilder::on(root)
        .margin_top(64)
        .margin_left(12)
        .margin_bottom(8)
        .margin_right(150)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(least..most.max(least + 1.0), low..high)?;
    chart
        .configure_mesh()
        .x_desc("cache size, in selections of one step (mandatory pages)")
        .y_desc(quantity.label())
        .axis_desc_style(body.clone())
        .label_style(body.clone())
        .x_labels(9)
        .y_labels(8)
        .x_label_formatter(&|size| format!("{size}x"))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .bold_line_style(RGBColor(225, 225, 225))
        .light_line_style(TRANSPARENT)
        .axis_style(RGBColor(120, 120, 120))
        .draw()?;

    // Wide lines first, so that narrow ones on top of them can be seen.
    let mut by_width = policies.clone();
    by_width.sort_by_key(|policy| std::cmp::Reverse(look(*policy).1));
    for policy in &by_width {
        let of_policy = || outcomes.iter().filter(|outcome| outcome.policy == *policy);
        let (colour, width) = look(*policy);
        let line = colour.stroke_width(width);
        let points = of_policy().map(|outcome| (outcome.size, quantity.of(outcome)));
        chart.draw_series(LineSeries::new(points.clone(), line))?;
        chart.draw_series(points.map(|point| Circle::new(point, width.max(3), colour.filled())))?;
        if quantity == Quantity::Throughput {
            let points = of_policy().map(|outcome| (outcome.size, outcome.tokens_per_s));
            chart.draw_series(DashedLineSeries::new(points, 5, 4, colour.stroke_width(1)))?;
        }
    }
    let mut ends: Vec<_> = policies
        .iter()
        .map(|policy| {
            let last = outcomes.iter().rfind(|outcome| outcome.policy == *policy).expect("it has outcomes");
            let at = chart.backend_coord(&(last.size, quantity.of(last)));
            End { at, label: policy.name(), colour: look(*policy).0 }
        })
        .collect();
    if let Some(Reference { label, value }) = reference {
        let colour = RGBColor(90, 90, 90);
        chart.draw_series(DashedLineSeries::new([(least, *value), (most, *value)], 2, 3, colour.into()))?;
        ends.push(End { at: chart.backend_coord(&(most, *value)), label, colour });
    }
    legend(root, ends)
}

/// The right end of a curve.
struct End<'a> {
    at: (i32, i32),
    label: &'a str,
    colour: RGBColor,
}

/// Names the curves at their right ends, moved apart where they would touch.
fn legend(root: &DrawingArea<SVGBackend<'_>, Shift>, mut ends: Vec<End<'_>>) -> Result<(), Failure> {
    const LINE: i32 = 17;
    ends.sort_by_key(|end| end.at.1);
    // Groups of labels that stand line under line: the sum of where each would put the first, and their number. A
    // group that would reach into the one above joins it, and both stand in the middle of what all want.
    let mut groups: Vec<(i32, i32)> = Vec::new();
    for end in &ends {
        let mut group = (end.at.1, 1);
        while let Some((sum, count)) = groups.pop() {
            if sum / count + count * LINE <= group.0 / group.1 {
                groups.push((sum, count));
                break;
            }
            group = (sum + group.0 - count * group.1 * LINE, count + group.1);
        }
        groups.push(group);
    }
    let places =
        groups.iter().flat_map(|(sum, count)| (0..*count).map(move |line| sum / count + line * LINE));
    for (End { at: (x, y), label, colour }, place) in ends.iter().zip(places) {
        root.draw(&PathElement::new([(x + 6, *y), (x + 18, place)], colour.stroke_width(1)))?;
        let style = (FONT, 13).into_font().color(colour);
        root.draw(&Text::new(*label, (x + 22, place - 8), style))?;
    }
    Ok(())
}

/// The axis: percentages from below the lowest curve to 100, all else from 0.
fn range(quantity: Quantity, values: &[f64]) -> (f64, f64) {
    let (least, most) =
        (values.iter().copied().fold(f64::MAX, f64::min), values.iter().copied().fold(f64::MIN, f64::max));
    match quantity {
        Quantity::HitRatio => (((least - 2.0) / 10.0).floor().max(0.0) * 10.0, 100.0),
        Quantity::Transfers | Quantity::Throughput => (0.0, (most * 1.08).max(1.0)),
    }
}

/// Colours after Okabe and Ito, which all eyes can tell apart; the policy that runs is the widest line.
fn look(policy: Policy) -> (RGBColor, u32) {
    match policy {
        Policy::Belady => (RGBColor(0, 0, 0), 2),
        Policy::Bucketed64 => (RGBColor(236, 132, 52), 6),
        Policy::Lru => (RGBColor(0, 114, 178), 2),
        Policy::Bucketed16 => (RGBColor(230, 159, 0), 2),
        Policy::Bucketed4 => (RGBColor(178, 150, 0), 2),
        Policy::Random => (RGBColor(0, 158, 115), 2),
        Policy::Fifo => (RGBColor(204, 121, 167), 2),
        Policy::PreviousStep => (RGBColor(120, 120, 120), 2),
    }
}

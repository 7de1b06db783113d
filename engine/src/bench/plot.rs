//! Figures of decode steps, as SVG: text stays text, so no font is needed to write one.

use std::path::Path;

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use spinkv::memory::HostFormat;

#[cfg(feature = "serve")]
use super::load::{LoadPoint, LoadReport};
use super::report::cache_label;
use super::{AblationReport, Caching, DecodeReport, Point};

const PANEL: (u32, u32) = (520, 360);
const LEGEND: u32 = 18;
const FONT: &str = "Helvetica, Arial, sans-serif";

type Failure = Box<dyn std::error::Error>;

/// From here on a number stands for what has none, as a cache of all pages, and is drawn at the right edge.
const BEYOND: f64 = 1e6;

/// A panel: lines over one axis.
struct Panel {
    title: String,
    across: &'static str,
    /// What stands at the right edge, if anything does.
    beyond: &'static str,
    up: &'static str,
    /// The greatest that `up` can be, where it has a limit.
    most: Option<f64>,
    lines: Vec<Line>,
}

/// A line of a panel.
struct Line {
    name: String,
    /// Lines of one have one colour.
    subject: usize,
    /// Of what is worse than the others of its subject.
    dashed: bool,
    points: Vec<(f64, f64)>,
}

/// Lines each of which is a subject of its own.
fn lines(named: impl Iterator<Item = (String, Vec<(f64, f64)>)>) -> Vec<Line> {
    let line = |(subject, (name, points))| Line { name, subject, dashed: false, points };
    named.enumerate().map(line).collect()
}

/// Draws tokens a second over the batch to `path`: a panel for each context, a line for each method, budget and cache.
///
/// # Errors
/// What writing the file says, as text.
pub fn throughput(path: &Path, report: &DecodeReport) -> Result<(), String> {
    let of_all = report.facts.layers < report.facts.all_layers;
    let speed = |point: &Point| if of_all { point.tokens_per_s_all_layers } else { point.tokens_per_s };
    let contexts = distinct(report.points.iter().map(|point| point.context));
    let panels = contexts.into_iter().map(|context| {
        let of_context = || report.points.iter().filter(|point| point.context == context);
        let named = distinct(of_context().map(subject)).into_iter().map(|name| {
            let of_line = of_context().filter(|point| subject(point) == name);
            let points = of_line.filter_map(|point| Some((point.batch as f64, speed(point)?))).collect();
            (name, points)
        });
        Panel {
            title: format!("{}, {context} tokens", report.facts.model),
            across: "requests of a step",
            beyond: "",
            up: if of_all { "tokens/s, worked out for all layers" } else { "tokens/s" },
            most: None,
            lines: lines(named),
        }
    });
    draw(path, &panels.collect::<Vec<_>>())
}

/// Draws hit ratio over cache size, and the time of a step with each part of the design, to `path`.
///
/// # Errors
/// What writing the file says, as text.
pub fn ablation(path: &Path, report: &AblationReport) -> Result<(), String> {
    let caches = [Caching::PreviousStep, Caching::BucketedLru, Caching::ExactLru, Caching::Belady];
    // Of codes a line of their own: what they save is time.
    let mut kinds: Vec<(Caching, HostFormat)> = Vec::new();
    for point in &report.points {
        let kind = (point.cache, point.host_kv);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let kept = |wanted: &[Caching]| {
        kinds.iter().filter(|(cache, _)| wanted.contains(cache)).copied().collect::<Vec<_>>()
    };
    let curve = kept(&caches).into_iter().map(|(cache, host_kv)| {
        let of_cache = report.curve.iter().filter(|point| point.cache == cache && point.host_kv == host_kv);
        (
            cache_label(cache, host_kv),
            of_cache.map(|point| (1.0 + point.buffering, point.hit_ratio)).collect(),
        )
    });
    let timed = [&caches[..], &[Caching::NoCache, Caching::Resident]].concat();
    let steps = kept(&timed).into_iter().map(|(cache, host_kv)| {
        let of_cache = report.points.iter().filter(|point| point.cache == cache && point.host_kv == host_kv);
        let times = of_cache.filter_map(|point| Some((1.0 + point.buffering, point.step_ms?)));
        (cache_label(cache, host_kv), times.collect())
    });
    let panel = |up, most, lines| Panel {
        title: report.facts.model.clone(),
        across: "slots, in what one step selects",
        beyond: "all",
        up,
        most,
        lines,
    };
    draw(path, &[panel("hit ratio", Some(1.0), lines(curve)), panel("ms a step", None, lines(steps))])
}

/// Draws throughput, TTFT, TPOT and batch over the rate at which requests arrive to `path`: a line for each report, for times a dashed one more, of the
/// slowest hundredth. What arrived all at once stands at the right edge.
///
/// # Errors
/// What writing the file says, as text.
#[cfg(feature = "serve")]
pub fn load(path: &Path, reports: &[LoadReport]) -> Result<(), String> {
    type Value = fn(&LoadPoint) -> Option<f64>;
    let first = reports.first();
    let title = first.map(|report| format!("{}, {} x {}", report.model, report.lengths, report.scale));
    let panel = |up, values: &[(&str, Value)]| {
        let lines = reports.iter().enumerate().flat_map(|(subject, report)| {
            values.iter().enumerate().map(move |(number, (of, value))| {
                let x = |point: &LoadPoint| point.rate.unwrap_or(f64::INFINITY);
                let points = report.points.iter().filter_map(|point| Some((x(point), value(point)?)));
                let name = format!("{}{of}", report.name);
                Line { name, subject, dashed: number > 0, points: points.collect() }
            })
        });
        Panel {
            title: title.clone().unwrap_or_default(),
            across: "sessions that arrive a second",
            beyond: "all at once",
            up,
            most: None,
            lines: lines.collect(),
        }
    };
    let panels = [
        panel("output tokens/s", &[("", |point| Some(point.output_tokens_per_s))]),
        panel(
            "ms to the first token",
            &[(", p50", |point| Some(point.ttft_ms?.p50)), (", p99", |point| Some(point.ttft_ms?.p99))],
        ),
        panel(
            "ms for each further token",
            &[(", p50", |point| Some(point.tpot_ms?.p50)), (", p99", |point| Some(point.tpot_ms?.p99))],
        ),
        panel("requests that decode at a time", &[("", |point| Some(point.mean_batch))]),
    ];
    draw(path, &panels)
}

/// What a line is of.
fn subject(point: &Point) -> String {
    match (&point.budget, point.cache.is_dense()) {
        (_, true) => point.cache.to_string(),
        (budget, _) => {
            let budget = budget.as_ref().map_or(String::new(), |budget| format!(" {budget}"));
            let cache = cache_label(point.cache, point.host_kv);
            format!("{}{budget}, {cache} {}", point.method, point.buffering)
        }
    }
}

fn draw(path: &Path, panels: &[Panel]) -> Result<(), String> {
    let lines = panels.iter().map(|panel| panel.lines.len() as u32).max().unwrap_or(0);
    // Four of them are a square.
    let columns = if panels.len() == 4 { 2 } else { panels.len().max(1) };
    let rows = panels.len().div_ceil(columns).max(1);
    let size = (PANEL.0 * columns as u32, (PANEL.1 + LEGEND * lines + 12) * rows as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let all = || -> Result<(), Failure> {
        root.fill(&WHITE)?;
        let areas = root.split_evenly((rows, columns));
        areas.iter().zip(panels).try_for_each(|(area, panel)| draw_panel(area, panel))
    };
    all().map_err(|error| error.to_string())?;
    root.present().map_err(|error| error.to_string())
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, Shift>, panel: &Panel) -> Result<(), Failure> {
    let (above, below) = area.split_vertically(PANEL.1);
    let all = || panel.lines.iter().flat_map(|line| &line.points);
    let widest = all().map(|(x, _)| *x).filter(|x| *x < BEYOND).fold(0.0, f64::max);
    let widest = if widest > 0.0 { widest } else { 1.0 };
    // What is beyond all numbers stands apart, at the right edge.
    let apart = all().any(|(x, _)| *x >= BEYOND);
    let edge = if apart { 1.25 * widest } else { widest };
    let highest = panel.most.unwrap_or_else(|| all().map(|(_, y)| *y).fold(1e-6, f64::max));
    let body = (FONT, 12).into_font().color(&RGBColor(60, 60, 60));
    let mut chart = ChartBuilder::on(&above)
        .caption(&panel.title, body.clone())
        .margin(8)
        .margin_right(18)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..1.05 * edge, 0.0..1.05 * highest)?;
    chart
        .configure_mesh()
        .x_desc(panel.across)
        .y_desc(panel.up)
        .axis_desc_style(body.clone())
        .label_style(body.clone())
        .x_label_formatter(&|x| if apart && *x > 1.1 * widest { String::new() } else { short(*x) })
        .y_label_formatter(&|y| short(*y))
        .x_labels(8)
        .y_labels(6)
        .bold_line_style(RGBColor(225, 225, 225))
        .light_line_style(TRANSPARENT)
        .axis_style(RGBColor(120, 120, 120))
        .draw()?;
    if apart {
        let grey = RGBColor(225, 225, 225);
        chart.draw_series([PathElement::new([(edge, 0.0), (edge, 1.05 * highest)], grey)])?;
        let (x, y) = chart.backend_coord(&(edge, 0.0));
        let (left, top) = (above.get_pixel_range().0.start, above.get_pixel_range().1.start);
        let style = body.pos(Pos::new(HPos::Center, VPos::Top));
        above.draw(&Text::new(panel.beyond, (x - left, y - top + 9), style))?;
    }
    for (index, Line { name, subject, dashed, points }) in panel.lines.iter().enumerate() {
        let colour = colour(*subject);
        let mut points: Vec<_> = points.iter().map(|(x, y)| (x.min(edge), *y)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (y, style) = ((LEGEND * index as u32) as i32, colour.stroke_width(2));
        let key = [(64, y + 8), (84, y + 8)];
        if *dashed {
            chart.draw_series(DashedLineSeries::new(points.clone(), 5, 4, style))?;
            chart.draw_series(points.into_iter().map(|point| Circle::new(point, 3, colour)))?;
            below.draw(&DashedPathElement::new(key, 5, 4, style))?;
        } else {
            chart.draw_series(LineSeries::new(points.clone(), style))?;
            chart.draw_series(points.into_iter().map(|point| Circle::new(point, 3, colour.filled())))?;
            below.draw(&PathElement::new(key, style))?;
        }
        below.draw(&Text::new(name.clone(), (90, y), (FONT, 12).into_font().color(&colour)))?;
    }
    Ok(())
}

/// A number without the digits that an axis' steps have from adding up.
fn short(number: f64) -> String {
    ((number * 1e6).round() / 1e6).to_string()
}

/// Values, each once, in order.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// Colours after Okabe and Ito, which all eyes can tell apart.
fn colour(index: usize) -> RGBColor {
    const COLOURS: [RGBColor; 8] = [
        RGBColor(0, 0, 0),
        RGBColor(213, 94, 0),
        RGBColor(0, 114, 178),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
        RGBColor(178, 150, 0),
        RGBColor(86, 180, 233),
        RGBColor(140, 140, 140),
    ];
    COLOURS[index % COLOURS.len()]
}

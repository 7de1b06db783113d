//! Accuracy over what it costs, as SVG: text stays text, so no font is needed to write one.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{CellReport, Report, Task};

const PANEL: (u32, u32) = (380, 320);
const HEADING: u32 = 62;
const FONT: &str = "Helvetica, Arial, sans-serif";

type Failure = Box<dyn std::error::Error>;

/// Draws a report to `path`: a row of panels for each task, a panel for each context, a line for each method over its budgets. Across
/// is what a decode step fetches; up is exact match for needles, and for text the divergence from dense attention, or, where that was not
/// kept, nats a token beyond it.
///
/// # Errors
/// What writing the file says, as text.
pub fn plot(path: &Path, report: &Report) -> Result<(), String> {
    let (tasks, contexts) = (distinct(report, |cell| cell.task), distinct(report, |cell| cell.context));
    let width = (PANEL.0 * contexts.len() as u32).max(2 * PANEL.0);
    let root = SVGBackend::new(path, (width, PANEL.1 * tasks.len() as u32 + HEADING)).into_drawing_area();
    draw(&root, report, &tasks, &contexts).map_err(|error| error.to_string())?;
    root.present().map_err(|error| error.to_string())
}

fn draw(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    report: &Report,
    tasks: &[Task],
    contexts: &[usize],
) -> Result<(), Failure> {
    root.fill(&WHITE)?;
    let (heading, panels) = root.split_vertically(HEADING);
    let style = (FONT, 17).into_font().style(FontStyle::Bold).color(&BLACK);
    let model =
        Path::new(&report.model).file_name().map_or_else(String::new, |name| name.to_string_lossy().into());
    let title = format!("Accuracy over bytes fetched: {model}, {} prompts a point", report.prompts);
    heading.draw(&Text::new(title, (14, 10), style))?;
    let methods = distinct(report, |cell| cell.method.clone());
    let mut x = 16;
    for (index, method) in methods.iter().enumerate() {
        let colour = colour(index);
        heading.draw(&PathElement::new([(x, 46), (x + 20, 46)], colour.stroke_width(2)))?;
        heading.draw(&Circle::new((x + 10, 46), 3, colour.filled()))?;
        heading.draw(&Text::new(method.clone(), (x + 26, 38), (FONT, 13).into_font().color(&colour)))?;
        x += 48 + 7 * method.chars().count() as i32;
    }
    for (panel, (task, context)) in panels
        .split_evenly((tasks.len(), contexts.len()))
        .iter()
        .zip(tasks.iter().flat_map(|task| contexts.iter().map(move |context| (*task, *context))))
    {
        let cells: Vec<_> =
            report.cells.iter().filter(|cell| cell.task == task && cell.context == context).collect();
        // Panels of a task share what is up, to be compared.
        let all: Vec<f64> = report.cells.iter().filter(|cell| cell.task == task).filter_map(height).collect();
        draw_panel(panel, task, context, &cells, &all, &methods)?;
    }
    Ok(())
}

fn draw_panel(
    panel: &DrawingArea<SVGBackend<'_>, Shift>,
    task: Task,
    context: usize,
    cells: &[&CellReport],
    all: &[f64],
    methods: &[String],
) -> Result<(), Failure> {
    let across = |cell: &CellReport| cell.fetched_bytes_per_token / 1024.0;
    let widest = cells.iter().map(|cell| across(cell)).fold(0.0, f64::max).max(1.0);
    let (least, most) = all.iter().fold((0.0f64, 0.0f64), |(low, high), y| (low.min(*y), high.max(*y)));
    let up = match task {
        Task::Needle => -0.04..1.04,
        Task::Perplexity => least - 0.04 * (most - least)..(most + 0.06 * (most - least)).max(least + 1e-6),
    };
    let body = (FONT, 12).into_font().color(&RGBColor(60, 60, 60));
    let mut chart = ChartBuilder::on(panel)
        .caption(format!("{task}, {context} tokens"), body.clone())
        .margin(8)
        .margin_right(18)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(-0.03 * widest..1.06 * widest, up)?;
    let label = match task {
        Task::Needle => "exact match",
        Task::Perplexity if cells.iter().any(|cell| cell.divergence.is_some()) => {
            "divergence from dense (nats a token)"
        }
        Task::Perplexity => "nats a token beyond dense",
    };
    chart
        .configure_mesh()
        .x_desc("KiB fetched a token")
        .y_desc(label)
        .axis_desc_style(body.clone())
        .label_style(body)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|kib| format!("{kib:.0}"))
        .y_label_formatter(&|y| if task == Task::Needle { format!("{y:.1}") } else { format!("{y:.3}") })
        .bold_line_style(RGBColor(225, 225, 225))
        .light_line_style(TRANSPARENT)
        .axis_style(RGBColor(120, 120, 120))
        .draw()?;
    for (index, method) in methods.iter().enumerate() {
        let colour = colour(index);
        let of_method = cells.iter().filter(|cell| cell.method == *method);
        let points: Vec<_> =
            of_method.filter_map(|cell| Some((across(cell), height(cell)?, cell.budget_name()))).collect();
        let line = points.iter().map(|(x, y, _)| (*x, *y));
        chart.draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)))?;
        chart.draw_series(line.map(|point| Circle::new(point, 3, colour.filled())))?;
        for (x, y, budget) in points.iter().filter(|(.., budget)| *budget != "-") {
            let (x, y) = chart.backend_coord(&(*x, *y));
            let (left, top) = panel.get_base_pixel();
            let style = (FONT, 10).into_font().color(&colour);
            panel.draw(&Text::new(*budget, (x - left + 5, y - top + 5), style))?;
        }
    }
    Ok(())
}

/// What a panel shows upwards.
fn height(cell: &CellReport) -> Option<f64> {
    match cell.task {
        Task::Needle => cell.exact_match,
        Task::Perplexity => cell.divergence.or(cell.nats_over_dense),
    }
}

/// The values of all cells, each once, in order.
fn distinct<T: PartialEq>(report: &Report, of: impl Fn(&CellReport) -> T) -> Vec<T> {
    let mut found = Vec::new();
    for value in report.cells.iter().map(of) {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// Colours after Okabe and Ito, which all eyes can tell apart.
fn colour(index: usize) -> RGBColor {
    const COLOURS: [RGBColor; 7] = [
        RGBColor(0, 0, 0),
        RGBColor(213, 94, 0),
        RGBColor(0, 114, 178),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
        RGBColor(178, 150, 0),
        RGBColor(86, 180, 233),
    ];
    COLOURS[index % COLOURS.len()]
}

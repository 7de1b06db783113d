//! Rates over bytes moved, with the ceilings of the same run, as SVG: text stays text, so no font is needed to write one.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::report::{Report, Row};
use crate::units;

const SIZE: (u32, u32) = (860, 656);
const FONT: &str = "Helvetica, Arial, sans-serif";
const TEXT: RGBColor = RGBColor(60, 60, 60);
/// Where the legend's lines begin, and how far they are apart.
const LEGEND: (i32, i32) = (554, 20);

/// What draws a ceiling in place of a point, and its name at the line.
const CEILINGS: [(&str, &str); 3] =
    [("copy", "device copy"), ("read", "device read"), ("copy engine", "copy engine")];

/// A stage's kernels share a colour, after Okabe and Ito, which all eyes can tell apart; each has a mark.
const STAGES: [(&str, RGBColor, &[&str]); 5] = [
    ("Index", RGBColor(0, 114, 178), &["chunk_mean", "chunk_bounds"]),
    ("Offload", RGBColor(204, 121, 167), &["append", "store_prompt", "write_back"]),
    ("Select", RGBColor(0, 158, 115), &["score", "select", "score + select", "top_k"]),
    ("Retrieve", RGBColor(213, 94, 0), &["gather", "gather_bulk", "restore", "resolve", "resolve+gather"]),
    ("Attention", RGBColor(86, 180, 233), &["attend"]),
];
/// Kernels that are in no stage yet.
const OTHERS: (&str, RGBColor) = ("others", RGBColor(100, 100, 100));

/// Draws the rows of `report` that move bytes to `path`.
///
/// # Errors
/// If no row moves any, or the file cannot be written.
pub fn plot(path: &Path, report: &Report) -> Result<(), Box<dyn Error>> {
    let svg = draw(report)?;
    std::fs::write(path, svg).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// A row's point: where it is, and how it looks.
struct Point<'a> {
    bytes: f64,
    gb_per_s: f64,
    what: &'a str,
}

/// A horizontal line.
struct Ceiling {
    name: &'static str,
    gb_per_s: f64,
}

fn draw(report: &Report) -> Result<String, Box<dyn Error>> {
    let ceilings = ceilings(&report.rows);
    let points: Vec<_> = report.rows.iter().filter_map(point).collect();
    let xs = || points.iter().map(|point| point.bytes);
    let ys =
        || points.iter().map(|point| point.gb_per_s).chain(ceilings.iter().map(|ceiling| ceiling.gb_per_s));
    if points.is_empty() {
        return Err("no row moves bytes: nothing to draw".into());
    }
    let (left, right) = decades(xs());
    let (low, high) = decades(ys());
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let body = (FONT, 13).into_font().color(&TEXT);
    let heading = (FONT, 19).into_font().style(FontStyle::Bold).color(&BLACK);
    root.draw(&Text::new(
        format!("Kernels under the ceilings of the same run: {}", report.gpu),
        (20, 14),
        heading,
    ))?;
    let subtitle = format!(
        "medians of {} launches; dashed: launches of equal time; rows that move nothing are left out",
        report.repeats
    );
    root.draw(&Text::new(subtitle, (20, 40), body.clone()))?;

    let mut chart = ChartBuilder::on(&root)
        .margin_top(76)
        .margin_left(12)
        .margin_right(150)
        .margin_bottom(SIZE.1 as i32 - LEGEND.0 + 24)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bytes moved per launch")
        .y_desc("GB/s")
        .axis_desc_style(body.clone())
        .label_style(body.clone())
        .x_label_formatter(&|moved| units::bytes(*moved))
        .y_label_formatter(&|rate| format!("{rate}"))
        .bold_line_style(RGBColor(225, 225, 225))
        .light_line_style(TRANSPARENT)
        .axis_style(RGBColor(120, 120, 120))
        .draw()?;

    let faint = (FONT, 11).into_font().color(&RGBColor(130, 130, 130));
    for (us, name) in [(1.0, "1 us"), (10.0, "10 us"), (100.0, "100 us"), (1e3, "1 ms"), (1e4, "10 ms")] {
        // Of a diagonal what is within the chart.
        let rate = |bytes: f64| bytes / us / 1e3;
        let ends = [left.max(low * us * 1e3), right.min(high * us * 1e3)];
        if ends[0] >= ends[1] {
            continue;
        }
        let line = ends.map(|bytes| (bytes, rate(bytes)));
        chart.draw_series(DashedLineSeries::new(line, 3, 4, RGBColor(190, 190, 190).into()))?;
        let (x, y) = chart.backend_coord(&line[1]);
        let at = if ends[1] < right { (x - 14, y - 13) } else { (x + 4, y - 6) };
        root.draw(&Text::new(name, at, faint.clone()))?;
    }
    for Ceiling { gb_per_s, .. } in &ceilings {
        let line = [(left, *gb_per_s), (right, *gb_per_s)];
        chart.draw_series(LineSeries::new(line, BLACK.stroke_width(2)))?;
    }
    for point in &points {
        let (_, colour, mark) = look(point.what);
        let style = colour.mix(0.75).filled();
        let at = EmptyElement::at((point.bytes, point.gb_per_s));
        chart.draw_series([at + Polygon::new(mark, style)])?;
    }
    let ends =
        ceilings.iter().map(|ceiling| (ceiling, chart.backend_coord(&(right, ceiling.gb_per_s)))).collect();
    name_ceilings(&root, ends)?;
    legend(&root, &points)?;
    root.present()?;
    drop(chart);
    drop(root);
    Ok(svg)
}

/// The highest rate of each ceiling that was measured.
fn ceilings(rows: &[Row]) -> Vec<Ceiling> {
    let of = |(what, name)| {
        let rates = rows.iter().filter(|row| row.what == what).map(|row| row.gb_per_s);
        rates.reduce(f64::max).map(|gb_per_s| Ceiling { name, gb_per_s })
    };
    CEILINGS.into_iter().filter_map(of).collect()
}

fn point(row: &Row) -> Option<Point<'_>> {
    let kernel = CEILINGS.iter().all(|(what, _)| row.what != *what);
    // What arithmetic bounds has no place under ceilings of bytes.
    (kernel && row.bytes > 0 && row.flops.is_none()).then(|| Point {
        bytes: row.bytes as f64,
        gb_per_s: row.gb_per_s,
        what: &row.what,
    })
}

/// Whole decades around all values, with a little room to the next value on each side.
fn decades(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let (least, most) = (values.clone().fold(f64::MAX, f64::min), values.fold(f64::MIN, f64::max));
    (10_f64.powf((least / 1.2).log10().floor()), 10_f64.powf((most * 1.2).log10().ceil()))
}

/// The stage, the colour and the mark of a kernel: a polygon about its place.
fn look(what: &str) -> (&'static str, RGBColor, Vec<(i32, i32)>) {
    const MARKS: [&[(i32, i32)]; 5] = [
        &[(-2, -5), (2, -5), (5, -2), (5, 2), (2, 5), (-2, 5), (-5, 2), (-5, -2)],
        &[(0, -6), (6, 5), (-6, 5)],
        &[(-4, -4), (4, -4), (4, 4), (-4, 4)],
        &[(0, -6), (6, 0), (0, 6), (-6, 0)],
        &[(-6, -5), (6, -5), (0, 6)],
    ];
    let stage = STAGES.iter().find_map(|(stage, colour, kernels)| {
        let mark = kernels.iter().position(|kernel| *kernel == what)?;
        Some((*stage, *colour, MARKS[mark % MARKS.len()].to_vec()))
    });
    stage.unwrap_or((OTHERS.0, OTHERS.1, MARKS[0].to_vec()))
}

/// Names the ceilings at their right ends.
fn name_ceilings(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    mut ends: Vec<(&Ceiling, (i32, i32))>,
) -> Result<(), Box<dyn Error>> {
    let (name, rate) = ((FONT, 13).into_font().color(&BLACK), (FONT, 13).into_font().color(&TEXT));
    ends.sort_by_key(|(_, (_, y))| *y);
    let mut free = i32::MIN;
    for (ceiling, (x, y)) in ends {
        // Below a name that would be touched.
        let at = (y - 14).max(free);
        free = at + 32;
        root.draw(&Text::new(ceiling.name, (x + 40, at), name.clone()))?;
        root.draw(&Text::new(format!("{:.0} GB/s", ceiling.gb_per_s), (x + 40, at + 14), rate.clone()))?;
        root.draw(&PathElement::new([(x, y), (x + 36, at + 14)], BLACK.stroke_width(1)))?;
    }
    Ok(())
}

/// Marks and names of the kernels that have points, a line a stage, below the chart.
fn legend(root: &DrawingArea<SVGBackend<'_>, Shift>, points: &[Point<'_>]) -> Result<(), Box<dyn Error>> {
    let mut names: Vec<&str> = Vec::new();
    for point in points {
        if !names.contains(&point.what) {
            names.push(point.what);
        }
    }
    let stages = STAGES.iter().map(|(stage, colour, _)| (*stage, *colour)).chain([OTHERS]);
    let mut y = LEGEND.0;
    for (stage, colour) in stages {
        let mut of_stage = names.iter().filter(|name| look(name).0 == stage).peekable();
        if of_stage.peek().is_none() {
            continue;
        }
        let bold = (FONT, 13).into_font().style(FontStyle::Bold).color(&colour);
        root.draw(&Text::new(stage, (76, y - 6), bold))?;
        for (name, x) in of_stage.zip((165..).step_by(135)) {
            let mark = Polygon::new(look(name).2, colour.filled());
            root.draw(&(EmptyElement::at((x, y)) + mark))?;
            root.draw(&Text::new(*name, (x + 12, y - 6), (FONT, 13).into_font().color(&TEXT)))?;
        }
        y += LEGEND.1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows as a run has them, and one of a kernel that the legend does not know.
    const ROWS: &str = include_str!("roofline-rows.json");

    fn report() -> Report {
        serde_json::from_str(ROWS).unwrap()
    }

    #[test]
    fn ceilings_are_lines_and_what_moves_bytes_is_a_point() {
        let report = report();
        let found = ceilings(&report.rows);
        // The better of two rows; no row read the device's memory.
        let lines: Vec<_> = found.iter().map(|ceiling| (ceiling.name, ceiling.gb_per_s)).collect();
        assert_eq!(lines, [("device copy", 4148.16), ("copy engine", 55.38)]);
        let points: Vec<_> = report.rows.iter().filter_map(point).collect();
        let still = report.rows.iter().filter(|row| row.bytes == 0).count();
        assert!(still > 0);
        assert_eq!(points.len() + still + 3, report.rows.len());

        let svg = draw(&report).unwrap();
        let marks = svg.matches("<polygon").count();
        let names = ["chunk_mean", "write_back", "score", "select", "gather", "resolve+gather", "novel"];
        assert_eq!(marks, points.len() + names.len());
        for name in names.into_iter().chain([
            "device copy",
            "4148 GB/s",
            "copy engine",
            "55 GB/s",
            "others",
            "NVIDIA H200",
        ]) {
            assert!(svg.contains(name), "{name} is not in the picture");
        }
        assert!(!svg.contains("chunk_bounds"), "a name without a point");
    }

    #[test]
    fn higher_rates_are_higher_up() {
        let mut report = report();
        report.rows.retain(|row| row.what == "copy" || row.what == "novel");
        let height = |report: &Report| -> f64 {
            let svg = draw(report).unwrap();
            let mark = svg.split("<polygon").nth(1).unwrap();
            let corner = mark.split("points=\"").nth(1).unwrap().split([' ', ',']).nth(1).unwrap();
            corner.parse().unwrap()
        };
        let before = height(&report);
        report.rows[1].gb_per_s *= 2.0;
        assert!(height(&report) < before);
    }

    #[test]
    fn a_run_that_moves_nothing_is_refused() {
        let mut report = report();
        report.rows.retain(|row| row.bytes == 0);
        assert!(
            plot(Path::new("/dev/null/picture.svg"), &report)
                .unwrap_err()
                .to_string()
                .contains("nothing to draw")
        );
    }

    #[test]
    fn whole_decades_hold_all_values() {
        assert_eq!(decades([65_536.0, 1e9].into_iter()), (1e4, 1e10));
        assert_eq!(decades([50.0, 60.0].into_iter()), (10.0, 100.0));
    }
}

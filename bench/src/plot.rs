//! Reports as a picture: tokens per second over time, and curves of latencies, in one SVG.
//!
//! Written by hand: three panels of lines need no library.

use std::fmt::Write as _;

use crate::report::Report;

/// Size of a panel's plot.
const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 240.0;
/// Room around it, for titles and numbers.
const MARGIN: f64 = 60.0;
/// Height of a line of the legend.
const LEGEND: f64 = 18.0;
/// Colours that are told apart by those who see colours otherwise, too.
const COLOURS: [&str; 6] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
];

/// A panel: what lies on its axes, and a line for each report.
struct Panel {
    title: &'static str,
    x: &'static str,
    lines: Vec<Vec<(f64, f64)>>,
}

/// Draws reports.
#[must_use]
pub fn svg(reports: &[Report]) -> String {
    let shares = |curve: &[f64]| -> Vec<(f64, f64)> {
        let last = curve.len().saturating_sub(1).max(1) as f64;
        let point = |(index, ms): (usize, &f64)| (ms / 1e3, 100.0 * index as f64 / last);
        curve.iter().enumerate().map(point).collect()
    };
    let by_second = |report: &Report| -> Vec<(f64, f64)> {
        let seconds = report.tokens_by_second.iter().enumerate();
        seconds
            .map(|(second, tokens)| (second as f64, *tokens))
            .collect()
    };
    let panels = [
        Panel {
            title: "output tokens per second",
            x: "seconds from the beginning",
            lines: reports.iter().map(by_second).collect(),
        },
        Panel {
            title: "% of requests with their first token",
            x: "seconds from the request",
            lines: reports
                .iter()
                .map(|report| shares(&report.ttft_curve_ms))
                .collect(),
        },
        Panel {
            title: "% of requests answered",
            x: "seconds from the request",
            lines: reports
                .iter()
                .map(|report| shares(&report.e2e_curve_ms))
                .collect(),
        },
    ];
    let (width, top) = (WIDTH + 1.5 * MARGIN, LEGEND * reports.len() as f64);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{:.0}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        width * panels.len() as f64,
        top + HEIGHT + 2.0 * MARGIN
    );
    for (index, report) in reports.iter().enumerate() {
        let y = LEGEND * (index as f64 + 1.0);
        let label = format!(
            "{}: {:.1} output tokens/s",
            report.label, report.output_tokens_per_s
        );
        text(&mut out, MARGIN, y, "start", colour(index), &label);
    }
    for (index, panel) in panels.iter().enumerate() {
        let left = width * index as f64 + MARGIN;
        panel.draw(&mut out, left, top + MARGIN);
    }
    out.push_str("</svg>\n");
    out
}

impl Panel {
    fn draw(&self, out: &mut String, left: f64, top: f64) {
        let points = || self.lines.iter().flatten();
        let x_max = round_up(points().map(|point| point.0).fold(0.0, f64::max));
        let y_max = round_up(points().map(|point| point.1).fold(0.0, f64::max));
        let (bottom, middle) = (top + HEIGHT, left + WIDTH / 2.0);
        text(out, middle, top - 10.0, "middle", "black", self.title);
        text(out, middle, bottom + 36.0, "middle", "black", self.x);
        write(
            out,
            format_args!(
                "<path d=\"M{left:.1} {top:.1}V{bottom:.1}H{:.1}\" fill=\"none\" stroke=\"black\"/>\n",
                left + WIDTH
            ),
        );
        for part in 0..=4 {
            let share = f64::from(part) / 4.0;
            let (x, y) = (left + share * WIDTH, bottom - share * HEIGHT);
            text(
                out,
                x,
                bottom + 16.0,
                "middle",
                "black",
                &number(share * x_max),
            );
            text(
                out,
                left - 6.0,
                y + 4.0,
                "end",
                "black",
                &number(share * y_max),
            );
        }
        for (index, line) in self.lines.iter().enumerate() {
            let points: Vec<String> = line
                .iter()
                .map(|(x, y)| {
                    let (x, y) = (left + x / x_max * WIDTH, bottom - y / y_max * HEIGHT);
                    format!("{x:.1},{y:.1}")
                })
                .collect();
            write(
                out,
                format_args!(
                    "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"/>\n",
                    points.join(" "),
                    colour(index)
                ),
            );
        }
    }
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, fill: &str, text: &str) {
    let escaped = text
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    write(
        out,
        format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{escaped}</text>\n"
        ),
    );
}

fn write(out: &mut String, args: std::fmt::Arguments<'_>) {
    out.write_fmt(args)
        .expect("writing to a string does not fail");
}

/// The next of 1, 2, 4, 8 times a power of ten: an axis's end. 1 where there is nothing.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let step = [1.0, 2.0, 4.0, 8.0, 10.0]
        .iter()
        .find(|step| **step * power >= value);
    step.unwrap_or(&10.0) * power
}

/// A number of an axis: as short as it can be told.
fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_at_a_round_number_above_all_values() {
        for (value, end) in [
            (0.0, 1.0),
            (0.3, 0.4),
            (1.0, 1.0),
            (7.0, 8.0),
            (81.0, 100.0),
        ] {
            assert!(
                (round_up(value) - end).abs() < 1e-9,
                "{value}: {}",
                round_up(value)
            );
        }
        assert_eq!(
            (number(0.25), number(40.0), number(0.0)),
            ("0.25".into(), "40".into(), "0".into())
        );
    }

    #[test]
    fn every_report_has_its_label_and_a_line_in_every_panel_within_the_picture() {
        let report = |label: &str| Report {
            label: label.into(),
            tokens_by_second: vec![1.0, 50.0],
            ttft_curve_ms: vec![100.0, 200.0],
            e2e_curve_ms: vec![300.0, 900.0],
            ..Report::default()
        };
        let picture = svg(&[report("a < b"), report("c")]);
        assert_eq!(picture.matches("<polyline").count(), 6);
        assert!(picture.contains("a &lt; b: 0.0 output tokens/s"));
        assert!(!picture.contains("NaN") && !picture.contains("inf"));
    }

    #[test]
    fn a_report_of_nothing_is_drawn_too() {
        let picture = svg(&[Report::default()]);
        assert!(picture.ends_with("</svg>\n") && !picture.contains("NaN"));
    }
}

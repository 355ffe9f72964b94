//! The distribution of latencies as a drawing.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use plotters::style::FontDesc;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use vmkit::{Error, ErrorKind, Result};

use super::args::Pattern;
use super::figures::{self, Series};

const SIZE: (u32, u32) = (760, 420);
/// How high title and legend are.
const HEAD: u32 = 60;
/// Where each pattern's name stands.
const LEGEND: [i32; 3] = [80, 300, 520];
const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const GRID: RGBColor = RGBColor(0xd8, 0xde, 0xe4);

/// Colours that also those who see few of them tell apart, on white.
fn colour(pattern: Pattern) -> RGBColor {
    match pattern {
        Pattern::Sequential => RGBColor(0x00, 0x72, 0xb2),
        Pattern::Staggered => RGBColor(0xd5, 0x5e, 0x00),
        Pattern::Burst => RGBColor(0x00, 0x87, 0x62),
    }
}

/// Where a drawing goes. It is opened before the work: hours are not spent on what cannot be written.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    file: File,
    /// Made by us, with nothing in it yet.
    empty: bool,
}

impl Target {
    pub fn open(path: &Path) -> Result<Target> {
        let (mut options, failed) = (File::options(), |error| unwritable(path, error));
        let options = options.write(true);
        let (file, empty) = match options.clone().create_new(true).open(path) {
            Ok(file) => (file, true),
            // What is there stays until the drawing is made.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                (options.open(path).map_err(failed)?, false)
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Target { path: path.to_owned(), file, empty })
    }

    pub fn write(mut self, drawing: &str) -> Result<()> {
        self.rewrite(drawing).map_err(|error| unwritable(&self.path, error))?;
        self.empty = false;
        Ok(())
    }

    fn rewrite(&mut self, drawing: &str) -> std::io::Result<()> {
        // A pipe or a terminal has nothing to cut off.
        if self.file.metadata()?.is_file() {
            self.file.set_len(0)?;
            self.file.seek(SeekFrom::Start(0))?;
        }
        self.file.write_all(drawing.as_bytes())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.empty {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn unwritable(path: &Path, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("{} cannot be written", path.display()))
        .hint("choose another file with --svg")
        .caused_by(error)
}

/// For each pattern, which part of its requests was answered within which time.
pub fn draw(all: &[Series], title: &str) -> Result<String> {
    let mut drawing = String::new();
    chart(&mut drawing, all, title).map_err(|error| {
        let error = Error::new(ErrorKind::Io, "the plot cannot be drawn").caused_by(error.to_string());
        error.hint("leave --svg out")
    })?;
    Ok(drawing)
}

fn chart(drawing: &mut String, all: &[Series], title: &str) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(drawing, SIZE).into_drawing_area();
    // Not transparent: ink and colours are chosen for white, whatever page it stands on.
    root.fill(&WHITE)?;
    let font = |size: u32| FontDesc::from(("sans-serif", size)).color(&INK);
    let (least, most) = range(all);
    // The legend stands above the curves: wherever else, one may run through it.
    let (head, body) = root.split_vertically(HEAD);
    let centred = font(18).pos(Pos::new(HPos::Center, VPos::Top));
    head.draw(&Text::new(title, (SIZE.0 as i32 / 2, 14), centred))?;
    for (series, left) in all.iter().zip(LEGEND) {
        head.draw(&PathElement::new([(left, 52), (left + 20, 52)], colour(series.pattern).stroke_width(2)))?;
        head.draw(&Text::new(legend(series), (left + 26, 46), font(13)))?;
    }
    let mut chart = ChartBuilder::on(&body)
        .margin(12)
        // Room for half of the last label.
        .margin_right(40)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d((least..most).log_scale().with_key_points(ticks(least, most)), 0.0..100.0)?;
    chart
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(font(13))
        .axis_desc_style(font(14))
        .x_desc("acquire → first command's answer (log scale)")
        .y_desc("requests answered")
        .x_label_formatter(&|ms| label(*ms))
        .y_labels(6)
        .y_label_formatter(&|percent| format!("{percent:.0}%"))
        .draw()?;
    for series in all {
        chart.draw_series(LineSeries::new(steps(series), colour(series.pattern).stroke_width(2)))?;
    }
    root.present()?;
    drop(chart);
    Ok(())
}

fn legend(series: &Series) -> String {
    let name = series.pattern.name();
    series.figures().map_or(name.to_owned(), |of| format!("{name}, median {}", figures::text(of.median_ms)))
}

/// The curve: it rises at each latency by one request's part. What failed is missing at its top.
fn steps(series: &Series) -> Vec<(f64, f64)> {
    let part = |count: usize| 100.0 * count as f64 / series.requests.len() as f64;
    let latencies = series.latencies();
    latencies.iter().enumerate().flat_map(|(at, &ms)| [(visible(ms), part(at)), (visible(ms), part(at + 1))]).collect()
}

/// A logarithm has no zero, and no clock here tells less than this.
fn visible(ms: f64) -> f64 {
    ms.max(1e-4)
}

/// From the round number below the least to the one above the most.
fn range(all: &[Series]) -> (f64, f64) {
    let mut latencies: Vec<f64> = all.iter().flat_map(Series::latencies).map(visible).collect();
    latencies.sort_by(f64::total_cmp);
    let (least, most) = (latencies.first().copied().unwrap_or(1.0), latencies.last().copied().unwrap_or(10.0));
    let below = round_numbers().filter(|round| *round < least).last().unwrap_or(least / 2.0);
    let above = round_numbers().find(|round| *round > most).unwrap_or(most * 2.0);
    (below, above)
}

/// Round numbers in the range: all, or the powers of ten alone where those would be too many to read.
fn ticks(least: f64, most: f64) -> Vec<f64> {
    let inside: Vec<f64> = round_numbers().filter(|round| (least..=most).contains(round)).collect();
    match inside.len() {
        0..=12 => inside,
        _ => inside.into_iter().filter(|round| (round.log10().round() - round.log10()).abs() < 1e-9).collect(),
    }
}

/// 1, 2 and 5 of every power of ten, from a tenth of a microsecond to weeks, milliseconds.
fn round_numbers() -> impl Iterator<Item = f64> {
    (-5..=9).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)))
}

fn label(ms: f64) -> String {
    let number = |value: f64| format!("{}", (value * 1000.0).round() / 1000.0);
    match ms {
        ms if ms < 0.999 => format!("{} µs", number(ms * 1000.0)),
        ms if ms < 999.9 => format!("{} ms", number(ms)),
        ms => format!("{} s", number(ms / 1000.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_ticks_and_labels() {
        assert_eq!(ticks(5.0, 200.0), [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
        assert_eq!(ticks(0.01, 1000.0).len(), 6);
        assert_eq!(
            [0.02, 0.5, 1.0, 20.0, 500.0, 1000.0, 50_000.0].map(label),
            ["20 µs", "500 µs", "1 ms", "20 ms", "500 ms", "1 s", "50 s"]
        );
    }

    #[test]
    fn a_target_that_was_not_written_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old.svg"), dir.path().join("new.svg"));
        fs::write(&old, "a longer drawing").unwrap();
        drop((Target::open(&old).unwrap(), Target::open(&new).unwrap()));
        assert_eq!(fs::read_to_string(&old).unwrap(), "a longer drawing");
        assert!(!new.exists());
        Target::open(&old).unwrap().write("short").unwrap();
        Target::open(&new).unwrap().write("new").unwrap();
        assert_eq!(
            (fs::read_to_string(&old).unwrap(), fs::read_to_string(&new).unwrap()),
            ("short".into(), "new".into())
        );
        assert_eq!(Target::open(&dir.path().join("no/such.svg")).unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(Target::open(dir.path()).unwrap_err().kind(), ErrorKind::Io);
    }
}

//! The figures as a drawing: ours and bare QEMU's, side by side.

use plotters::prelude::*;
use plotters::style::FontDesc;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::Bar;

const WIDTH: u32 = 760;
/// How high title and legend are, a pair of bars, and the axis below them.
const HEAD: i32 = 64;
const ROW: i32 = 34;
const FOOT: i32 = 40;
/// Where bars begin and end; names stand before, figures behind.
const LEFT: i32 = 160;
const RIGHT: i32 = 650;
const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const GRID: RGBColor = RGBColor(0xd8, 0xde, 0xe4);
/// Colours that also those who see few of them tell apart, on white.
const OURS: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const FLOOR: RGBColor = RGBColor(0xa8, 0xb0, 0xb8);

/// A drawing of these figures, milliseconds on a logarithmic scale.
///
/// # Errors
/// What the library says of it.
pub fn draw(bars: &[Bar], title: &str) -> Result<String, String> {
    let mut drawing = String::new();
    bars_into(&mut drawing, bars, title).map_err(|error| error.to_string())?;
    Ok(drawing)
}

fn bars_into(drawing: &mut String, bars: &[Bar], title: &str) -> Result<(), Box<dyn std::error::Error>> {
    let bottom = HEAD + ROW * i32::try_from(bars.len())?;
    let root = SVGBackend::with_string(drawing, (WIDTH, u32::try_from(bottom + FOOT)?)).into_drawing_area();
    // Not transparent: ink and colours are chosen for white, whatever page it stands on.
    root.fill(&WHITE)?;
    let font = |size: u32| FontDesc::from(("sans-serif", size)).color(&INK);
    let at = |size, h, v| font(size).pos(Pos::new(h, v));
    let middle = i32::try_from(WIDTH)? / 2;
    root.draw(&Text::new(title, (middle, 10), at(18, HPos::Center, VPos::Top)))?;
    for (left, colour, name) in [(LEFT, OURS, "vmkit"), (LEFT + 110, FLOOR, "bare QEMU, in the same run")] {
        root.draw(&Rectangle::new([(left, 40), (left + 14, 52)], colour.filled()))?;
        root.draw(&Text::new(name, (left + 20, 46), at(13, HPos::Left, VPos::Center)))?;
    }
    let scale = Scale::of(bars);
    for (ms, x) in scale.marks() {
        root.draw(&PathElement::new([(x, HEAD), (x, bottom)], GRID))?;
        let label = if ms < 1000.0 { format!("{ms} ms") } else { format!("{} s", ms / 1000.0) };
        root.draw(&Text::new(label, (x, bottom + 8), at(13, HPos::Center, VPos::Top)))?;
    }
    for (bar, top) in bars.iter().zip((HEAD..).step_by(ROW as usize)) {
        let centre = top + ROW / 2;
        root.draw(&Text::new(bar.name, (LEFT - 10, centre), at(13, HPos::Right, VPos::Center)))?;
        for (ms, colour, from) in [(bar.ours, OURS, top + 5), (bar.floor, FLOOR, top + 17)] {
            root.draw(&Rectangle::new([(LEFT, from), (scale.x(ms), from + 11)], colour.filled()))?;
        }
        let said = format!("{:.2} ×", bar.ours / bar.floor);
        let end = scale.x(bar.ours.max(bar.floor)) + 8;
        root.draw(&Text::new(said, (end, centre), at(13, HPos::Left, VPos::Center)))?;
    }
    root.present()?;
    Ok(())
}

/// From the power of ten below the least to the one above the most.
struct Scale {
    least: i32,
    most: i32,
}

impl Scale {
    fn of(bars: &[Bar]) -> Scale {
        let all = || bars.iter().flat_map(|bar| [bar.ours, bar.floor]).filter(|ms| *ms > 0.0).map(f64::log10);
        let least = all().fold(f64::INFINITY, f64::min);
        let most = all().fold(f64::NEG_INFINITY, f64::max);
        match least.is_finite() && most.is_finite() {
            true => Scale { least: least.floor() as i32, most: (most.ceil() as i32).max(least.floor() as i32 + 1) },
            false => Scale { least: 0, most: 1 },
        }
    }

    fn x(&self, ms: f64) -> i32 {
        let part = (ms.max(1e-6).log10() - f64::from(self.least)) / f64::from(self.most - self.least);
        LEFT + (part.clamp(0.0, 1.0) * f64::from(RIGHT - LEFT)).round() as i32
    }

    fn marks(&self) -> Vec<(f64, i32)> {
        (self.least..=self.most).map(|power| 10_f64.powi(power)).map(|ms| (ms, self.x(ms))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_figure() {
        let bars = [Bar { name: "boot", ours: 2000.0, floor: 1000.0 }, Bar { name: "warm", ours: 6.0, floor: 5.0 }];
        let scale = Scale::of(&bars);
        assert_eq!((scale.least, scale.most), (0, 4));
        assert_eq!([1.0, 100.0, 10_000.0].map(|ms| scale.x(ms)), [LEFT, (LEFT + RIGHT) / 2, RIGHT]);
        let drawing = draw(&bars, "title").unwrap();
        for part in ["<svg", "title", "boot", "2.00 ×", "1.20 ×", "100 ms", "10 s", "</svg>"] {
            assert!(drawing.contains(part), "{part} is missing in {drawing}");
        }
        assert!(draw(&[], "nothing").unwrap().contains("nothing"));
    }
}

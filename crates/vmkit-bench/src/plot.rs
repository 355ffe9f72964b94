//! The ratios as a drawing: ours by bare QEMU's, beside its limit.

use plotters::prelude::*;
use plotters::style::FontDesc;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::figures::Target;
use crate::report::Bar;

const WIDTH: u32 = 760;
/// How high title and legend are, a row, and what is below the last.
const HEAD: i32 = 84;
const ROW: i32 = 30;
const FOOT: i32 = 14;
/// Where bars begin and end at the most; names stand before, numbers behind.
const LEFT: i32 = 150;
const RIGHT: i32 = 560;
/// How far beyond its limit a bar is drawn; one that is longer ends there.
const BEYOND: f64 = 3.0;
const INK: RGBColor = RGBColor(0x24, 0x29, 0x2f);
/// Colours that also those who see few of them tell apart, on white.
const WITHIN: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const OVER: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const FLOOR: RGBColor = RGBColor(0xa8, 0xb0, 0xb8);

impl Bar {
    /// How long ours and the floor's are by the limit: of what is to be much, the time that one of it takes.
    fn parts(&self) -> (f64, f64) {
        match self.target {
            Target::AtLeast(limit) => (limit / self.ratio, limit),
            Target::Ratio(limit) => (self.ratio / limit, 1.0 / limit),
            Target::Milliseconds(_) => (0.0, 0.0),
        }
    }

    fn said(&self) -> String {
        let ratio = if self.ratio < 10.0 { format!("{:.2}", self.ratio) } else { format!("{:.1}", self.ratio) };
        match self.target {
            Target::AtLeast(limit) => format!("{ratio} ×, at least {limit} ×"),
            Target::Ratio(limit) => format!("{ratio} ×, at most {limit} ×"),
            Target::Milliseconds(_) => String::new(),
        }
    }
}

/// A drawing of these ratios. Each row has a scale of its own, so that all limits are below each other.
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
    root.draw(&Text::new(title, (i32::try_from(WIDTH)? / 2, 12), at(18, HPos::Center, VPos::Top)))?;
    let legend =
        [(LEFT, FLOOR, "bare QEMU"), (LEFT + 110, WITHIN, "vmkit"), (LEFT + 190, OVER, "vmkit, over its limit")];
    for (left, colour, name) in legend {
        root.draw(&Rectangle::new([(left, 42), (left + 14, 54)], colour.filled()))?;
        root.draw(&Text::new(name, (left + 20, 48), at(13, HPos::Left, VPos::Center)))?;
    }
    let most = bars.iter().map(|bar| bar.parts().0).fold(1.25, f64::max).min(BEYOND);
    let x = |part: f64| LEFT + (part.clamp(0.0, most) / most * f64::from(RIGHT - LEFT)).round() as i32;
    for (bar, top) in bars.iter().zip((HEAD..).step_by(ROW as usize)) {
        let (centre, (ours, floor)) = (top + ROW / 2, bar.parts());
        let colour = if ours > 1.0 { OVER } else { WITHIN };
        root.draw(&Text::new(bar.name, (LEFT - 10, centre), at(13, HPos::Right, VPos::Center)))?;
        for (part, colour, from) in [(floor, FLOOR, top + 4), (ours, colour, top + 15)] {
            root.draw(&Rectangle::new([(LEFT, from), (x(part), from + 10)], colour.filled()))?;
        }
        root.draw(&Text::new(bar.said(), (RIGHT + 14, centre), at(13, HPos::Left, VPos::Center)))?;
    }
    // Last: it is seen over a bar that crosses it.
    root.draw(&PathElement::new([(x(1.0), HEAD - 4), (x(1.0), bottom + 4)], INK.stroke_width(2)))?;
    root.draw(&Text::new("limit", (x(1.0), HEAD - 6), at(13, HPos::Center, VPos::Bottom)))?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_held_against_its_limit() {
        let bars = [
            Bar { name: "boot", ratio: 1.1, target: Target::Ratio(1.25) },
            Bar { name: "burst", ratio: 70.0, target: Target::Ratio(35.0) },
            Bar { name: "churn", ratio: 0.9, target: Target::AtLeast(0.85) },
        ];
        assert_eq!(bars[1].parts(), (2.0, 1.0 / 35.0));
        let (churn, _) = bars[2].parts();
        assert!(churn < 1.0, "more than the least is within the limit");
        let drawing = draw(&bars, "title").unwrap();
        for part in ["<svg", "title", "boot", "1.10 ×, at most 1.25 ×", "70.0 ×", "0.90 ×, at least 0.85 ×", "</svg>"]
        {
            assert!(drawing.contains(part), "{part} is missing in {drawing}");
        }
        assert_eq!(drawing.matches("#D55E00").count(), 2, "the one that is over, and the legend");
        assert!(draw(&[], "nothing").unwrap().contains("nothing"));
    }
}

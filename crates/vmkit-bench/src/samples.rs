//! What was measured, by figure.

use std::collections::BTreeMap;
use std::time::Duration;

/// The measurements of each figure.
#[derive(Clone, Debug, Default)]
pub struct Samples(BTreeMap<&'static str, Vec<f64>>);

impl Samples {
    /// Adds a measurement.
    pub fn add(&mut self, figure: &'static str, value: f64) {
        self.0.entry(figure).or_default().push(value);
    }

    /// A figure's median, when it was measured.
    pub fn median(&self, figure: &str) -> Option<f64> {
        self.0.get(figure).map(|values| median(values))
    }
}

/// The middle one; of an even number the mean of the two in the middle; of none not a number.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[half],
        _ => f64::midpoint(sorted[half - 1], sorted[half]),
    }
}

/// The percentile of values that are in order, a nearest rank: the smallest that so many percent of all do not exceed; of none not
/// a number.
pub fn rank(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// In milliseconds.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 900.0, 2.0]), 3.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 99, 100].map(|percent| rank(&hundred, percent)), [50.0, 99.0, 100.0]);
        assert_eq!([0, 50, 99].map(|percent| rank(&[7.0], percent)), [7.0; 3]);
        assert!(rank(&[], 50).is_nan());
    }

    #[test]
    fn figures_are_apart() {
        let mut samples = Samples::default();
        for value in [1.0, 5.0, 3.0] {
            samples.add("boot", value);
        }
        samples.add("exec", 7.0);
        assert_eq!(
            (samples.median("boot"), samples.median("exec"), samples.median("other")),
            (Some(3.0), Some(7.0), None)
        );
    }
}

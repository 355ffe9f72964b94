#![no_main]
//! What is encoded is what is decoded, however it is cut up; and noise decodes to something without panicking.

use libfuzzer_sys::fuzz_target;
use vmkit_agent::link::{Decoder, Encoder, MARKER, Stop};

fuzz_target!(|input: (&[u8], u8)| {
    let (data, cut) = input;
    let step = usize::from(cut).max(1);
    let (mut encoder, mut wire) = (Encoder::default(), Vec::new());
    for part in data.chunks(step) {
        encoder.encode(part, &mut wire);
    }
    assert!(!wire.windows(MARKER.len()).any(|window| window == MARKER));
    assert_eq!(decode(&wire, step).as_deref(), Some(data));
    // The same bytes as noise from the line.
    let _ = decode(data, step);
});

fn decode(wire: &[u8], step: usize) -> Option<Vec<u8>> {
    let (mut decoder, mut all, mut out) = (Decoder::default(), Vec::new(), vec![0; step]);
    let mut rest = wire;
    while !rest.is_empty() {
        let done = decoder.decode(&rest[..rest.len().min(step)], &mut out);
        all.extend_from_slice(&out[..done.produced]);
        rest = &rest[done.consumed..];
        match done.stop {
            Stop::More => {}
            Stop::Marker | Stop::Garbage => return None,
        }
    }
    Some(all)
}

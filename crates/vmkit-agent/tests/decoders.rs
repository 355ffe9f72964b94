//! What the fuzz targets check, on random input from a seed that a failure prints.

use vmkit_agent::link::{Decoder, Encoder, FRAME, Handshake, Kind, MARKER, Stop};
use vmkit_agent::protocol::{self, Control, ExecRequest, Header, MAX_MESSAGE, Reply, Request};

/// Enough for tests: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Bytes in which the marker's own are far more frequent than chance would have it.
    fn bytes(&mut self, limit: usize) -> Vec<u8> {
        let length = self.below(limit);
        (0..length)
            .map(|_| match self.below(4) {
                0 => self.next() as u8,
                1 => 0,
                _ => MARKER[self.below(MARKER.len())],
            })
            .collect()
    }

    /// Bytes with whole markers and prefixes of it in them.
    fn hostile(&mut self, limit: usize) -> Vec<u8> {
        let mut bytes = self.bytes(limit);
        for _ in 0..self.below(4) {
            let at = self.below(bytes.len() + 1);
            let part = &MARKER[..=self.below(MARKER.len() - 1)];
            bytes.splice(at..at, part.iter().copied());
        }
        bytes
    }
}

/// Decodes wire bytes that arrive in pieces, into a buffer of any size; `None` at a marker or garbage.
fn decode(wire: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let (mut decoder, mut all, mut rest) = (Decoder::default(), Vec::new(), wire);
    while !rest.is_empty() {
        let mut out = vec![0; 1 + random.below(40)];
        let done = decoder.decode(&rest[..1 + random.below(rest.len())], &mut out);
        all.extend_from_slice(&out[..done.produced]);
        rest = &rest[done.consumed..];
        if done.stop != Stop::More {
            return None;
        }
    }
    Some(all)
}

#[test]
fn what_is_encoded_is_what_is_decoded_and_has_no_marker() {
    for seed in 0..20_000 {
        let mut random = Random(seed);
        let data = random.hostile(200);
        let (mut encoder, mut wire, mut rest) = (Encoder::default(), Vec::new(), &data[..]);
        while !rest.is_empty() {
            let (part, more) = rest.split_at(1 + random.below(rest.len()));
            encoder.encode(part, &mut wire);
            rest = more;
        }
        assert!(!wire.windows(MARKER.len()).any(|window| window == MARKER), "seed {seed}");
        assert_eq!(decode(&wire, &mut random), Some(data), "seed {seed}");
    }
}

#[test]
fn a_marker_is_found_after_any_half_frame() {
    for seed in 0..20_000 {
        let mut random = Random(seed);
        let (mut encoder, mut wire) = (Encoder::default(), Vec::new());
        encoder.encode(&random.hostile(100), &mut wire);
        // A host that was killed in the middle of a write, and the next one's hello.
        wire.truncate(random.below(wire.len() + 1));
        let hello = Handshake { kind: Kind::Hello, version: 7, nonce: [random.next() as u8; 16], payload: Vec::new() };
        wire.extend(hello.encode());
        let (mut decoder, mut out, mut rest) = (Decoder::default(), [0; 512], &wire[..]);
        let stop = loop {
            let done = decoder.decode(rest, &mut out);
            rest = &rest[done.consumed..];
            // Half an escape and a marker look like garbage first; the marker itself is still ahead, or was its end.
            if done.stop == Stop::Marker || rest.is_empty() {
                break done.stop;
            }
        };
        assert_eq!(stop, Stop::Marker, "seed {seed}");
        let frame: &[u8; FRAME] = rest.try_into().unwrap();
        assert_eq!(Handshake::decode(frame), Some((hello, 0)), "seed {seed}");
    }
}

#[test]
fn noise_is_an_error_or_a_message_and_never_a_panic() {
    for seed in 0..100_000 {
        let mut random = Random(seed);
        let length = random.below(60);
        let noise: Vec<u8> = (0..length).map(|_| (random.next() >> random.below(60)) as u8).collect();
        if let Ok(request) = protocol::decode::<Request>(&noise) {
            let again = protocol::encode(&request).unwrap();
            assert_eq!(protocol::decode::<Request>(&again[4..]).unwrap(), request, "seed {seed}");
        }
        if let Ok(reply) = protocol::decode::<Reply>(&noise) {
            let again = protocol::encode(&reply).unwrap();
            assert_eq!(protocol::decode::<Reply>(&again[4..]).unwrap(), reply, "seed {seed}");
        }
        let _ = protocol::decode::<Control>(&noise);
        let _ = protocol::decode::<Header>(&noise);
        let _ = decode(&noise, &mut random);
    }
}

#[tokio::test]
async fn lengths_that_lie_are_errors() {
    let mut long = (MAX_MESSAGE as u32 + 1).to_le_bytes().to_vec();
    assert!(protocol::read::<Request>(&mut &long[..]).await.is_err());
    long[..4].copy_from_slice(&(MAX_MESSAGE as u32).to_le_bytes());
    // Says four megabytes, and ends: no memory was taken for them.
    assert_eq!(protocol::read::<Request>(&mut &long[..]).await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    for cut in 1..4 {
        assert!(protocol::read::<Request>(&mut &long[..cut]).await.is_err());
    }
    assert!(protocol::read::<Request>(&mut &[][..]).await.unwrap().is_none());
    let request = ExecRequest { program: "x".repeat(MAX_MESSAGE), ..ExecRequest::default() };
    assert!(protocol::encode(&Request::Exec(request)).is_err());
}

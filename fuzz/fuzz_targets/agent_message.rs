#![no_main]
//! Messages: noise is an error or a message that encodes to the same again.

use libfuzzer_sys::fuzz_target;
use vmkit_agent::protocol::{self, Control, Header, Reply, Request};

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = protocol::decode::<Request>(data) {
        let again = protocol::encode(&request).unwrap();
        assert_eq!(protocol::decode::<Request>(&again[4..]).unwrap(), request);
    }
    if let Ok(reply) = protocol::decode::<Reply>(data) {
        let again = protocol::encode(&reply).unwrap();
        assert_eq!(protocol::decode::<Reply>(&again[4..]).unwrap(), reply);
    }
    let _ = protocol::decode::<Control>(data);
    let _ = protocol::decode::<Header>(data);
});

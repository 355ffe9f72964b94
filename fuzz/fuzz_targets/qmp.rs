#![no_main]
//! A control session with something that is not QEMU: an error, never a panic or a hang.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(vmkit_backends::qemu::fuzzing::control_session(data));
});

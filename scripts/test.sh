#!/usr/bin/env bash
# Every test, real VMs included. A test that cannot run here fails: nothing is skipped in silence.
set -euo pipefail
cd "$(dirname "$0")/.."
export VMKIT_REQUIRE="${VMKIT_REQUIRE:-qemu}"
cargo test --locked --workspace --all-features

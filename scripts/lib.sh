# What the scripts share. Sourced, not run.

# Says what is wrong and ends.
fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# Prints the comment at the top of a script.
help_of() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$1"
  exit 0
}

# Oldest rustc that builds the workspace, as Cargo.toml says.
rust_version_needed() {
  sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml
}

need_toolchain() {
  local needed have oldest
  needed=$(rust_version_needed)
  command -v cargo >/dev/null || fail "cargo is not installed: Rust $needed or newer is needed, see https://rustup.rs"
  have=$(rustc --version | cut -d ' ' -f 2)
  oldest=$(printf '%s\n%s\n' "$needed" "${have%%-*}" | sort -V | head -n 1)
  [ "$oldest" = "$needed" ] || fail "rustc $have is too old: $needed or newer is needed (rustup update)"
  command -v "${CC:-cc}" >/dev/null ||
    fail "no C compiler ('${CC:-cc}'): install one (Debian: apt install gcc), or set CC; Rust links with it"
}

need_python() {
  command -v python3 >/dev/null || fail "python3 is not installed (3.9 or newer, standard library only)"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
    fail "$(python3 --version) is too old: 3.9 or newer is needed"
}

# For the tests of the CUDA path, whose devices are emulated by programs in C++.
need_cxx() {
  local version
  version=$("${CXX:-g++}" -dumpversion 2>/dev/null) ||
    fail "no C++ compiler ('${CXX:-g++}'): tests on emulated GPUs need GCC 11 or newer (Debian: apt install g++; or set CXX)"
  [ "${version%%.*}" -ge 11 ] || fail "'${CXX:-g++}' is version $version: tests on emulated GPUs need GCC 11 or newer (CXX names another)"
}

# Version of NVRTC that the kernels are compiled with, as scripts/build-kernels says.
nvrtc_needed() {
  sed -n 's/^nvrtc=\([0-9.]*\).*/\1/p' scripts/build-kernels
}

# Whether that compiler is installed already, so that no package index is needed.
have_nvrtc() {
  [ "$(cat target/kernels-venv/nvrtc 2>/dev/null)" = "$(nvrtc_needed)" ]
}

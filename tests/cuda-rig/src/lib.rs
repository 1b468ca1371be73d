//! The CUDA path without a GPU.
//!
//! Owns building and finding three shared libraries under NVIDIA's sonames (`libcuda.so.1`, `libcublas.so.12`,
//! `libnccl.so.2`) whose kernels are the product's, compiled for the host, and the kernels' test harness in three builds.
//! Everything is made by g++ at first use, once for each state of the sources, under `target/cuda-rig`; concurrent test
//! processes are safe. What the emulation does, and the `CUDA_EMU_*` variables it reads, is in `src/driver/settings.h`.
//!
//! A failure to build panics with the compiler's message: without the rig there is nothing to test.

mod compile;
mod recipe;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use recipe::Recipe;

/// How the kernels of a harness are built, and so what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Random orders of warps, poisoned shared memory, guard pages, alignment of accesses.
    Plain,
    /// A race detector; every CUDA thread is a fiber, and barriers are all that orders them.
    Tsan,
    /// Bounds to the byte, undefined behaviour, alignment.
    Asan,
}

/// Whether tests are to run on this machine's own devices and libraries: `TANDEM_GPU=1`, which `scripts/gpu-smoke` sets.
pub fn on_hardware() -> bool {
    std::env::var_os("TANDEM_GPU").is_some_and(|value| value == "1")
}

/// The folder of the emulated libraries, with the product's kernels in them.
pub fn library() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| Recipe::product().libraries())
}

/// Loads the emulated libraries into this process, for good: whoever asks the loader for one of their sonames from now on
/// gets them. To be called before anything looks for CUDA. Does nothing [`on_hardware`].
pub fn preload() {
    if !on_hardware() {
        preload_from(library());
    }
}

/// As [`preload()`], from another folder of libraries.
pub fn preload_from(folder: &Path) {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    for soname in recipe::SONAMES {
        let path = folder.join(soname);
        // SAFETY: the library is ours; its initialisers only register kernels.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        match library {
            Ok(library) => std::mem::forget(library),
            Err(error) => panic!(
                "the emulated library {} does not load: {error}",
                path.display()
            ),
        }
    }
}

/// Environment for a child process, so that its loader finds the emulated libraries first. Nothing [`on_hardware`].
pub fn env() -> Vec<(String, String)> {
    if on_hardware() {
        return Vec::new();
    }
    env_of(library())
}

/// As [`env()`], for another folder of libraries.
pub fn env_of(folder: &Path) -> Vec<(String, String)> {
    let mut path = OsString::from(folder);
    if let Some(old) = std::env::var_os("LD_LIBRARY_PATH").filter(|old| !old.is_empty()) {
        path.push(":");
        path.push(old);
    }
    vec![(
        "LD_LIBRARY_PATH".into(),
        path.to_string_lossy().into_owned(),
    )]
}

/// The harness of the product's kernels: `harness --seeds N --first SEED --only TEXT --list`.
pub fn harness(kind: Kind) -> &'static Path {
    static BINARIES: [OnceLock<PathBuf>; 3] = [const { OnceLock::new() }; 3];
    BINARIES[kind as usize].get_or_init(|| Recipe::product().harness(kind))
}

/// The harness of kernels with planted bugs, one case for each bug.
pub fn planted_harness(kind: Kind) -> PathBuf {
    Recipe::planted().harness(kind)
}

/// The emulated libraries with the planted kernels in them, and a program that drives them: `scenarios NAME`.
pub fn planted_libraries() -> (PathBuf, PathBuf) {
    let recipe = Recipe::planted();
    let folder = recipe.libraries();
    let program = recipe.scenarios(&folder);
    (folder, program)
}

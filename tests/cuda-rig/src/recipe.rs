//! What is built from which files with which flags.
//!
//! Owns the list of sources and flags of each artifact; running the compiler and keeping its results is `compile`'s.

use std::path::{Path, PathBuf};

use crate::Kind;
use crate::compile::{self, Link, Unit};

/// The libraries that a CUDA program looks for, in the order in which they must be loaded.
pub(crate) const SONAMES: [&str; 3] = ["libcuda.so.1", "libcublas.so.12", "libnccl.so.2"];

/// Names that programs try before the sonames; a real library of that name must not be found first.
const DEVELOPMENT_NAMES: [(&str, &str); 3] = [
    ("libcuda.so", "libcuda.so.1"),
    ("libcublas.so", "libcublas.so.12"),
    ("libnccl.so", "libnccl.so.2"),
];

/// One set of kernels with its test cases.
pub(crate) struct Recipe {
    name: &'static str,
    kernels: PathBuf,
    cases: PathBuf,
}

impl Recipe {
    /// The product's kernels.
    pub(crate) fn product() -> Recipe {
        Recipe {
            name: "product",
            kernels: here().join("../../worker/engine/src/backend/cuda/kernels"),
            cases: here().join("src/harness"),
        }
    }

    /// Kernels with planted bugs.
    pub(crate) fn planted() -> Recipe {
        Recipe {
            name: "planted",
            kernels: here().join("planted"),
            cases: here().join("planted/cases"),
        }
    }

    /// Builds the three libraries; gives their folder.
    pub(crate) fn libraries(&self) -> PathBuf {
        let mut driver = self.units(
            "src/runtime",
            "launch.cc block.cc",
            &runtime_flags(Kind::Plain),
        );
        driver.extend(self.units_in(&here().join("src/driver"), &common_flags()));
        driver.extend(self.kernel_units(Kind::Plain));
        let blas = self.units_in(&here().join("src/blas"), &common_flags());
        let nccl = self.units_in(&here().join("src/nccl"), &common_flags());
        let shared = |soname: &str, units, needs_driver: bool| Link {
            output: soname.to_owned(),
            units,
            flags: [
                "-shared",
                "-pthread",
                "-Wl,-z,defs",
                &format!("-Wl,-soname,{soname}"),
            ]
            .map(str::to_owned)
            .into(),
            last_flags: if needs_driver {
                driver_flags()
            } else {
                vec!["-ldl".into(), "-lrt".into()]
            },
        };
        let links = [
            shared(SONAMES[0], driver, false),
            shared(SONAMES[1], blas, true),
            shared(SONAMES[2], nccl, true),
        ];
        compile::build(
            &format!("{}-libraries", self.name),
            &self.headers(),
            &links,
            &DEVELOPMENT_NAMES,
        )
    }

    /// Builds the harness; gives the binary.
    pub(crate) fn harness(&self, kind: Kind) -> PathBuf {
        let mut units = self.units("src/runtime", "launch.cc block.cc", &runtime_flags(kind));
        units.extend(self.units("src/harness", "main.cc", &runtime_flags(kind)));
        let cases = self.units_in(&self.cases, &runtime_flags(kind));
        units.extend(
            cases
                .into_iter()
                .filter(|unit| !unit.source.ends_with("main.cc")),
        );
        units.extend(self.kernel_units(kind));
        let flags = match kind {
            Kind::Plain => vec![],
            Kind::Tsan => vec!["-fsanitize=thread".to_owned()],
            Kind::Asan => vec!["-fsanitize=address,undefined".to_owned()],
        };
        let link = Link {
            output: "harness".into(),
            units,
            flags,
            last_flags: vec!["-pthread".into()],
        };
        let name = format!(
            "{}-harness-{}",
            self.name,
            format!("{kind:?}").to_lowercase()
        );
        compile::build(&name, &self.headers(), &[link], &[]).join("harness")
    }

    /// Builds the program that drives the libraries in `folder`.
    pub(crate) fn scenarios(&self, folder: &Path) -> PathBuf {
        let units = self.units_in(&here().join("planted/scenarios"), &common_flags());
        let mut last_flags: Vec<String> = SONAMES
            .iter()
            .map(|soname| format!("-l:{soname}"))
            .collect();
        last_flags.push(format!("-Wl,-rpath,{}", folder.display()));
        let flags = vec![format!("-L{}", folder.display()), "-pthread".into()];
        let link = Link {
            output: "scenarios".into(),
            units,
            flags,
            last_flags,
        };
        compile::build("planted-scenarios", &self.headers(), &[link], &[]).join("scenarios")
    }

    /// Every file that any source may include: a change of one of them builds all anew.
    fn headers(&self) -> Vec<PathBuf> {
        let mut headers = vec![];
        for folder in [
            "include",
            "include/rig",
            "src/runtime",
            "src/driver",
            "src/blas",
            "src/nccl",
            "src/harness",
        ] {
            headers.extend(compile::files_in(&here().join(folder), "h"));
        }
        headers.extend(compile::files_in(&self.cases, "h"));
        headers.extend(compile::files_in(&self.kernels, "cuh"));
        headers
    }

    fn units(&self, folder: &str, files: &str, flags: &[String]) -> Vec<Unit> {
        files
            .split(' ')
            .map(|file| self.unit(here().join(folder).join(file), flags))
            .collect()
    }

    fn units_in(&self, folder: &Path, flags: &[String]) -> Vec<Unit> {
        compile::files_in(folder, "cc")
            .into_iter()
            .map(|source| self.unit(source, flags))
            .collect()
    }

    fn unit(&self, source: PathBuf, flags: &[String]) -> Unit {
        let mut flags = flags.to_vec();
        flags.push(format!("-I{}", self.kernels.display()));
        Unit {
            also: vec![],
            source,
            flags,
            kernels: false,
        }
    }

    /// Each kernel file as one unit of `kernel_unit.cc`.
    fn kernel_units(&self, kind: Kind) -> Vec<Unit> {
        let sources = compile::files_in(&self.kernels, "cu");
        let unit = |kernel: PathBuf| {
            let mut unit = self.unit(
                here().join("src/runtime/kernel_unit.cc"),
                &kernel_flags(kind),
            );
            unit.flags
                .push(format!("-DRIG_KERNEL_FILE=\"{}\"", kernel.display()));
            unit.also.push(kernel);
            // Sanitizers add variables of their own; the plain build of the same file tells.
            unit.kernels = kind == Kind::Plain;
            unit
        };
        sources.into_iter().map(unit).collect()
    }
}

fn here() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The emulated cuBLAS and NCCL find the driver beside them.
fn driver_flags() -> Vec<String> {
    ["-L.", "-l:libcuda.so.1", "-Wl,-rpath,$ORIGIN", "-lrt"]
        .map(str::to_owned)
        .into()
}

fn common_flags() -> Vec<String> {
    let mut flags: Vec<String> =
        "-std=c++17 -g1 -O2 -fPIC -pthread -fvisibility=hidden -DTANDEM_RIG -Wall -Wextra -Werror"
            .split(' ')
            .map(str::to_owned)
            .collect();
    // Never fused: a result must not depend on where the compiler sees a chance. Aliasing as CUDA C++ takes it.
    flags.extend(
        [
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-Wno-unknown-pragmas",
            "-Wno-psabi",
        ]
        .map(str::to_owned),
    );
    flags.push(architecture_flag());
    for folder in ["include", "src", "src/harness"] {
        flags.push(format!("-I{}", here().join(folder).display()));
    }
    flags
}

/// The widest vectors that this machine has; artifacts are kept apart by their flags, so another machine builds its own.
fn architecture_flag() -> String {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("bmi2")
    {
        return "-march=x86-64-v3".into();
    }
    "-DRIG_BASELINE".into()
}

/// The runtime itself is never instrumented: it plays the hardware.
fn runtime_flags(kind: Kind) -> Vec<String> {
    let mut flags = common_flags();
    match kind {
        Kind::Plain => {}
        Kind::Tsan => flags.push("-DRIG_TSAN".into()),
        Kind::Asan => flags.push("-DRIG_ASAN".into()),
    }
    flags
}

fn kernel_flags(kind: Kind) -> Vec<String> {
    let mut flags = runtime_flags(kind);
    let more: &[&str] = match kind {
        Kind::Plain => &["-fsanitize=alignment"],
        Kind::Tsan => &["-O1", "-fsanitize=thread"],
        Kind::Asan => &[
            "-O1",
            "-fsanitize=address,undefined",
            "-fno-sanitize=vptr",
            "-fno-sanitize-recover=all",
            "-fsanitize-sections=rig_shared",
        ],
    };
    flags.extend(more.iter().map(|&flag| flag.to_owned()));
    // A kernel file may have helpers that only some of its entries use.
    flags.push("-Wno-unused-function".into());
    flags
}

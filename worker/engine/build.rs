//! Writes what the CUDA backend includes: a launcher for each kernel, and the compiled kernels themselves.
//!
//! Owns the form of that text. What a kernel's head may hold is told in `signature.rs`. Compiles no kernel: the cubins lie
//! in the repository, and `scripts/build-kernels` makes them.

#[path = "src/backend/cuda/signature.rs"]
mod signature;

use signature::{Kind, Signature};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs, process};

/// Architectures with cubins of their own.
const ARCHITECTURES: [u32; 2] = [80, 90];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/backend/cuda/signature.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/backend/cuda/kernels");
    println!("cargo::rerun-if-changed=src/backend/cuda/cubins");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    match generate(&here.join("src/backend/cuda")) {
        Ok(text) => fs::write(out.join("cuda_kernels.rs"), text).expect("OUT_DIR can be written"),
        Err(reason) => {
            println!("cargo::error={reason}");
            process::exit(1);
        }
    }
}

/// A file of kernels.
struct Source {
    name: String,
    path: PathBuf,
    signatures: Vec<Signature>,
}

fn generate(backend: &Path) -> Result<String, String> {
    let (mut sources, mut headers) = (Vec::new(), Vec::new());
    for path in files(&backend.join("kernels"))? {
        let (Some(name), Some(kind)) = (stem(&path), path.extension()) else {
            continue;
        };
        if kind == "cuh" {
            headers.push((format!("{name}.cuh"), path));
        } else if kind == "cu" {
            let text = fs::read_to_string(&path)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            let signatures = signature::parse(&text)
                .map_err(|reason| format!("{}, {reason}", path.display()))?;
            sources.push(Source {
                name,
                path,
                signatures,
            });
        }
    }
    let mut out = String::new();
    write_sources(&mut out, &sources, &headers, &backend.join("cubins"))?;
    write_launchers(&mut out, &sources);
    Ok(out)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    Ok(paths)
}

fn stem(path: &Path) -> Option<String> {
    Some(path.file_stem()?.to_str()?.to_owned())
}

/// `HEADERS` and `SOURCES`: texts, cubins and what is in them.
fn write_sources(
    out: &mut String,
    sources: &[Source],
    headers: &[(String, PathBuf)],
    cubins: &Path,
) -> Result<(), String> {
    line(out, "/// What kernels include, by name.");
    line(out, "pub(super) const HEADERS: &[(&str, &str)] = &[");
    for (name, path) in headers {
        line(out, &format!("    ({name:?}, include_str!({path:?})),"));
    }
    line(
        out,
        "];\n\n/// All files of kernels.\npub(super) const SOURCES: &[Source] = &[",
    );
    for Source {
        name,
        path,
        signatures,
    } in sources
    {
        line(
            out,
            &format!(
                "    Source {{\n        name: {name:?},\n        text: include_str!({path:?}),"
            ),
        );
        line(out, "        cubins: &[");
        for sm in ARCHITECTURES {
            let cubin = cubins.join(format!("sm_{sm}/{name}.cubin"));
            if !cubin.exists() {
                return Err(format!(
                    "{} is not there: run scripts/build-kernels",
                    cubin.display()
                ));
            }
            line(
                out,
                &format!("            ({sm}, include_bytes!({cubin:?})),"),
            );
        }
        line(out, "        ],\n        kernels: &[");
        for Signature { name, parameters } in signatures {
            let bytes: Vec<usize> = parameters
                .iter()
                .map(|parameter| parameter.kind.bytes())
                .collect();
            line(
                out,
                &format!("            Head {{ name: {name:?}, parameters: &{bytes:?} }},"),
            );
        }
        line(out, "        ],\n    },");
    }
    line(out, "];\n");
    Ok(())
}

/// `Kernels`: a field and a launcher for each.
fn write_launchers(out: &mut String, sources: &[Source]) {
    let all = || sources.iter().flat_map(|source| &source.signatures);
    line(
        out,
        "/// Every kernel, ready to launch.\npub(super) struct Kernels {",
    );
    for Signature { name, .. } in all() {
        line(out, &format!("    pub(super) {name}: Function,"));
    }
    line(out, "}\n\nimpl Kernels {");
    line(
        out,
        "    /// Finds every kernel: `find` gets its file, its place in the file and itself.",
    );
    line(
        out,
        "    pub fn find<E>(mut find: impl FnMut(usize, &'static Head) -> Result<Function, E>) -> Result<Kernels, E> {",
    );
    line(out, "        Ok(Kernels {");
    for (file, source) in sources.iter().enumerate() {
        for (at, Signature { name, .. }) in source.signatures.iter().enumerate() {
            line(
                out,
                &format!("            {name}: find({file}, &SOURCES[{file}].kernels[{at}])?,"),
            );
        }
    }
    line(out, "        })\n    }");
    for Signature { name, parameters } in all() {
        let list: Vec<String> = parameters
            .iter()
            .map(|parameter| format!("{}: {}", parameter.name, parameter.kind.rust()))
            .collect();
        line(out, "\n    #[allow(clippy::too_many_arguments)]");
        line(
            out,
            &format!(
                "    pub fn {name}(&self, launch: Launch<'_>, {}) -> Result<(), CudaError> {{",
                list.join(", ")
            ),
        );
        let arguments: Vec<String> = parameters
            .iter()
            .map(|parameter| match parameter.kind {
                // Whatever a pointer points to, the kernel gets its address.
                Kind::Read(_) | Kind::Write(_) => {
                    format!("argument(&{}.address())", parameter.name)
                }
                Kind::Value(_) => format!("argument(&{})", parameter.name),
            })
            .collect();
        line(
            out,
            "        // SAFETY: the parameters of this kernel, in its order; loading compared their sizes with the cubin's.",
        );
        line(
            out,
            &format!(
                "        unsafe {{ self.{name}.launch(launch, &mut [{}]) }}",
                arguments.join(", ")
            ),
        );
        line(out, "    }");
    }
    line(out, "}");
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{text}").expect("a string takes all");
}

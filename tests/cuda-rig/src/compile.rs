//! Runs the compiler and keeps what it made.
//!
//! Owns the cache under `target/cuda-rig`: objects and finished folders are named by a hash of everything they were made
//! from, written elsewhere first and renamed into place, so what is there under its name is whole. One builder at a time
//! works on a name (a file lock); others wait for it and find it done.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

/// One translation unit.
pub(crate) struct Unit {
    pub(crate) source: PathBuf,
    /// Files that it includes beside the headers common to all.
    pub(crate) also: Vec<PathBuf>,
    pub(crate) flags: Vec<String>,
    /// Variables that may not be in the object, see [`check_variables`].
    pub(crate) kernels: bool,
}

/// One binary or shared library.
pub(crate) struct Link {
    pub(crate) output: String,
    pub(crate) units: Vec<Unit>,
    pub(crate) flags: Vec<String>,
    /// Behind the objects, where libraries belong.
    pub(crate) last_flags: Vec<String>,
}

/// Builds all of `links` in order into one folder and gives it. A later link may use the output of an earlier one by `-L.`;
/// `aliases` are symbolic links (name, target) in the folder.
pub(crate) fn build(
    name: &str,
    headers: &[PathBuf],
    links: &[Link],
    aliases: &[(&str, &str)],
) -> PathBuf {
    let common = Common::new(headers);
    let mut hasher = DefaultHasher::new();
    for link in links {
        (&link.output, &link.flags, &link.last_flags).hash(&mut hasher);
        for unit in &link.units {
            common.key_of(unit).hash(&mut hasher);
        }
    }
    let folder = cache().join(format!("{name}-{:016x}", hasher.finish()));
    if folder.is_dir() {
        return folder;
    }
    create_folder(&cache().join("objects"));
    let lock_path = cache().join(format!("{name}.lock"));
    let lock = fs::File::create(&lock_path)
        .unwrap_or_else(|e| panic!("cannot create {}: {e}", lock_path.display()));
    lock.lock()
        .unwrap_or_else(|e| panic!("cannot lock {}: {e}", lock_path.display()));
    if folder.is_dir() {
        return folder;
    }
    remove_older(name);
    let units: Vec<&Unit> = links.iter().flat_map(|link| &link.units).collect();
    compile_all(&common, &units);
    let making = cache().join(format!("{name}-making-{}", std::process::id()));
    let _ = fs::remove_dir_all(&making);
    create_folder(&making);
    for link in links {
        let mut command = Command::new(compiler());
        command.current_dir(&making).args(&link.flags);
        command.args(link.units.iter().map(|unit| common.object_of(unit)));
        command.arg("-o").arg(&link.output).args(&link.last_flags);
        run(command, &link.output).unwrap_or_else(|failure| panic!("{failure}"));
    }
    for (alias, target) in aliases {
        std::os::unix::fs::symlink(target, making.join(alias))
            .unwrap_or_else(|e| panic!("cannot link {alias}: {e}"));
    }
    fs::rename(&making, &folder)
        .unwrap_or_else(|e| panic!("cannot put {} into place: {e}", folder.display()));
    folder
}

/// The files directly in `folder` whose names end in `.extension`, sorted; none if there is no such folder.
pub(crate) fn files_in(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return vec![];
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    files
}

/// What all units depend on: the compiler and the headers.
struct Common {
    hash: u64,
}

impl Common {
    fn new(headers: &[PathBuf]) -> Common {
        let mut hasher = DefaultHasher::new();
        compiler_version().hash(&mut hasher);
        for header in headers {
            (header, read(header)).hash(&mut hasher);
        }
        Common {
            hash: hasher.finish(),
        }
    }

    fn key_of(&self, unit: &Unit) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.hash, &unit.source, &unit.flags, read(&unit.source)).hash(&mut hasher);
        for file in &unit.also {
            read(file).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn object_of(&self, unit: &Unit) -> PathBuf {
        cache()
            .join("objects")
            .join(format!("{:016x}.o", self.key_of(unit)))
    }
}

/// Compiles what is not there yet, as many at a time as there are processors.
fn compile_all(common: &Common, units: &[&Unit]) {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(vec![]);
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(failure) = compile(unit, &common.object_of(unit)) {
                        failures.lock().expect("no worker panics").push(failure);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no worker panics");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn compile(unit: &Unit, object: &Path) -> Result<(), String> {
    if object.is_file() {
        return Ok(());
    }
    let making = object.with_extension(format!("{}.making", std::process::id()));
    let mut command = Command::new(compiler());
    command
        .args(&unit.flags)
        .arg("-c")
        .arg(&unit.source)
        .arg("-o")
        .arg(&making);
    let what = unit.also.first().unwrap_or(&unit.source);
    run(command, &what.display().to_string())?;
    if unit.kernels {
        check_variables(&making, what)?;
    }
    fs::rename(&making, object)
        .map_err(|e| format!("cannot put {} into place: {e}", object.display()))
}

/// Shared memory must lie in its own section, to be poisoned, and g++ silently ignores the section of a variable in a
/// template. Such a one is found as what it then is: a variable of the kernel file outside that section.
fn check_variables(object: &Path, what: &Path) -> Result<(), String> {
    let output = Command::new("nm")
        .args(["--demangle", "--defined-only", "--format=sysv"])
        .arg(object)
        .output();
    let output = output.map_err(|e| format!("nm (of binutils, which g++ needs too): {e}"))?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        // name | value | class | type | size | line | section
        let fields: Vec<&str> = line.split('|').map(str::trim).collect();
        let [name, _, _, "OBJECT", _, _, section] = fields[..] else {
            continue;
        };
        let ours = name.starts_with("rig::")
            || name.contains("rig_entry_of_")
            || name.starts_with("guard variable for");
        if !ours
            && (section.starts_with(".bss")
                || section.starts_with(".data") && !section.contains(".rel.ro"))
        {
            return Err(format!(
                "{}: '{name}' is shared memory declared in a template, where g++ ignores its section: \
                 declare it in the KERNEL's body and pass a pointer",
                what.display()
            ));
        }
    }
    Ok(())
}

fn run(mut command: Command, what: &str) -> Result<(), String> {
    let output = command
        .output()
        .map_err(|e| format!("{}: {e}. {ADVICE}", compiler()))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "g++ could not build {what}:\n{message}\nthe command was: {command:?}"
    ))
}

const ADVICE: &str = "The CUDA tests need g++ (C++17): install it, or name a compiler in CXX";

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "g++".into())
}

fn compiler_version() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(
        || match Command::new(compiler()).arg("--version").output() {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => panic!("{} does not run: {error}. {ADVICE}", compiler()),
        },
    )
}

/// `cuda-rig` in cargo's target folder.
fn cache() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target"),
        PathBuf::from,
    );
    target.join("cuda-rig")
}

/// Finished folders of this name from other sources: one edit-compile loop would fill the disk with them. Those of the
/// last hour stay, as another test process may be using them.
fn remove_older(name: &str) {
    let Ok(entries) = fs::read_dir(cache()) else {
        return;
    };
    let hour = std::time::Duration::from_secs(3600);
    for entry in entries.flatten() {
        let old = entry
            .metadata()
            .and_then(|data| data.modified())
            .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > hour));
        if old
            && entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{name}-"))
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
}

fn create_folder(path: &Path) {
    fs::create_dir_all(path).unwrap_or_else(|e| panic!("cannot create {}: {e}", path.display()));
}

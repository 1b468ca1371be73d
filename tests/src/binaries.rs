//! Where the programs under test are: in the target folder that this test was built into.

use std::path::PathBuf;

/// The coordinator's program.
pub fn coordinator() -> PathBuf {
    find("coordinator")
}

/// The worker's program.
pub fn worker() -> PathBuf {
    find("worker")
}

/// Test executables lie in `target/<profile>/deps`, programs in `target/<profile>`.
fn find(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let folder = test
        .ancestors()
        .nth(2)
        .expect("tests lie two levels below the profile's folder");
    let program = folder.join(name);
    assert!(
        program.is_file(),
        "{} is not there: build the programs first with `cargo build --workspace`",
        program.display()
    );
    program
}

//! The product's kernels against their naive twins, in three builds.

use std::path::Path;
use std::process::Command;

use cuda_rig::Kind;

/// The detectors' own exit codes and reports fail the run as a wrong result does.
fn run(binary: &Path, arguments: &[&str]) {
    let output = Command::new(binary)
        .args(arguments)
        .output()
        .expect("the harness starts");
    let (out, error) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{} {arguments:?}: {}\n{out}\n{error}",
        binary.display(),
        output.status
    );
}

#[test]
fn kernels_equal_their_twins_under_every_order_of_warps() {
    run(cuda_rig::harness(Kind::Plain), &["--seeds", "12"]);
}

#[test]
fn kernels_have_no_race() {
    run(cuda_rig::harness(Kind::Tsan), &["--seeds", "2"]);
}

#[test]
fn kernels_stay_within_their_buffers() {
    run(cuda_rig::harness(Kind::Asan), &["--seeds", "4"]);
}

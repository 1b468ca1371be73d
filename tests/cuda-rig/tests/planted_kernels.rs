//! Each planted mistake in a kernel is found by the check that claims to find it, and the right kernel passes them all.

use std::process::Command;

use cuda_rig::Kind;

/// Runs one case; its exit code and all it printed.
fn run(kind: Kind, case: &str) -> (bool, String) {
    let output = Command::new(cuda_rig::planted_harness(kind))
        .args(["--seeds", "20", "--only", case])
        .output()
        .expect("the harness starts");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

fn assert_passes(case: &str) {
    for kind in [Kind::Plain, Kind::Tsan, Kind::Asan] {
        let (ok, text) = run(kind, case);
        assert!(ok, "{case} is right, and {kind:?} says: {text}");
    }
}

fn assert_found(kind: Kind, case: &str, words: &[&str]) {
    let (ok, text) = run(kind, case);
    assert!(!ok, "{kind:?} does not find {case}: {text}");
    for word in words {
        assert!(
            text.contains(word),
            "{kind:?} finds {case}, but does not say '{word}': {text}"
        );
    }
}

#[test]
fn right_kernels_pass_every_check() {
    for case in [
        "right_block_sum",
        "right_rotation",
        "right_tile",
        "right_transposed_tile",
    ] {
        assert_passes(case);
    }
}

#[test]
fn a_missing_barrier_shows_as_poison_and_as_a_race() {
    assert_found(Kind::Plain, "missing_barrier", &["sum[0] is", "nan"]);
    assert_found(Kind::Tsan, "missing_barrier", &["data race", "barriers.cu"]);
}

#[test]
fn a_missing_barrier_within_a_warp_shows_as_poison_and_as_a_race() {
    assert_found(Kind::Plain, "missing_syncwarp", &["nan"]);
    assert_found(
        Kind::Tsan,
        "missing_syncwarp",
        &["data race", "barriers.cu"],
    );
}

#[test]
fn a_missing_barrier_after_copies_shows_as_poison_and_as_a_race() {
    assert_found(Kind::Plain, "copies_without_barrier", &["c[", "nan"]);
    assert_found(Kind::Tsan, "copies_without_barrier", &["data race"]);
}

#[test]
fn a_wrong_shuffle_mask_is_named() {
    assert_found(
        Kind::Plain,
        "wrong_mask",
        &["mask 0x0000ffff", "warp_sum_with_wrong_mask"],
    );
}

#[test]
fn threads_that_wait_at_different_places_are_counted() {
    assert_found(
        Kind::Plain,
        "divergent_barrier",
        &["divergent barrier", "at __syncthreads"],
    );
}

#[test]
fn a_read_past_a_buffer_meets_its_guard_page_or_its_red_zone() {
    assert_found(
        Kind::Plain,
        "out_of_bounds",
        &[
            "copy_one_too_many: illegal address",
            "0 bytes past the end of a buffer",
        ],
    );
    assert_found(
        Kind::Asan,
        "one_past_an_odd_end",
        &["heap-buffer-overflow", "bounds.cu"],
    );
}

#[test]
fn a_write_past_shared_memory_is_found() {
    assert_found(
        Kind::Asan,
        "out_of_static_shared",
        &["bounds.cu:11", "index 16 out of bounds"],
    );
    assert_found(
        Kind::Asan,
        "out_of_dynamic_shared",
        &["overflow", "bounds.cu"],
    );
    assert_found(
        Kind::Plain,
        "out_of_dynamic_shared",
        &["past the end of 512 bytes of dynamic shared memory"],
    );
}

#[test]
fn a_misaligned_vector_load_is_found_at_its_line() {
    assert_found(
        Kind::Plain,
        "misaligned",
        &["misaligned address", "bounds.cu:", "not a multiple of 16"],
    );
    assert_found(
        Kind::Asan,
        "misaligned",
        &["misaligned address", "bounds.cu"],
    );
}

#[test]
fn a_missing_wait_or_commit_for_copies_shows_as_poison() {
    assert_found(Kind::Plain, "missing_wait", &["c[", "nan"]);
    assert_found(Kind::Plain, "missing_commit", &["c[", "nan"]);
}

#[test]
fn the_harness_refuses_arguments_and_shapes_that_a_kernel_does_not_take() {
    assert_found(
        Kind::Plain,
        "wrong_argument_type",
        &["parameter 2 is int, given was long long"],
    );
    assert_found(
        Kind::Plain,
        "too_many_threads",
        &["64 threads (at most 32)"],
    );
}

//! The emulated driver, cuBLAS and NCCL, driven right and wrong by small programs (`planted/scenarios`).

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// What a scenario printed: its values, and what the emulation reported.
struct Seen {
    values: HashMap<String, i64>,
    lines: Vec<String>,
    report: String,
}

impl Seen {
    fn value(&self, key: &str) -> i64 {
        *self
            .values
            .get(key)
            .unwrap_or_else(|| panic!("no '{key}' in {:?}; {}", self.lines, self.report))
    }

    fn assert(&self, wanted: &[(&str, i64)]) {
        for (key, value) in wanted {
            assert_eq!(
                self.value(key),
                *value,
                "{key}, in {:?}; {}",
                self.lines,
                self.report
            );
        }
    }

    fn assert_reported(&self, words: &str) {
        assert!(
            self.report.contains(words),
            "the report does not say '{words}': {}",
            self.report
        );
    }
}

fn run_with(name: &str, environment: &[(&str, &str)]) -> Seen {
    static BUILT: OnceLock<(std::path::PathBuf, std::path::PathBuf)> = OnceLock::new();
    let (folder, program) = BUILT.get_or_init(cuda_rig::planted_libraries);
    let cubins = Path::new(env!("CARGO_MANIFEST_DIR")).join("planted/cubins");
    let output = Command::new(program)
        .arg(name)
        .env("CUBINS", cubins)
        .envs(cuda_rig::env_of(folder))
        .envs(environment.iter().copied())
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let report = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{name}: {}\n{text}\n{report}",
        output.status
    );
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let pair = |line: &String| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.parse().ok()?))
    };
    Seen {
        values: lines.iter().filter_map(pair).collect(),
        lines,
        report,
    }
}

fn run(name: &str) -> Seen {
    run_with(name, &[])
}

/// Under several seeds, since it is a matter of order.
fn wrong_rounds(name: &str) -> i64 {
    ["1", "2", "3", "4", "5"]
        .iter()
        .map(|seed| run_with(name, &[("CUDA_EMU_SEED", seed)]).value("wrong"))
        .sum()
}

#[test]
fn a_missing_event_between_streams_shows_as_old_values() {
    assert!(wrong_rounds("missing_event") > 10);
    assert_eq!(wrong_rounds("event_between_streams"), 0);
}

#[test]
fn a_pinned_buffer_written_before_its_copy_is_done_shows_as_new_values() {
    assert!(wrong_rounds("pinned_reused_early") > 50);
    assert_eq!(wrong_rounds("pinned_reused_after_waiting"), 0);
}

#[test]
fn polling_an_event_is_enough_for_work_to_go_on() {
    run("polling_an_event_makes_progress").assert(&[("result", 0), ("value", 3)]);
}

#[test]
fn a_cubin_that_is_not_of_these_sources_is_refused_with_its_difference() {
    let seen = run("module_checks");
    seen.assert(&[
        ("signature.cubin", 200),
        ("stale.cubin", 200),
        ("bound.cubin", 200),
        ("scenario_90.cubin", 209),
        ("scenario_80.cubin", 0),
        ("not_a_cubin", 200),
        ("unknown_function", 500),
    ]);
    seen.assert_reported(
        "kernel fill_with: parameter 1 has 4 bytes in the cubin, 8 in the source: stale cubin?",
    );
    seen.assert_reported("kernel fill_with_old of the cubin is not in the host's build");
    seen.assert_reported("kernel fill_with: at most 128 threads in the cubin, 256 in the source");
    let parameters: Vec<&str> = seen.lines.iter().skip(7).map(String::as_str).collect();
    let expected = [
        "parameter 0",
        "offset 0",
        "bytes 8",
        "parameter 0",
        "offset 8",
        "bytes 8",
    ];
    assert_eq!(parameters[..6], expected);
    assert_eq!(
        parameters[6..],
        [
            "parameter 0",
            "offset 16",
            "bytes 4",
            "parameter 1",
            "offset 0",
            "bytes 0"
        ]
    );
}

#[test]
fn a_cubin_of_the_other_architecture_is_for_the_other_device() {
    let seen = run_with("architectures", &[("CUDA_EMU_ARCH", "90")]);
    seen.assert(&[("scenario_80.cubin", 209), ("scenario_90.cubin", 0)]);
    seen.assert_reported("the image is for sm_80, the device is sm_90");
}

#[test]
fn a_launch_beyond_the_limits_is_refused() {
    run("launch_checks").assert(&[
        ("threads_over_bound", 701),
        ("threads_over_1024", 1),
        ("no_block", 1),
        ("shared_48k", 0),
        ("shared_unasked", 1),
        ("ask_163k", 0),
        ("shared_asked", 0),
        ("ask_164k", 1),
        ("at_the_end", 0),
    ]);
}

#[test]
fn a_kernel_fault_is_reported_and_stays() {
    let cases = [
        (
            "illegal_address",
            700,
            "bytes past the end of a device allocation of 256 bytes",
        ),
        (
            "write_into_the_slack",
            700,
            "write_far wrote past the end of a device allocation of 240 bytes",
        ),
        (
            "use_after_free",
            700,
            "in a device allocation of 256 bytes that was freed",
        ),
        (
            "arguments_in_wrong_order",
            700,
            "fill_with: illegal address 0x40 as parameter 0",
        ),
        ("misaligned_vector", 716, "scenario.cu:"),
    ];
    for (name, result, words) in cases {
        let seen = run(name);
        seen.assert(&[
            ("launch", 0),
            ("synchronize", result),
            ("allocate", result),
            ("new_stream", result),
        ]);
        seen.assert_reported(words);
    }
}

#[test]
fn memory_has_a_limit_and_is_never_zero_at_first() {
    run_with("memory_limit", &[("CUDA_EMU_MEMORY", "64M")]).assert(&[
        ("total", 64 << 20),
        ("first", 0),
        ("second", 2),
        ("free", 0),
        ("again", 1),
        ("third", 0),
        ("poisoned", 1),
    ]);
}

#[test]
fn synchronizing_in_a_capture_spoils_it_until_its_end() {
    run("synchronize_in_a_capture").assert(&[
        ("launch", 0),
        ("synchronize", 900),
        ("next_launch", 901),
        ("end", 901),
        ("after", 0),
        ("synchronize_after", 0),
    ]);
}

#[test]
fn a_graph_keeps_its_parameters_and_reads_memory_anew() {
    run("replay_of_a_graph").assert(&[("before", 0), ("first", 1), ("second", 5)]);
}

#[test]
fn a_captured_product_without_a_workspace_is_refused() {
    let seen = run("captured_product");
    seen.assert(&[
        ("eager", 0),
        ("value", 24),
        ("without_workspace", 15),
        ("with_workspace", 0),
        ("replay", 0),
        ("workspace_used", 1),
    ]);
    seen.assert_reported("captured without a workspace");
}

#[test]
fn two_ranks_exchange_what_they_have_as_threads_and_as_processes() {
    run("two_ranks_as_threads").assert(&[("rank_0", 0), ("rank_1", 0)]);
    run("two_ranks_as_processes").assert(&[("rank_0", 0), ("rank_1", 0), ("child", 0)]);
}

#[test]
fn a_dead_peer_hangs_the_stream_until_the_abort() {
    run("killed_peer").assert(&[
        ("joined", 0),
        ("abort", 0),
        ("synchronize", 0),
        ("hung_until_the_abort", 1),
        ("later_work", 0),
    ]);
}

#[test]
fn an_abort_waits_for_the_graph_that_holds_the_communicator() {
    run("captured_collective").assert(&[("abort_waited_for_the_graph", 1), ("wrong", 0)]);
    let free = run_with("captured_collective", &[("CUDA_EMU_NCCL_GRAPH_HOLD", "0")]);
    free.assert(&[("abort_waited_for_the_graph", 0), ("wrong", 0)]);
}

#[test]
fn a_communicator_made_on_another_device_is_refused() {
    let seen = run("wrong_device");
    seen.assert(&[("all_reduce", 5)]);
    seen.assert_reported("the communicator was made on device 0, its stream is on device 1");
}

#[test]
fn two_ranks_on_one_device_fail_on_both() {
    run("two_ranks_on_one_device").assert(&[("rank_0", 5), ("rank_1", 5)]);
}

#[test]
fn shared_memory_files_do_not_outlive_their_ranks() {
    run("absent_peer").assert(&[("state", 7), ("file", 0), ("abort", 0), ("file_after", -1)]);
    run("killed_before_joining").assert(&[("left", 0), ("swept", -1)]);
}

#[test]
fn aborting_an_idle_communicator_is_slow_only_when_asked() {
    run("abort_of_an_idle_communicator").assert(&[("slow", 0)]);
    run_with(
        "abort_of_an_idle_communicator",
        &[("CUDA_EMU_NCCL_SLOW_ABORT", "1")],
    )
    .assert(&[("slow", 1)]);
}

#[test]
fn ranks_in_different_collectives_hang_and_are_named() {
    run("different_collectives").assert_reported("they hang");
}

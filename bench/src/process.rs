//! Processor time of server processes and of all that they started, from `/proc`.
//!
//! What a process started is below it in the tree of processes, or in its process group, where a child's parent has ended.

use std::collections::HashMap;
use std::fs;

/// Clock ticks of `/proc/PID/stat` a second: what Linux tells programs, whatever the kernel's own clock.
const TICKS_PER_S: f64 = 100.0;

/// A process: whose child it is, in which group, and the time it has used.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Process {
    parent: u32,
    group: u32,
    seconds: f64,
}

/// Seconds of processor time that these processes and their descendants have used, children that ended included; 0 for
/// those that are not there.
#[must_use]
pub fn cpu_seconds(roots: &[u32]) -> f64 {
    let Ok(folder) = fs::read_dir("/proc") else {
        return 0.0;
    };
    let pids = folder.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let process = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((pid, parse(&stat)?))
    };
    sum(&pids.filter_map(process).collect(), roots)
}

/// Reads a line of `/proc/PID/stat`. The second field, a name, may hold anything, blanks and brackets too.
fn parse(stat: &str) -> Option<Process> {
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    // Fields 14 to 17: time in the program and in the kernel, then the same of children that were waited for.
    let ticks: Option<u64> = (11..15)
        .map(|index| fields.get(index)?.parse::<u64>().ok())
        .sum();
    Some(Process {
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
        seconds: ticks? as f64 / TICKS_PER_S,
    })
}

fn sum(all: &HashMap<u32, Process>, roots: &[u32]) -> f64 {
    let below = |pid: &u32| {
        // A chain of parents ends at 0, or is cut by a process that ended meanwhile.
        let mut chain = std::iter::successors(Some(*pid), |pid| Some(all.get(pid)?.parent));
        chain.any(|pid| roots.contains(&pid))
    };
    all.iter()
        .filter(|(pid, process)| below(pid) || roots.contains(&process.group))
        .map(|(_, process)| process.seconds)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_blanks_and_brackets_does_not_shift_the_fields() {
        let line = "42 (a) b (c) S 7 1 1 0 -1 4194560 9 8 7 6 100 50 30 20 20 0 1 0 5";
        let process = Process {
            parent: 7,
            group: 1,
            seconds: 2.0,
        };
        assert_eq!(parse(line), Some(process));
        assert_eq!(parse("42 (cut"), None);
        assert_eq!(parse("42 (cut) S 1 2"), None);
    }

    #[test]
    fn descendants_count_and_strangers_do_not() {
        let process = |parent, seconds| Process {
            parent,
            group: 1,
            seconds,
        };
        let all = HashMap::from([
            (1, process(0, 1.0)),
            (10, process(1, 2.0)),
            (11, process(10, 4.0)),
            (12, process(11, 8.0)),
            (20, process(1, 16.0)),
            (
                30,
                Process {
                    group: 10,
                    ..process(1, 32.0)
                },
            ),
        ]);
        assert_eq!(sum(&all, &[10]), 46.0);
        assert_eq!(sum(&all, &[10, 12]), 46.0);
        assert_eq!(sum(&all, &[99]), 0.0);
    }

    #[test]
    fn this_process_has_used_some_time() {
        let mut x = 1.0f64;
        while cpu_seconds(&[std::process::id()]) == 0.0 {
            x = std::hint::black_box(x).sqrt();
        }
    }
}

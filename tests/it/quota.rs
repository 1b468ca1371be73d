//! A cgroup's quota, where this machine lets one be made: a worker starts as many threads as it has time for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use cluster_tests::binaries;

/// A cgroup with the time of one core. It goes with the value, when its processes have ended.
struct OneCore(PathBuf);

impl OneCore {
    /// Fails where the system is not ours to divide.
    fn new() -> io::Result<OneCore> {
        // Where version 1 counts processors' time it has a folder for that, version 2 has one for everything.
        let first = Path::new("/sys/fs/cgroup/cpu");
        let (root, file, quota) = match first.is_dir() {
            true => (first, "cpu.cfs_quota_us", "100000"),
            false => (Path::new("/sys/fs/cgroup"), "cpu.max", "100000 100000"),
        };
        let group = OneCore(root.join(format!("tandem-test-{}", std::process::id())));
        fs::create_dir(&group.0)?;
        fs::write(group.0.join(file), quota)?;
        Ok(group)
    }

    /// A command line that runs the program in the group.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        let join = "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"";
        command.args(["-c", join]).arg(&self.0).arg(program);
        command
    }
}

impl Drop for OneCore {
    fn drop(&mut self) {
        // One that was not made is not there.
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_quota_of_one_core_is_one_compute_thread() {
    if available_parallelism().unwrap().get() == 1 {
        println!("skipped: one core is all that this process has");
        return;
    }
    let group = match OneCore::new() {
        Ok(group) => group,
        Err(error) => {
            println!("skipped: no cgroup with a quota can be made here: {error}");
            return;
        }
    };
    let mut doctor = group.command(&binaries::worker());
    let output = doctor.arg("doctor").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [", time for 1\n", " 1 compute thread, not pinned\n"] {
        assert!(text.contains(part), "{text}\ndoes not say\n{part}");
    }
}

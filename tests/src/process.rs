//! A process under test: its output in files, its signals, its memory, and its end together with the test.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::until::until;

/// Lines of a log that are shown when a test fails.
const LOG_TAIL_LINES: usize = 60;

/// A running or ended process. Killed when dropped; on a failed test its log is printed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    /// Length of `stdout` before this start: a process that is started again appends.
    stdout_before: usize,
    stderr_before: usize,
}

/// Signals that tests send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Ends it at once, with no chance to clean up.
    Kill,
    /// Asks it to end.
    Terminate,
    /// Freezes it: its sockets stay open and nothing answers.
    Stop,
    /// Lets it go on.
    Continue,
}

impl Process {
    /// Starts a program whose output goes to `NAME.out` and `NAME.err` in `logs`.
    pub fn start(name: &str, mut command: Command, logs: &Path) -> Process {
        let file_name = name.replace('/', "-");
        let stdout = logs.join(format!("{file_name}.out"));
        let stderr = logs.join(format!("{file_name}.err"));
        let length = |path: &Path| fs::metadata(path).map(|m| m.len() as usize).unwrap_or(0);
        let (stdout_before, stderr_before) = (length(&stdout), length(&stderr));
        command
            .stdin(Stdio::null())
            .stdout(append(&stdout))
            .stderr(append(&stderr));
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe and touches no memory of ours.
        // It ties the process to the thread that starts it: the test's own, which outlives the cluster.
        unsafe {
            command.pre_exec(
                || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                },
            );
        }
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{name} cannot be started: {e}"));
        Process {
            name: name.to_owned(),
            child,
            stdout,
            stderr,
            stdout_before,
            stderr_before,
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard error since this start.
    pub fn stderr(&self) -> String {
        since(&self.stderr, self.stderr_before)
    }

    /// What it wrote to standard output since this start.
    pub fn stdout(&self) -> String {
        since(&self.stdout, self.stdout_before)
    }

    /// Waits for a line of standard output that starts with `prefix`, and gives it.
    ///
    /// # Panics
    /// When it does not come, or the process ends before.
    pub async fn line(&mut self, prefix: &str, limit: Duration) -> String {
        until(
            &format!("{} to print \"{prefix}\"", self.name),
            limit,
            async || {
                let out = self.stdout();
                if let Some(line) = out.lines().find(|line| line.starts_with(prefix)) {
                    return Ok(line.to_owned());
                }
                if let Some(status) = self.try_exit() {
                    panic!(
                        "{} ended with {status} instead of printing \"{prefix}\":\n{}",
                        self.name,
                        self.stderr()
                    );
                }
                Err(format!("standard output: {out:?}"))
            },
        )
        .await
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let number = match signal {
            Signal::Kill => libc::SIGKILL,
            Signal::Terminate => libc::SIGTERM,
            Signal::Stop => libc::SIGSTOP,
            Signal::Continue => libc::SIGCONT,
        };
        let pid = i32::try_from(self.child.id()).expect("process ids are positive and below 2^31");
        // SAFETY: kill takes two integers. The child has not been waited for while we hold it unreaped, so that the id
        // cannot have passed to another process.
        unsafe { libc::kill(pid, number) };
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        // An error means that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it ends by itself.
    pub async fn exit(&mut self, limit: Duration) -> ExitStatus {
        let name = self.name.clone();
        until(&format!("{name} to end"), limit, async || {
            self.try_exit()
                .ok_or_else(|| format!("still running; its log:\n{}", tail(&self.stderr())))
        })
        .await
    }

    /// Its exit status, when it has ended.
    pub fn try_exit(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .expect("a child can be asked for its status")
    }

    /// Its resident memory in bytes.
    ///
    /// # Panics
    /// When it has ended.
    pub fn resident_bytes(&self) -> u64 {
        status_bytes(self.child.id(), "VmRSS:")
    }

    /// Resident memory that is its own or its children's, in bytes: without the pages of files.
    ///
    /// # Panics
    /// When it has ended.
    pub fn own_bytes(&self) -> u64 {
        let own = |pid: u32| status_bytes(pid, "RssAnon:") + status_bytes(pid, "RssShmem:");
        let mut pids = vec![self.child.id()];
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("it is running");
        for task in tasks.flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            pids.extend(children.split_whitespace().flat_map(str::parse::<u32>));
        }
        pids.into_iter().map(own).sum()
    }
}

/// A size of a live process, as the kernel counts it.
fn status_bytes(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it is running");
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kib = kib.and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("{key} of process {pid} is a number of kB")) << 10
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!(
                "--- {}: end of its log\n{}---",
                self.name,
                tail(&self.stderr())
            );
        }
    }
}

fn append(path: &Path) -> File {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.unwrap_or_else(|e| panic!("{} cannot be written: {e}", path.display()))
}

fn since(path: &Path, start: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL_LINES);
    lines[from..]
        .iter()
        .map(|line| format!("{line}\n"))
        .collect()
}

//! Work that may end the process that does it, done by a process of its own: this same program, kept between questions.
//!
//! Owns the limits on memory and time, and the frames to and fro. The process is started again after a question has
//! ended it. What is asked is [`super::sandbox`]'s and [`super::trial`]'s part.

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// This program, also after its file has been replaced.
pub const THIS_PROGRAM: &str = "/proc/self/exe";
/// Memory of the process, its program included: some ten times the longest prompt.
const MEMORY_MIB: u64 = 256;
/// Processor time of a question; a long conversation takes some ten milliseconds.
const CPU_S: u64 = 2;
/// Time of a question on a machine that has little left for it.
const WALL_S: u64 = 5;

/// How a question ended the process, or never reached it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Death {
    /// There is no process.
    NotStarted(String),
    /// It computed or waited longer than this many seconds.
    Slow(u64),
    /// It took more memory than this many MiB.
    Memory(u64),
    /// Something else.
    Broke(String),
}

/// A process that answers questions, and the question that it is told first of all.
pub struct Helper {
    program: PathBuf,
    task: &'static str,
    /// Of the process and of the thread that speaks with it.
    name: &'static str,
    first: Vec<u8>,
    /// Started by the first question.
    process: Mutex<Option<Process>>,
}

impl Helper {
    /// Will run `program` with the argument `task`, and begin by sending `first`.
    pub fn new(program: &Path, task: &'static str, name: &'static str, first: Vec<u8>) -> Helper {
        Helper {
            program: program.to_owned(),
            task,
            name,
            first,
            process: Mutex::new(None),
        }
    }

    /// The answer to a question. Questions wait for each other.
    ///
    /// # Errors
    /// [`Death`]: this question has none.
    pub fn ask(&self, question: Vec<u8>) -> Result<Vec<u8>, Death> {
        // A panic leaves no process behind, or one that works.
        let mut kept = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let running = kept.take_if(|process| process.runs());
        let mut process = match running {
            Some(process) => process,
            None => Process::start(self)?,
        };
        let reply = process.ask(question).inspect_err(|death| {
            tracing::warn!(
                ?death,
                task = self.task,
                "a question ended the process that was asked"
            );
        })?;
        *kept = Some(process);
        Ok(reply)
    }
}

/// A running process. Killed when dropped.
struct Process {
    child: Child,
    /// To the thread that speaks with it, since a pipe cannot be waited for with a time limit.
    asked: SyncSender<Vec<u8>>,
    replies: Receiver<io::Result<Vec<u8>>>,
}

impl Process {
    fn start(helper: &Helper) -> Result<Process, Death> {
        let failed = |e: io::Error| Death::NotStarted(format!("its process does not start: {e}"));
        let mut child = Command::new(&helper.program)
            .arg0("worker")
            .arg(helper.task)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It says nothing but how it died.
            .stderr(Stdio::null())
            // A terminal's interrupt is for the worker, which ends this process by closing its input.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (asked, questions) = sync_channel(1);
        let (answers, replies) = sync_channel(1);
        // From here on, every way out ends the process.
        let process = Process {
            child,
            asked,
            replies,
        };
        let Some((input, output)) = pipes else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        let first = helper.first.clone();
        thread::Builder::new()
            .name(helper.name.to_owned())
            .spawn(move || converse(input, output, &first, &questions, &answers))
            .map_err(failed)?;
        Ok(process)
    }

    fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The reply to a question. After an error the process is of no more use.
    fn ask(&mut self, question: Vec<u8>) -> Result<Vec<u8>, Death> {
        // Without a thread there is no reply either.
        let _ = self.asked.send(question);
        match self.replies.recv_timeout(Duration::from_secs(WALL_S)) {
            Ok(Ok(reply)) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => Err(Death::Slow(WALL_S)),
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => Err(self.cause_of_death()),
        }
    }

    /// Why the process has closed its output.
    fn cause_of_death(&mut self) -> Death {
        // Changes nothing about a process that has died already.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        match ended {
            Ok(status) => cause(status),
            Err(e) => Death::Broke(e.to_string()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cause(status: ExitStatus) -> Death {
    match status.signal() {
        Some(signal) if signal == Signal::XCPU.as_raw() => Death::Slow(CPU_S),
        // An allocation that fails ends a program so; a stack that cannot grow, too.
        Some(signal) if signal == Signal::ABORT.as_raw() => Death::Memory(MEMORY_MIB),
        _ => Death::Broke(status.to_string()),
    }
}

/// Hands the first frame over, and then questions and replies to and fro until either side is gone.
fn converse(
    mut input: impl Write,
    mut output: impl Read,
    first: &[u8],
    questions: &Receiver<Vec<u8>>,
    answers: &SyncSender<io::Result<Vec<u8>>>,
) {
    let mut ready = write_frame(&mut input, first);
    while let Ok(question) = questions.recv() {
        let reply = std::mem::replace(&mut ready, Ok(()))
            .and_then(|()| write_frame(&mut input, &question))
            .and_then(|()| read_frame(&mut output)?.ok_or(io::ErrorKind::UnexpectedEof.into()));
        let over = reply.is_err();
        if answers.send(reply).is_err() || over {
            return;
        }
    }
}

/// The process's own part: takes its limits on, reads the first frame from standard input, makes it into what answers
/// questions, and answers each that follows until the input ends.
///
/// # Errors
/// When a limit cannot be set, or when whoever started it is gone or does not keep to the protocol.
pub fn serve<A: FnMut(&[u8]) -> io::Result<Vec<u8>>>(
    begin: impl FnOnce(&[u8]) -> io::Result<A>,
) -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    limit(Resource::As, MEMORY_MIB << 20)?;
    limit(Resource::Core, 0)?;
    allow_cpu()?;
    let Some(first) = read_frame(&mut input)? else {
        return Ok(());
    };
    let mut answer = begin(&first)?;
    while let Some(question) = read_frame(&mut input)? {
        allow_cpu()?;
        write_frame(&mut output, &answer(&question)?)?;
    }
    Ok(())
}

/// Lets the process compute [`CPU_S`] from now on, up to a second more.
fn allow_cpu() -> io::Result<()> {
    let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec as u64;
    limit(Resource::Cpu, used + CPU_S + 1)
}

/// Sets a limit, which may be raised again, within what the process was started with.
fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let maximum = getrlimit(resource).maximum;
    let current = Some(maximum.map_or(most, |maximum| maximum.min(most)));
    Ok(setrlimit(resource, Rlimit { current, maximum })?)
}

fn write_frame(output: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
    output.write_all(&length.to_le_bytes())?;
    output.write_all(bytes)?;
    output.flush()
}

/// The next frame; `None` at the end of the stream.
fn read_frame(input: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match input.read_exact(&mut length) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let length = u64::from(u32::from_le_bytes(length));
    let mut bytes = Vec::new();
    input.take(length).read_to_end(&mut bytes)?;
    if (bytes.len() as u64) < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_written_and_a_cut_one_is_an_error() {
        let mut written = Vec::new();
        for frame in [&b"one"[..], b"", b"three"] {
            write_frame(&mut written, frame).unwrap();
        }
        let mut rest = &written[..];
        let mut read = || read_frame(&mut rest);
        assert_eq!(read().unwrap().unwrap(), b"one");
        assert_eq!(read().unwrap().unwrap(), b"");
        assert_eq!(read().unwrap().unwrap(), b"three");
        assert_eq!(read().unwrap(), None);
        assert!(read_frame(&mut &written[..5]).is_err());
    }
}

//! Chat templates rendered in a process of their own, which may die of them.
//!
//! Owns the limits on a rendering's memory and time, which Jinja cannot have: a few operations double a text without
//! end, and a single one may ask for gigabytes. Each model has its process, so that a template holds up its own model
//! alone. The process is this same program, kept between renderings, and started again after a template has ended it.
//! What a rendering is, is [`super::chat`]'s part.

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use common::request::Chat;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::Render;
use super::chat::{ChatError, ChatTemplate, TemplateSource};

/// The program's argument that makes it [`serve`].
pub const TASK: &str = "render-template";

/// This program, also after its file has been replaced.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Memory of the process, its program included: some ten times the longest prompt.
const MEMORY_MIB: u64 = 256;
/// Processor time of a rendering; a long conversation takes some ten milliseconds.
const CPU_S: u64 = 2;
/// Time of a rendering on a machine that has little left for it.
const WALL_S: u64 = 5;

/// A model's chat template and the process that renders it.
pub struct Sandbox {
    program: PathBuf,
    template: TemplateSource,
    /// Started by the first conversation.
    helper: Mutex<Option<Helper>>,
}

impl Sandbox {
    /// Renders by this same program.
    pub fn of_this_program(template: TemplateSource) -> Sandbox {
        Sandbox::new(Path::new(THIS_PROGRAM), template)
    }

    /// Renders by a worker's program.
    pub fn new(program: &Path, template: TemplateSource) -> Sandbox {
        Sandbox {
            program: program.to_owned(),
            template,
            helper: Mutex::new(None),
        }
    }
}

impl Render for Sandbox {
    fn render(&self, chat: &Chat) -> Result<String, ChatError> {
        if self.template.text.is_none() {
            return Err(ChatError::Missing);
        }
        let conversation = serde_json::to_vec(chat).map_err(unreadable)?;
        // A panic leaves no helper behind, or one that works.
        let mut kept = self.helper.lock().unwrap_or_else(PoisonError::into_inner);
        let running = kept.take_if(|helper| helper.runs());
        let mut helper = match running {
            Some(helper) => helper,
            None => Helper::start(&self.program, &self.template)?,
        };
        let reply = helper.ask(conversation)?;
        *kept = Some(helper);
        serde_json::from_slice(&reply).map_err(unreadable)?
    }
}

fn unreadable(error: serde_json::Error) -> ChatError {
    ChatError::Sandbox(error.to_string())
}

/// A running process. Killed when dropped.
struct Helper {
    child: Child,
    /// To the thread that speaks with it, since a pipe cannot be waited for with a time limit.
    asked: SyncSender<Vec<u8>>,
    replies: Receiver<io::Result<Vec<u8>>>,
}

impl Helper {
    fn start(program: &Path, template: &TemplateSource) -> Result<Helper, ChatError> {
        let template = serde_json::to_vec(template).map_err(unreadable)?;
        let failed = |e: io::Error| ChatError::Sandbox(format!("its process does not start: {e}"));
        let mut child = Command::new(program)
            .arg0("worker")
            .arg(TASK)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It says nothing but how it died of a template.
            .stderr(Stdio::null())
            // A terminal's interrupt is for the worker, which ends this process by closing its input.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (asked, questions) = sync_channel(1);
        let (answers, replies) = sync_channel(1);
        // From here on, every way out ends the process.
        let helper = Helper {
            child,
            asked,
            replies,
        };
        let Some((input, output)) = pipes else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        thread::Builder::new()
            .name("chat-template".to_owned())
            .spawn(move || converse(input, output, &template, &questions, &answers))
            .map_err(failed)?;
        Ok(helper)
    }

    fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The reply to a conversation. After an error the process is of no more use.
    fn ask(&mut self, conversation: Vec<u8>) -> Result<Vec<u8>, ChatError> {
        // Without a thread there is no reply either.
        let _ = self.asked.send(conversation);
        match self.replies.recv_timeout(Duration::from_secs(WALL_S)) {
            Ok(Ok(reply)) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!("a chat template did not end in {WALL_S} s and was killed");
                Err(ChatError::Slow(WALL_S))
            }
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => Err(self.cause_of_death()),
        }
    }

    /// Why the process has closed its output.
    fn cause_of_death(&mut self) -> ChatError {
        // Changes nothing about a process that has died already.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        let error = match ended {
            Ok(status) => cause(status),
            Err(e) => ChatError::Sandbox(e.to_string()),
        };
        tracing::warn!(%error, "a chat template ended the process that renders it");
        error
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cause(status: ExitStatus) -> ChatError {
    match status.signal() {
        Some(signal) if signal == Signal::XCPU.as_raw() => ChatError::Slow(CPU_S),
        // An allocation that fails ends a program so; a stack that cannot grow, too.
        Some(signal) if signal == Signal::ABORT.as_raw() => ChatError::Memory(MEMORY_MIB),
        _ => ChatError::Broke(status.to_string()),
    }
}

/// Hands the template over, and then conversations and replies to and fro until either side is gone.
fn converse(
    mut input: impl Write,
    mut output: impl Read,
    template: &[u8],
    questions: &Receiver<Vec<u8>>,
    answers: &SyncSender<io::Result<Vec<u8>>>,
) {
    let mut ready = write_frame(&mut input, template);
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

/// The process's own part: takes its limits on, reads a template from standard input, and answers each conversation
/// that follows with a prompt or a [`ChatError`], until the input ends.
///
/// # Errors
/// When a limit cannot be set, or when whoever started it is gone or does not keep to the protocol.
pub fn serve() -> io::Result<()> {
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    limit(Resource::As, MEMORY_MIB << 20)?;
    limit(Resource::Core, 0)?;
    allow_cpu()?;
    let Some(template) = read_frame(&mut input)? else {
        return Ok(());
    };
    let template = ChatTemplate::new(serde_json::from_slice(&template)?);
    while let Some(conversation) = read_frame(&mut input)? {
        allow_cpu()?;
        let chat: Chat = serde_json::from_slice(&conversation)?;
        let reply = template.render(&chat);
        write_frame(&mut output, &serde_json::to_vec(&reply)?)?;
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

    #[test]
    fn a_process_that_cannot_be_started_is_no_fault_of_the_request() {
        let template = TemplateSource {
            text: Some("x".into()),
            ..Default::default()
        };
        let nowhere = Sandbox::new(Path::new("/nowhere/worker"), template);
        let error = nowhere.render(&Chat::default()).unwrap_err();
        assert!(
            matches!(&error, ChatError::Sandbox(why) if why.contains("does not start")),
            "{error}"
        );
    }
}

//! Logs of served entities: the lines of their shards' loads and runs, and the coordinator's own about them.
//!
//! Owns the files `data_dir/logs/ENDPOINT/ENTITY.{build,run}.log`: they survive replicas and restarts, so that a failed
//! deployment can be read about, and go with their endpoint. Each is bounded, its older half goes first. Lines go to
//! the files on a thread of its own, through a bounded queue; what does not fit is dropped, counted, and said.

mod files;

use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use common::ids::{Generation, ReplicaId, WorkerId};
use common::wire::message::{LogLine, LogPhase};

use crate::actors::gateway::now_ms;
use crate::calendar::Moment;
use files::Files;

/// Batches of lines that may wait for the disk.
const QUEUE_MAX: usize = 4096;
/// Lines of one report; a worker sends no more.
const REPORT_LINES_MAX: usize = 512;
/// Longest line kept, in bytes.
const LINE_BYTES_MAX: usize = 2048;
/// A disk that takes longer to give a log does not answer.
const READ_WAIT: Duration = Duration::from_secs(5);

/// A served entity's place in the logs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// Its endpoint's name.
    pub endpoint: String,
    /// Its own.
    pub entity: String,
}

/// The logs of all served entities.
pub struct Logs {
    queue: SyncSender<Work>,
    places: RwLock<HashMap<ReplicaId, Place>>,
    /// Lines that found the queue full and are not told of yet.
    dropped: Mutex<u64>,
}

enum Work {
    Write {
        place: Place,
        phase: LogPhase,
        text: String,
    },
    Read {
        place: Place,
        phase: LogPhase,
        reply: tokio::sync::oneshot::Sender<std::io::Result<String>>,
    },
    Forget(String),
    /// Everything before it is in the files.
    Flush(SyncSender<()>),
}

impl Logs {
    /// The logs in a data folder; nothing is touched before the first line.
    ///
    /// # Errors
    /// When the thread cannot start.
    pub fn open(data_dir: &Path) -> std::io::Result<Arc<Logs>> {
        let (queue, work) = sync_channel(QUEUE_MAX);
        let files = Files::new(data_dir.join("logs"));
        std::thread::Builder::new()
            .name("logs".into())
            .spawn(move || write(&files, &work))?;
        Ok(Arc::new(Logs {
            queue,
            places: RwLock::default(),
            dropped: Mutex::default(),
        }))
    }

    /// Says whose lines a replica's are.
    pub fn place(&self, replica: ReplicaId, endpoint: &str, entity: &str) {
        let known = |place: &Place| place.endpoint == endpoint && place.entity == entity;
        if self.place_of(replica).as_ref().is_some_and(known) {
            return;
        }
        let place = Place {
            endpoint: endpoint.to_owned(),
            entity: entity.to_owned(),
        };
        self.places
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(replica, place);
    }

    /// A replica is gone for good: no line of it is taken any more.
    pub fn forget_replica(&self, replica: ReplicaId) {
        self.places
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&replica);
    }

    /// An endpoint is deleted, and its logs with it.
    pub fn forget(&self, endpoint: &str) {
        self.places
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, place| place.endpoint != endpoint);
        self.hand_in(Work::Forget(endpoint.to_owned()), 0);
    }

    /// A line of the coordinator's own about a replica.
    pub fn note(&self, replica: ReplicaId, phase: LogPhase, text: &str) {
        let Some(place) = self.place_of(replica) else {
            return;
        };
        let mut lines = String::new();
        push_line(&mut lines, now_ms(), "coordinator", text);
        self.hand_in(
            Work::Write {
                place,
                phase,
                text: lines,
            },
            1,
        );
    }

    /// Lines of a shard.
    pub fn take(
        &self,
        worker: &WorkerId,
        (replica, generation): (ReplicaId, Generation),
        rank: u32,
        lines: &[LogLine],
    ) {
        let Some(place) = self.place_of(replica) else {
            return;
        };
        let who = format!("{worker} rank {rank} generation {generation}");
        for phase in [LogPhase::Build, LogPhase::Run] {
            let mut text = String::new();
            let mut count = 0;
            let of_phase = lines.iter().filter(|line| line.phase == phase);
            for line in of_phase.take(REPORT_LINES_MAX) {
                push_line(&mut text, line.at_ms, &who, &line.text);
                count += 1;
            }
            if count > 0 {
                let place = place.clone();
                self.hand_in(Work::Write { place, phase, text }, count);
            }
        }
    }

    /// The newest part of a log, oldest line first; empty when nothing was written yet.
    ///
    /// # Errors
    /// When the disk does not give it.
    pub async fn read(&self, place: Place, phase: LogPhase) -> std::io::Result<String> {
        let busy = || std::io::Error::new(std::io::ErrorKind::TimedOut, "the logs are busy");
        let (reply, answer) = tokio::sync::oneshot::channel();
        let work = Work::Read {
            place,
            phase,
            reply,
        };
        self.queue.try_send(work).map_err(|_| busy())?;
        match tokio::time::timeout(READ_WAIT, answer).await {
            Ok(Ok(text)) => text,
            _ => Err(busy()),
        }
    }

    /// Waits until everything said so far is in the files. Blocks.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if self.queue.send(Work::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(READ_WAIT);
        }
    }

    fn place_of(&self, replica: ReplicaId) -> Option<Place> {
        self.places
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&replica)
            .cloned()
    }

    fn hand_in(&self, work: Work, lines: u64) {
        let mut dropped = self.dropped.lock().unwrap_or_else(PoisonError::into_inner);
        match self.queue.try_send(work) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                if *dropped == 0 {
                    tracing::warn!("the disk does not keep up with the logs; lines are dropped");
                }
                *dropped += lines;
                metrics::counter!("tandem_log_lines_dropped_total").increment(lines);
                return;
            }
        }
        if *dropped > 0 {
            tracing::warn!(dropped = *dropped, "the logs go on");
            *dropped = 0;
        }
    }
}

/// `moment [who] text`, one line.
fn push_line(lines: &mut String, at_ms: u64, who: &str, text: &str) {
    use std::fmt::Write as _;
    let mut end = text.len().min(LINE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // Writing to a string cannot fail.
    let _ = write!(lines, "{} [{who}] ", Moment(at_ms));
    lines.extend(
        text[..end]
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c }),
    );
    lines.push('\n');
}

/// The thread: until nobody can hand in any more.
fn write(files: &Files, work: &Receiver<Work>) {
    let mut failed = false;
    while let Ok(work) = work.recv() {
        match work {
            Work::Write { place, phase, text } => match files.append(&place, phase, &text) {
                Ok(()) => failed = false,
                Err(error) => {
                    let lines = text.lines().count() as u64;
                    metrics::counter!("tandem_log_lines_dropped_total").increment(lines);
                    if !failed {
                        tracing::warn!(%error, endpoint = place.endpoint, "a log cannot be written; its lines are dropped");
                    }
                    failed = true;
                }
            },
            Work::Read {
                place,
                phase,
                reply,
            } => drop(reply.send(files.read(&place, phase))),
            Work::Forget(endpoint) => files.forget(&endpoint),
            Work::Flush(done) => drop(done.try_send(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLICA: ReplicaId = ReplicaId(7);

    fn place() -> Place {
        Place {
            endpoint: "e".into(),
            entity: "m-1".into(),
        }
    }

    fn line(phase: LogPhase, text: &str) -> LogLine {
        LogLine {
            at_ms: 1_710_327_769_123,
            phase,
            text: text.into(),
        }
    }

    #[tokio::test]
    async fn lines_go_to_the_log_of_their_entity_and_phase_and_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::open(folder.path()).unwrap();
        logs.note(REPLICA, LogPhase::Build, "nobody's line");
        logs.place(REPLICA, "e", "m-1");
        logs.note(REPLICA, LogPhase::Build, "placed");
        let lines = [
            line(LogPhase::Build, "weights\nread"),
            line(LogPhase::Run, "serves"),
        ];
        let worker = WorkerId("n/0".into());
        logs.take(&worker, (REPLICA, Generation(2)), 1, &lines);
        logs.flush();
        let logs = Logs::open(folder.path()).unwrap();
        let build = logs.read(place(), LogPhase::Build).await.unwrap();
        let build: Vec<&str> = build.lines().collect();
        assert!(build[0].ends_with("Z [coordinator] placed"), "{build:?}");
        assert_eq!(
            build[1],
            "2024-03-13T11:02:49.123Z [n/0 rank 1 generation 2] weights read"
        );
        let run = logs.read(place(), LogPhase::Run).await.unwrap();
        assert_eq!(
            run,
            "2024-03-13T11:02:49.123Z [n/0 rank 1 generation 2] serves\n"
        );
    }

    #[tokio::test]
    async fn a_deleted_endpoints_logs_go_and_late_lines_do_not_bring_them_back() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::open(folder.path()).unwrap();
        logs.place(REPLICA, "e", "m-1");
        logs.note(REPLICA, LogPhase::Run, "serves");
        logs.forget("e");
        logs.note(REPLICA, LogPhase::Run, "late");
        assert_eq!(logs.read(place(), LogPhase::Run).await.unwrap(), "");
        logs.flush();
        assert!(!folder.path().join("logs/e").exists());
    }

    #[tokio::test]
    async fn a_log_of_which_nothing_was_written_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::open(folder.path()).unwrap();
        assert_eq!(logs.read(place(), LogPhase::Build).await.unwrap(), "");
    }

    #[tokio::test]
    async fn a_disk_that_cannot_be_written_costs_lines_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("logs"), "a file where the folder goes").unwrap();
        let logs = Logs::open(folder.path()).unwrap();
        logs.place(REPLICA, "e", "m-1");
        logs.note(REPLICA, LogPhase::Run, "lost");
        logs.flush();
        assert!(logs.read(place(), LogPhase::Run).await.is_err());
    }
}

//! Shards' log lines on their way to the coordinator, and what a run says of itself in them.
//!
//! Owns the lines that wait for a link: bounded, the oldest dropped first, and said to be. No prompt and no output ever
//! stands in a line. Who sends them, and when, is the outbox's part.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::ids::{Generation, ReplicaId};
use common::wire::message::{Health, LogLine, LogPhase, Report, ShardSpec};

use crate::memory::show;
use crate::outbox::Outbox;

/// Lines of a shard that may wait for a link.
const LINES_MAX: usize = 256;
/// Shards whose lines may wait, those that are over included.
const SHARDS_MAX: usize = 64;
/// Longest line; a failure's reason may quote a file.
const LINE_BYTES_MAX: usize = 1024;
/// How often a run says how it goes, when it goes at all.
const SUMMARY_EVERY: Duration = Duration::from_secs(10);

/// How often a load says how far it is, when it gets on at all: often enough for one of seconds, seldom enough for one of an
/// hour.
const LOAD_LINE_EVERY: Duration = Duration::from_secs(2);

/// Where a shard writes its log.
#[derive(Clone)]
pub struct ShardLog {
    outbox: Arc<Outbox>,
    replica: ReplicaId,
    generation: Generation,
    rank: u32,
}

impl ShardLog {
    /// The log of the shard that `spec` describes.
    pub fn new(spec: &ShardSpec, outbox: Arc<Outbox>) -> ShardLog {
        ShardLog {
            outbox,
            replica: spec.replica,
            generation: spec.generation,
            rank: spec.rank,
        }
    }

    /// A line of its load.
    pub fn build(&self, text: impl AsRef<str>) {
        self.write(LogPhase::Build, text.as_ref());
    }

    /// A line of its run.
    pub fn run(&self, text: impl AsRef<str>) {
        self.write(LogPhase::Run, text.as_ref());
    }

    fn write(&self, phase: LogPhase, text: &str) {
        let line = LogLine {
            at_ms: now_ms(),
            phase,
            text: one_line(text),
        };
        self.outbox
            .log(self.replica, self.generation, self.rank, line);
    }
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// A text as one line of bounded length.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(LINE_BYTES_MAX));
    for c in text.trim().chars() {
        if line.len() + c.len_utf8() > LINE_BYTES_MAX {
            line.push_str("...");
            break;
        }
        line.push(if c.is_control() { ' ' } else { c });
    }
    line
}

/// The lines that wait, by shard.
#[derive(Default)]
pub struct LogBook {
    shards: BTreeMap<(ReplicaId, Generation), Waiting>,
}

#[derive(Default)]
struct Waiting {
    rank: u32,
    lines: VecDeque<LogLine>,
    dropped: u64,
}

impl LogBook {
    /// Adds a line.
    pub fn add(&mut self, replica: ReplicaId, generation: Generation, rank: u32, line: LogLine) {
        let key = (replica, generation);
        if !self.shards.contains_key(&key) && self.shards.len() >= SHARDS_MAX {
            self.shards.pop_first();
        }
        let waiting = self.shards.entry(key).or_default();
        waiting.rank = rank;
        if waiting.lines.len() >= LINES_MAX {
            waiting.lines.pop_front();
            waiting.dropped += 1;
        }
        waiting.lines.push_back(line);
    }

    /// Whose lines wait.
    pub fn shards(&self) -> Vec<(ReplicaId, Generation)> {
        self.shards.keys().copied().collect()
    }

    /// Takes all lines of a shard, if there are any.
    pub fn take(&mut self, replica: ReplicaId, generation: Generation) -> Option<Report> {
        let Waiting {
            rank,
            mut lines,
            dropped,
        } = self.shards.remove(&(replica, generation))?;
        if let Some(first) = lines.front().filter(|_| dropped > 0) {
            let text = format!("{dropped} lines dropped: there was no link to take them");
            let (at_ms, phase) = (first.at_ms, first.phase);
            lines.push_front(LogLine { at_ms, phase, text });
        }
        Some(Report::Log {
            replica,
            generation,
            rank,
            lines: lines.into(),
        })
    }
}

/// What a long load says of itself: how far it is, now and then.
#[derive(Default)]
pub struct LoadLog {
    said: Option<Said>,
}

/// What was last said of a load.
struct Said {
    stage: String,
    at: Instant,
    done_bytes: u64,
}

impl LoadLog {
    /// The line that this news gives, if it is one.
    pub fn line(
        &mut self,
        stage: &str,
        done_bytes: u64,
        total_bytes: u64,
        now: Instant,
    ) -> Option<String> {
        let begins = |said: &Said| said.stage != stage || done_bytes < said.done_bytes;
        let said = match &mut self.said {
            Some(said) if !begins(said) => said,
            _ => {
                // A stage that does not last is told of when it is over.
                self.said = Some(Said {
                    stage: stage.to_owned(),
                    at: now,
                    done_bytes,
                });
                return None;
            }
        };
        let due = now.saturating_duration_since(said.at) >= LOAD_LINE_EVERY;
        if !due || done_bytes == said.done_bytes {
            return None;
        }
        (said.at, said.done_bytes) = (now, done_bytes);
        let percent = (u128::from(done_bytes) * 100)
            .checked_div(u128::from(total_bytes))
            .map(|percent| format!(", {percent} %"))
            .unwrap_or_default();
        let total = match total_bytes {
            0 => String::new(),
            total => format!(" of {}", show(total)),
        };
        Some(format!("{stage}: {}{total}{percent}", show(done_bytes)))
    }
}

/// What a run says of itself: at once what is unusual, and now and then how it goes.
pub struct RunLog {
    said: Health,
    said_at: Instant,
    stalled: bool,
    preemptions: u64,
    accepted: u64,
    refused: u64,
}

impl RunLog {
    /// The log of a run that begins.
    pub fn new(now: Instant) -> RunLog {
        RunLog {
            said: Health::default(),
            said_at: now,
            stalled: false,
            preemptions: 0,
            accepted: 0,
            refused: 0,
        }
    }

    /// A request goes to the engine.
    pub fn accepted(&mut self) {
        self.accepted += 1;
    }

    /// A request was refused by this worker.
    pub fn refused(&mut self) {
        self.refused += 1;
    }

    /// The lines that these counters give.
    pub fn lines(&mut self, health: &Health, now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        if health.preemptions > self.preemptions {
            lines.push(format!(
                "{} sequences put back for want of KV blocks, to be computed again ({} so far; {} of {} blocks in use)",
                health.preemptions - self.preemptions,
                health.preemptions,
                health.kv_blocks_used,
                health.kv_blocks_total
            ));
            self.preemptions = health.preemptions;
        }
        if health.stalled != self.stalled {
            self.stalled = health.stalled;
            lines.push(if health.stalled {
                format!(
                    "stalled: {} sequences run and {} wait, and the step after step {} does not end",
                    health.running, health.waiting, health.steps
                )
            } else {
                format!("goes on after a stall, at step {}", health.steps)
            });
        }
        let quiet = health.steps == self.said.steps && self.accepted + self.refused == 0;
        let since = now.saturating_duration_since(self.said_at);
        if since >= SUMMARY_EVERY {
            if !quiet {
                lines.push(self.summary(health, since));
                (self.accepted, self.refused) = (0, 0);
                self.said = health.clone();
            }
            self.said_at = now;
        }
        lines
    }

    fn summary(&self, health: &Health, since: Duration) -> String {
        let said = &self.said;
        format!(
            "in {:.0} s: {} requests accepted, {} refused; {} steps, {} prompt tokens ({} from the prefix cache), {} output tokens; \
             now {} sequences run, {} wait, {} of {} KV blocks in use",
            since.as_secs_f64(),
            self.accepted,
            self.refused,
            health.steps - said.steps,
            health.prompt_tokens - said.prompt_tokens,
            health.prefix_hits - said.prefix_hits,
            health.output_tokens - said.output_tokens,
            health.running,
            health.waiting,
            health.kv_blocks_used,
            health.kv_blocks_total
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: (ReplicaId, Generation) = (ReplicaId(1), Generation(2));

    fn line(text: &str) -> LogLine {
        LogLine {
            at_ms: 5,
            phase: LogPhase::Run,
            text: text.into(),
        }
    }

    fn texts(report: Option<Report>) -> Vec<String> {
        match report {
            Some(Report::Log { lines, .. }) => lines.into_iter().map(|line| line.text).collect(),
            None => Vec::new(),
            other => panic!("not a log: {other:?}"),
        }
    }

    #[test]
    fn lines_come_in_order_and_once() {
        let mut book = LogBook::default();
        book.add(SHARD.0, SHARD.1, 3, line("one"));
        book.add(SHARD.0, SHARD.1, 3, line("two"));
        assert_eq!(book.shards(), [SHARD]);
        assert_eq!(texts(book.take(SHARD.0, SHARD.1)), ["one", "two"]);
        assert_eq!(book.take(SHARD.0, SHARD.1), None);
    }

    #[test]
    fn the_oldest_lines_are_dropped_and_it_is_said() {
        let mut book = LogBook::default();
        for i in 0..LINES_MAX + 3 {
            book.add(SHARD.0, SHARD.1, 0, line(&i.to_string()));
        }
        let texts = texts(book.take(SHARD.0, SHARD.1));
        assert!(texts[0].starts_with("3 lines dropped"), "{}", texts[0]);
        assert_eq!((texts[1].as_str(), texts.len()), ("3", LINES_MAX + 1));
    }

    #[test]
    fn shards_that_are_over_do_not_gather_without_bound() {
        let mut book = LogBook::default();
        for replica in 0..1000 {
            book.add(ReplicaId(replica), SHARD.1, 0, line("x"));
        }
        assert_eq!(book.shards().len(), SHARDS_MAX);
    }

    #[test]
    fn a_text_becomes_one_line_of_bounded_length() {
        assert_eq!(one_line(" a\nb\tc\n"), "a b c");
        let long = one_line(&"é".repeat(LINE_BYTES_MAX));
        assert!(long.len() <= LINE_BYTES_MAX + 3 && long.ends_with("..."));
    }

    #[test]
    fn a_long_load_says_now_and_then_how_far_it_is() {
        let start = Instant::now();
        let (mut log, at) = (LoadLog::default(), |ms| start + Duration::from_millis(ms));
        let total = 100 << 20;
        let mut line = |stage: &str, mib: u64, ms| log.line(stage, mib << 20, total, at(ms));
        assert_eq!(line("fetching model", 0, 0), None);
        assert_eq!(line("fetching model", 100, 1999), None);
        assert_eq!(line("reading weights", 0, 2000), None);
        assert_eq!(line("reading weights", 10, 3999), None, "too early");
        assert_eq!(
            line("reading weights", 25, 4000).as_deref(),
            Some("reading weights: 25.0 MiB of 100.0 MiB, 25 %")
        );
        assert_eq!(line("reading weights", 30, 5999), None);
        assert_eq!(line("reading weights", 25, 9000), None, "begun anew");
        assert_eq!(line("reading weights", 25, 12_000), None, "it stands");
        assert!(line("reading weights", 26, 12_250).is_some());
        assert_eq!(log.line("waiting", 7, 0, at(20_000)), None);
        assert_eq!(
            log.line("waiting", 1 << 30, 0, at(22_000)).as_deref(),
            Some("waiting: 1.00 GiB")
        );
    }

    #[test]
    fn a_run_says_at_once_what_is_unusual_and_now_and_then_how_it_goes() {
        let start = Instant::now();
        let mut log = RunLog::new(start);
        let mut health = Health {
            steps: 4,
            output_tokens: 9,
            prompt_tokens: 3,
            ..Health::default()
        };
        log.accepted();
        assert!(log.lines(&health, start).is_empty());
        health.preemptions = 2;
        health.stalled = true;
        let lines = log.lines(&health, start);
        assert!(lines[0].starts_with("2 sequences put back"), "{lines:?}");
        assert!(lines[1].starts_with("stalled"), "{lines:?}");
        health.stalled = false;
        let lines = log.lines(&health, start + SUMMARY_EVERY);
        assert!(lines[0].starts_with("goes on"), "{lines:?}");
        assert!(
            lines[1].contains("1 requests accepted, 0 refused; 4 steps, 3 prompt tokens"),
            "{lines:?}"
        );
        assert!(
            log.lines(&health, start + 2 * SUMMARY_EVERY).is_empty(),
            "an idle engine says nothing"
        );
        health.steps += 1;
        health.output_tokens += 1;
        let lines = log.lines(&health, start + 3 * SUMMARY_EVERY);
        assert!(
            lines[0].contains("in 10 s: 0 requests accepted, 0 refused; 1 steps, 0 prompt tokens (0 from the prefix cache), 1 output tokens"),
            "{lines:?}"
        );
    }
}

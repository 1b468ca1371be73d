//! The thread that writes tables of one kind: rows in through a bounded queue, lines out to the disk.
//!
//! A call never waits for it. Rows are written within milliseconds and brought to the disk at least once a second: a
//! killed process loses none that was written, a power cut loses the last second. When the disk stands still for as many
//! rows as the queue holds, or takes no more, rows are lost; they are counted, it is logged once, and calls go on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::index::Index;
use super::journal::{Bounds, Journal, Line};
use super::row::{InferenceRow, Keep, UsageRow};
use super::segment::Segment;
use super::totals::{Total, Totals};
use crate::actors::gateway::now_ms;
use crate::api::CallRecord;

/// Rows that may wait for the disk: a minute of a thousand calls a second.
const QUEUE_ROWS_MAX: usize = 1 << 16;
/// Bytes of the bodies of rows that wait.
const QUEUE_BYTES_MAX: u64 = 256 << 20;
/// Rows written at a time.
const BATCH_ROWS_MAX: usize = 1024;
/// How often what was written is brought to the disk.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// How often old segments are looked for, beside the beginnings of new ones.
const RETAIN_EVERY: Duration = Duration::from_secs(60);
/// Rows after which the index is written anew: a start reads no more than these again.
const INDEX_ROWS: u64 = 50_000;
/// Open files; the rest is opened again when it is needed.
const FILES_MAX: usize = 64;
/// A writer that does not answer for this long has a disk that stands still.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// The tables of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// One table of calls.
    Usage,
    /// A table of calls with bodies for each endpoint.
    Inference,
}

impl Kind {
    /// As a label of metrics.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Usage => "usage",
            Kind::Inference => "inference",
        }
    }
}

/// A row to be made and written.
pub enum Row {
    /// A call.
    Usage(Box<UsageRow>),
    /// A call with its bodies; what is kept of them is made on the writer's thread.
    Inference {
        /// The call.
        record: Box<CallRecord>,
        /// The endpoint's id.
        endpoint_id: String,
        /// What is kept of its bodies.
        keep: Keep,
    },
}

impl Row {
    fn bytes(&self) -> u64 {
        let Row::Inference { record, .. } = self else {
            return 0;
        };
        record.payload.as_ref().map_or(0, |payload| {
            payload.request.len() as u64 + payload.response.as_ref().map_or(0, String::len) as u64
        })
    }
}

enum Work {
    Row(Row),
    Segments(String, SyncSender<(PathBuf, Vec<Segment>)>),
    Totals {
        user: Option<String>,
        endpoint_id: Option<String>,
        reply: SyncSender<Vec<Total>>,
    },
    Close(SyncSender<()>),
}

/// A writer did not answer in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the disk of coordinator.data_dir does not answer")]
pub struct Stuck;

/// Where rows are handed in.
pub struct Writer {
    kind: Kind,
    queue: SyncSender<Work>,
    queued_bytes: Arc<AtomicU64>,
    losing: std::sync::Mutex<bool>,
}

impl Writer {
    /// Opens the tables in `folder` and starts the thread. Blocks.
    ///
    /// # Errors
    /// When files are there that cannot be read, or the thread cannot start.
    pub fn start(kind: Kind, folder: PathBuf, bounds: Bounds) -> std::io::Result<Writer> {
        let (queue, work) = sync_channel(QUEUE_ROWS_MAX);
        let queued_bytes = Arc::new(AtomicU64::new(0));
        let mut desk = Desk::open(kind, folder, bounds)?;
        std::thread::Builder::new()
            .name(format!("{}-table", kind.word()))
            .spawn({
                let queued_bytes = queued_bytes.clone();
                move || desk.run(&work, &queued_bytes)
            })?;
        Ok(Writer {
            kind,
            queue,
            queued_bytes,
            losing: std::sync::Mutex::new(false),
        })
    }

    /// Hands a row in. Never waits.
    pub fn offer(&self, row: Row) {
        let bytes = row.bytes();
        let queued = self.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let taken = if queued > QUEUE_BYTES_MAX {
            Err("bytes")
        } else {
            self.queue
                .try_send(Work::Row(row))
                .map_err(|error| match error {
                    TrySendError::Full(_) => "rows",
                    TrySendError::Disconnected(_) => "closed",
                })
        };
        let mut losing = self
            .losing
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match taken {
            Ok(()) => *losing = false,
            Err(full) => {
                self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
                lost(self.kind, "queue_full", 1);
                if !std::mem::replace(&mut *losing, true) {
                    tracing::error!(
                        table = self.kind.word(),
                        full,
                        "the disk does not keep up with the calls; rows of the table are lost until it does"
                    );
                }
            }
        }
    }

    /// A table's folder and segments, with all rows handed in so far. Blocks.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn segments(&self, table: &str) -> Result<(PathBuf, Vec<Segment>), Stuck> {
        self.ask(|reply| Work::Segments(table.to_owned(), reply))
    }

    /// Totals, with all rows handed in so far. Blocks.
    ///
    /// # Errors
    /// [`Stuck`].
    pub fn totals(
        &self,
        user: Option<String>,
        endpoint_id: Option<String>,
    ) -> Result<Vec<Total>, Stuck> {
        self.ask(|reply| Work::Totals {
            user,
            endpoint_id,
            reply,
        })
    }

    /// Writes everything handed in so far, and the index. Blocks.
    pub fn close(&self) {
        if self.ask(Work::Close).is_err() {
            tracing::error!(
                table = self.kind.word(),
                "the table could not be closed; its last rows may be lost"
            );
        }
    }

    fn ask<T>(&self, work: impl FnOnce(SyncSender<T>) -> Work) -> Result<T, Stuck> {
        let (reply, answer) = sync_channel(1);
        // A queue that is full of rows means a disk that stands still.
        self.queue.try_send(work(reply)).map_err(|_| Stuck)?;
        answer.recv_timeout(ANSWER_WAIT).map_err(|_| Stuck)
    }
}

/// Rows are lost.
fn lost(kind: Kind, reason: &'static str, rows: usize) {
    metrics::counter!("tandem_table_rows_lost_total", "table" => kind.word(), "reason" => reason)
        .increment(rows as u64);
}

/// One table.
struct Table {
    folder: PathBuf,
    journal: Journal,
    totals: Totals,
    /// Rows since the index was written.
    unindexed: u64,
}

impl Table {
    fn open(kind: Kind, folder: PathBuf, bounds: Bounds) -> std::io::Result<Table> {
        let Index { segments, totals } = Index::read(&folder);
        let mut totals = Totals::of(totals);
        let mut unindexed = 0;
        let journal = Journal::open(folder.clone(), bounds, &segments, |line| {
            unindexed += 1;
            if kind == Kind::Usage
                && let Ok(row) = serde_json::from_slice(line)
            {
                totals.add(&row);
            }
        })?;
        Ok(Table {
            folder,
            journal,
            totals,
            unindexed,
        })
    }

    /// The index holds what is on the disk, never more.
    fn write_index(&mut self) -> std::io::Result<()> {
        if self.unindexed == 0 {
            return Ok(());
        }
        self.journal.sync()?;
        let index = Index {
            segments: self.journal.segments().to_vec(),
            totals: self.totals.get(None, None),
        };
        index.write(&self.folder)?;
        self.unindexed = 0;
        Ok(())
    }
}

/// What the thread works on.
struct Desk {
    kind: Kind,
    folder: PathBuf,
    bounds: Bounds,
    tables: BTreeMap<String, Table>,
    /// The disk takes nothing; that is logged once.
    failing: bool,
}

impl Desk {
    fn open(kind: Kind, folder: PathBuf, bounds: Bounds) -> std::io::Result<Desk> {
        let mut desk = Desk {
            kind,
            folder,
            bounds,
            tables: BTreeMap::new(),
            failing: false,
        };
        match kind {
            Kind::Usage => drop(desk.table("")?),
            Kind::Inference => {
                let entries = match std::fs::read_dir(&desk.folder) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(desk),
                    entries => entries?,
                };
                for entry in entries {
                    let name = entry?.file_name();
                    let name = name
                        .to_str()
                        .filter(|name| common::names::check_entity(name).is_ok());
                    if let Some(name) = name {
                        desk.table(name)?;
                    }
                }
            }
        }
        Ok(desk)
    }

    /// The table of this name, opened now when it was not yet.
    fn table(&mut self, name: &str) -> std::io::Result<&mut Table> {
        if !self.tables.contains_key(name) {
            let table = Table::open(self.kind, self.folder_of(name), self.bounds)?;
            self.tables.insert(name.to_owned(), table);
        }
        self.tables
            .get_mut(name)
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    fn folder_of(&self, name: &str) -> PathBuf {
        match self.kind {
            Kind::Usage => self.folder.clone(),
            Kind::Inference => self.folder.join(name),
        }
    }

    fn run(&mut self, work: &Receiver<Work>, queued_bytes: &AtomicU64) {
        let (mut synced, mut retained) = (Instant::now(), None::<Instant>);
        loop {
            let mut next = match work.recv_timeout(SYNC_EVERY) {
                Ok(next) => Some(next),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let mut rows = Vec::new();
            while let Some(Work::Row(row)) = next {
                queued_bytes.fetch_sub(row.bytes(), Ordering::Relaxed);
                rows.push(row);
                next = (rows.len() < BATCH_ROWS_MAX)
                    .then(|| work.try_recv().ok())
                    .flatten();
            }
            self.write(rows);
            if let Some(next) = next {
                self.answer(next);
            }
            if synced.elapsed() >= SYNC_EVERY {
                synced = Instant::now();
                self.upkeep(|table| table.journal.sync());
                self.meter();
            }
            if retained.is_none_or(|at| at.elapsed() >= RETAIN_EVERY) {
                retained = Some(Instant::now());
                self.retain();
            }
        }
        self.upkeep(Table::write_index);
    }

    fn write(&mut self, rows: Vec<Row>) {
        let mut by_table: BTreeMap<String, (Vec<Line>, Vec<UsageRow>)> = BTreeMap::new();
        for row in rows {
            match row {
                Row::Usage(row) => {
                    let (lines, counted) = by_table.entry(String::new()).or_default();
                    if let Some(line) = self.line(row.time_ms, &*row) {
                        lines.push(line);
                        counted.push(*row);
                    }
                }
                Row::Inference {
                    record,
                    endpoint_id,
                    keep,
                } => {
                    let Some(row) = InferenceRow::of(*record, &endpoint_id, keep) else {
                        continue;
                    };
                    if let Some(line) = self.line(row.time_ms, &row) {
                        by_table.entry(row.endpoint).or_default().0.push(line);
                    }
                }
            }
        }
        for (name, (lines, counted)) in by_table {
            self.write_table(&name, &lines, &counted);
        }
        let open = self.tables.len();
        if open > FILES_MAX {
            self.upkeep(|table| table.journal.rest());
        }
    }

    fn line(&self, time_ms: u64, row: &impl Serialize) -> Option<Line> {
        match serde_json::to_vec(row) {
            Ok(text) => Some(Line { time_ms, text }),
            Err(error) => {
                tracing::error!(%error, "a row cannot be written as JSON");
                lost(self.kind, "unwritable", 1);
                None
            }
        }
    }

    fn write_table(&mut self, name: &str, lines: &[Line], counted: &[UsageRow]) {
        let written = self
            .table(name)
            .map_err(|error| super::journal::Loss {
                rows: lines.len(),
                error,
            })
            .and_then(|table| table.journal.append(lines));
        let lost_rows = written.as_ref().map_or_else(|loss| loss.rows, |_| 0);
        let kept = lines.len() - lost_rows;
        metrics::counter!("tandem_table_rows_total", "table" => self.kind.word())
            .increment(kept as u64);
        let mut index_is_due = matches!(written, Ok(true));
        if let Some(table) = self.tables.get_mut(name) {
            // Exactly what is in the table is in the totals.
            counted[..kept.min(counted.len())]
                .iter()
                .for_each(|row| table.totals.add(row));
            table.unindexed += kept as u64;
            index_is_due |= table.unindexed >= INDEX_ROWS;
        }
        match written {
            Ok(_) => {
                if std::mem::replace(&mut self.failing, false) {
                    tracing::warn!(
                        table = self.kind.word(),
                        "rows of the table are written again"
                    );
                }
            }
            Err(loss) => {
                lost(self.kind, "disk", loss.rows);
                self.failed(&loss.error, "rows of the table are lost");
            }
        }
        if index_is_due {
            self.retain();
        }
    }

    /// Once until it works again: a full disk is not to be filled with this.
    fn failed(&mut self, error: &std::io::Error, what: &str) {
        if !std::mem::replace(&mut self.failing, true) {
            let (table, folder) = (self.kind.word(), self.folder.display());
            tracing::error!(table, %folder, %error, "{what}; make room on the disk, or set [tables] bounds");
        }
    }

    fn upkeep(&mut self, work: impl Fn(&mut Table) -> std::io::Result<()>) {
        let failed = self
            .tables
            .values_mut()
            .filter_map(|table| work(table).err());
        if let Some(error) = failed.last() {
            self.failed(&error, "a table cannot be brought to the disk");
        }
    }

    /// Drops old segments. What they summed up to is in the index first, unless there is no room for it: making room
    /// comes before totals that outlive a crash in the next minute.
    fn retain(&mut self) {
        let now_ms = now_ms();
        let mut empty = Vec::new();
        for (name, table) in &mut self.tables {
            let indexed = table.write_index();
            let mut dropped = table.journal.retain(now_ms);
            if indexed.is_err() && matches!(dropped, Ok(true)) {
                dropped = table.write_index().map(|()| true);
            }
            match dropped {
                Ok(true) => tracing::info!(
                    table = self.kind.word(),
                    name,
                    "old segments of the table are deleted"
                ),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(table = self.kind.word(), name, %error, "old segments cannot be deleted");
                }
            }
            if self.kind == Kind::Inference && table.journal.segments().is_empty() {
                empty.push(name.clone());
            }
        }
        for name in empty {
            self.tables.remove(&name);
            let _ = std::fs::remove_dir_all(self.folder_of(&name));
        }
    }

    fn meter(&self) {
        let tables = self.tables.values();
        let bytes: u64 = tables.map(|table| table.journal.bytes()).sum();
        metrics::gauge!("tandem_table_bytes", "table" => self.kind.word()).set(bytes as f64);
    }

    /// Answers what is not a row. Whoever asked may have left.
    fn answer(&mut self, work: Work) {
        match work {
            Work::Row(row) => self.write(vec![row]),
            Work::Segments(name, reply) => {
                let segments = self.tables.get(&name);
                let segments =
                    segments.map_or_else(Vec::new, |table| table.journal.segments().to_vec());
                let _ = reply.try_send((self.folder_of(&name), segments));
            }
            Work::Totals {
                user,
                endpoint_id,
                reply,
            } => {
                let totals = self.tables.get("").map_or_else(Vec::new, |table| {
                    table.totals.get(user.as_deref(), endpoint_id.as_deref())
                });
                let _ = reply.try_send(totals);
            }
            Work::Close(reply) => {
                self.upkeep(Table::write_index);
                let _ = reply.try_send(());
            }
        }
    }
}

#[cfg(test)]
mod tests;

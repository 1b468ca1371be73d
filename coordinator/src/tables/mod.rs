//! Usage and inference tables: one row per call in append-only files, and the questions that may be asked of them.
//!
//! `data_dir/tables/usage` has the calls of all endpoints, `data_dir/tables/inference/ENDPOINT` those of an endpoint
//! with their bodies, where that is switched on. HTTP's accounts hand each call in once ([`CallObserver`]); a thread per
//! kind writes ([`writer`]). What is known of endpoints (ids, models, switches) is the coordinator's word ([`Known`]).

pub mod index;
pub mod journal;
pub mod query;
pub mod row;
pub mod segment;
pub mod totals;
pub mod writer;

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use common::config::TablesConfig;
use common::model_ref::ModelRef;
use tokio::sync::Semaphore;

use crate::api::{CallObserver, CallRecord};
use journal::Bounds;
use query::{By, Filter, Group, Page, QueryError};
use row::{InferenceRow, Keep, UsageRow};
use segment::{Position, Segment};
use totals::Total;
use writer::{Kind, Row, Stuck, Writer};

/// Questions that are looked up at a time; others wait.
const SCANS_MAX: usize = 2;
/// How long a question waits for its turn.
const TURN_WAIT: Duration = Duration::from_secs(10);
/// Deleted endpoints whose last calls still find their ids.
const GONE_MAX: usize = 1024;

/// What rows say of an endpoint beside its name, and whether there are any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its id.
    pub id: String,
    /// Its calls are rows of the usage table.
    pub usage: bool,
    /// Its calls are rows of its inference table, when it has one.
    pub inference: Option<Capture>,
    /// The models of its served entities, by the entities' names.
    pub models: Vec<(String, ModelRef)>,
}

/// An endpoint's inference table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capture {
    /// Bodies by length and digest alone, whatever cluster.toml says.
    pub redact: bool,
}

#[derive(Default)]
struct Endpoints {
    known: HashMap<String, Arc<Known>>,
    /// Deleted ones, the oldest first.
    gone: VecDeque<String>,
}

/// All tables.
pub struct Tables {
    config: TablesConfig,
    usage: Option<Writer>,
    inference: Writer,
    endpoints: RwLock<Endpoints>,
    scans: Semaphore,
}

impl Tables {
    /// Opens the tables in a data folder. Blocks.
    ///
    /// # Errors
    /// When files of them cannot be read.
    pub fn open(config: TablesConfig, data_dir: &Path) -> std::io::Result<Arc<Tables>> {
        let folder = data_dir.join("tables");
        let bounds = |bytes_max, days_max| Bounds {
            segment_bytes_max: config.segment_bytes_max,
            bytes_max,
            days_max,
        };
        let usage = config.usage.then(|| {
            let bounds = bounds(config.usage_bytes_max, config.usage_days_max);
            Writer::start(Kind::Usage, folder.join("usage"), bounds)
        });
        let inference = Writer::start(
            Kind::Inference,
            folder.join("inference"),
            bounds(config.inference_bytes_max, config.inference_days_max),
        )?;
        Ok(Arc::new(Tables {
            usage: usage.transpose()?,
            inference,
            config,
            endpoints: RwLock::default(),
            scans: Semaphore::new(SCANS_MAX),
        }))
    }

    /// Says what is known of an endpoint from here on; `None` when it is deleted. Calls that are still under way are
    /// then accounted for as before.
    pub fn know(&self, endpoint: &str, known: Option<Known>) {
        let mut endpoints = self
            .endpoints
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        match known {
            Some(known) => {
                endpoints.gone.retain(|gone| gone != endpoint);
                endpoints.known.insert(endpoint.to_owned(), Arc::new(known));
            }
            None => {
                let is_known = endpoints.known.contains_key(endpoint);
                if !is_known || endpoints.gone.iter().any(|gone| gone == endpoint) {
                    return;
                }
                if endpoints.gone.len() >= GONE_MAX
                    && let Some(oldest) = endpoints.gone.pop_front()
                {
                    endpoints.known.remove(&oldest);
                }
                endpoints.gone.push_back(endpoint.to_owned());
            }
        }
    }

    fn known(&self, endpoint: &str) -> Option<Arc<Known>> {
        self.endpoints
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .known
            .get(endpoint)
            .cloned()
    }

    /// Rows of calls.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn usage_rows(
        self: &Arc<Self>,
        filter: Filter,
        from: Option<Position>,
        rows_max: usize,
    ) -> Result<Page<UsageRow>, QueryError> {
        self.look_up(move |tables| {
            let (folder, segments) = tables.usage_segments()?;
            query::page(&folder, &segments, &filter, from, rows_max)
        })
        .await
    }

    /// Sums over calls.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn usage_sums(
        self: &Arc<Self>,
        filter: Filter,
        by: Vec<By>,
    ) -> Result<Vec<Group>, QueryError> {
        self.look_up(move |tables| {
            let (folder, segments) = tables.usage_segments()?;
            query::sums(&folder, &segments, &filter, &by)
        })
        .await
    }

    /// The running totals of this user or all, on the endpoint with this id or all.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn usage_totals(
        self: &Arc<Self>,
        user: Option<String>,
        endpoint_id: Option<String>,
    ) -> Result<Vec<Total>, QueryError> {
        self.look_up(move |tables| Ok(tables.usage()?.totals(user, endpoint_id)?))
            .await
    }

    /// Rows of an endpoint's calls with their bodies.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn inference_rows(
        self: &Arc<Self>,
        filter: Filter,
        from: Option<Position>,
        rows_max: usize,
    ) -> Result<Page<InferenceRow>, QueryError> {
        self.look_up(move |tables| {
            let table = filter.endpoint.as_deref().unwrap_or_default();
            let (folder, segments) = tables.inference.segments(table)?;
            query::page(&folder, &segments, &filter, from, rows_max)
        })
        .await
    }

    /// Writes everything handed in so far, and closes the files. Blocks.
    pub fn close(&self) {
        self.usage.iter().for_each(Writer::close);
        self.inference.close();
    }

    fn usage(&self) -> Result<&Writer, QueryError> {
        let off = || {
            QueryError::Refused(
                "the usage table is off: set usage = true in [tables] of cluster.toml".into(),
            )
        };
        self.usage.as_ref().ok_or_else(off)
    }

    fn usage_segments(&self) -> Result<(PathBuf, Vec<Segment>), QueryError> {
        Ok(self.usage()?.segments("")?)
    }

    /// Looks something up on the blocking pool, in its turn.
    async fn look_up<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Tables) -> Result<T, QueryError> + Send + 'static,
    ) -> Result<T, QueryError> {
        let busy = || {
            QueryError::Unavailable("other questions to the tables are being answered".to_owned())
        };
        let turn = tokio::time::timeout(TURN_WAIT, self.scans.acquire()).await;
        let _turn = turn.map_err(|_| busy())?.map_err(|_| busy())?;
        let tables = self.clone();
        tokio::task::spawn_blocking(move || work(&tables))
            .await
            .unwrap_or_else(|error| Err(QueryError::Unavailable(error.to_string())))
    }
}

impl From<Stuck> for QueryError {
    fn from(stuck: Stuck) -> Self {
        QueryError::Unavailable(stuck.to_string())
    }
}

impl CallObserver for Tables {
    fn wants_payload(&self, endpoint: &str) -> bool {
        self.known(endpoint)
            .is_some_and(|known| known.inference.is_some())
    }

    /// A call of an endpoint that does not exist is in no table: its name is anybody's invention.
    fn record(&self, record: CallRecord) {
        let Some(known) = self.known(&record.endpoint) else {
            return;
        };
        meter(&record);
        if let Some(usage) = self.usage.as_ref().filter(|_| known.usage) {
            let model = record.served_entity.as_ref().and_then(|entity| {
                let mut models = known.models.iter();
                models
                    .find(|(name, _)| name == entity)
                    .map(|(_, model)| model)
            });
            let row = UsageRow::of(&record, &known.id, model);
            usage.offer(Row::Usage(Box::new(row)));
        }
        if let Some(capture) = known.inference.filter(|_| record.payload.is_some()) {
            let keep = Keep {
                bytes_max: usize::try_from(self.config.payload_bytes_max).unwrap_or(usize::MAX),
                redact: self.config.redact || capture.redact,
            };
            self.inference.offer(Row::Inference {
                record: Box::new(record),
                endpoint_id: known.id.clone(),
                keep,
            });
        }
    }
}

/// The call in its endpoint's histograms, in the units and with the bounds of this field's dashboards.
fn meter(record: &CallRecord) {
    let endpoint = || record.endpoint.clone();
    metrics::histogram!("tandem_e2e_request_latency_seconds", "endpoint" => endpoint())
        .record(record.latency.as_secs_f64());
    if record.served_entity.is_some() {
        metrics::histogram!("tandem_request_prompt_tokens", "endpoint" => endpoint())
            .record(record.prompt_tokens as f64);
        metrics::histogram!("tandem_request_generation_tokens", "endpoint" => endpoint())
            .record(record.output_tokens as f64);
    }
}

#[cfg(test)]
mod tests;

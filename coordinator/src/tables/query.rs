//! Questions to the tables: which rows, and what they sum up to. Scans are bounded and block.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::Path;

use serde::de::DeserializeOwned;

use super::journal;
use super::row::{InferenceRow, UsageRow};
use super::segment::{Position, Segment};
use super::totals::Sums;
use crate::calendar::Day;

/// Most bytes that sums are made over at a time.
const SUM_BYTES_MAX: u64 = 512 << 20;
/// Bytes that a page is looked for in: a page may be empty and say where to go on.
const PAGE_SCAN_BYTES_MAX: u64 = 64 << 20;
/// Bytes of the rows of a page, about.
const PAGE_BYTES_MAX: usize = 8 << 20;
/// Most groups of an answer.
const GROUPS_MAX: usize = 10_000;

/// Which rows are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// From this moment on; calls belong to the moment of their end.
    pub start_ms: u64,
    /// Up to this moment, exclusive; `None` is no end.
    pub end_ms: Option<u64>,
    /// Of this user.
    pub user: Option<String>,
    /// Of endpoints of this name.
    pub endpoint: Option<String>,
    /// Of the endpoint with this id: not of earlier ones of its name.
    pub endpoint_id: Option<String>,
}

impl Filter {
    fn end_ms(&self) -> u64 {
        self.end_ms.unwrap_or(u64::MAX)
    }

    fn segments(&self, segments: &[Segment]) -> Vec<Segment> {
        segments
            .iter()
            .filter(|segment| segment.overlaps(self.start_ms, self.end_ms()))
            .cloned()
            .collect()
    }

    fn takes(&self, row: &impl Call) -> bool {
        let same =
            |asked: &Option<String>, is: &str| asked.as_deref().is_none_or(|asked| asked == is);
        (self.start_ms..self.end_ms()).contains(&row.time_ms())
            && same(&self.user, row.user())
            && same(&self.endpoint, row.endpoint())
            && same(&self.endpoint_id, row.endpoint_id())
    }
}

/// A row of a call, in any table.
pub trait Call: DeserializeOwned {
    /// When it ended.
    fn time_ms(&self) -> u64;
    /// Who called.
    fn user(&self) -> &str;
    /// The endpoint's name.
    fn endpoint(&self) -> &str;
    /// The endpoint's id.
    fn endpoint_id(&self) -> &str;
}

macro_rules! call {
    ($row:ty) => {
        impl Call for $row {
            fn time_ms(&self) -> u64 {
                self.time_ms
            }
            fn user(&self) -> &str {
                &self.user
            }
            fn endpoint(&self) -> &str {
                &self.endpoint
            }
            fn endpoint_id(&self) -> &str {
                &self.endpoint_id
            }
        }
    };
}

call!(UsageRow);
call!(InferenceRow);

/// Why a question is not answered.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The question is too large or wrong; what would do.
    #[error("{0}")]
    Refused(String),
    /// The disk, or too much else is going on: come again.
    #[error("{0}")]
    Unavailable(String),
}

impl From<std::io::Error> for QueryError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::InvalidInput => {
                QueryError::Refused("page_token is not one that this table has given".into())
            }
            _ => QueryError::Unavailable(format!("the table cannot be read: {error}")),
        }
    }
}

/// Some rows, in the order of their writing.
#[derive(Debug, PartialEq, Eq)]
pub struct Page<R> {
    /// The rows.
    pub rows: Vec<R>,
    /// Where to go on, when there may be more.
    pub next: Option<Position>,
}

/// Rows of a table, from a place on.
///
/// # Errors
/// [`QueryError`].
pub fn page<R: Call>(
    folder: &Path,
    segments: &[Segment],
    filter: &Filter,
    from: Option<Position>,
    rows_max: usize,
) -> Result<Page<R>, QueryError> {
    let segments = filter.segments(segments);
    let mut rows = Vec::new();
    let mut next = None;
    let (mut scanned, mut kept) = (0u64, 0usize);
    journal::read(folder, &segments, from, |behind, line| {
        scanned += line.len() as u64 + 1;
        if let Ok(row) = serde_json::from_slice::<R>(line)
            && filter.takes(&row)
        {
            kept += line.len();
            rows.push(row);
        }
        if rows.len() >= rows_max || kept >= PAGE_BYTES_MAX || scanned >= PAGE_SCAN_BYTES_MAX {
            next = Some(behind);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    // Nothing stands behind the table's last row.
    let last = segments.last().map(|segment| Position {
        segment: segment.name,
        offset: segment.bytes,
    });
    Ok(Page {
        rows,
        next: next.filter(|next| Some(*next) < last),
    })
}

/// What rows are summed up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// Who called.
    User,
    /// The endpoint.
    Endpoint,
    /// The served entity.
    Entity,
    /// The day of the call's end, UTC.
    Day,
}

impl By {
    /// All of them.
    pub const ALL: [By; 4] = [By::User, By::Endpoint, By::Entity, By::Day];

    /// As clients write it.
    pub fn word(self) -> &'static str {
        match self {
            By::User => "user",
            By::Endpoint => "endpoint",
            By::Entity => "entity",
            By::Day => "day",
        }
    }

    fn of(self, row: &UsageRow) -> String {
        match self {
            By::User => row.user.clone(),
            By::Endpoint => row.endpoint.clone(),
            By::Entity => row.served_entity.clone().unwrap_or_default(),
            By::Day => Day::of_ms(row.time_ms).to_string(),
        }
    }
}

/// Rows with the same keys, summed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// In the order asked for.
    pub keys: Vec<String>,
    /// Their sums.
    pub sums: Sums,
}

/// Sums over all rows that a filter takes, by these keys, in order of the keys.
///
/// # Errors
/// [`QueryError::Refused`] when that would be too much at a time.
pub fn sums(
    folder: &Path,
    segments: &[Segment],
    filter: &Filter,
    by: &[By],
) -> Result<Vec<Group>, QueryError> {
    let segments = filter.segments(segments);
    let bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
    if bytes > SUM_BYTES_MAX {
        return Err(QueryError::Refused(format!(
            "the rows between start and end take {bytes} bytes; at most {SUM_BYTES_MAX} are summed up at a time: ask for a shorter time"
        )));
    }
    let mut groups: BTreeMap<Vec<String>, Sums> = BTreeMap::new();
    journal::read(folder, &segments, None, |_, line| {
        if let Ok(row) = serde_json::from_slice::<UsageRow>(line)
            && filter.takes(&row)
        {
            let keys = by.iter().map(|by| by.of(&row)).collect();
            groups.entry(keys).or_default().add_row(&row);
        }
        if groups.len() > GROUPS_MAX {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    if groups.len() > GROUPS_MAX {
        return Err(QueryError::Refused(format!(
            "there are more than {GROUPS_MAX} groups: ask for a shorter time or fewer keys in group_by"
        )));
    }
    Ok(groups
        .into_iter()
        .map(|(keys, sums)| Group { keys, sums })
        .collect())
}

#[cfg(test)]
mod tests;

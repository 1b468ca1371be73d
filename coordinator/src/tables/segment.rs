//! Segments: a table's files by day, and by part where a day has more than fits into one.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::calendar::Day;

/// How a table's files end.
const SUFFIX: &str = ".jsonl";

/// A segment's name; later segments are greater. As a text `2026-11-26.jsonl`, then `2026-11-26.2.jsonl`, ...
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SegmentName {
    /// The day of its first row.
    pub day: Day,
    /// Counts from 1.
    pub part: u32,
}

impl SegmentName {
    /// The first segment of a day.
    pub fn first_of(day: Day) -> Self {
        SegmentName { day, part: 1 }
    }

    /// The one after this on the same day.
    pub fn next_part(self) -> Self {
        SegmentName {
            part: self.part + 1,
            ..self
        }
    }

    /// From a file's name; `None` for a file that is no segment.
    pub fn parse(name: &str) -> Option<Self> {
        let stem = name.strip_suffix(SUFFIX)?;
        let (day, part) = match stem.split_once('.') {
            Some((day, part)) => (day, part.parse().ok().filter(|part| *part > 1)?),
            None => (stem, 1),
        };
        let segment = SegmentName {
            day: Day::parse(day)?,
            part,
        };
        // One name, one spelling.
        (segment.to_string() == name).then_some(segment)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.part {
            1 => write!(f, "{}{SUFFIX}", self.day),
            part => write!(f, "{}.{part}{SUFFIX}", self.day),
        }
    }
}

impl From<SegmentName> for String {
    fn from(name: SegmentName) -> String {
        name.to_string()
    }
}

impl TryFrom<String> for SegmentName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        SegmentName::parse(&text).ok_or_else(|| format!("{text} is not a segment's name"))
    }
}

/// What is known of a segment without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its name.
    pub name: SegmentName,
    /// Bytes of whole rows; what stands behind them in the file was torn.
    pub bytes: u64,
    /// Whole rows.
    pub rows: u64,
    /// Least time of a row; above `last_ms` when there is none.
    pub first_ms: u64,
    /// Greatest time of a row.
    pub last_ms: u64,
}

impl Segment {
    /// A segment without rows.
    pub fn empty(name: SegmentName) -> Self {
        Segment {
            name,
            bytes: 0,
            rows: 0,
            first_ms: u64::MAX,
            last_ms: 0,
        }
    }

    /// A row that takes `bytes` with its line's end has been added.
    pub fn add(&mut self, time_ms: u64, bytes: u64) {
        self.bytes += bytes;
        self.rows += 1;
        self.first_ms = self.first_ms.min(time_ms);
        self.last_ms = self.last_ms.max(time_ms);
    }

    /// Whether it may have rows in `start_ms..end_ms`.
    pub fn overlaps(&self, start_ms: u64, end_ms: u64) -> bool {
        self.rows > 0 && self.first_ms < end_ms && self.last_ms >= start_ms
    }
}

/// A place between two rows of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// In which segment.
    pub segment: SegmentName,
    /// Bytes before it.
    pub offset: u64,
}

/// What clients hand back to go on.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.segment, self.offset)
    }
}

impl Position {
    /// From what a client hands back.
    pub fn parse(text: &str) -> Option<Self> {
        let (segment, offset) = text.split_once('@')?;
        Some(Position {
            segment: SegmentName::parse(segment)?,
            offset: offset.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_are_in_order() {
        let names = [
            "2026-11-25.jsonl",
            "2026-11-26.jsonl",
            "2026-11-26.2.jsonl",
            "2026-11-26.10.jsonl",
            "2026-11-27.jsonl",
        ];
        let parsed = names.map(|name| SegmentName::parse(name).unwrap());
        assert_eq!(parsed.map(|name| name.to_string()), names);
        assert!(parsed.is_sorted());
        for name in [
            "index.json",
            "2026-11-26.1.jsonl",
            "2026-11-26.02.jsonl",
            "2026-11-26.jsonl.old",
            "2026-13-26.jsonl",
            "2026-11-26.x.jsonl",
            "../2026-11-26.jsonl",
        ] {
            assert_eq!(SegmentName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn positions_come_back_and_nonsense_is_none() {
        let position = Position::parse("2026-11-26.2.jsonl@77").unwrap();
        assert_eq!(position.to_string(), "2026-11-26.2.jsonl@77");
        for text in [
            "",
            "@",
            "2026-11-26.jsonl@",
            "2026-11-26.jsonl@-1",
            "x@1",
            "2026-11-26@1",
        ] {
            assert_eq!(Position::parse(text), None, "{text}");
        }
    }
}

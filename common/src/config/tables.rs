//! `[tables]`: the rows that the coordinator keeps of calls, and for how long.

use super::reader::{Reader, Table};

/// A row takes some 500 bytes: two million calls.
const USAGE_BYTES_MAX_DEFAULT: u64 = 1 << 30;
/// A quarter, as accounts are made.
const USAGE_DAYS_MAX_DEFAULT: u64 = 90;
/// Per endpoint; bodies are large.
const INFERENCE_BYTES_MAX_DEFAULT: u64 = 1 << 30;
/// Long enough to look into what went wrong last month.
const INFERENCE_DAYS_MAX_DEFAULT: u64 = 30;
/// A long chat; what is longer is cut.
const PAYLOAD_BYTES_MAX_DEFAULT: u64 = 64 << 10;
/// Whole segments go at a time: small beside the bounds above.
const SEGMENT_BYTES_MAX_DEFAULT: u64 = 16 << 20;
/// Less would make a file of every few rows.
const SEGMENT_BYTES_MIN: u64 = 4 << 10;

/// What is kept of calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablesConfig {
    /// One row per call, of all endpoints that do not switch it off.
    pub usage: bool,
    /// Bodies by length and digest alone, of all endpoints.
    pub redact: bool,
    /// Longest text of a body in a row; the rest is cut off.
    pub payload_bytes_max: u64,
    /// Longest file.
    pub segment_bytes_max: u64,
    /// Rows of calls go after so many days.
    pub usage_days_max: u64,
    /// Rows of calls take no more than this; the oldest go.
    pub usage_bytes_max: u64,
    /// Rows with bodies go after so many days.
    pub inference_days_max: u64,
    /// Rows with bodies of one endpoint take no more than this; the oldest go.
    pub inference_bytes_max: u64,
}

impl Default for TablesConfig {
    fn default() -> Self {
        TablesConfig {
            usage: true,
            redact: false,
            payload_bytes_max: PAYLOAD_BYTES_MAX_DEFAULT,
            segment_bytes_max: SEGMENT_BYTES_MAX_DEFAULT,
            usage_days_max: USAGE_DAYS_MAX_DEFAULT,
            usage_bytes_max: USAGE_BYTES_MAX_DEFAULT,
            inference_days_max: INFERENCE_DAYS_MAX_DEFAULT,
            inference_bytes_max: INFERENCE_BYTES_MAX_DEFAULT,
        }
    }
}

/// Reads and checks the table; defaults stand for what is not there.
pub(super) fn tables<'a>(mut t: Table<'a>, r: &mut Reader<'a>) -> TablesConfig {
    let default = TablesConfig::default();
    let least_one = |value: Option<u64>, default: u64, key: &str, r: &mut Reader<'_>| match value {
        Some(0) => {
            r.mistake(&format!("tables.{key}"), "must be above 0");
            default
        }
        value => value.unwrap_or(default),
    };
    let segment_bytes_max = t.bytes(r, "segment_bytes_max");
    if segment_bytes_max.is_some_and(|bytes| bytes < SEGMENT_BYTES_MIN) {
        let message = format!("must be at least {SEGMENT_BYTES_MIN} bytes");
        r.mistake("tables.segment_bytes_max", message);
    }
    let days = [
        ("usage_days_max", default.usage_days_max),
        ("inference_days_max", default.inference_days_max),
    ];
    let bytes = [
        ("usage_bytes_max", default.usage_bytes_max),
        ("inference_bytes_max", default.inference_bytes_max),
    ];
    let [usage_days_max, inference_days_max] =
        days.map(|(key, default)| least_one(t.number(r, key), default, key, r));
    let [usage_bytes_max, inference_bytes_max] =
        bytes.map(|(key, default)| least_one(t.bytes(r, key), default, key, r));
    let config = TablesConfig {
        usage: t.flag(r, "usage").unwrap_or(default.usage),
        redact: t.flag(r, "redact").unwrap_or(default.redact),
        payload_bytes_max: t
            .bytes(r, "payload_bytes_max")
            .unwrap_or(default.payload_bytes_max),
        segment_bytes_max: segment_bytes_max.unwrap_or(default.segment_bytes_max),
        usage_days_max,
        usage_bytes_max,
        inference_days_max,
        inference_bytes_max,
    };
    t.close(r);
    config
}

//! A load generator for serving APIs: closed loops of clients or open arrivals, prompts and answers of given lengths, and
//! a report of rates, latencies, failures and processor time.
//!
//! It knows APIs from outside alone, so that it measures this system and others alike. Read in this order: [`load`]
//! (what is sent, and when), [`client`] (one request), [`report`] (what came of all), [`compare`] (two systems in turn).
#![forbid(unsafe_code)]

pub mod arrivals;
pub mod client;
pub mod compare;
pub mod length;
pub mod load;
pub mod percentile;
pub mod plot;
pub mod process;
pub mod prompt;
pub mod report;

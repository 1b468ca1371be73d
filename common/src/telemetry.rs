//! Logging: `tracing` to standard error, filtered by `TANDEM_LOG` (for example `info,coordinator=debug`).
//!
//! Owns how events are printed; metrics are the processes' own.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging. `json` prints one object per line for log collectors. Later calls change nothing.
pub fn init(json: bool) {
    let filter = EnvFilter::try_from_env("TANDEM_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Colours are for people at a terminal, not for log files.
    let ansi = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(ansi)
        .with_writer(std::io::stderr);
    let started = if json {
        builder.json().try_init()
    } else {
        builder.with_target(true).try_init()
    };
    if started.is_err() {
        tracing::debug!("logging was already started");
    }
}

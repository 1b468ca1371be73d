//! What the cluster's tests need: real processes on free ports in folders of their own, a client, a worker that is
//! played by the test, and faults.
//!
//! Helpers panic when the cluster does not do what the test needs, with what was seen instead; nothing here sleeps:
//! [`until::until`] waits for conditions.

pub mod binaries;
pub mod certificates;
pub mod client;
pub mod cluster;
pub mod document;
pub mod events;
pub mod fake_coordinator;
pub mod fake_registry;
pub mod fake_worker;
pub mod fault;
pub mod golden;
pub mod metrics;
pub mod process;
pub mod random_model;
pub mod settings;
pub mod source;
pub mod until;

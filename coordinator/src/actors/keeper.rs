//! Writes lifecycle events to the store, one after another: read, apply, compare and swap.
//!
//! Callers are level-triggered: an event that is lost, because the queue is full or the store fails, is sent again by
//! the next look at what is there.

use std::time::Duration;

use tokio::sync::mpsc;

use super::record::{EndpointRecord, decode, encode, endpoint_key};
use crate::policy::lifecycle::Event;
use crate::store::{Expect, SharedStore, StoreError};

/// Events that may wait.
const EVENTS_MAX: usize = 1024;
/// After a failed write the store is left alone for so long.
const FAILED_PAUSE: Duration = Duration::from_secs(1);

/// The keeper's door.
#[derive(Debug, Clone)]
pub struct Keeper {
    events: mpsc::Sender<(String, Event)>,
}

impl Keeper {
    /// Starts the keeper's task; it ends with the last clone of the door.
    pub fn start(store: SharedStore) -> Self {
        let (events, mut queue) = mpsc::channel::<(String, Event)>(EVENTS_MAX);
        tokio::spawn(async move {
            while let Some((endpoint, event)) = queue.recv().await {
                if let Err(error) = write(&store, &endpoint, event).await {
                    tracing::error!(endpoint, %error, "an endpoint's state cannot be stored; trying again");
                    tokio::time::sleep(FAILED_PAUSE).await;
                }
            }
        });
        Keeper { events }
    }

    /// Hands in what happened to an endpoint.
    pub fn hand_in(&self, endpoint: &str, event: Event) {
        if self.events.try_send((endpoint.to_owned(), event)).is_err() {
            tracing::warn!(
                endpoint,
                "the keeper is busy; the event is sent again with the next look"
            );
        }
    }
}

async fn write(store: &SharedStore, endpoint: &str, event: Event) -> Result<(), StoreError> {
    let key = endpoint_key(endpoint);
    loop {
        // Deleted meanwhile: nothing to keep.
        let Some(entry) = store.get(key.clone()).await? else {
            return Ok(());
        };
        let mut record: EndpointRecord = decode(&key, &entry.value)?;
        if !record.life.apply(event.clone()).unwrap_or(false) {
            return Ok(());
        }
        match store
            .put(
                key.clone(),
                encode(&record)?,
                Expect::Revision(entry.revision),
            )
            .await
        {
            Err(StoreError::Conflict { .. }) => {}
            other => return other.map(drop),
        }
    }
}

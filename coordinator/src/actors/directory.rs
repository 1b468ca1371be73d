//! What the actors publish for callers on other threads: where an endpoint's door is, how far the store was seen.
//!
//! Actor memory can be rebuilt: a coordinator that is started anew publishes itself here again.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use actix::Addr;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::allowance::Allowance;
use super::coordinator::CoordinatorActor;
use super::endpoint::EndpointActor;
use super::meters::Meters;
use crate::api::Access;

/// An endpoint as callers find it.
#[derive(Debug, Clone)]
pub struct Published {
    /// Its door.
    pub door: Addr<EndpointActor>,
    /// Who may do what with it.
    pub access: Arc<Access>,
    /// What its callers have used of their limits.
    pub allowance: Arc<Allowance>,
    /// Its meters.
    pub meters: Arc<Meters>,
}

/// The published addresses.
#[derive(Debug)]
pub struct Directory {
    endpoints: RwLock<HashMap<String, Published>>,
    coordinator: RwLock<Option<(Addr<CoordinatorActor>, CancellationToken)>>,
    /// The store's revision up to which the coordinator has seen changes.
    seen: watch::Sender<u64>,
}

impl Default for Directory {
    fn default() -> Self {
        let (endpoints, coordinator) = (RwLock::default(), RwLock::default());
        Directory {
            endpoints,
            coordinator,
            seen: watch::Sender::new(0),
        }
    }
}

impl Directory {
    /// An endpoint.
    pub fn endpoint(&self, name: &str) -> Option<Published> {
        self.endpoints
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// The name of the endpoint with this id.
    pub fn name_of(&self, id: &str) -> Option<String> {
        let endpoints = self
            .endpoints
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut all = endpoints.values();
        let found = all.find(|published| published.access.id == id)?;
        Some(found.access.name.clone())
    }

    /// Publishes an endpoint, or takes it back.
    pub fn set_endpoint(&self, name: &str, published: Option<Published>) {
        let mut endpoints = self
            .endpoints
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        match published {
            Some(published) => endpoints.insert(name.to_owned(), published),
            None => endpoints.remove(name),
        };
    }

    /// The coordinator, when it is up.
    pub fn coordinator(&self) -> Option<Addr<CoordinatorActor>> {
        self.incarnation().map(|(addr, _)| addr)
    }

    /// The coordinator, when it is up, and what is cancelled when it is gone.
    pub fn incarnation(&self) -> Option<(Addr<CoordinatorActor>, CancellationToken)> {
        self.coordinator
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Publishes the coordinator, or takes it back with all endpoints.
    pub fn set_coordinator(
        &self,
        coordinator: Option<(Addr<CoordinatorActor>, CancellationToken)>,
    ) {
        if coordinator.is_none() {
            self.endpoints
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
        *self
            .coordinator
            .write()
            .unwrap_or_else(PoisonError::into_inner) = coordinator;
    }

    /// The coordinator has seen the store up to this revision.
    pub fn set_seen(&self, revision: u64) {
        self.seen
            .send_if_modified(|seen| std::mem::replace(seen, revision.max(*seen)) < revision);
    }

    /// Waits until the coordinator has seen the store up to this revision: what was written is then in force.
    pub async fn wait_seen(&self, revision: u64) {
        // The sender is part of this directory: it cannot be gone.
        let _ = self
            .seen
            .subscribe()
            .wait_for(|seen| *seen >= revision)
            .await;
    }
}

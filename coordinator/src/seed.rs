//! Endpoints of cluster.toml: created when the store lacks them, and from then on like any other.

use std::sync::Arc;

use anyhow::{Result, bail};
use common::config::{Cluster, EndpointEntry};

use crate::actors::gateway::now_ms;
use crate::actors::record::{EndpointRecord, encode, endpoint_key};
use crate::api::{ConfigSpec, EntitySpec, Route, WorkloadSize};
use crate::policy::lifecycle::Lifecycle;
use crate::store::{Expect, SharedStore, StoreError};

/// Whom these endpoints are shown to be created by.
const CREATOR: &str = "cluster.toml";

/// Stores the endpoints that are not there yet.
///
/// # Errors
/// An entry whose traffic does not add up, or a store that fails.
pub async fn endpoints(cluster: &Arc<Cluster>, store: &SharedStore) -> Result<()> {
    for entry in &cluster.endpoints {
        let now_ms = now_ms();
        let record = EndpointRecord {
            name: entry.name.clone(),
            id: uuid::Uuid::new_v4().simple().to_string(),
            creator: CREATOR.into(),
            created_ms: now_ms,
            updated_ms: now_ms,
            tags: Vec::new(),
            description: None,
            life: Lifecycle::create(config(entry)?, CREATOR, now_ms),
        };
        match store
            .put(endpoint_key(&entry.name), encode(&record)?, Expect::Absent)
            .await
        {
            Ok(_) => tracing::info!(endpoint = entry.name, "endpoint of cluster.toml created"),
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The entry as a configuration.
///
/// # Errors
/// When shares are missing or do not sum to 100.
pub fn config(entry: &EndpointEntry) -> Result<ConfigSpec> {
    let (mut entities, mut routes) = (Vec::new(), Vec::new());
    let only = entry.served_entities.len() == 1;
    for served in &entry.served_entities {
        let name = served
            .name
            .clone()
            .unwrap_or_else(|| format!("{}-{}", served.model.short_name(), served.model.version));
        let percentage = served
            .traffic_percentage
            .or(only.then_some(100))
            .unwrap_or(0);
        routes.push(Route {
            entity: name.clone(),
            percentage,
        });
        entities.push(EntitySpec {
            name,
            model: served.model.clone(),
            workload_type: served.workload_type.clone(),
            workload_size: WorkloadSize::parse(&served.workload_size)
                .unwrap_or(WorkloadSize::Small),
            scale_to_zero: false,
            environment_vars: Vec::new(),
        });
    }
    let sum: u32 = routes.iter().map(|route| route.percentage).sum();
    if sum != 100 {
        bail!(
            "cluster.toml: endpoint {}: the traffic_percentage of its served entities must sum to 100, it is {sum}",
            entry.name
        );
    }
    for (i, entity) in entities.iter().enumerate() {
        if entities[..i].iter().any(|other| other.name == entity.name) {
            bail!(
                "cluster.toml: endpoint {}: two served entities are called {}; give one a name",
                entry.name,
                entity.name
            );
        }
    }
    Ok(ConfigSpec { entities, routes })
}

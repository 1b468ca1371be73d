//! Endpoints of cluster.toml: created at the first start that names them, and from then on like any other.
//!
//! A key of its own in the store remembers each name that was seeded, so that an endpoint deleted over the API stays
//! deleted.

use anyhow::Result;
use common::config::{Cluster, EndpointEntry};

use crate::actors::gateway::now_ms;
use crate::actors::record::{EndpointRecord, encode, endpoint_key};
use crate::api::{ConfigSpec, EntitySpec, Route, Settings, WorkloadSize};
use crate::policy::lifecycle::Lifecycle;
use crate::store::{Expect, SharedStore, StoreError};

/// Whom these endpoints are shown to be created by.
const CREATOR: &str = "cluster.toml";

/// The key that says that an endpoint was seeded.
fn seeded_key(name: &str) -> String {
    format!("seeded/{name}")
}

/// Stores the endpoints that cluster.toml names for the first time.
///
/// # Errors
/// A store that fails.
pub async fn endpoints(cluster: &Cluster, store: &SharedStore) -> Result<()> {
    for entry in &cluster.endpoints {
        if store.get(seeded_key(&entry.name)).await?.is_some() {
            continue;
        }
        let now_ms = now_ms();
        let record = EndpointRecord {
            name: entry.name.clone(),
            id: uuid::Uuid::new_v4().simple().to_string(),
            creator: CREATOR.into(),
            created_ms: now_ms,
            updated_ms: now_ms,
            settings: Settings::default(),
            life: Lifecycle::create(config(entry), CREATOR, now_ms),
        };
        match store
            .put(endpoint_key(&entry.name), encode(&record)?, Expect::Absent)
            .await
        {
            Ok(_) => tracing::info!(endpoint = entry.name, "endpoint of cluster.toml created"),
            // The API made it before cluster.toml named it.
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // Second: a start that ends in between finds the endpoint there, and the API was not up to delete it.
        store
            .put(seeded_key(&entry.name), Vec::new(), Expect::Any)
            .await?;
    }
    Ok(())
}

/// The entry as a configuration.
pub fn config(entry: &EndpointEntry) -> ConfigSpec {
    let served = &entry.served_entities;
    let entities = served.iter().map(|served| EntitySpec {
        name: served.name.clone(),
        model: served.model.clone(),
        workload_type: served.workload_type.clone(),
        workload_size: WorkloadSize::parse(&served.workload_size).unwrap_or(WorkloadSize::Small),
        scale_to_zero: false,
        environment_vars: Vec::new(),
        provisioned: None,
        concurrency: None,
        instance_profile_arn: None,
        quantization: served.quantization,
    });
    let routes = served.iter().map(|served| Route {
        entity: served.name.clone(),
        percentage: served.traffic_percentage,
    });
    ConfigSpec {
        entities: entities.collect(),
        routes: routes.collect(),
        auto_capture: None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::EmbeddedStore;

    const TOML: &str = "[[auth.tokens]]\nuser = \"admin\"\nfile = \"token\"\n\
        [[workload_types]]\nname = \"CPU\"\ndevice = \"cpu\"\n\
        [[models]]\nname = \"m\"\nversion = 1\npath = \"m\"\n\
        [[endpoints]]\nname = \"wished\"\n\
        [[endpoints.served_entities]]\nentity_name = \"m\"\nentity_version = 1\ntraffic_percentage = 30\n\
        [[endpoints.served_entities]]\nname = \"b\"\nentity_name = \"m\"\nentity_version = 1\ntraffic_percentage = 70\n\
        workload_size = \"Large\"\n";

    fn cluster(folder: &std::path::Path) -> Cluster {
        let file = folder.join("cluster.toml");
        std::fs::write(&file, TOML).unwrap();
        common::config::load(&file).unwrap()
    }

    #[tokio::test]
    async fn an_endpoint_is_created_once_and_stays_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = cluster(folder.path());
        let store: SharedStore = Arc::new(EmbeddedStore::open(folder.path()).unwrap());
        let key = endpoint_key("wished");
        endpoints(&cluster, &store).await.unwrap();
        let first = store.get(key.clone()).await.unwrap().unwrap();
        endpoints(&cluster, &store).await.unwrap();
        assert_eq!(store.get(key.clone()).await.unwrap(), Some(first));
        store.delete(key.clone(), Expect::Any).await.unwrap();
        endpoints(&cluster, &store).await.unwrap();
        assert_eq!(store.get(key).await.unwrap(), None, "it came back");
    }

    #[tokio::test]
    async fn an_endpoint_of_the_api_is_left_as_it_is_and_counts_as_seeded() {
        let folder = tempfile::tempdir().unwrap();
        let cluster = cluster(folder.path());
        let store: SharedStore = Arc::new(EmbeddedStore::open(folder.path()).unwrap());
        let key = endpoint_key("wished");
        let made = store.put(key.clone(), b"made".to_vec(), Expect::Absent);
        made.await.unwrap();
        endpoints(&cluster, &store).await.unwrap();
        let kept = store.get(key.clone()).await.unwrap().unwrap();
        assert_eq!(kept.value, b"made");
        store.delete(key.clone(), Expect::Any).await.unwrap();
        endpoints(&cluster, &store).await.unwrap();
        assert_eq!(store.get(key).await.unwrap(), None);
    }

    #[test]
    fn names_sizes_and_shares_are_those_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(&cluster(folder.path()).endpoints[0]);
        let shares: Vec<(&str, u32)> = config
            .routes
            .iter()
            .map(|route| (route.entity.as_str(), route.percentage))
            .collect();
        assert_eq!(shares, [("m-1", 30), ("b", 70)]);
        assert_eq!(config.entities[1].workload_size, WorkloadSize::Large);
    }
}

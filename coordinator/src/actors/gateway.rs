//! What HTTP calls: the cluster behind [`Gateway`].
//!
//! Validates against registry and memory plan on the caller's thread, writes wishes to the store and waits until they
//! are in force; hands calls to the endpoint's door.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::{BoxFuture, try_join_all};
use tokio::sync::oneshot;
use tokio::time::{timeout, timeout_at};

use super::allowance::Charge;
use super::coordinator::{CoordinatorActor, Means};
use super::directory::Published;
use super::endpoint::EndpointActor;
use super::messages::{
    CheckFit, GetHealth, GetOffer, GetView, Invoke, ListViews, Offer, Pending, Refusal,
};
use super::record::{EndpointRecord, TERM, decode, encode, endpoint_key};
use crate::api::{
    Access, Amendment, Answer, ApiError, Call, ClusterHealth, ConfigSpec, CreateEndpoint,
    EndpointView, EntitySpec, ErrorKind, Gateway, Generation, OptimizationInfo,
};
use crate::policy::lifecycle::{Event, Lifecycle};
use crate::policy::{fallback, settings, throughput, workload};
use crate::registry::{ModelFacts, RegistryError};
use crate::store::{Expect, StoreError};
use common::model_ref::ModelRef;
use common::request::{Generate, Prompt};

/// Longest prompt that a frame to a worker carries, in bytes; longer than any context served.
const PROMPT_BYTES_MAX: usize = 6 << 20;

/// When to come again after a registry did not answer.
const REGISTRY_PAUSE_S: u64 = 5;

/// A store that takes longer to answer `/health` does not answer.
const STORE_WAIT: Duration = Duration::from_secs(1);

/// The cluster as HTTP sees it.
#[derive(Clone)]
pub struct ActorGateway {
    pub(super) means: Means,
}

impl ActorGateway {
    /// A gateway to the coordinator that is published in the directory.
    pub fn new(means: Means) -> Self {
        ActorGateway { means }
    }

    fn coordinator(&self) -> Result<actix::Addr<CoordinatorActor>, ApiError> {
        self.means.directory.coordinator().ok_or_else(restarting)
    }

    fn published(&self, name: &str) -> Result<Published, ApiError> {
        let directory = &self.means.directory;
        directory
            .endpoint(name)
            .ok_or_else(|| match directory.coordinator() {
                Some(_) => not_found(name),
                None => restarting(),
            })
    }

    /// Reads what every start has written.
    async fn store_answers(&self) -> bool {
        let read = timeout(STORE_WAIT, self.means.store.get(TERM.into())).await;
        matches!(read, Ok(Ok(Some(_))))
    }

    async fn view(&self, name: String) -> Result<EndpointView, ApiError> {
        let found = self
            .coordinator()?
            .send(GetView(name.clone()))
            .await
            .map_err(|_| restarting())?;
        found.ok_or_else(|| not_found(&name))
    }

    /// Looks the models up in their registries and reads their headers.
    async fn facts(&self, config: &ConfigSpec) -> Result<Vec<Arc<ModelFacts>>, ApiError> {
        for entity in &config.entities {
            workload::resolve(
                &self.means.cluster.workload_types,
                &entity.workload_type,
                entity.workload_size,
            )?;
        }
        let entities = config.entities.iter();
        try_join_all(entities.map(|entity| self.facts_for(entity)))
            .await
            .map_err(no_model)
    }

    async fn facts_of(&self, model: &ModelRef) -> Result<Arc<ModelFacts>, RegistryError> {
        self.means.registry.facts(model).await
    }

    /// The facts of an entity's model, with weights kept as it asks for.
    async fn facts_for(&self, entity: &EntitySpec) -> Result<Arc<ModelFacts>, RegistryError> {
        let facts = self.facts_of(&entity.model).await?;
        Ok(facts.kept_as(entity.quantization))
    }

    async fn offer(&self, facts: Arc<ModelFacts>) -> Result<Option<Offer>, ApiError> {
        self.coordinator()?
            .send(GetOffer(facts))
            .await
            .map_err(|_| restarting())?
    }

    async fn optimization_info(&self, model: ModelRef) -> Result<OptimizationInfo, ApiError> {
        let facts = match self.facts_of(&model).await {
            Ok(facts) => facts,
            Err(RegistryError::Broken(why)) => {
                tracing::info!(%model, why, "a model cannot be served");
                return Ok(OptimizationInfo::NotServable);
            }
            Err(error) => return Err(no_model(error)),
        };
        let offer = self.offer(facts.clone()).await?;
        Ok(offer.map_or(OptimizationInfo::NotServable, |offer| {
            OptimizationInfo::Servable {
                model_type: facts.shape.model_type().to_owned(),
                chunk_tokens_per_s: offer.forecast.chunk(),
            }
        }))
    }

    /// Chooses type and size of what is sized by throughput, and fills in its rates. What one of `before` has stays.
    async fn provision(
        &self,
        mut config: ConfigSpec,
        before: &[EntitySpec],
    ) -> Result<ConfigSpec, ApiError> {
        for entity in &mut config.entities {
            let Some(asked) = entity.provisioned else {
                continue;
            };
            let kept = before
                .iter()
                .find(|old| throughput::is_unchanged(old, entity));
            if let Some(old) = kept {
                entity.provisioned = old.provisioned;
                entity.workload_size = old.workload_size;
                entity.workload_type.clone_from(&old.workload_type);
                continue;
            }
            let refuse = |message: String| ApiError::new(ErrorKind::InvalidParameter, message);
            let facts = self.facts_for(entity).await.map_err(no_model)?;
            let Some(offer) = self.offer(facts).await? else {
                return Err(refuse(format!(
                    "{model} fits no workload type of this cluster; `coordinator plan {name} {version}` says what would do",
                    model = entity.model,
                    name = entity.model.name,
                    version = entity.model.version,
                )));
            };
            let settled = throughput::settle(asked, offer.forecast.chunk()).map_err(refuse)?;
            entity.workload_size = offer.forecast.size(settled.max_tokens_per_s);
            entity.provisioned = Some(settled);
            if entity.workload_type.is_empty() {
                entity.workload_type = offer.workload_type;
            }
        }
        Ok(config)
    }

    async fn check(&self, config: &ConfigSpec, instead_of: Option<String>) -> Result<(), ApiError> {
        let facts = self.facts(config).await?;
        let ask = CheckFit {
            config: config.clone(),
            facts,
            instead_of,
        };
        self.coordinator()?
            .send(ask)
            .await
            .map_err(|_| restarting())?
    }

    async fn create(
        &self,
        user: String,
        mut endpoint: CreateEndpoint,
    ) -> Result<EndpointView, ApiError> {
        let key = endpoint_key(&endpoint.name);
        let taken = || {
            ApiError::new(
                ErrorKind::AlreadyExists,
                format!("Endpoint with name '{}' already exists.", endpoint.name),
            )
        };
        if self
            .means
            .store
            .get(key.clone())
            .await
            .map_err(internal)?
            .is_some()
        {
            return Err(taken());
        }
        endpoint.config = self.provision(endpoint.config, &[]).await?;
        self.check(&endpoint.config, None).await?;
        let now_ms = now_ms();
        let record = EndpointRecord {
            name: endpoint.name.clone(),
            id: uuid::Uuid::new_v4().simple().to_string(),
            life: Lifecycle::create(endpoint.config.clone(), &user, now_ms),
            creator: user,
            created_ms: now_ms,
            updated_ms: now_ms,
            settings: endpoint.settings.clone(),
        };
        let value = encode(&record).map_err(internal)?;
        let revision = match self.means.store.put(key, value, Expect::Absent).await {
            Err(StoreError::Conflict { .. }) => return Err(taken()),
            other => other.map_err(internal)?,
        };
        self.means.directory.wait_seen(revision).await;
        self.view(record.name).await
    }

    async fn update(
        &self,
        user: String,
        name: String,
        config: ConfigSpec,
    ) -> Result<EndpointView, ApiError> {
        let updating = |record: &mut EndpointRecord, config: &ConfigSpec| {
            let now_ms = now_ms();
            let event = Event::Update {
                config: config.clone(),
                user: user.clone(),
                now_ms,
            };
            record.life.apply(event).map_err(|_| {
                let message = format!(
                    "Endpoint '{}' is being updated; wait until the update is done.",
                    record.name
                );
                ApiError::new(ErrorKind::Conflict, message)
            })?;
            record.updated_ms = now_ms;
            Ok(())
        };
        // Refused before anything is read when it cannot be, whatever the configuration says.
        let key = endpoint_key(&name);
        let Some(entry) = self.means.store.get(key.clone()).await.map_err(internal)? else {
            return Err(not_found(&name));
        };
        let mut record: EndpointRecord = decode(&key, &entry.value).map_err(internal)?;
        let before: Vec<EntitySpec> = record.life.specs().cloned().collect();
        updating(&mut record, &config)?;
        let config = self.provision(config, &before).await?;
        self.check(&config, Some(name.clone())).await?;
        self.edit(name, |record| updating(record, &config)).await
    }

    /// Changes an endpoint's record: reads, changes, compares and swaps, until nobody came between.
    async fn edit(
        &self,
        name: String,
        change: impl Fn(&mut EndpointRecord) -> Result<(), ApiError>,
    ) -> Result<EndpointView, ApiError> {
        let key = endpoint_key(&name);
        loop {
            let Some(entry) = self.means.store.get(key.clone()).await.map_err(internal)? else {
                return Err(not_found(&name));
            };
            let mut record: EndpointRecord = decode(&key, &entry.value).map_err(internal)?;
            change(&mut record)?;
            let value = encode(&record).map_err(internal)?;
            match self
                .means
                .store
                .put(key.clone(), value, Expect::Revision(entry.revision))
                .await
            {
                // A state changed in between: decide anew.
                Err(StoreError::Conflict { .. }) => {}
                other => {
                    self.means
                        .directory
                        .wait_seen(other.map_err(internal)?)
                        .await;
                    return self.view(name).await;
                }
            }
        }
    }

    async fn delete(&self, name: String) -> Result<(), ApiError> {
        let key = endpoint_key(&name);
        loop {
            let Some(entry) = self.means.store.get(key.clone()).await.map_err(internal)? else {
                return Err(not_found(&name));
            };
            match self
                .means
                .store
                .delete(key.clone(), Expect::Revision(entry.revision))
                .await
            {
                Err(StoreError::Conflict { .. }) => {}
                other => {
                    self.means
                        .directory
                        .wait_seen(other.map_err(internal)?)
                        .await;
                    return Ok(());
                }
            }
        }
    }

    async fn generate(&self, mut call: Call) -> Result<Answer, ApiError> {
        let Published {
            door,
            access,
            allowance,
            meters,
        } = self.published(&call.endpoint)?;
        call.prompts.iter().try_for_each(check_bytes)?;
        let charge = allowance
            .admit(&access, &call.caller, Instant::now())
            .inspect_err(|_| meters.ended("limited"))?;
        let mut tried: Vec<String> = Vec::new();
        let mut first = None;
        loop {
            let again = access.settings.falls_back().then(|| call.clone());
            let (charge, others) = (charge.clone(), tried.clone());
            let refusal = match attempt(&door, call, charge, others).await {
                Ok(answer) => return Ok(answer),
                Err(refusal) => refusal,
            };
            match (again, refusal.entity) {
                (Some(again), Some(entity)) if fallback::helps(refusal.error.kind) => {
                    tracing::info!(endpoint = access.name, entity, error = %refusal.error, "a call falls back to another served entity");
                    tried.push(entity);
                    first.get_or_insert(refusal.error);
                    call = again;
                }
                // None is left: the one that the traffic split meant has the word.
                _ => return Err(first.unwrap_or(refusal.error)),
            }
        }
    }
}

/// Gives a call to a served entity that was not tried, and waits until a worker has accepted it.
async fn attempt(
    door: &actix::Addr<EndpointActor>,
    call: Call,
    charge: Option<Charge>,
    tried: Vec<String>,
) -> Result<Answer, Refusal> {
    let deadline = call.deadline;
    let (reply, admitted) = oneshot::channel();
    let invoke = Invoke {
        call,
        charge,
        tried,
        reply,
    };
    door.try_send(invoke).map_err(|error| match error {
        actix::dev::SendError::Full(_) => ApiError::new(
            ErrorKind::Overloaded,
            "too many calls at once; try again in 1 s",
        )
        .retry_after(1),
        actix::dev::SendError::Closed(_) => restarting(),
    })?;
    let answers = async {
        let admitted = admitted.await.map_err(|_| restarting())??;
        let accepted = try_join_all(admitted.pending.into_iter().map(accepted)).await;
        let generations = accepted.map_err(|error| Refusal {
            entity: Some(admitted.served_entity.clone()),
            error,
        })?;
        admitted.reading.hand_out(Instant::now());
        Ok(Answer {
            served_entity: admitted.served_entity,
            generations,
        })
    };
    // Dropping what is not accepted by then cancels it.
    let late = |_| {
        ApiError::new(
            ErrorKind::Deadline,
            "the request's time was up before a replica could take it",
        )
    };
    timeout_at(deadline.into(), answers).await.map_err(late)?
}

/// Waits for a worker's word on a prompt.
async fn accepted(pending: Pending) -> Result<Generation, ApiError> {
    let Pending {
        accepted,
        events,
        guard,
    } = pending;
    let prompt_tokens = accepted.await.map_err(|_| restarting())??;
    Ok(Generation {
        prompt_tokens,
        events,
        guard,
    })
}

fn check_bytes(generate: &Generate) -> Result<(), ApiError> {
    let bytes = match &generate.prompt {
        Prompt::Text(text) => text.len(),
        // The longest form of an id on the wire.
        Prompt::Tokens(ids) => ids.len() * 5,
        Prompt::Chat(chat) => chat.bytes() + chat.messages.len() * 40,
    };
    if bytes > PROMPT_BYTES_MAX {
        let message = format!("the prompt has {bytes} bytes; at most {PROMPT_BYTES_MAX} are taken");
        return Err(ApiError::new(ErrorKind::BadRequest, message));
    }
    Ok(())
}

fn no_model(error: RegistryError) -> ApiError {
    match error {
        RegistryError::Unknown(message) => ApiError::new(ErrorKind::NotFound, message),
        RegistryError::Broken(message) => ApiError::new(ErrorKind::InvalidParameter, message),
        RegistryError::Unavailable(message) => {
            ApiError::new(ErrorKind::Unavailable, message).retry_after(REGISTRY_PAUSE_S)
        }
    }
}

fn not_found(name: &str) -> ApiError {
    ApiError::new(
        ErrorKind::NotFound,
        format!("Endpoint with name '{name}' does not exist."),
    )
}

fn restarting() -> ApiError {
    ApiError::new(
        ErrorKind::Unavailable,
        "a part of the coordinator is being started again",
    )
    .retry_after(1)
}

fn internal(error: StoreError) -> ApiError {
    ApiError::new(ErrorKind::Internal, error.to_string())
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

impl Gateway for ActorGateway {
    fn create(
        &self,
        user: String,
        endpoint: CreateEndpoint,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        self.create(user, endpoint).boxed()
    }

    fn get(&self, name: String) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        self.view(name).boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<EndpointView>, ApiError>> {
        async {
            self.coordinator()?
                .send(ListViews)
                .await
                .map_err(|_| restarting())
        }
        .boxed()
    }

    fn update(
        &self,
        user: String,
        name: String,
        config: ConfigSpec,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        self.update(user, name, config).boxed()
    }

    fn access(&self, name: &str) -> Result<Arc<Access>, ApiError> {
        Ok(self.published(name)?.access)
    }

    fn name_of(&self, id: &str) -> Option<String> {
        self.means.directory.name_of(id)
    }

    fn amend(
        &self,
        name: String,
        amendment: Amendment,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        let amend = move |record: &mut EndpointRecord| {
            settings::amend(&mut record.settings, amendment.clone())
        };
        self.edit(name, amend).boxed()
    }

    fn delete(&self, name: String) -> BoxFuture<'_, Result<(), ApiError>> {
        self.delete(name).boxed()
    }

    fn generate(&self, call: Call) -> BoxFuture<'_, Result<Answer, ApiError>> {
        self.generate(call).boxed()
    }

    fn optimization_info(
        &self,
        model: ModelRef,
    ) -> BoxFuture<'_, Result<OptimizationInfo, ApiError>> {
        self.optimization_info(model).boxed()
    }

    fn workload_types(&self) -> Vec<String> {
        self.means
            .cluster
            .workload_types
            .iter()
            .map(|workload| workload.name.clone())
            .collect()
    }

    fn health(&self) -> BoxFuture<'_, ClusterHealth> {
        async {
            let health = match self.coordinator() {
                Ok(coordinator) => coordinator.send(GetHealth).await.ok(),
                Err(_) => None,
            };
            let health = match health {
                Some(health) => Some(ClusterHealth {
                    ready: health.ready && self.store_answers().await,
                    ..health
                }),
                None => None,
            };
            health.unwrap_or_else(|| ClusterHealth {
                live: true,
                ready: false,
                workers: 0,
                workers_expected: self.means.cluster.workers().count() as u32,
                endpoints_ready: 0,
                endpoints: 0,
                stalled: 0,
            })
        }
        .boxed()
    }
}

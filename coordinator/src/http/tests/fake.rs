//! A cluster that plays a script: what the HTTP layer is tested against.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::model_ref::ModelRef;
use common::request::{Delta, End};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use crate::api::{
    Access, Amendment, Answer, ApiError, Call, CancelGuard, ClusterHealth, ConfigSpec, ConfigView,
    CreateEndpoint, DeploymentState, EndpointView, EntitySpec, EntityView, ErrorKind, Gateway,
    Generation, GenerationEvent, OptimizationInfo, Route, Settings, UpdateState, WorkloadSize,
};
use crate::policy::settings;

/// When recorded endpoints were created.
pub(in crate::http) const CREATED_MS: u64 = 1_710_327_769_000;

/// New text of a candidate.
pub(in crate::http) fn delta(candidate: u32, text: &str) -> GenerationEvent {
    GenerationEvent::Delta(Delta {
        candidate,
        ids: vec![1],
        text: text.into(),
        ..Delta::default()
    })
}

/// The end of a candidate.
pub(in crate::http) fn end(candidate: u32, output_tokens: u32, end: End) -> GenerationEvent {
    GenerationEvent::End {
        candidate,
        output_tokens,
        cached_tokens: 0,
        end,
    }
}

/// A generation whose events are all there.
pub(in crate::http) fn generation(prompt_tokens: u32, script: Vec<GenerationEvent>) -> Generation {
    let (sender, events) = mpsc::channel(script.len().max(1));
    for event in script {
        sender
            .try_send(event)
            .expect("the channel has room for the script");
    }
    Generation {
        prompt_tokens,
        events,
        guard: CancelGuard::new(|| {}),
    }
}

/// An endpoint that is being created, as it was once recorded.
pub(in crate::http) fn endpoint_view(name: &str) -> EndpointView {
    let entity = EntityView {
        spec: EntitySpec {
            name: "llama2-7b-1".into(),
            model: ModelRef::new("cat.default.llama2-7b", "1").expect("a model's name"),
            workload_type: "GPU_LARGE".into(),
            workload_size: WorkloadSize::Small,
            scale_to_zero: false,
            environment_vars: vec![],
            provisioned: None,
            concurrency: None,
            instance_profile_arn: None,
            quantization: None,
        },
        creator: "ann".into(),
        created_ms: CREATED_MS,
        state: DeploymentState::Creating,
        message: "Creating resources for served entity.".into(),
    };
    let config = ConfigView {
        version: 1,
        started_ms: CREATED_MS,
        entities: vec![entity],
        routes: vec![Route {
            entity: "llama2-7b-1".into(),
            percentage: 100,
        }],
        auto_capture: None,
    };
    EndpointView {
        name: name.into(),
        id: "08f9f293f47247588069fa4e4e61a9be".into(),
        creator: "ann".into(),
        created_ms: CREATED_MS,
        updated_ms: CREATED_MS,
        ready: false,
        update: UpdateState::InProgress,
        active: None,
        pending: Some(config),
        task: None,
        settings: Settings::default(),
    }
}

/// The same with its configuration active.
pub(in crate::http) fn with_state(mut view: EndpointView, state: DeploymentState) -> EndpointView {
    view.active = view.pending.take();
    for entity in view
        .active
        .iter_mut()
        .flat_map(|config| &mut config.entities)
    {
        entity.state = state;
    }
    view.ready = state == DeploymentState::Ready;
    view.update = UpdateState::NotUpdating;
    view
}

/// What the next call of `generate` gets.
pub(in crate::http) enum Script {
    /// These events, by prompt; each prompt has 3 tokens.
    Events(Vec<Vec<GenerationEvent>>),
    /// These generations.
    Generations(Vec<Generation>),
    /// This refusal.
    Refusal(ApiError),
    /// Nothing, ever; counts when it is dropped.
    Silence(CancelGuard),
}

/// The cluster.
#[derive(Default)]
pub(in crate::http) struct FakeGateway {
    pub scripts: Mutex<VecDeque<Script>>,
    pub calls: Mutex<Vec<Call>>,
    pub created: Mutex<Vec<(String, CreateEndpoint)>>,
    pub updated: Mutex<Vec<(String, String, ConfigSpec)>>,
    pub endpoints: Mutex<Vec<EndpointView>>,
    /// What the control plane answers instead of working.
    pub refusal: Mutex<Option<ApiError>>,
    pub unready: AtomicUsize,
}

impl FakeGateway {
    /// A cluster that will play these scripts, one per call.
    pub fn playing(scripts: impl IntoIterator<Item = Script>) -> Arc<Self> {
        let gateway = FakeGateway::default();
        gateway.scripts.lock().unwrap().extend(scripts);
        Arc::new(gateway)
    }

    fn refused(&self) -> Result<(), ApiError> {
        self.refusal.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn find(&self, name: &str) -> Result<EndpointView, ApiError> {
        self.refused()?;
        let found = self
            .endpoints
            .lock()
            .unwrap()
            .iter()
            .find(|view| view.name == name)
            .cloned();
        let message = format!("Endpoint with name '{name}' does not exist.");
        found.ok_or_else(|| ApiError::new(ErrorKind::NotFound, message))
    }
}

fn done<T: Send + 'static>(value: T) -> BoxFuture<'static, T> {
    std::future::ready(value).boxed()
}

impl Gateway for FakeGateway {
    fn create(
        &self,
        user: String,
        endpoint: CreateEndpoint,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        let view = endpoint_view(&endpoint.name);
        self.created.lock().unwrap().push((user, endpoint));
        done(self.refused().map(|()| view))
    }

    fn get(&self, name: String) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        done(self.find(&name))
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<EndpointView>, ApiError>> {
        done(Ok(self.endpoints.lock().unwrap().clone()))
    }

    fn update(
        &self,
        user: String,
        name: String,
        config: ConfigSpec,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        let view = self.find(&name);
        self.updated.lock().unwrap().push((user, name, config));
        done(view)
    }

    /// Every endpoint is there for whoever asks it; those that were put here have their own settings.
    fn access(&self, name: &str) -> Result<Arc<Access>, ApiError> {
        let known = self.endpoints.lock().unwrap();
        let view = known.iter().find(|view| view.name == name).cloned();
        let view = view.unwrap_or_else(|| endpoint_view(name));
        Ok(Arc::new(Access {
            name: view.name,
            id: view.id,
            creator: view.creator,
            settings: view.settings,
            inference_table: None,
        }))
    }

    fn name_of(&self, id: &str) -> Option<String> {
        let known = self.endpoints.lock().unwrap();
        let found = known.iter().find(|view| view.id == id)?;
        Some(found.name.clone())
    }

    fn amend(
        &self,
        name: String,
        amendment: Amendment,
    ) -> BoxFuture<'_, Result<EndpointView, ApiError>> {
        let amended = self.find(&name).and_then(|mut view| {
            settings::amend(&mut view.settings, amendment)?;
            let mut known = self.endpoints.lock().unwrap();
            for kept in known.iter_mut().filter(|kept| kept.name == name) {
                *kept = view.clone();
            }
            Ok(view)
        });
        done(amended)
    }

    fn delete(&self, name: String) -> BoxFuture<'_, Result<(), ApiError>> {
        let found = self.find(&name).map(|_| ());
        self.endpoints
            .lock()
            .unwrap()
            .retain(|view| view.name != name);
        done(found)
    }

    fn generate(&self, call: Call) -> BoxFuture<'_, Result<Answer, ApiError>> {
        self.calls.lock().unwrap().push(call);
        let script = self.scripts.lock().unwrap().pop_front();
        let generations = match script {
            None => {
                return done(Err(ApiError::new(
                    ErrorKind::Internal,
                    "there is no script for this call",
                )));
            }
            Some(Script::Refusal(error)) => return done(Err(error)),
            Some(Script::Silence(guard)) => {
                return async move {
                    let _held = guard;
                    std::future::pending().await
                }
                .boxed();
            }
            Some(Script::Events(prompts)) => prompts
                .into_iter()
                .map(|events| generation(3, events))
                .collect(),
            Some(Script::Generations(generations)) => generations,
        };
        done(Ok(Answer {
            served_entity: "llama2-7b-1".into(),
            generations,
        }))
    }

    fn optimization_info(
        &self,
        model: ModelRef,
    ) -> BoxFuture<'_, Result<OptimizationInfo, ApiError>> {
        done(match model.name.as_str() {
            "gone" => Err(ApiError::new(
                ErrorKind::NotFound,
                "Registered model 'gone' does not exist.",
            )),
            "odd" => Ok(OptimizationInfo::NotServable),
            _ => Ok(OptimizationInfo::Servable {
                model_type: "llama".into(),
                chunk_tokens_per_s: 970,
            }),
        })
    }

    fn workload_types(&self) -> Vec<String> {
        ["CPU", "GPU_LARGE", "GPU_LARGE_2"]
            .map(String::from)
            .to_vec()
    }

    fn health(&self) -> BoxFuture<'_, ClusterHealth> {
        done(ClusterHealth {
            live: true,
            ready: self.unready.load(Ordering::SeqCst) == 0,
            workers: 1,
            workers_expected: 2,
            endpoints_ready: 0,
            endpoints: 0,
            stalled: 0,
        })
    }
}

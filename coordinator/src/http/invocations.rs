//! Generation: an endpoint's own path, and the paths of OpenAI's clients. Extract, check, call, answer.
//!
//! No status goes out before the cluster has accepted the call. A whole answer is its stream, collected; leaving
//! drops either, which cancels.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap};
use actix_web::web::{Data, Path, ReqData, ServiceConfig, resource};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use common::request::Generate;
use serde::Serialize;
use uuid::Uuid;

use super::account::Account;
use super::auth::Caller;
use super::embeddings::{self, EmbeddingRequest, Embeddings};
use super::error::Fault;
use super::json::{FieldError, JsonBody, Object};
use super::openai::{self, OpenAiRequest, Style};
use super::parts::{DEADLINE_GRACE, Deadline, Parts, best, collect};
use super::permissions::allowed;
use super::replies::{Meta, OpenAiReply, Predictions};
use super::sse::SseStream;
use super::view::{Model, Models};
use super::{HttpState, RequestId, inputs};
use crate::api::{Call, CallFormat, Level};

/// The keys by which a body says what it is.
const INPUT_KEYS: [&str; 7] = [
    "dataframe_split",
    "dataframe_records",
    "instances",
    "inputs",
    "messages",
    "prompt",
    "input",
];
/// Where OpenAI's clients find their paths, by what they take for their base.
const OPENAI_PREFIXES: [&str; 4] = [
    "/serving-endpoints",
    "/serving-endpoints/v1",
    "/ai-gateway/mlflow/v1",
    "/ai-gateway/openai/v1",
];
/// A client's way to wait less than the server would: milliseconds for the whole call.
const TIMEOUT_HEADER: &str = "x-request-timeout-ms";
/// Which served entity answered.
const ENTITY_HEADER: &str = "served-model-name";

pub(super) fn routes(config: &mut ServiceConfig) {
    for prefix in OPENAI_PREFIXES {
        config
            .service(resource(format!("{prefix}/completions")).post(completions))
            .service(resource(format!("{prefix}/chat/completions")).post(chat))
            .service(resource(format!("{prefix}/embeddings")).post(embeddings))
            .service(resource(format!("{prefix}/models")).get(models))
            .service(resource(format!("{prefix}/models/{{name}}")).get(model));
    }
    config.service(resource("/serving-endpoints/{name}/invocations").post(invoke));
}

/// What every handler here needs of its request.
type Door = (
    Data<HttpState>,
    HttpRequest,
    ReqData<RequestId>,
    Caller,
    JsonBody,
);

/// Everything about a call but its prompts.
struct Context {
    state: Data<HttpState>,
    endpoint: String,
    caller: Caller,
    request_id: RequestId,
    deadline: Deadline,
    account: Account,
}

impl Context {
    /// A call of `endpoint` that comes through this door, and its body.
    fn open(door: Door, endpoint: String, format: CallFormat) -> Result<(Self, Object), Fault> {
        let (state, request, id, caller, JsonBody(body)) = door;
        let request_id = id.into_inner();
        let mut account = Account::open(
            state.observer.clone(),
            endpoint.clone(),
            caller.user.clone(),
            request_id.0.clone(),
            format,
            &body,
        );
        let labelled = allowed(&state, &caller, &endpoint, Level::Query)
            .and_then(|_| account.label(&body).map_err(Fault::bad_request));
        let limit_ms = state.limits.deadline_ms;
        let deadline =
            labelled.and_then(|()| deadline(request.headers(), limit_ms, Instant::now()));
        match deadline {
            Ok(deadline) => Ok((
                Context {
                    state,
                    endpoint,
                    caller,
                    request_id,
                    deadline,
                    account,
                },
                body,
            )),
            Err(fault) => {
                account.failed(&fault);
                Err(fault)
            }
        }
    }

    /// A refusal of this call.
    fn refuse(mut self, fault: impl Into<Fault>) -> Fault {
        let fault = fault.into();
        self.account.failed(&fault);
        fault
    }
}

async fn invoke(name: Path<String>, door: Door) -> Result<HttpResponse, Fault> {
    let key = inputs::only_key(&door.4.0, &INPUT_KEYS);
    let format = match key {
        Ok("input") => CallFormat::Embeddings,
        Ok("prompt") => CallFormat::Completions,
        Ok("messages") => CallFormat::Chat,
        _ => CallFormat::Predictions,
    };
    let (context, body) = Context::open(door, name.into_inner(), format)?;
    match key {
        Err(error) => Err(context.refuse(Fault::bad_request(error))),
        Ok("input") => embed(context, embeddings::request(&body)).await,
        Ok("prompt") => answer(context, openai::completion(&body, &mut rand::random)).await,
        Ok("messages") => answer(context, openai::chat(&body, &mut rand::random)).await,
        Ok(key) => predict(context, inputs::predictions(&body, key, &mut rand::random)).await,
    }
}

async fn completions(door: Door) -> Result<HttpResponse, Fault> {
    let endpoint = openai::model(&door.4.0).map_err(Fault::bad_request)?;
    let (context, body) = Context::open(door, endpoint, CallFormat::Completions)?;
    answer(context, openai::completion(&body, &mut rand::random)).await
}

async fn chat(door: Door) -> Result<HttpResponse, Fault> {
    let endpoint = openai::model(&door.4.0).map_err(Fault::bad_request)?;
    let (context, body) = Context::open(door, endpoint, CallFormat::Chat)?;
    answer(context, openai::chat(&body, &mut rand::random)).await
}

async fn embeddings(door: Door) -> Result<HttpResponse, Fault> {
    let endpoint = openai::model(&door.4.0).map_err(Fault::bad_request)?;
    let (context, body) = Context::open(door, endpoint, CallFormat::Embeddings)?;
    embed(context, embeddings::request(&body)).await
}

/// One of those.
async fn model(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
) -> Result<HttpResponse, Fault> {
    allowed(&state, &caller, &name, Level::Query)?;
    let view = state.gateway.get(name.into_inner()).await?;
    Ok(HttpResponse::Ok().json(Model::of(&view)))
}

/// Those that the caller may ask.
async fn models(state: Data<HttpState>, caller: Caller) -> Result<HttpResponse, Fault> {
    let mut views = state.gateway.list().await?;
    views.retain(|view| view.level(&caller) >= Some(Level::Query));
    Ok(HttpResponse::Ok().json(Models::of(&views)))
}

/// The server's limit, or less when the client wants to wait less.
fn deadline(headers: &HeaderMap, limit_ms: u64, now: Instant) -> Result<Deadline, Fault> {
    let asked_ms = match headers.get(TIMEOUT_HEADER) {
        None => limit_ms,
        Some(value) => match value.to_str().unwrap_or_default().trim().parse() {
            Ok(ms) if ms > 0 => ms,
            _ => {
                let why = "must be a whole number of milliseconds above 0";
                return Err(Fault::bad_request(FieldError::at(TIMEOUT_HEADER, why)));
            }
        },
    };
    let allowed_ms = asked_ms.min(limit_ms);
    Ok(Deadline {
        at: now + Duration::from_millis(allowed_ms),
        allowed_ms,
    })
}

/// Answers in the form of predictions.
async fn predict(
    context: Context,
    prompts: Result<Vec<Generate>, FieldError>,
) -> Result<HttpResponse, Fault> {
    let prompts = match prompts {
        Ok(prompts) => prompts,
        Err(error) => return Err(context.refuse(Fault::bad_request(error))),
    };
    let candidates: Vec<u32> = prompts.iter().map(|prompt| prompt.candidates).collect();
    let (response, mut parts) = start(context, prompts, false).await?;
    let choices = collect(&mut parts).await?;
    let reply = Predictions::of(&choices, &candidates, &parts.prompt_tokens);
    Ok(whole(response, parts, &reply))
}

/// Answers in one of OpenAI's forms, whole or as a stream.
async fn answer(
    mut context: Context,
    request: Result<OpenAiRequest, FieldError>,
) -> Result<HttpResponse, Fault> {
    let OpenAiRequest {
        style,
        prompts,
        n,
        logprobs,
        stream,
        include_usage,
        suffix,
        partial_on_deadline,
    } = match request {
        Ok(request) => request,
        Err(error) => return Err(context.refuse(Fault::bad_request(error))),
    };
    if stream {
        context.account.streams();
    }
    let made = prompts
        .first()
        .map_or(n, |prompt| prompt.candidates as usize);
    let meta = meta(style, context.endpoint.clone(), logprobs);
    let (mut response, mut parts) = start(context, prompts, partial_on_deadline).await?;
    if stream {
        let events = SseStream::new(parts, meta, suffix, include_usage);
        // Proxies keep streams back unless they are told not to.
        return Ok(response
            .insert_header((CONTENT_TYPE, "text/event-stream"))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .insert_header(("x-accel-buffering", "no"))
            .streaming(events));
    }
    let mut choices = best(collect(&mut parts).await?, made, n);
    for choice in &mut choices {
        choice.text.push_str(&suffix);
    }
    let reply = OpenAiReply::whole(&meta, &choices, parts.usage());
    Ok(whole(response, parts, &reply))
}

/// Answers with embeddings.
async fn embed(
    context: Context,
    request: Result<EmbeddingRequest, FieldError>,
) -> Result<HttpResponse, Fault> {
    let EmbeddingRequest {
        prompts,
        base64,
        dimensions,
    } = match request {
        Ok(request) => request,
        Err(error) => return Err(context.refuse(Fault::bad_request(error))),
    };
    let model = context.endpoint.clone();
    let (response, mut parts) = start(context, prompts, false).await?;
    let choices = collect(&mut parts).await?;
    let reply = Embeddings::of(&model, &choices, base64, parts.usage());
    match reply.check(dimensions) {
        Ok(()) => Ok(whole(response, parts, &reply)),
        Err(fault) => {
            parts.account.failed(&fault);
            Err(fault)
        }
    }
}

/// A whole answer. Its account is closed before the client sees it.
fn whole(
    mut response: HttpResponseBuilder,
    mut parts: Parts,
    reply: &impl Serialize,
) -> HttpResponse {
    if parts.account.wants_payload() {
        let body = serde_json::to_string(reply).unwrap_or_default();
        parts.account.replied(body);
    }
    response.json(reply)
}

/// Gives the prompts to the cluster and waits until it has accepted them.
async fn start(
    context: Context,
    prompts: Vec<Generate>,
    partial_on_deadline: bool,
) -> Result<(HttpResponseBuilder, Parts), Fault> {
    let deadline = context.deadline;
    let candidates: Vec<u32> = prompts.iter().map(|prompt| prompt.candidates).collect();
    let call = Call {
        endpoint: context.endpoint.clone(),
        caller: context.caller.clone(),
        request_id: context.request_id.0.clone(),
        prompts,
        deadline: deadline.at,
    };
    let accepted = context.state.gateway.generate(call);
    let answer =
        match tokio::time::timeout_at((deadline.at + DEADLINE_GRACE).into(), accepted).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(context.refuse(error)),
            Err(_) => return Err(context.refuse(Fault::deadline(deadline.allowed_ms))),
        };
    if answer.generations.len() != candidates.len() {
        let (got, asked) = (answer.generations.len(), candidates.len());
        return Err(context.refuse(Fault::internal(format!(
            "the cluster answered {got} of {asked} prompts"
        ))));
    }
    let mut response = HttpResponse::Ok();
    response.insert_header((ENTITY_HEADER, answer.served_entity.as_str()));
    let mut account = context.account;
    let prompt_tokens = answer
        .generations
        .iter()
        .map(|generation| u64::from(generation.prompt_tokens))
        .sum();
    account.accepted(answer.served_entity, prompt_tokens);
    Ok((
        response,
        Parts::new(
            answer.generations,
            &candidates,
            partial_on_deadline,
            deadline,
            account,
        ),
    ))
}

fn meta(style: Style, model: String, logprobs: bool) -> Meta {
    let prefix = match style {
        Style::Completion => "cmpl",
        Style::Chat => "chatcmpl",
    };
    Meta {
        style,
        id: format!("{prefix}-{}", Uuid::new_v4().simple()),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        model,
        logprobs,
    }
}

#[cfg(test)]
mod tests {
    use actix_web::http::header::{HeaderName, HeaderValue};

    use super::*;

    fn allowed(header: Option<&'static str>) -> Result<u64, Fault> {
        let mut headers = HeaderMap::new();
        if let Some(value) = header {
            headers.insert(
                HeaderName::from_static(TIMEOUT_HEADER),
                HeaderValue::from_static(value),
            );
        }
        let now = Instant::now();
        let deadline = deadline(&headers, 1000, now)?;
        assert_eq!(
            deadline.at,
            now + Duration::from_millis(deadline.allowed_ms)
        );
        Ok(deadline.allowed_ms)
    }

    #[test]
    fn a_client_may_wait_less_than_the_limit_but_not_more() {
        for (header, expected) in [
            (None, 1000),
            (Some("5"), 5),
            (Some(" 999 "), 999),
            (Some("99999"), 1000),
        ] {
            assert_eq!(allowed(header).unwrap(), expected, "{header:?}");
        }
        for header in ["0", "-1", "1.5", "soon", "99999999999999999999999"] {
            let fault = allowed(Some(header)).unwrap_err();
            assert_eq!(
                (fault.code, fault.param.as_deref()),
                ("BAD_REQUEST", Some(TIMEOUT_HEADER)),
                "{header}"
            );
        }
    }
}

//! Generation: an endpoint's own path, and the paths of OpenAI's clients. Extract, check, call, answer.
//!
//! No status goes out before the cluster has accepted the call. A whole answer is its stream, collected; leaving
//! drops either, which cancels.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap};
use actix_web::web::{Data, Path, ReqData, ServiceConfig, resource};
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use common::request::Generate;
use uuid::Uuid;

use super::error::Fault;
use super::json::{FieldError, JsonBody, Object};
use super::openai::{self, OpenAiRequest, Style};
use super::parts::{DEADLINE_GRACE, Deadline, Parts, collect};
use super::replies::{Meta, OpenAiReply, Predictions};
use super::sse::SseStream;
use super::view::Models;
use super::{HttpState, RequestId, inputs};
use crate::api::Call;

/// The keys by which a body says what it is.
const INPUT_KEYS: [&str; 6] = [
    "dataframe_split",
    "dataframe_records",
    "instances",
    "inputs",
    "messages",
    "prompt",
];
/// A client's way to wait less than the server would: milliseconds for the whole call.
const TIMEOUT_HEADER: &str = "x-request-timeout-ms";
/// Which served entity answered.
const ENTITY_HEADER: &str = "served-model-name";

pub(super) fn routes(config: &mut ServiceConfig) {
    for prefix in ["/serving-endpoints", "/serving-endpoints/v1"] {
        config
            .service(resource(format!("{prefix}/completions")).post(completions))
            .service(resource(format!("{prefix}/chat/completions")).post(chat))
            .service(resource(format!("{prefix}/models")).get(models));
    }
    config.service(resource("/serving-endpoints/{name}/invocations").post(invoke));
}

/// Everything about a call but its prompts.
struct Context {
    state: Data<HttpState>,
    endpoint: String,
    request_id: RequestId,
    deadline: Deadline,
}

impl Context {
    fn new(
        state: Data<HttpState>,
        endpoint: String,
        request: &HttpRequest,
        id: RequestId,
    ) -> Result<Self, Fault> {
        let deadline = deadline(request.headers(), state.limits.deadline_ms, Instant::now())?;
        Ok(Context {
            state,
            endpoint,
            request_id: id,
            deadline,
        })
    }
}

async fn invoke(
    state: Data<HttpState>,
    name: Path<String>,
    request: HttpRequest,
    id: ReqData<RequestId>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let context = Context::new(state, name.into_inner(), &request, id.into_inner())?;
    match input_key(&body.0).map_err(Fault::bad_request)? {
        "prompt" => answer(context, openai::completion(&body.0, &mut rand::random)).await,
        "messages" => answer(context, openai::chat(&body.0, &mut rand::random)).await,
        key => {
            predict(
                context,
                inputs::predictions(&body.0, key, &mut rand::random),
            )
            .await
        }
    }
}

async fn completions(
    state: Data<HttpState>,
    request: HttpRequest,
    id: ReqData<RequestId>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let endpoint = openai::model(&body.0).map_err(Fault::bad_request)?;
    let context = Context::new(state, endpoint, &request, id.into_inner())?;
    answer(context, openai::completion(&body.0, &mut rand::random)).await
}

async fn chat(
    state: Data<HttpState>,
    request: HttpRequest,
    id: ReqData<RequestId>,
    body: JsonBody,
) -> Result<HttpResponse, Fault> {
    let endpoint = openai::model(&body.0).map_err(Fault::bad_request)?;
    let context = Context::new(state, endpoint, &request, id.into_inner())?;
    answer(context, openai::chat(&body.0, &mut rand::random)).await
}

async fn models(state: Data<HttpState>) -> Result<HttpResponse, Fault> {
    let views = state.gateway.list().await?;
    Ok(HttpResponse::Ok().json(Models::of(&views)))
}

/// Which of the formats a body has.
fn input_key(body: &Object) -> Result<&'static str, FieldError> {
    if body.get("input").is_some_and(|value| !value.is_null()) {
        return Err(FieldError::at(
            "input",
            "asks for embeddings, which this server does not support",
        ));
    }
    inputs::only_key(body, &INPUT_KEYS)
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
    let prompts = prompts.map_err(Fault::bad_request)?;
    let candidates: Vec<u32> = prompts.iter().map(|prompt| prompt.candidates).collect();
    let (mut response, mut parts) = start(&context, prompts, false).await?;
    let choices = collect(&mut parts).await?;
    Ok(response.json(Predictions::of(&choices, &candidates, &parts.prompt_tokens)))
}

/// Answers in one of OpenAI's forms, whole or as a stream.
async fn answer(
    context: Context,
    request: Result<OpenAiRequest, FieldError>,
) -> Result<HttpResponse, Fault> {
    let OpenAiRequest {
        style,
        prompts,
        stream,
        include_usage,
        suffix,
        partial_on_deadline,
    } = request.map_err(Fault::bad_request)?;
    let logprobs = prompts.iter().any(|prompt| prompt.logprobs.is_some());
    let (mut response, mut parts) = start(&context, prompts, partial_on_deadline).await?;
    let meta = meta(style, context.endpoint, logprobs);
    if stream {
        let events = SseStream::new(parts, meta, suffix, include_usage);
        // Proxies keep streams back unless they are told not to.
        return Ok(response
            .insert_header((CONTENT_TYPE, "text/event-stream"))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .insert_header(("x-accel-buffering", "no"))
            .streaming(events));
    }
    let mut choices = collect(&mut parts).await?;
    for choice in &mut choices {
        choice.text.push_str(&suffix);
    }
    Ok(response.json(OpenAiReply::whole(&meta, &choices, parts.usage)))
}

/// Gives the prompts to the cluster and waits until it has accepted them.
async fn start(
    context: &Context,
    prompts: Vec<Generate>,
    partial_on_deadline: bool,
) -> Result<(HttpResponseBuilder, Parts), Fault> {
    let deadline = context.deadline;
    let candidates: Vec<u32> = prompts.iter().map(|prompt| prompt.candidates).collect();
    let call = Call {
        endpoint: context.endpoint.clone(),
        request_id: context.request_id.0.clone(),
        prompts,
        deadline: deadline.at,
    };
    let accepted = context.state.gateway.generate(call);
    let answer =
        match tokio::time::timeout_at((deadline.at + DEADLINE_GRACE).into(), accepted).await {
            Ok(answer) => answer?,
            Err(_) => return Err(Fault::deadline(deadline.allowed_ms)),
        };
    if answer.generations.len() != candidates.len() {
        let (got, asked) = (answer.generations.len(), candidates.len());
        return Err(Fault::internal(format!(
            "the cluster answered {got} of {asked} prompts"
        )));
    }
    let mut response = HttpResponse::Ok();
    response.insert_header((ENTITY_HEADER, answer.served_entity));
    Ok((
        response,
        Parts::new(
            answer.generations,
            &candidates,
            partial_on_deadline,
            deadline,
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

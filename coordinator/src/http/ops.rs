//! For the machine's operators: health, metrics, and the counting of requests. None of it needs a token.

use std::time::{Duration, Instant};

use actix_web::HttpResponse;
use actix_web::dev::ServiceResponse;
use actix_web::http::Method;
use actix_web::web::{Data, ServiceConfig, resource};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use tokio_util::sync::CancellationToken;

use super::HttpState;
use crate::api::ClusterHealth;

/// A cluster that does not say how it is for this long is not well.
const HEALTH_WAIT: Duration = Duration::from_secs(2);
/// How often what histograms have gathered is folded into their buckets.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Bounds of histograms of tokens.
const TOKEN_BUCKETS: [f64; 17] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0, 200_000.0,
];

/// Bounds of histograms by the end of their name, in seconds; those that dashboards of this field are drawn for.
const BUCKETS: [(&str, &[f64]); 7] = [
    (
        "time_to_first_token_seconds",
        &[
            0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
            10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
        ],
    ),
    (
        // Finer at the low end than most: small models on CPUs decode in a millisecond.
        "inter_token_latency_seconds",
        &[
            0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
            1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
        ],
    ),
    (
        "step_seconds",
        &[
            0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
        ],
    ),
    (
        "request_latency_seconds",
        &[
            0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
            50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
        ],
    ),
    ("request_prompt_tokens", &TOKEN_BUCKETS),
    ("request_generation_tokens", &TOKEN_BUCKETS),
    (
        "duration_seconds",
        &[
            0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0,
            20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
        ],
    ),
];

/// A recorder of metrics with the buckets set: install it once per process, and give its handle to the HTTP layer.
///
/// # Errors
/// When the buckets are not well formed.
pub fn build_recorder() -> Result<PrometheusRecorder, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for (suffix, bounds) in BUCKETS {
        builder = builder.set_buckets_for_metric(Matcher::Suffix(suffix.to_owned()), bounds)?;
    }
    Ok(builder.build_recorder())
}

pub(super) fn routes(config: &mut ServiceConfig) {
    config
        .service(resource("/health").get(ready))
        .service(resource("/health/ready").get(ready))
        .service(resource("/health/live").get(live))
        .service(resource("/metrics").get(metrics));
}

async fn ready(state: Data<HttpState>) -> HttpResponse {
    let health = health(&state).await;
    answer(health.live && health.ready, &health)
}

async fn live(state: Data<HttpState>) -> HttpResponse {
    let health = health(&state).await;
    answer(health.live, &health)
}

/// A cluster that cannot say is not live.
async fn health(state: &HttpState) -> ClusterHealth {
    let silent = ClusterHealth {
        live: false,
        ready: false,
        workers: 0,
        workers_expected: 0,
        endpoints_ready: 0,
        endpoints: 0,
        stalled: 0,
    };
    tokio::time::timeout(HEALTH_WAIT, state.gateway.health())
        .await
        .unwrap_or(silent)
}

fn answer(well: bool, health: &ClusterHealth) -> HttpResponse {
    let mut response = if well {
        HttpResponse::Ok()
    } else {
        HttpResponse::ServiceUnavailable()
    };
    response.json(health)
}

async fn metrics(state: Data<HttpState>) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("text/plain; version=0.0.4")
        .body(state.metrics.render())
}

/// Keeps histograms small until the process stops.
pub(super) async fn upkeep(metrics: PrometheusHandle, shutdown: CancellationToken) {
    while tokio::time::timeout(UPKEEP_EVERY, shutdown.cancelled())
        .await
        .is_err()
    {
        metrics.run_upkeep();
    }
}

/// Counts an answered request. Labels are bounded: routes, known methods, status codes.
pub(super) fn count<B>(method: &Method, started: Instant, response: &ServiceResponse<B>) {
    let handler = response
        .request()
        .match_pattern()
        .unwrap_or_else(|| "unmatched".to_owned());
    let method = match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    };
    let status = response.status().as_u16().to_string();
    metrics::counter!("tandem_http_requests_total", "handler" => handler.clone(), "method" => method, "status" => status)
        .increment(1);
    metrics::histogram!("tandem_http_request_duration_seconds", "handler" => handler)
        .record(started.elapsed().as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_histogram_has_buckets_of_its_kind() {
        let recorder = build_recorder().unwrap();
        metrics::with_local_recorder(&recorder, || {
            metrics::histogram!("tandem_time_to_first_token_seconds").record(0.07);
            metrics::histogram!("tandem_inter_token_latency_seconds").record(0.07);
            metrics::histogram!("tandem_step_seconds").record(0.07);
            metrics::histogram!("tandem_http_request_duration_seconds").record(0.07);
            metrics::histogram!("tandem_e2e_request_latency_seconds").record(0.07);
            metrics::histogram!("tandem_request_prompt_tokens").record(7.0);
            metrics::histogram!("tandem_request_generation_tokens").record(7.0);
        });
        let text = recorder.handle().render();
        for line in [
            "tandem_time_to_first_token_seconds_bucket{le=\"0.06\"} 0",
            "tandem_time_to_first_token_seconds_bucket{le=\"0.08\"} 1",
            "tandem_inter_token_latency_seconds_bucket{le=\"0.075\"} 1",
            "tandem_step_seconds_bucket{le=\"0.1\"} 1",
            "tandem_http_request_duration_seconds_bucket{le=\"0.1\"} 1",
            "tandem_e2e_request_latency_seconds_bucket{le=\"0.1\"} 1",
            "tandem_request_prompt_tokens_bucket{le=\"10\"} 1",
            "tandem_request_generation_tokens_bucket{le=\"5\"} 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}

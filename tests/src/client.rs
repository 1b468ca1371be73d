//! A small client of the REST API: what a test asks of a cluster over HTTP.

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::events::Events;
use crate::metrics::Metrics;
use crate::until::{PATIENCE, until};

/// A caller with a token. Cloning shares the connection pool.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    token: Option<String>,
    http: reqwest::Client,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// `Retry-After` in seconds, when it was sent.
    pub retry_after_s: Option<u64>,
    /// The header `served-model-name`.
    pub served_model_name: Option<String>,
    /// The header `content-type`.
    pub content_type: Option<String>,
    /// The body.
    pub text: String,
}

impl Reply {
    /// The body of an answer that must have gone well.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// The body.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text)
            .unwrap_or_else(|e| panic!("{e} in answer {}: {:?}", self.status, self.text))
    }

    /// Checks a refusal: its status, its code, and what its message says.
    pub fn refused(&self, status: u16, code: &str, says: &[&str]) {
        let body = self.json();
        let (got_code, message) = (
            body["error_code"].as_str(),
            body["message"].as_str().unwrap_or_default(),
        );
        assert_eq!(
            (self.status, got_code),
            (status, Some(code)),
            "{}",
            self.text
        );
        for part in says {
            assert!(
                message.contains(part),
                "the message\n  {message}\ndoes not say\n  {part}"
            );
        }
    }

    /// The texts of an answer in the legacy format: one list of candidates per prompt.
    pub fn candidates(&self) -> Vec<Vec<String>> {
        let body = self.ok();
        let predictions = body["predictions"]
            .as_array()
            .unwrap_or_else(|| panic!("no predictions in {body}"));
        let text = |candidate: &Value| {
            candidate["text"]
                .as_str()
                .expect("a candidate has text")
                .to_owned()
        };
        let texts = |p: &Value| {
            p["candidates"]
                .as_array()
                .expect("a prediction has candidates")
                .iter()
                .map(text)
                .collect()
        };
        predictions.iter().map(texts).collect()
    }

    /// The only text of an answer in the legacy format.
    pub fn candidate(&self) -> String {
        let mut all = self.candidates();
        assert!(
            all.len() == 1 && all[0].len() == 1,
            "more than one text: {all:?}"
        );
        all.remove(0).remove(0)
    }
}

impl Client {
    /// A caller of the API at `address`.
    pub fn new(address: &str, token: Option<&str>) -> Client {
        // Built together with the cluster's own clients of registries, this one knows TLS too, and wants a provider for
        // it. An error says that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .timeout(Duration::from_secs(300))
            .build();
        Client {
            base: format!("http://{address}"),
            token: token.map(str::to_owned),
            http: http.expect("a plain HTTP client can be made"),
        }
    }

    /// The same caller with another token, or none.
    pub fn with_token(&self, token: Option<&str>) -> Client {
        Client {
            token: token.map(str::to_owned),
            ..self.clone()
        }
    }

    /// The same caller on connections of its own.
    pub fn on_new_connections(&self) -> Client {
        Client {
            http: Client::new("", None).http,
            ..self.clone()
        }
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends a request with a JSON body, or none for `Value::Null`; `Err` when the connection failed.
    pub async fn try_call(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> Result<Reply, reqwest::Error> {
        let mut request = self.request(method, path);
        if !body.is_null() {
            request = request.json(body);
        }
        reply(request.send().await?).await
    }

    /// Sends a request and takes the answer, whatever its status.
    pub async fn call(&self, method: Method, path: &str, body: &Value) -> Reply {
        self.try_call(method, path, body)
            .await
            .unwrap_or_else(|e| panic!("{path}: {e:?}"))
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Reply {
        self.call(Method::GET, path, &Value::Null).await
    }

    /// POST with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.call(Method::POST, path, body).await
    }

    /// POST with any body.
    pub async fn post_text(&self, path: &str, body: &str) -> Reply {
        let request = self
            .request(Method::POST, path)
            .header("Content-Type", "application/json")
            .body(body.to_owned());
        let response = request
            .send()
            .await
            .unwrap_or_else(|e| panic!("{path}: {e:?}"));
        reply(response)
            .await
            .unwrap_or_else(|e| panic!("{path}: {e:?}"))
    }

    /// Sends any bytes with any headers.
    pub async fn send_bytes(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Reply {
        let mut request = self.request(method, path).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request
            .send()
            .await
            .unwrap_or_else(|e| panic!("{path}: {e:?}"));
        reply(response)
            .await
            .unwrap_or_else(|e| panic!("{path}: {e:?}"))
    }

    /// Creates an endpoint with one served entity of a `ml.demo` model, as the oldest clients write it.
    pub async fn create(
        &self,
        name: &str,
        model: &str,
        workload_type: &str,
        workload_size: &str,
    ) -> Reply {
        self.post(
            "/api/2.0/serving-endpoints",
            &endpoint(name, model, workload_type, workload_size),
        )
        .await
    }

    /// Creates an endpoint (CPU, Small unless said otherwise by [`Client::create`]) and waits until it serves.
    pub async fn deploy(&self, name: &str, model: &str) {
        self.deploy_on(name, model, "CPU", "Small").await;
    }

    /// Creates an endpoint of this type and size, and waits until it serves.
    pub async fn deploy_on(
        &self,
        name: &str,
        model: &str,
        workload_type: &str,
        workload_size: &str,
    ) {
        self.create(name, model, workload_type, workload_size)
            .await
            .ok();
        self.wait_ready(name).await;
    }

    /// An endpoint as the API shows it.
    pub async fn endpoint(&self, name: &str) -> Value {
        self.get(&format!("/api/2.0/serving-endpoints/{name}"))
            .await
            .ok()
    }

    /// Waits until an endpoint serves and nothing is being deployed; gives what the API shows.
    pub async fn wait_ready(&self, name: &str) -> Value {
        self.wait_for(name, "READY and NOT_UPDATING", |view| {
            assert_ne!(view["state"]["config_update"], "UPDATE_FAILED", "{view:#}");
            view["state"]["ready"] == "READY" && view["state"]["config_update"] == "NOT_UPDATING"
        })
        .await
    }

    /// Waits until the deployment of an endpoint has failed; gives the message of its first served entity.
    pub async fn wait_failed(&self, name: &str) -> String {
        let failed = |view: &Value| view["state"]["config_update"] == "UPDATE_FAILED";
        let view = self.wait_for(name, "UPDATE_FAILED", failed).await;
        let state = &view["pending_config"]["served_entities"][0]["state"];
        assert_eq!(state["deployment"], "DEPLOYMENT_FAILED", "{view:#}");
        state["deployment_state_message"]
            .as_str()
            .expect("a failure has a message")
            .to_owned()
    }

    /// Waits until what the API shows of an endpoint meets a condition.
    pub async fn wait_for(&self, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let path = format!("/api/2.0/serving-endpoints/{name}");
        until(
            &format!("endpoint {name} to be {what}"),
            PATIENCE,
            async || {
                let reply = self
                    .try_call(Method::GET, &path, &Value::Null)
                    .await
                    .map_err(|e| format!("{e:?}"))?;
                let view = reply.json();
                if reply.status == 200 && is(&view) {
                    Ok(view)
                } else {
                    Err(format!("{view:#}"))
                }
            },
        )
        .await
    }

    /// Invokes an endpoint.
    pub async fn invoke(&self, name: &str, body: &Value) -> Reply {
        self.post(&invocations(name), body).await
    }

    /// Asks an endpoint for one greedy continuation in the legacy format.
    pub async fn continue_text(&self, name: &str, prompt: &str, tokens_max: u32) -> String {
        let body = json!({"inputs": {"prompt": prompt}, "params": {"max_tokens": tokens_max}});
        self.invoke(name, &body).await.candidate()
    }

    /// Starts a streaming answer; `Err` is a refusal.
    pub async fn try_stream(&self, path: &str, body: &Value) -> Result<Events, Reply> {
        let response = self.request(Method::POST, path).json(body).send().await;
        let response = response.unwrap_or_else(|e| panic!("{path}: {e:?}"));
        if response.status() != 200 {
            return Err(reply(response)
                .await
                .unwrap_or_else(|e| panic!("{path}: {e:?}")));
        }
        let content_type = response.headers()["content-type"]
            .to_str()
            .expect("a header of ASCII")
            .to_owned();
        assert!(
            content_type.starts_with("text/event-stream"),
            "{content_type}"
        );
        Ok(Events::new(response))
    }

    /// Starts a streaming answer of an endpoint.
    pub async fn stream(&self, name: &str, body: &Value) -> Events {
        let events = self.try_stream(&invocations(name), body).await;
        events.unwrap_or_else(|reply| {
            panic!("{name} refused to stream: {} {}", reply.status, reply.text)
        })
    }

    /// The process's metrics.
    pub async fn metrics(&self) -> Metrics {
        let reply = self.get("/metrics").await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        Metrics::parse(&reply.text)
    }
}

/// The path that invokes an endpoint.
pub fn invocations(name: &str) -> String {
    format!("/serving-endpoints/{name}/invocations")
}

/// A body that creates an endpoint with one served entity of `ml.demo.MODEL` version 1.
pub fn endpoint(name: &str, model: &str, workload_type: &str, workload_size: &str) -> Value {
    json!({"name": name, "config": {"served_models": [{
        "model_name": format!("ml.demo.{model}"),
        "model_version": 1,
        "workload_type": workload_type,
        "workload_size": workload_size,
        "scale_to_zero_enabled": false,
    }]}})
}

async fn reply(response: Response) -> Result<Reply, reqwest::Error> {
    let header = |name: &str| {
        response
            .headers()
            .get(name)
            .and_then(|v| v.to_str().ok())
            .map(str::to_owned)
    };
    let (status, retry_after) = (response.status().as_u16(), header("retry-after"));
    let (served_model_name, content_type) = (header("served-model-name"), header("content-type"));
    let retry_after_s = retry_after.map(|s| s.parse().expect("Retry-After is whole seconds"));
    Ok(Reply {
        status,
        retry_after_s,
        served_model_name,
        content_type,
        text: response.text().await?,
    })
}

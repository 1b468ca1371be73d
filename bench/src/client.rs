//! One request: sent, its answer read as it comes, every token's moment noted.

use std::fmt;
use std::time::{Duration, Instant};

use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};

/// How a server is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Api {
    /// OpenAI's completions, streamed: this system, llama.cpp's server, vLLM.
    Openai,
    /// What `mlflow models serve` takes for `llm/v1/completions`: the answer comes whole, and its tokens are taken to be
    /// as many as were asked for. The server counts those of its text, read anew, which may be more or fewer.
    Mlflow,
}

/// Who is asked.
#[derive(Debug, Clone)]
pub struct Target {
    /// The route that completes prompts, whole: `http://127.0.0.1:8470/serving-endpoints/completions`.
    pub url: String,
    /// How.
    pub api: Api,
    /// The model's or endpoint's name, where the server wants one.
    pub model: Option<String>,
    /// A bearer token.
    pub token: Option<String>,
    /// How long one request may take.
    pub timeout: Duration,
}

/// A whole answer. Times count from the request.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Tokens of the prompt, as the server counted them; as they were asked for where it tells nothing.
    pub prompt_tokens: u32,
    /// Tokens of the answer, likewise.
    pub output_tokens: u32,
    /// When parts of the answer came, in order. A part may hold several tokens. Never empty.
    pub parts: Vec<Duration>,
    /// When it was over.
    pub end: Duration,
}

/// Why there is no whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// No connection, or it broke.
    Connection,
    /// It took too long.
    Timeout,
    /// The server refused with this status.
    Status(u16),
    /// The server told of an error in the midst of its answer.
    Error,
    /// The answer ended before its time, or is none.
    Cut,
    /// It is whole and has fewer tokens than asked for, with the end of text ignored.
    Short,
    /// It was not sent: too many others were still open.
    Overrun,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connection => f.write_str("connection"),
            Failure::Timeout => f.write_str("timeout"),
            Failure::Status(status) => write!(f, "status {status}"),
            Failure::Error => f.write_str("error in the stream"),
            Failure::Cut => f.write_str("cut short"),
            Failure::Short => f.write_str("too few tokens"),
            Failure::Overrun => f.write_str("not sent"),
        }
    }
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Failure {
        if error.is_timeout() {
            Failure::Timeout
        } else if error.is_decode() {
            Failure::Cut
        } else {
            Failure::Connection
        }
    }
}

/// Sends requests to one target. Connections are kept and used again, as clients in production do.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    target: Target,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Token ids or a text.
    pub prompt: Value,
    /// Tokens of the prompt, as far as is known here.
    pub prompt_tokens: u32,
    /// Tokens that the answer shall have.
    pub output_tokens: u32,
}

impl Client {
    /// A client of this target.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(target: Target) -> reqwest::Result<Client> {
        // Built together with clients of registries this one knows TLS too, and wants a provider for it. An error says
        // that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .timeout(target.timeout)
            .tcp_nodelay(true)
            .build()?;
        Ok(Client { http, target })
    }

    /// Sends a request and reads its answer to the end.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn ask(&self, ask: &Ask) -> Result<Answer, Failure> {
        let start = Instant::now();
        let response = self.request(ask).send().await?;
        if !response.status().is_success() {
            return Err(Failure::Status(response.status().as_u16()));
        }
        let (parts, usage) = match self.target.api {
            Api::Openai => streamed(response, start).await?,
            Api::Mlflow => whole(response, start).await?,
        };
        let count = |key: &str, asked: u32| {
            let told = usage[key].as_u64();
            told.and_then(|count| u32::try_from(count).ok())
                .unwrap_or(asked)
        };
        let answer = Answer {
            prompt_tokens: count("prompt_tokens", ask.prompt_tokens),
            output_tokens: count("completion_tokens", ask.output_tokens),
            parts,
            end: start.elapsed(),
        };
        if answer.parts.is_empty() {
            Err(Failure::Cut)
        } else if answer.output_tokens < ask.output_tokens {
            Err(Failure::Short)
        } else {
            Ok(answer)
        }
    }

    fn request(&self, ask: &Ask) -> RequestBuilder {
        let mut body =
            json!({"prompt": ask.prompt, "max_tokens": ask.output_tokens, "temperature": 0});
        if self.target.api == Api::Openai {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
            // Every run does the same work, whatever the model says.
            body["ignore_eos"] = json!(true);
        }
        if let Some(model) = &self.target.model {
            body["model"] = json!(model);
        }
        let request = self.http.post(&self.target.url).json(&body);
        match &self.target.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }
}

/// Reads server-sent events: when parts of the answer came, and the usage.
async fn streamed(
    mut response: Response,
    start: Instant,
) -> Result<(Vec<Duration>, Value), Failure> {
    let (mut parts, mut usage, mut events) = (Vec::new(), Value::Null, Events::default());
    while let Some(bytes) = response.chunk().await? {
        let now = start.elapsed();
        for event in events.feed(&bytes) {
            if event == "[DONE]" {
                if parts.is_empty() {
                    // Tokens that stand for no text: they are seen when the answer is over.
                    parts.push(now);
                }
                return Ok((parts, usage));
            }
            let event: Value = serde_json::from_str(&event).map_err(|_| Failure::Cut)?;
            if event.get("error").is_some() {
                return Err(Failure::Error);
            }
            if event["usage"].is_object() {
                usage = event["usage"].clone();
            }
            let text =
                |choice: &Value| choice["text"].as_str().is_some_and(|text| !text.is_empty());
            if event["choices"]
                .as_array()
                .is_some_and(|all| all.iter().any(text))
            {
                parts.push(now);
            }
        }
    }
    Err(Failure::Cut)
}

/// Reads a whole answer, a list of one: it is seen when it is over.
async fn whole(response: Response, start: Instant) -> Result<(Vec<Duration>, Value), Failure> {
    let body: Value = response.json().await?;
    let answer = &body[0];
    let answered = answer["choices"].is_array();
    let parts = answered.then(|| start.elapsed()).into_iter().collect();
    let usage = json!({"prompt_tokens": answer["usage"]["prompt_tokens"]});
    Ok((parts, usage))
}

/// Cuts a stream of bytes into the data of its events.
#[derive(Debug, Default)]
struct Events {
    buffer: Vec<u8>,
}

impl Events {
    /// The data lines that these bytes complete.
    fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        self.buffer.extend_from_slice(bytes);
        let Some(end) = self.buffer.iter().rposition(|byte| *byte == b'\n') else {
            return Vec::new();
        };
        let lines: Vec<u8> = self.buffer.drain(..=end).collect();
        String::from_utf8_lossy(&lines)
            .lines()
            .filter_map(|line| Some(line.strip_prefix("data:")?.trim().to_owned()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let stream = b"data: {\"a\": \"\xc3\xa4\"}\n\n: a comment\nevent: x\r\ndata:two\r\n\r\ndata: [DONE]\n\n";
        let expected = ["{\"a\": \"\u{e4}\"}", "two", "[DONE]"];
        for size in 1..stream.len() {
            let mut events = Events::default();
            let read: Vec<String> = stream
                .chunks(size)
                .flat_map(|part| events.feed(part))
                .collect();
            assert_eq!(read, expected, "in parts of {size}");
        }
    }

    #[test]
    fn an_event_without_its_end_is_not_shown() {
        let mut events = Events::default();
        assert!(events.feed(b"data: half").is_empty());
        assert_eq!(events.feed(b"\n"), ["half"]);
    }
}

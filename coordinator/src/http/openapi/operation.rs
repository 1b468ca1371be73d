//! The words in which operations are written here: what is asked, what is answered, and how it may be refused.
//!
//! Every operation takes a token and may be refused for want of one, unless it says otherwise; every body may be
//! malformed or too large; every endpoint that a path names may be missing.

use serde_json::Value;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::{Content, Header, HttpMethod, PathItem, PathsBuilder, Ref, Required};

use super::errors::{self, Refusal};
use super::parameters;
use super::schema::{Shape, at_least, described, text};

/// The name of the way in which callers say who they are.
pub(super) const BEARER: &str = "bearer";

const JSON: &str = "application/json";

/// One operation of the API.
pub(super) struct Operation {
    path: String,
    method: HttpMethod,
    builder: OperationBuilder,
    refusals: Vec<&'static Refusal>,
    answers: Vec<(u16, ResponseBuilder)>,
    open: bool,
}

/// An example of a body: a name, a line that says what it shows, and the body.
pub(super) type Example = (&'static str, &'static str, Value);

impl Operation {
    /// `id` is what generated clients call it, `tag` the chapter in which it stands.
    pub fn new(method: HttpMethod, path: &str, tag: &str, id: &str, summary: &str) -> Self {
        let mut builder = OperationBuilder::new()
            .operation_id(Some(id))
            .summary(Some(summary))
            .tag(tag);
        for name in parameters::in_path(path) {
            builder = builder.parameter(parameters::known(name));
        }
        let mut refusals = vec![&errors::INTERNAL_ERROR, &errors::UNAVAILABLE];
        if path.contains('{') {
            refusals.push(&errors::NOT_FOUND);
        }
        Operation {
            path: path.to_owned(),
            method,
            builder,
            refusals,
            answers: Vec::new(),
            open: false,
        }
    }

    /// What a caller should know beside the summary.
    pub fn about(mut self, says: &str) -> Self {
        self.builder = self.builder.description(Some(says));
        self
    }

    /// Needs no token.
    pub fn open(mut self) -> Self {
        self.open = true;
        self.refusals.clear();
        self
    }

    /// May be refused like this as well.
    pub fn refuses(mut self, refusals: &[&'static Refusal]) -> Self {
        self.refusals.extend(refusals);
        self
    }

    /// Takes a parameter in the query or in a header.
    pub fn takes(mut self, place: ParameterIn, name: &str, shape: Shape, says: &str) -> Self {
        let parameter = ParameterBuilder::new()
            .name(name)
            .parameter_in(place)
            .required(Required::False)
            .schema(Some(shape))
            .description(Some(says));
        self.builder = self.builder.parameter(parameter);
        self
    }

    /// Takes a JSON body. Any content type is taken for JSON.
    pub fn body(mut self, shape: Shape, examples: impl IntoIterator<Item = Example>) -> Self {
        let examples = examples.into_iter().map(|(name, says, body)| {
            let example = ExampleBuilder::new().summary(says).value(Some(body));
            (name, example)
        });
        let content = ContentBuilder::new()
            .schema(Some(shape))
            .examples_from_iter(examples);
        let body = RequestBodyBuilder::new()
            .required(Some(Required::True))
            .content(JSON, content.build());
        self.builder = self.builder.request_body(Some(body.build()));
        self.refuses(&[
            &errors::BAD_REQUEST,
            &errors::BODY_TIMEOUT,
            &errors::TOO_LARGE,
        ])
    }

    /// Answers with JSON.
    pub fn gives(self, shape: Shape, says: &str) -> Self {
        self.gives_as(200, JSON, shape, says)
    }

    /// Answers with something else or with another status; the first words about a status count.
    pub fn gives_as(mut self, status: u16, kind: &str, shape: Shape, says: &str) -> Self {
        let known = self.answers.iter().position(|(known, _)| *known == status);
        let response = match known {
            Some(known) => self.answers.remove(known).1,
            None => ResponseBuilder::new().description(says),
        };
        let response = response.content(kind, Content::new(Some(described(shape, says))));
        self.answers.push((status, response));
        self
    }

    /// Answers with events instead, when a stream is asked for. Their form is told in words: a stream is no one value.
    pub fn streams(mut self) -> Self {
        for (_, response) in &mut self.answers {
            let events = Content::new(None::<Shape>);
            *response = std::mem::take(response).content("text/event-stream", events);
        }
        self
    }

    /// The answers have this header.
    pub fn with_header(mut self, name: &str, says: &str) -> Self {
        for (_, response) in &mut self.answers {
            *response = std::mem::take(response).header(name, header(text(), says));
        }
        self
    }

    /// Puts it among the paths.
    pub fn put(self, paths: PathsBuilder) -> PathsBuilder {
        let mut builder = self.builder;
        let mut refusals = self.refusals;
        if self.open {
            builder = builder.security(SecurityRequirement::default());
        } else {
            refusals.extend([&errors::UNAUTHENTICATED, &errors::PERMISSION_DENIED]);
        }
        for (status, response) in self.answers {
            builder = builder.response(status.to_string(), response);
        }
        for refusal in refusals {
            let named = Ref::from_response_name(refusal.name);
            builder = builder.response(refusal.status.to_string(), named);
        }
        paths.path(self.path, PathItem::new(self.method, builder))
    }
}

/// A header of an answer.
pub(super) fn header(shape: Shape, says: &str) -> Header {
    HeaderBuilder::new()
        .schema(Some(shape))
        .description(Some(says))
        .build()
}

/// The header by which a client learns when to come again.
pub(super) fn retry_after() -> Header {
    header(at_least(1), "Come again after so many seconds.")
}

//! The API as an OpenAPI 3.1 document, and a page to explore it.
//!
//! Written beside the code that it describes and held to it by tests: every route is here and nothing else (`http/tests/openapi`),
//! bounds are those by which bodies are checked (`http/tests/openapi/bounds`), and a real cluster answers every example in the shape
//! that is promised (`tests/it/openapi.rs` of the workspace).

mod endpoints;
pub(super) mod errors;
mod examples;
pub(super) mod explorer;
mod generation;
mod operation;
mod ops;
mod own;
pub(super) mod parameters;
mod permissions;
mod provisioned;
mod replies;
mod schema;
mod settings;
mod tables;

use std::sync::OnceLock;

use actix_web::HttpResponse;
use actix_web::web::{Data, ServiceConfig, resource};
use utoipa::openapi::info::InfoBuilder;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    ComponentsBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, PathsBuilder, Server,
};

use self::operation::BEARER;
use super::HttpState;

/// Where the document is; clients of other servers look for it at the second path.
pub(super) const DOCUMENT_PATHS: [&str; 2] = ["/api/2.0/openapi.json", "/openapi.json"];

/// The chapters.
pub(super) const TAGS: [(&str, &str); 6] = [
    (
        "Endpoints",
        "What is served: created, shown, changed and deleted.",
    ),
    (
        "Provisioned throughput",
        "Endpoints sized by tokens per second.",
    ),
    (
        "Permissions",
        "Who may do what: CAN_VIEW sees an endpoint, CAN_QUERY asks it, CAN_MANAGE changes it.",
    ),
    (
        "Invocations",
        "Asking endpoints: Databricks' input formats and OpenAI's.",
    ),
    (
        "Tables",
        "What was asked and used: sums, rows and bodies, as JSON or as files.",
    ),
    (
        "Operations",
        "Health, metrics and this document: for the machine's operators, without a token.",
    ),
];

const ABOUT: &str = "Large language models behind the Databricks model-serving API, and OpenAI's.\n\n\
    Send `Authorization: Bearer TOKEN`. Bodies are JSON whatever their content type says; `null` is the same as absent; \
    unknown fields are ignored, and fields that ask for what this server cannot do are refused. Paths may end with a slash. \
    `/api/2.0/preview/serving-endpoints` is the same as `/api/2.0/serving-endpoints`, and `/serving-endpoints/v1` the same \
    as `/serving-endpoints` for OpenAI's clients. Every answer has an `x-request-id`: the client's own, or a new one.";

pub(super) fn routes(config: &mut ServiceConfig) {
    config.app_data(Data::new(Document::default()));
    for path in DOCUMENT_PATHS {
        config.service(resource(path).get(show));
    }
    own::routes(config);
    explorer::routes(config);
}

/// Whether a path is one of those that need no token: whoever may reach the server may read how to use it.
pub(super) fn is_open(path: &str) -> bool {
    DOCUMENT_PATHS.contains(&path) || explorer::is_part(path)
}

/// The document, made when it is first asked for.
#[derive(Default)]
struct Document(OnceLock<OpenApi>);

async fn show(state: Data<HttpState>, document: Data<Document>) -> HttpResponse {
    let document = document
        .0
        .get_or_init(|| of(&state.gateway.workload_types()));
    HttpResponse::Ok().json(document)
}

/// The document of a cluster with these workload types.
pub(super) fn of(workload_types: &[String]) -> OpenApi {
    let paths = PathsBuilder::new();
    let paths = endpoints::paths(paths);
    let paths = settings::paths(paths);
    let paths = provisioned::paths(own::paths(paths));
    let paths = permissions::paths(paths);
    let paths = generation::paths(paths);
    let paths = ops::paths(tables::paths(paths));
    let tag = |(name, says)| TagBuilder::new().name(name).description(Some(says)).build();
    let components = endpoints::schemas(components(), workload_types);
    let components = permissions::schemas(settings::schemas(components));
    let components = tables::schemas(provisioned::schemas(components));
    frame("tandem", ABOUT)
        .tags(Some(TAGS.map(tag)))
        .paths(paths)
        .components(Some(ops::schemas(components).build()))
        .build()
}

/// What all documents have in common.
fn frame(title: &str, about: &str) -> OpenApiBuilder {
    let licence = LicenseBuilder::new()
        .name("Apache-2.0")
        .identifier(Some("Apache-2.0"));
    OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title(title)
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(about))
                .license(Some(licence.build())),
        )
        .servers(Some([Server::new("/")]))
        .security(Some([SecurityRequirement::new::<_, [&str; 0], &str>(
            BEARER,
            [],
        )]))
}

/// The components that invocations speak of.
fn components() -> ComponentsBuilder {
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("A token of `[[auth.tokens]]` in cluster.toml."));
    let components =
        ComponentsBuilder::new().security_scheme(BEARER, SecurityScheme::Http(bearer.build()));
    replies::schemas(generation::schemas(errors::add(components)))
}

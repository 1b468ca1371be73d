//! The page that shows the document and sends its requests: Swagger UI, all of it served from here.
//!
//! The page is given rights by its headers: to load its own files and to talk to this server, and nothing else.

use std::borrow::Cow;

use actix_web::HttpResponse;
use actix_web::http::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use actix_web::web::{Data, Path, ServiceConfig, resource};
use utoipa_swagger_ui::Config;

use super::DOCUMENT_PATHS;
use crate::http::error::Fault;

const PAGE: &str = "/docs";

/// The page loads these. Others of Swagger UI's files are not served: its own index has another title and looks for its
/// parts at other places.
pub(in crate::http) const FILES: [&str; 7] = [
    "favicon-16x16.png",
    "favicon-32x32.png",
    "index.css",
    "swagger-initializer.js",
    "swagger-ui-bundle.js",
    "swagger-ui-standalone-preset.js",
    "swagger-ui.css",
];

/// With a path and without a slash at its end: both are this page.
const HTML: &str = r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tandem: the API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="stylesheet" href="/docs/index.css">
<link rel="icon" type="image/png" href="/docs/favicon-32x32.png" sizes="32x32">
<link rel="icon" type="image/png" href="/docs/favicon-16x16.png" sizes="16x16">
</head>
<body>
<noscript>This page needs JavaScript. The document that it shows is at <a href="/openapi.json">/openapi.json</a>.</noscript>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/swagger-ui-standalone-preset.js"></script>
<script src="/docs/swagger-initializer.js"></script>
</body>
</html>
"#;

/// Swagger UI writes styles into its elements and shows images that it carries along.
const RIGHTS: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
                      font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

pub(super) fn routes(config: &mut ServiceConfig) {
    config
        .app_data(Data::new(settings()))
        .service(resource(PAGE).get(page))
        .service(resource("/docs/{file}").get(file));
}

/// Whether a path is part of the page.
pub(super) fn is_part(path: &str) -> bool {
    let path = path.trim_end_matches('/');
    path == PAGE
        || path
            .strip_prefix("/docs/")
            .is_some_and(|file| FILES.contains(&file))
}

fn settings() -> Config<'static> {
    Config::new([DOCUMENT_PATHS[0]])
        .use_base_layout()
        .deep_linking(true)
        .display_operation_id(true)
        .display_request_duration(true)
        .default_models_expand_depth(0)
        .filter(true)
        // A token that was typed in stays in this page alone.
        .persist_authorization(false)
        // The validator is somebody else's server.
        .validator_url("none")
}

async fn page() -> HttpResponse {
    answer("text/html; charset=utf-8", HTML.as_bytes().into(), false)
}

async fn file(settings: Data<Config<'static>>, file: Path<String>) -> Result<HttpResponse, Fault> {
    if !FILES.contains(&file.as_str()) {
        return Ok(HttpResponse::NotFound().finish());
    }
    match utoipa_swagger_ui::serve(&file, settings.into_inner()) {
        Ok(Some(found)) => Ok(answer(&found.content_type, found.bytes, found.gzpipped)),
        Ok(None) => Ok(HttpResponse::NotFound().finish()),
        Err(error) => {
            let message = format!("the page's file {file} cannot be made: {error}");
            Err(Fault::internal(message))
        }
    }
}

fn answer(kind: &str, bytes: Cow<'_, [u8]>, zipped: bool) -> HttpResponse {
    let mut response = HttpResponse::Ok();
    if zipped {
        response.insert_header((CONTENT_ENCODING, "gzip"));
    }
    response
        .insert_header((CONTENT_TYPE, kind))
        .insert_header((CONTENT_SECURITY_POLICY, RIGHTS))
        .insert_header((X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((REFERRER_POLICY, "no-referrer"))
        .insert_header((CACHE_CONTROL, "no-cache"))
        .body(bytes.into_owned())
}

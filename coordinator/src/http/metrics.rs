//! One endpoint's metrics: its part of what `/metrics` shows.

use actix_web::HttpResponse;
use actix_web::web::{Data, Path, ServiceConfig, resource};

use super::HttpState;
use super::auth::Caller;
use super::endpoints::PATHS;
use super::error::Fault;
use super::permissions::allowed;
use crate::api::Level;

pub(super) fn routes(config: &mut ServiceConfig) {
    for path in PATHS {
        config.service(resource(format!("{path}/{{name}}/metrics")).get(metrics));
    }
}

async fn metrics(
    state: Data<HttpState>,
    caller: Caller,
    name: Path<String>,
) -> Result<HttpResponse, Fault> {
    allowed(&state, &caller, &name, Level::View)?;
    Ok(HttpResponse::Ok()
        .content_type("text/plain; version=0.0.4")
        .body(of_endpoint(&state.metrics.render(), &name)))
}

/// The samples that are labelled with this endpoint, each family with its own comments.
fn of_endpoint(text: &str, endpoint: &str) -> String {
    // A quote inside of a label's value is escaped: what looks like a label is one.
    let labels = [
        format!("{{endpoint=\"{endpoint}\""),
        format!(",endpoint=\"{endpoint}\""),
    ];
    let mut kept = String::new();
    let mut comments: Vec<&str> = Vec::new();
    let mut in_comments = false;
    for line in text.lines() {
        if line.starts_with('#') {
            if !in_comments {
                comments.clear();
            }
            in_comments = true;
            comments.push(line);
            continue;
        }
        in_comments = false;
        if labels.iter().any(|label| line.contains(label)) {
            for line in comments.drain(..).chain([line]) {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_gets_its_own_samples_with_their_comments() {
        let text = "# HELP a what a is\n# TYPE a counter\na{endpoint=\"e\"} 1\na{endpoint=\"e2\"} 2\na{endpoint=\"e\",outcome=\"stop\"} 3\n\n\
                    # TYPE b gauge\nb{endpoint=\"other\"} 4\nb 5\n\n\
                    # TYPE c histogram\nc_bucket{worker=\"x\",endpoint=\"e\",le=\"+Inf\"} 6\nc_sum{x=\"\\\",endpoint=\\\"e\\\"\"} 7\n";
        let expected = "# HELP a what a is\n# TYPE a counter\na{endpoint=\"e\"} 1\na{endpoint=\"e\",outcome=\"stop\"} 3\n\
                        # TYPE c histogram\nc_bucket{worker=\"x\",endpoint=\"e\",le=\"+Inf\"} 6\n";
        assert_eq!(of_endpoint(text, "e"), expected);
        assert_eq!(of_endpoint(text, "none"), "");
    }
}

//! Parameters that stand in paths, each explained once.

use common::model_ref::ModelRef;
use common::names::NAME_CHARS_MAX;
use serde_json::Value;
use utoipa::openapi::Required;
use utoipa::openapi::path::{ParameterBuilder, ParameterIn};

use super::schema::{Shape, formed, text};

/// The endpoint that examples speak of.
pub(super) const ENDPOINT: &str = "hello";
/// The model that it serves, one of those that come with the source.
pub(super) const MODEL: &str = "ml.demo.tiny-llama";
/// Its served entity, named by default.
const ENTITY: &str = "tiny-llama-1";

/// What an endpoint may be called. Some words are reserved besides.
pub(super) fn endpoint_name() -> Shape {
    formed("^[A-Za-z0-9][A-Za-z0-9_-]*$", NAME_CHARS_MAX)
}

/// A registered model's name.
pub(super) fn model_name() -> Shape {
    formed(
        "^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+[.][A-Za-z0-9_-]+)?$",
        ModelRef::NAME_MAX,
    )
}

/// The names of the parameters in a path.
pub(in crate::http) fn in_path(path: &str) -> impl Iterator<Item = &str> {
    let rests = path.split('{').skip(1);
    rests.filter_map(|rest| rest.split('}').next())
}

/// A parameter by its name. A test finds those that are not explained.
pub(super) fn known(name: &str) -> ParameterBuilder {
    let (shape, example, says) = match name {
        "name" => (endpoint_name(), ENDPOINT, "The endpoint's name."),
        "id" => (endpoint_name(), ENDPOINT, "The endpoint's id or its name."),
        "served" => (endpoint_name(), ENTITY, "The served entity's name."),
        "model" => (model_name(), MODEL, "The registered model."),
        "version" => (formed("^[1-9][0-9]*$", 9), "1", "Its version."),
        _ => (text(), "", ""),
    };
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .schema(Some(shape))
        .example(Some(Value::from(example)))
        .description(Some(says))
}

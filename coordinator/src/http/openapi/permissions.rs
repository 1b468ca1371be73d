//! Who may do what, and who the caller is.

use serde_json::json;
use utoipa::openapi::{ComponentsBuilder, HttpMethod, PathsBuilder};

use super::operation::Operation;
use super::schema::{
    Shape, flag, formed, list, list_of, may, named, need, object, text, text_of, words,
};
use crate::http::settings::TEXT_BYTES_MAX;
use crate::policy::settings::GRANTS_MAX;

const TAG: &str = "Permissions";

/// Levels, each with all that stands before it.
const LEVELS: [&str; 3] = ["CAN_VIEW", "CAN_QUERY", "CAN_MANAGE"];

/// What somebody may do with an endpoint.
pub(super) fn level() -> Shape {
    words(&LEVELS)
}

/// Puts the paths of permissions among the paths.
pub(super) fn paths(paths: PathsBuilder) -> PathsBuilder {
    let path = "/api/2.0/permissions/serving-endpoints/{id}";
    let operation =
        |method, path: &str, id, summary| Operation::new(method, path, TAG, id, summary);
    let grants = || {
        object([may(
            "access_control_list",
            list_of(named("Grant"), 0..=GRANTS_MAX),
            "Who may do what.",
        )])
    };
    let examples = || {
        let example = |name, says, key: &str, who: &str| {
            let grant = json!({key: who, "permission_level": "CAN_QUERY"});
            (name, says, json!({"access_control_list": [grant]}))
        };
        [
            example("user", "Bob may ask it", "user_name", "bob"),
            example("group", "A group may ask it", "group_name", "team"),
            example(
                "program",
                "A program may ask it",
                "service_principal_name",
                "crawler",
            ),
        ]
    };
    let paths = operation(
        HttpMethod::Get,
        path,
        "getPermissions",
        "Shows who may do what with an endpoint",
    )
    .gives(
        named("Permissions"),
        "Its creator, who was granted something, and administrators.",
    )
    .put(paths);
    let paths = operation(
        HttpMethod::Put,
        path,
        "setPermissions",
        "Replaces all grants",
    )
    .about("The creator and administrators keep CAN_MANAGE.")
    .body(grants(), examples())
    .gives(named("Permissions"), "As they are now.")
    .put(paths);
    let paths = operation(
        HttpMethod::Patch,
        path,
        "updatePermissions",
        "Adds and changes grants",
    )
    .body(grants(), examples())
    .gives(named("Permissions"), "As they are now.")
    .put(paths);
    let levels = format!("{path}/permissionLevels");
    let paths = operation(
        HttpMethod::Get,
        &levels,
        "getPermissionLevels",
        "Explains the levels",
    )
    .gives(
        object([need(
            "permission_levels",
            list(level_explained()),
            "All levels.",
        )]),
        "The levels.",
    )
    .put(paths);
    operation(
        HttpMethod::Get,
        "/api/2.0/preview/scim/v2/Me",
        "me",
        "Says who the caller is",
    )
    .gives(named("Me"), "The user of the token.")
    .put(paths)
}

/// Puts the schemas of permissions among the components.
pub(super) fn schemas(components: ComponentsBuilder) -> ComponentsBuilder {
    components
        .schema("Grant", grant())
        .schema("Permissions", permissions())
        .schema("Me", me())
}

fn grant() -> Shape {
    let name = || text_of(1..=TEXT_BYTES_MAX);
    object([
        may(
            "user_name",
            name(),
            "To whom: this, or one of the next two.",
        ),
        may("group_name", name(), "A group of cluster.toml's tokens."),
        may(
            "service_principal_name",
            name(),
            "A user that is a program.",
        ),
        need("permission_level", level(), "What they may do."),
    ])
}

fn permissions() -> Shape {
    let permission = object([
        need("permission_level", level(), "What they may do."),
        need(
            "inherited",
            flag(),
            "Whether it comes from elsewhere and cannot be changed here.",
        ),
        may("inherited_from_object", list(text()), "From where."),
    ]);
    let entry = object([
        may("user_name", text(), "Who."),
        may("group_name", text(), "Which group."),
        may("service_principal_name", text(), "Which program."),
        may("display_name", text(), "The same for people."),
        need("all_permissions", list(permission), "What they may do."),
    ]);
    object([
        need(
            "object_id",
            text(),
            "`/serving-endpoints/` and the endpoint's id.",
        ),
        need("object_type", words(&["serving-endpoint"]), "What it is."),
        need("access_control_list", list(entry), "Who may do what."),
    ])
}

fn level_explained() -> Shape {
    object([
        need("permission_level", level(), "The level."),
        need("description", text(), "What it allows."),
    ])
}

fn me() -> Shape {
    let group = object([need("display", text(), "Its name.")]);
    object([
        need("schemas", list(text()), "Of what kind this object is."),
        need(
            "id",
            formed("^[0-9]+$", 20),
            "A number that stays the same.",
        ),
        need("userName", text(), "The user."),
        need("displayName", text(), "The same."),
        need("active", flag(), "Always true."),
        need("groups", list(group), "To which the user belongs."),
    ])
}

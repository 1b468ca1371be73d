use serde_json::json;

use super::*;

fn object(value: Value) -> Object {
    value.as_object().unwrap().clone()
}

fn limit(on: Limited, calls: Option<u64>, tokens: Option<u64>) -> RateLimit {
    RateLimit { on, calls, tokens }
}

#[test]
fn everything_beside_the_configuration_is_taken_with_a_create() {
    let body = object(json!({
        "tags": [{"key": "team", "value": "x"}, {"key": "bare"}], "description": "for tests",
        "rate_limits": [{"calls": 7, "renewal_period": "minute"}],
        "ai_gateway": {"fallback_config": {"enabled": "True"}},
        "email_notifications": {"on_update_success": ["a@example.com"]},
        "budget_policy_id": "b", "route_optimized": true, "task": "llm", "telemetry_config": {},
    }));
    let expected = Settings {
        tags: vec![("team".into(), "x".into()), ("bare".into(), String::new())],
        description: Some("for tests".into()),
        rate_limits: vec![limit(Limited::Endpoint, Some(7), None)],
        ai_gateway: Some(AiGateway {
            fallback: Some(true),
            ..AiGateway::default()
        }),
        email_notifications: Some(EmailNotifications {
            on_update_success: vec!["a@example.com".into()],
            on_update_failure: vec![],
        }),
        budget_policy_id: Some("b".into()),
        route_optimized: true,
        grants: vec![],
    };
    assert_eq!(settings(&Fields::of("", &body)).unwrap(), expected);
    let nothing = object(json!({"tags": null, "ai_gateway": null, "rate_limits": []}));
    let empty = settings(&Fields::of("", &nothing)).unwrap();
    assert_eq!(empty, Settings::default());
}

#[test]
fn the_gateway_limits_calls_and_tokens_of_whom_it_names() {
    let body = object(json!({
        "rate_limits": [
            {"renewal_period": "minute", "calls": 10, "key": "endpoint"},
            {"renewal_period": "minute", "tokens": 20, "key": "user"},
            {"renewal_period": "minute", "calls": 1, "tokens": 2, "key": "user", "principal": "bob"},
            {"renewal_period": "minute", "calls": 3, "key": "user_group", "principal": "team"},
            {"renewal_period": "minute", "calls": 4, "key": "service_principal"},
            {"renewal_period": "minute", "calls": 5, "key": "service_principal", "principal": "robot"}],
        "usage_tracking_config": {"enabled": false},
        "inference_table_config": {"enabled": true, "catalog_name": "c", "schema_name": "s"},
        "guardrails": {"input": {"safety": false, "pii": {"behavior": "NONE"}}, "output": {}},
    }));
    let Amendment::AiGateway(gateway) = gateway(&body).unwrap() else {
        panic!("not a gateway")
    };
    let one = Limited::One;
    let expected = [
        limit(Limited::Endpoint, Some(10), None),
        limit(Limited::EachUser, None, Some(20)),
        limit(one(Grantee::User("bob".into())), Some(1), Some(2)),
        limit(one(Grantee::Group("team".into())), Some(3), None),
        limit(Limited::EachServicePrincipal, Some(4), None),
        limit(
            one(Grantee::ServicePrincipal("robot".into())),
            Some(5),
            None,
        ),
    ];
    assert_eq!(gateway.rate_limits, expected);
    assert_eq!(
        (gateway.usage_tracking, gateway.fallback),
        (Some(false), None)
    );
    let table = gateway.inference_table.unwrap();
    assert!(table.enabled && table.catalog_name.as_deref() == Some("c"));
    assert_eq!(table.table_name_prefix, None);
}

#[test]
fn grants_name_one_grantee_and_a_known_level() {
    let body = object(json!({"access_control_list": [
        {"user_name": "bob", "permission_level": "CAN_VIEW"},
        {"group_name": "users", "permission_level": "CAN_QUERY"},
        {"service_principal_name": "robot", "permission_level": "CAN_MANAGE"}]}));
    let expected = [
        (Grantee::User("bob".into()), Level::View),
        (Grantee::Group("users".into()), Level::Query),
        (Grantee::ServicePrincipal("robot".into()), Level::Manage),
    ];
    let read = grants(&body).unwrap().into_iter();
    let read: Vec<_> = read.map(|grant| (grant.to, grant.level)).collect();
    assert_eq!(read, expected);
    assert_eq!(grants(&Object::new()).unwrap(), []);
}

#[test]
fn every_mistake_is_told_with_its_field() {
    let minute = |more: Value| {
        let mut limit = json!({"renewal_period": "minute"});
        let (all, more) = (limit.as_object_mut().unwrap(), more.as_object().unwrap());
        all.extend(more.clone());
        json!({"rate_limits": [limit]})
    };
    let grant = |value: Value| json!({"access_control_list": [value]});
    let bob = |level: Value| grant(json!({"user_name": "bob", "permission_level": level}));
    type Read = fn(&Object) -> Result<(), FieldError>;
    let older: Read = |body| rate_limits(body).map(drop);
    let newer: Read = |body| gateway(body).map(drop);
    let acl: Read = |body| grants(body).map(drop);
    let tags: Read = |body| tag_changes(body).map(drop);
    let create: Read = |body| settings(&Fields::of("", body)).map(drop);
    let many = |count: usize| vec![json!({"key": "k"}); count];
    let table = [
        (
            older,
            minute(json!({"key": "user"})),
            "rate_limits[0].calls is missing",
        ),
        (
            older,
            minute(json!({"calls": -1})),
            "calls must be a whole number between 0 and",
        ),
        (
            older,
            minute(json!({"calls": 1, "key": "user_group"})),
            "key must be user or endpoint, got \"user_group\"",
        ),
        (
            older,
            json!({"rate_limits": [{"calls": 1}]}),
            "renewal_period is missing",
        ),
        (
            newer,
            json!({"rate_limits": [{"calls": 1, "renewal_period": "hour"}]}),
            "must be \"minute\", got \"hour\"",
        ),
        (
            newer,
            minute(json!({})),
            "rate_limits[0] needs calls or tokens",
        ),
        (
            newer,
            minute(json!({"calls": 1, "key": "planet"})),
            "key must be user, endpoint, user_group or service_principal",
        ),
        (
            newer,
            minute(json!({"calls": 1, "key": "user_group"})),
            "rate_limits[0].principal is missing",
        ),
        (
            newer,
            minute(json!({"calls": 1, "principal": "bob"})),
            "principal must be left out with key \"endpoint\"",
        ),
        (
            newer,
            minute(json!({"calls": 1, "key": "user", "principal": " "})),
            "principal must be a name",
        ),
        (
            newer,
            json!({"rate_limits": [{"renewal_period": "minute", "calls": 1},
            {"renewal_period": "minute", "calls": 2, "tokens": 5}]}),
            "rate_limits[1] limits the same again",
        ),
        (
            newer,
            json!({"guardrails": {"input": {"safety": true}}}),
            "guardrails are not supported",
        ),
        (
            newer,
            json!({"fallback_config": {"enabled": 5}}),
            "fallback_config.enabled must be true or false",
        ),
        (
            newer,
            json!({"inference_table_config": []}),
            "inference_table_config must be an object",
        ),
        (
            acl,
            bob(json!("CAN_FLY")),
            "permission_level must be CAN_VIEW, CAN_QUERY or CAN_MANAGE, got \"CAN_FLY\"",
        ),
        (
            acl,
            bob(Value::Null),
            "access_control_list[0].permission_level is missing",
        ),
        (
            acl,
            grant(json!({"permission_level": "CAN_VIEW"})),
            "exactly one of user_name, group_name and service_principal_name, got 0",
        ),
        (
            acl,
            grant(json!({"user_name": "a", "group_name": "b", "permission_level": "CAN_VIEW"})),
            "got 2",
        ),
        (
            acl,
            json!({"access_control_list": {}}),
            "access_control_list must be a list",
        ),
        (
            tags,
            json!({"add_tags": [{"key": "a"}], "delete_tags": ["a"]}),
            "add_tags and delete_tags both name \"a\"",
        ),
        (
            tags,
            json!({"add_tags": [{"key": ""}]}),
            "add_tags[0].key must be a name",
        ),
        (
            tags,
            json!({"delete_tags": [5]}),
            "delete_tags[0] must be a string, got 5",
        ),
        (
            create,
            json!({"tags": many(65)}),
            "tags must have at most 64 entries, got 65",
        ),
        (
            create,
            json!({"tags": many(2)}),
            "tags[1] would be the second tag \"k\"",
        ),
        (
            create,
            json!({"tags": [{"value": "x"}]}),
            "tags[0].key is missing",
        ),
        (
            create,
            json!({"description": "x".repeat(4097)}),
            "description must be at most 4096 bytes",
        ),
        (
            create,
            json!({"telemetry_config": {"x": 1}}),
            "telemetry_config is not supported",
        ),
    ];
    for (read, body, expected) in table {
        let error = read(&object(body)).expect_err(expected);
        let message = &error.message;
        assert!(
            message.contains(expected),
            "expected {expected:?}, got {message:?}"
        );
    }
}

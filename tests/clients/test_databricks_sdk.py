"""databricks-sdk: an endpoint's whole life through WorkspaceClient."""

import json

import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.config import Config
from databricks.sdk.errors import BadRequest, InvalidParameterValue, NotFound, PermissionDenied, ResourceAlreadyExists
from databricks.sdk.service import serving

from golden import ANSWER, QUESTION, TOKENS_MAX, golden

SPARK = golden("tiny-llama", "spark")
ENTITY = "tiny-llama-1"


def client(cluster, user=None):
    """A client of the administrator, or of another user. It gives up soon, so that what it repeats shows as an error."""
    token = cluster.tokens[user] if user else cluster.token
    return WorkspaceClient(config=Config(host=cluster.url, token=token, retry_timeout_seconds=20))


@pytest.fixture(scope="module")
def workspace(cluster):
    return client(cluster)


@pytest.fixture(scope="module")
def endpoints(workspace):
    return workspace.serving_endpoints


def entity(model="ml.demo.tiny-llama", size="Small", **fields):
    return serving.ServedEntityInput(
        entity_name=model,
        entity_version="1",
        workload_size=size,
        workload_type=serving.ServingModelWorkloadType.CPU,
        scale_to_zero_enabled=False,
        **fields,
    )


@pytest.fixture(scope="module")
def endpoint(endpoints):
    """An endpoint made by the SDK, which waits until it serves."""
    config = serving.EndpointCoreConfigInput("sdk", served_entities=[entity()])
    tags = [serving.EndpointTag("team", "research")]
    made = endpoints.create_and_wait("sdk", config=config, tags=tags, description="of the SDK's suite")
    yield made
    endpoints.delete("sdk")


def test_an_endpoint_that_was_waited_for_is_ready_as_asked(endpoints, endpoint):
    shown = endpoints.get("sdk")
    assert (shown.name, shown.creator, shown.description) == ("sdk", "admin", "of the SDK's suite")
    assert shown.state.ready == serving.EndpointStateReady.READY
    assert shown.state.config_update == serving.EndpointStateConfigUpdate.NOT_UPDATING
    assert shown.permission_level == serving.ServingEndpointDetailedPermissionLevel.CAN_MANAGE
    (served,) = shown.config.served_entities
    assert (served.name, served.entity_name, served.entity_version) == (ENTITY, "ml.demo.tiny-llama", "1")
    assert served.state.deployment == serving.ServedModelStateDeployment.DEPLOYMENT_READY
    (route,) = shown.config.traffic_config.routes
    assert (route.served_model_name, route.traffic_percentage) == (ENTITY, 100)
    assert shown.id == endpoint.id and len(shown.id) == 32


def test_the_list_has_it_with_state_and_tags(endpoints, endpoint):
    (listed,) = [found for found in endpoints.list() if found.name == "sdk"]
    assert listed.state.ready == serving.EndpointStateReady.READY
    assert [(tag.key, tag.value) for tag in listed.tags] == [("team", "research")]


@pytest.mark.parametrize(
    "form",
    [
        {"dataframe_split": serving.DataframeSplitInput(columns=["prompt"], data=[[SPARK.prompt]], index=[0])},
        {"dataframe_records": [{"prompt": SPARK.prompt}]},
        {"instances": [{"prompt": SPARK.prompt}]},
        {"inputs": {"prompt": [SPARK.prompt]}},
    ],
    ids=lambda form: next(iter(form)),
)
def test_queries_in_the_four_formats_give_predictions(endpoints, endpoint, form):
    answer = endpoints.query("sdk", **form)
    assert answer.served_model_name == ENTITY
    assert answer.predictions[0]["candidates"][0]["text"] == SPARK.text


def test_a_completion_is_asked_for_with_prompt_and_extra_params_as_strings(endpoints, endpoint):
    answer = endpoints.query(
        "sdk",
        prompt=SPARK.prompt,
        max_tokens=TOKENS_MAX,
        temperature=1.0,
        extra_params={"top_k": "1"},
        client_request_id="mine",
        usage_context={"project": "suite"},
    )
    assert answer.object == serving.QueryEndpointResponseObject.TEXT_COMPLETION
    assert answer.choices[0].text == SPARK.text
    assert answer.usage.prompt_tokens == len(SPARK.input_ids)


def test_a_chat_is_asked_for_with_messages(endpoints, endpoint):
    messages = [serving.ChatMessage(role=serving.ChatMessageRole.USER, content=QUESTION)]
    answer = endpoints.query("sdk", messages=messages, max_tokens=TOKENS_MAX, temperature=0)
    assert answer.object == serving.QueryEndpointResponseObject.CHAT_COMPLETION
    assert answer.choices[0].message.role == serving.ChatMessageRole.ASSISTANT
    assert answer.choices[0].message.content.strip() == ANSWER


def test_its_openai_client_asks_the_same_endpoint(endpoints, endpoint):
    answer = endpoints.get_open_ai_client().completions.create(
        model="sdk", prompt=SPARK.prompt, max_tokens=TOKENS_MAX, temperature=0
    )
    assert answer.choices[0].text == SPARK.text


def test_its_langchain_client_asks_the_same_endpoint(endpoints, endpoint):
    chat = endpoints.get_langchain_chat_open_ai_client("sdk")
    assert chat.invoke(QUESTION, temperature=0, max_tokens=TOKENS_MAX).content.strip() == ANSWER


def test_tags_are_added_replaced_and_deleted(endpoints, endpoint):
    added = endpoints.patch("sdk", add_tags=[serving.EndpointTag("cost", "7"), serving.EndpointTag("team", "serving")])
    assert {tag.key: tag.value for tag in added.tags} == {"cost": "7", "team": "serving"}
    left = endpoints.patch("sdk", delete_tags=["cost"], add_tags=[serving.EndpointTag("team", "research")])
    assert {tag.key: tag.value for tag in left.tags} == {"team": "research"}


def test_notifications_are_kept(endpoints, endpoint):
    emails = serving.EmailNotifications(on_update_failure=["ops@example.com"])
    told = endpoints.update_notifications("sdk", email_notifications=emails)
    assert told.name == "sdk" and told.email_notifications.on_update_failure == ["ops@example.com"]


def test_the_older_rate_limits_are_kept_and_taken_away(endpoints, endpoint):
    limit = serving.RateLimit(
        calls=10_000, renewal_period=serving.RateLimitRenewalPeriod.MINUTE, key=serving.RateLimitKey.USER
    )
    assert endpoints.put("sdk", rate_limits=[limit]).rate_limits == [limit]
    assert not endpoints.put("sdk", rate_limits=[]).rate_limits


def test_the_ai_gateway_is_set_and_shown(endpoints, endpoint):
    limit = serving.AiGatewayRateLimit(
        calls=10_000,
        renewal_period=serving.AiGatewayRateLimitRenewalPeriod.MINUTE,
        key=serving.AiGatewayRateLimitKey.ENDPOINT,
    )
    usage = serving.AiGatewayUsageTrackingConfig(enabled=True)
    put = endpoints.put_ai_gateway("sdk", rate_limits=[limit], usage_tracking_config=usage)
    assert put.rate_limits == [limit] and put.usage_tracking_config.enabled
    assert endpoints.get("sdk").ai_gateway.rate_limits == [limit]


def test_permissions_decide_who_sees_asks_and_changes(cluster, endpoints, endpoint):
    ann = client(cluster, "ann").serving_endpoints
    with pytest.raises((PermissionDenied, NotFound)):
        ann.query("sdk", prompt="x", max_tokens=1)
    assert "sdk" not in [found.name for found in ann.list()]

    def grant(level):
        control = serving.ServingEndpointAccessControlRequest(user_name="ann", permission_level=level)
        return endpoints.set_permissions(endpoint.id, access_control_list=[control])

    granted = grant(serving.ServingEndpointPermissionLevel.CAN_QUERY)
    of_ann = [entry for entry in granted.access_control_list if entry.user_name == "ann"]
    assert [p.permission_level.value for p in of_ann[0].all_permissions] == ["CAN_QUERY"]
    assert ann.query("sdk", prompt="x", max_tokens=1).choices
    assert ann.get("sdk").permission_level.value == "CAN_QUERY"
    with pytest.raises(PermissionDenied, match="CAN_MANAGE"):
        ann.delete("sdk")
    more = serving.ServingEndpointAccessControlRequest(
        user_name="bob", permission_level=serving.ServingEndpointPermissionLevel.CAN_VIEW
    )
    endpoints.update_permissions(endpoint.id, access_control_list=[more])
    users = [entry.user_name for entry in endpoints.get_permissions(endpoint.id).access_control_list]
    assert {"ann", "bob"} <= set(users)
    with pytest.raises(PermissionDenied):
        client(cluster, "bob").serving_endpoints.query("sdk", prompt="x", max_tokens=1)
    levels = endpoints.get_permission_levels(endpoint.id).permission_levels
    assert {level.permission_level.value for level in levels} == {"CAN_VIEW", "CAN_QUERY", "CAN_MANAGE"}


def test_logs_tell_how_the_model_was_loaded(endpoints, endpoint):
    build = endpoints.build_logs("sdk", ENTITY).logs
    assert "ready" in build, build
    assert isinstance(endpoints.logs("sdk", ENTITY).logs, str)
    with pytest.raises(NotFound):
        endpoints.build_logs("sdk", "nobody")


def test_metrics_are_prometheus_text_of_this_endpoint(endpoints, endpoint):
    text = endpoints.export_metrics("sdk").contents.read().decode()
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert samples and all("sdk" in sample for sample in samples), text


def test_the_endpoints_openapi_names_its_own_path(endpoints, endpoint):
    document = json.loads(endpoints.get_open_api("sdk").contents.read())
    assert document["openapi"].startswith("3.1.")
    assert "/serving-endpoints/sdk/invocations" in document["paths"]


def test_an_update_serves_the_old_configuration_until_the_new_one_is_ready(endpoints):
    config = serving.EndpointCoreConfigInput("sdk-update", served_entities=[entity(name="first")])
    endpoints.create_and_wait("sdk-update", config=config)
    try:
        traffic = serving.TrafficConfig(
            routes=[
                serving.Route(served_model_name="first", traffic_percentage=0),
                serving.Route(served_model_name="second", traffic_percentage=100),
            ]
        )
        wait = endpoints.update_config(
            "sdk-update",
            served_entities=[entity(name="first"), entity("ml.demo.tiny-mistral", name="second")],
            traffic_config=traffic,
        )
        # Whoever serves while it is being changed, somebody does.
        assert endpoints.query("sdk-update", prompt="x", max_tokens=1).served_model_name in ("first", "second")
        updated = wait.result()
        assert [served.name for served in updated.config.served_entities] == ["first", "second"]
        assert updated.config.config_version == 2
        assert endpoints.query("sdk-update", prompt="x", max_tokens=1).served_model_name == "second"
    finally:
        endpoints.delete("sdk-update")
    with pytest.raises(NotFound):
        endpoints.get("sdk-update")


def test_old_notebooks_served_models_make_the_same_endpoint(endpoints):
    model = serving.ServedModelInput(
        model_name="ml.demo.tiny-llama",
        model_version="1",
        workload_size="Small",
        workload_type=serving.ServedModelInputWorkloadType.CPU,
        scale_to_zero_enabled=False,
    )
    made = endpoints.create_and_wait("sdk-old", config=serving.EndpointCoreConfigInput("sdk-old", served_models=[model]))
    endpoints.delete("sdk-old")
    assert [served.entity_name for served in made.config.served_entities] == ["ml.demo.tiny-llama"]
    assert [served.model_name for served in made.config.served_models] == ["ml.demo.tiny-llama"]


def test_refusals_arrive_as_the_sdks_own_classes(endpoints, endpoint):
    with pytest.raises(NotFound, match="Endpoint with name 'nobody' does not exist"):
        endpoints.get("nobody")
    with pytest.raises((NotFound, InvalidParameterValue), match="ml.demo.unknown"):
        endpoints.create("sdk-unknown", config=serving.EndpointCoreConfigInput("sdk-unknown", served_entities=[entity("ml.demo.unknown")]))
    with pytest.raises(ResourceAlreadyExists, match="sdk"):
        endpoints.create("sdk", config=serving.EndpointCoreConfigInput("sdk", served_entities=[entity()]))
    with pytest.raises(BadRequest, match="max_tokens"):
        endpoints.query("sdk", prompt="x", max_tokens=-1)


def test_the_current_user_is_told(workspace):
    me = workspace.current_user.me()
    assert (me.user_name, me.active) == ("admin", True)

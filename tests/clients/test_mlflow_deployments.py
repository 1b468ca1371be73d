"""mlflow.deployments.get_deploy_client("databricks")."""

import pytest
from mlflow.deployments import get_deploy_client

from golden import ANSWER, QUESTION, TOKENS_MAX, golden

SPARK = golden("tiny-llama", "spark")


@pytest.fixture(scope="module")
def client(cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABRICKS_HOST", cluster.url)
        patch.setenv("DATABRICKS_TOKEN", cluster.token)
        yield get_deploy_client("databricks")


def config(model="ml.demo.tiny-llama", version=1):
    entity = {
        "entity_name": model,
        "entity_version": version,
        "workload_size": "Small",
        # As old notebooks write it.
        "scale_to_zero_enabled": "False",
    }
    return {"served_entities": [entity]}


@pytest.fixture(scope="module")
def endpoint(cluster, client):
    made = client.create_endpoint(name="deployments", config={"name": "deployments", "config": config(), "tags": []})
    assert made["name"] == "deployments"
    cluster.wait_ready("deployments")
    yield "deployments"
    assert client.delete_endpoint("deployments") is not None


def test_an_endpoint_is_shown_and_listed(client, endpoint):
    shown = client.get_endpoint(endpoint)
    assert (shown["name"], shown["state"]["ready"]) == (endpoint, "READY")
    assert shown["config"]["served_entities"][0]["entity_version"] == "1"
    assert endpoint in [found["name"] for found in client.list_endpoints()]


def test_predict_takes_the_input_formats_and_the_openai_forms(client, endpoint):
    params = {"temperature": 0, "max_tokens": TOKENS_MAX}
    legacy = client.predict(endpoint=endpoint, inputs={"inputs": {"prompt": [SPARK.prompt]}, "params": params})
    assert legacy["predictions"][0]["candidates"][0]["text"] == SPARK.text
    completion = client.predict(endpoint=endpoint, inputs={"prompt": SPARK.prompt, **params})
    assert completion["choices"][0]["text"] == SPARK.text
    chat = client.predict(endpoint=endpoint, inputs={"messages": [{"role": "user", "content": QUESTION}], **params})
    assert chat["choices"][0]["message"]["content"].strip() == ANSWER


def test_predict_stream_gives_the_chunks(client, endpoint):
    asked = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": TOKENS_MAX}
    chunks = list(client.predict_stream(endpoint=endpoint, inputs=asked))
    assert len(chunks) > 2
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text.strip() == ANSWER


def test_a_configuration_is_replaced(cluster, client, endpoint):
    changed = client.update_endpoint_config(endpoint=endpoint, config=config("ml.demo.tiny-mistral", "1"))
    assert changed["name"] == endpoint
    ready = cluster.wait_ready(endpoint)
    assert [served["entity_name"] for served in ready["config"]["served_entities"]] == ["ml.demo.tiny-mistral"]
    client.update_endpoint_config(endpoint=endpoint, config=config())
    cluster.wait_ready(endpoint)


def test_tags_limits_and_gateway_are_changed(client, endpoint):
    tags = client.update_endpoint_tags(endpoint=endpoint, config={"add_tags": [{"key": "team", "value": "serving"}]})
    assert tags["tags"] == [{"key": "team", "value": "serving"}]
    limits = [{"calls": 100_000, "key": "user", "renewal_period": "minute"}]
    assert client.update_endpoint_rate_limits(endpoint=endpoint, config={"rate_limits": limits})["rate_limits"] == limits
    gateway = {"usage_tracking_config": {"enabled": True}, "rate_limits": limits}
    assert client.update_endpoint_ai_gateway(endpoint=endpoint, config=gateway)["usage_tracking_config"] == {"enabled": True}
    shown = client.get_endpoint(endpoint)
    assert shown["tags"] == tags["tags"] and shown["ai_gateway"]["rate_limits"] == limits


def test_a_refusal_carries_the_servers_message(client, endpoint):
    with pytest.raises(Exception, match="Endpoint with name 'nobody' does not exist"):
        client.get_endpoint("nobody")
    with pytest.raises(Exception, match="max_tokens"):
        client.predict(endpoint=endpoint, inputs={"prompt": "x", "max_tokens": -1})

"""databricks-sdk's provisioned throughput: endpoints sized by tokens per second."""

import pytest
from databricks.sdk.service import serving

from golden import TOKENS_MAX, golden
from test_databricks_sdk import client

SPARK = golden("tiny-llama", "spark")


@pytest.fixture(scope="module")
def workspace(cluster):
    return client(cluster)


@pytest.fixture(scope="module")
def endpoints(workspace):
    return workspace.serving_endpoints


def test_provisioned_throughput_is_asked_for_in_tokens_per_second(workspace, endpoints):
    info = workspace.api_client.do(
        "GET", "/api/2.0/serving-endpoints/get-model-optimization-info/ml.demo.tiny-llama/1"
    )
    assert info["optimizable"] and info["model_type"] == "llama"
    chunk = info["throughput_chunk_size"]
    served = serving.ServedEntityInput(
        entity_name="ml.demo.tiny-llama",
        entity_version="1",
        min_provisioned_throughput=0,
        max_provisioned_throughput=chunk,
    )
    endpoints.create_and_wait("sdk-pt", config=serving.EndpointCoreConfigInput("sdk-pt", served_entities=[served]))
    try:
        (shown,) = endpoints.get("sdk-pt").config.served_entities
        assert (shown.min_provisioned_throughput, shown.max_provisioned_throughput) == (0, chunk)
        assert endpoints.query("sdk-pt", prompt=SPARK.prompt, temperature=0, max_tokens=TOKENS_MAX).choices[0].text == SPARK.text
    finally:
        endpoints.delete("sdk-pt")


def test_provisioned_throughput_endpoints_are_made_and_changed_in_model_units(endpoints):
    def config(units):
        served = serving.PtServedModel(entity_name="ml.demo.tiny-llama", provisioned_model_units=units, entity_version="1")
        return serving.PtEndpointCoreConfig(served_entities=[served])

    made = endpoints.create_provisioned_throughput_endpoint_and_wait("sdk-units", config(1))
    try:
        assert [served.provisioned_model_units for served in made.config.served_entities] == [1]
        changed = endpoints.update_provisioned_throughput_endpoint_config_and_wait("sdk-units", config(2))
        assert [served.provisioned_model_units for served in changed.config.served_entities] == [2]
    finally:
        endpoints.delete("sdk-units")

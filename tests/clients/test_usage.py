"""Usage and the table of requests, as the clients' own numbers must add up."""

import csv
import io

import openai
import pytest
import requests

from golden import golden
from processes import until

SPARK = golden("tiny-llama", "spark")
ENDPOINT = "metered"


@pytest.fixture(scope="module")
def spent(cluster):
    """Prompt and output tokens by user, as their clients were told, of whole answers and streams."""
    view = cluster.create(ENDPOINT, "ml.demo.tiny-llama")
    grants = [{"user_name": user, "permission_level": "CAN_QUERY"} for user in cluster.tokens]
    granted = cluster.call(
        "PUT", f"/api/2.0/permissions/serving-endpoints/{view['id']}", {"access_control_list": grants}
    )
    assert granted.status_code == 200, granted.text
    table = {"inference_table_config": {"enabled": True}, "usage_tracking_config": {"enabled": True}}
    assert cluster.call("PUT", f"/api/2.0/serving-endpoints/{ENDPOINT}/ai-gateway", table).status_code == 200
    return {user: ask(cluster, token, calls) for calls, (user, token) in enumerate(cluster.tokens.items(), 1)}


def ask(cluster, token, calls):
    told = []
    with openai.OpenAI(base_url=f"{cluster.url}/serving-endpoints", api_key=token, max_retries=0) as client:
        for number in range(calls):
            asked = {"model": ENDPOINT, "prompt": SPARK.prompt, "max_tokens": 4 + number, "seed": number}
            told.append(client.completions.create(**asked).usage)
            options = {"include_usage": True}
            *_, last = client.completions.create(**asked, stream=True, stream_options=options)
            told.append(last.usage)
    return sum(usage.prompt_tokens for usage in told), sum(usage.completion_tokens for usage in told)


def by_user(cluster, token=None):
    answer = cluster.call("GET", f"/api/2.0/serving-endpoints/{ENDPOINT}/usage?group_by=user", token=token)
    assert answer.status_code == 200, answer.text
    return {row["user"]: (row["prompt_tokens"], row["output_tokens"]) for row in answer.json()["groups"]}


def test_usage_by_user_is_what_the_users_clients_were_told(cluster, spent):
    assert until("all rows", 30, lambda: by_user(cluster) == spent and spent) == spent


def test_a_user_sees_only_the_own_usage(cluster, spent):
    assert by_user(cluster, cluster.tokens["ann"]) == {"ann": spent["ann"]}


def test_rows_come_as_csv_too(cluster, spent):
    headers = {"Authorization": f"Bearer {cluster.token}", "Accept": "text/csv"}
    text = requests.get(f"{cluster.url}/api/2.0/serving-endpoints/{ENDPOINT}/usage/rows", headers=headers).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert sum(int(row["output_tokens"]) for row in rows) == sum(output for _, output in spent.values())


def test_the_table_of_requests_has_prompts_for_managers_alone(cluster, spent):
    path = f"/api/2.0/serving-endpoints/{ENDPOINT}/inference-table"
    rows = cluster.call("GET", path).json()["rows"]
    assert len(rows) == 6 and all(SPARK.prompt.splitlines()[0] in str(row["request"]) for row in rows)
    assert cluster.call("GET", path, token=cluster.tokens["ann"]).status_code == 403

"""Plain HTTP, as the documentation's own samples and other languages' clients speak it."""

import json

import pytest
import requests

from golden import ANSWER, QUESTION, TOKENS_MAX, golden

SPARK = golden("tiny-llama", "spark_instructions")
PARAMS = {"temperature": 0.0, "max_tokens": TOKENS_MAX, "stop": ["word1", "word2"], "candidate_count": 1}
FORMATS = {
    "dataframe_split": {"columns": ["prompt"], "index": [0], "data": [[SPARK.prompt]]},
    "dataframe_records": [{"prompt": SPARK.prompt}],
    "instances": [{"prompt": SPARK.prompt}],
    "inputs": {"prompt": SPARK.prompt},
}


@pytest.mark.parametrize("key", FORMATS)
def test_every_input_format_gives_the_models_own_text(cluster, llama, key):
    answer = cluster.invoke(llama, {key: FORMATS[key], "params": PARAMS})
    assert answer.status_code == 200, answer.text
    assert answer.headers["served-model-name"] == "tiny-llama-1"
    (prediction,) = answer.json()["predictions"]
    (candidate,) = prediction["candidates"]
    assert candidate == {"text": SPARK.text, "metadata": {"finish_reason": "stop"}}
    tokens = prediction["metadata"]
    assert tokens["input_tokens"] == len(SPARK.input_ids)
    assert tokens["total_tokens"] == tokens["input_tokens"] + tokens["output_tokens"]


def test_a_misspelt_content_type_header_is_no_hindrance(cluster, llama):
    headers = {"Context-Type": "text/json", "Authorization": f"Bearer {cluster.token}"}
    url = f"{cluster.url}/serving-endpoints/{llama}/invocations"
    answer = requests.post(url=url, data=json.dumps({"inputs": {"prompt": ["Hello, I'm a language model,"]}}), headers=headers)
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == 1


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("path", ["/api/2.0/serving-endpoints", "/api/2.0/preview/serving-endpoints"])
def test_paths_answer_with_and_without_a_slash_at_the_end_and_never_redirect(cluster, llama, path, slash):
    headers = {"Authorization": f"Bearer {cluster.token}"}
    answer = requests.get(cluster.url + path + slash, headers=headers, allow_redirects=False)
    assert answer.status_code == 200
    assert llama in [endpoint["name"] for endpoint in answer.json()["endpoints"]]


def test_a_stream_has_data_lines_and_blank_lines_and_nothing_else(cluster, llama):
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": TOKENS_MAX, "stream": True}
    headers = {"Authorization": f"Bearer {cluster.token}"}
    url = f"{cluster.url}/serving-endpoints/chat/completions"
    with requests.post(url, json={"model": llama, **body}, headers=headers, stream=True) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.raw.read().decode().split("\n")
    assert all(line == "" or line.startswith("data: ") for line in lines), lines
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks).strip() == ANSWER


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/api/2.0/serving-endpoints/nobody", None, 404, "RESOURCE_DOES_NOT_EXIST"),
        ("GET", "/api/2.0/no-such-thing", None, 404, "ENDPOINT_NOT_FOUND"),
        ("POST", "/serving-endpoints/nobody/invocations", {"prompt": "x"}, 404, "RESOURCE_DOES_NOT_EXIST"),
        ("POST", "/serving-endpoints/llama/invocations", {"prompt": "x", "inputs": "y"}, 400, "BAD_REQUEST"),
        ("POST", "/api/2.0/serving-endpoints", {"name": "v1"}, 400, "INVALID_PARAMETER_VALUE"),
    ],
)
def test_errors_are_flat_json_with_the_vendors_codes(cluster, llama, method, path, body, status, code):
    answer = cluster.call(method, path, body)
    fault = answer.json()
    assert (answer.status_code, fault["error_code"]) == (status, code), fault
    assert "error" not in fault and fault["message"]


def test_no_token_is_401_and_a_wrong_one_is_403(cluster):
    url = f"{cluster.url}/api/2.0/serving-endpoints"
    assert requests.get(url).status_code == 401
    assert requests.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 403

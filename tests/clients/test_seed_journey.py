"""The journey of Databricks' page on optimized LLM serving: log, register, create, wait, query.

`page/` has the page's own code. What changes is what a user changes: where the notebook asks for host and token.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from golden import MODELS, TOKENS_MAX, golden
from registry import CATALOG, INPUT_EXAMPLE, PAGE_VERSION

PAGE = pathlib.Path(__file__).parent / "page"
NOTEBOOK = "dbutils.notebook.entry_point.getDbutils().notebook().getContext()"
PAGE_LIMIT_S = 120


def create_body(endpoint, model, version):
    """What the page posts."""
    served = {
        "model_name": model,
        "model_version": version,
        "workload_size": "Small",
        "scale_to_zero_enabled": False,
        "workload_type": "GPU_LARGE",
    }
    return {"name": endpoint, "config": {"served_models": [served]}}


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-mistral", "tiny-mpt"])
def test_a_model_logged_by_mlflow_is_created_waited_for_and_asked_in_four_formats(cluster, logged, family):
    model, version = f"{CATALOG}.{family}", logged[family]
    answer = cluster.call("POST", "/api/2.0/serving-endpoints", create_body(family, model, version))
    assert answer.status_code == 200, answer.text
    ready = cluster.wait_ready(family)
    (served,) = ready["config"]["served_models"]
    assert (served["model_name"], served["model_version"]) == (model, str(version))
    assert ready["task"] == "llm/v1/completions"
    expected = golden(family, "spark")
    (prompt,) = INPUT_EXAMPLE
    assert prompt == expected.prompt
    forms = {
        "dataframe_split": {"columns": ["prompt"], "index": [0], "data": [[prompt]]},
        "dataframe_records": [{"prompt": prompt}],
        "instances": [{"prompt": prompt}],
        "inputs": {"prompt": prompt},
    }
    params = {"temperature": 0.0, "max_tokens": TOKENS_MAX, "stop": ["word1", "word2"], "candidate_count": 1}
    for key, form in forms.items():
        answer = cluster.invoke(family, {key: form, "params": params})
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["candidates"][0]["text"] == expected.text, key
    assert cluster.call("DELETE", f"/api/2.0/serving-endpoints/{family}").json() == {}


def test_the_pages_own_code_works_with_host_and_token_changed(cluster, logged, tmp_path):
    def pasted(name):
        code = (PAGE / name).read_text()
        return code.replace(f"{NOTEBOOK}.apiUrl().get()", repr(cluster.url)).replace(
            f"{NOTEBOOK}.apiToken().get()", repr(cluster.token)
        )

    def run(code):
        script = tmp_path / "page.py"
        script.write_text(code)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=PAGE_LIMIT_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    created = json.loads(run(pasted("create.py")))
    assert created["name"] == "llama2-3b-chat", created
    assert created["state"]["config_update"] in ("IN_PROGRESS", "NOT_UPDATING")
    cluster.wait_ready("llama2-3b-chat")
    # The page's second cell goes on in the notebook of the first: here, its request is sent again, and refused.
    first, again, answered = run(pasted("create.py") + pasted("query.py")).partition('{"predictions"')
    assert json.loads(first)["error_code"] == "RESOURCE_ALREADY_EXISTS"
    (prediction,) = json.loads(again + answered)["predictions"]
    text = prediction["candidates"][0]["text"]
    hello = golden("tiny-llama", "hello_lm")
    assert text.startswith(hello.text[:40]) and prediction["metadata"]["output_tokens"] <= 100
    cluster.call("DELETE", "/api/2.0/serving-endpoints/llama2-3b-chat")


def test_a_version_that_is_not_there_is_refused_with_those_that_are(cluster, logged):
    body = create_body("nobody", f"{CATALOG}.tiny-llama", 99)
    answer = cluster.call("POST", "/api/2.0/serving-endpoints", body)
    assert answer.status_code in (400, 404), answer.text
    assert "99" in answer.json()["message"]


def test_a_model_logged_without_a_task_is_told_what_to_log(cluster, logged):
    body = create_body("no-task", f"{CATALOG}.no-task", logged["no-task"])
    answer = cluster.call("POST", "/api/2.0/serving-endpoints", body)
    assert answer.status_code == 400, answer.text
    assert "llm/v1/completions" in answer.json()["message"]


def test_the_models_under_test_are_the_repositorys_own(logged):
    assert set(logged) == {path.name for path in MODELS.glob("tiny-*")} | {"no-task", "page"}
    assert logged["page"] == PAGE_VERSION

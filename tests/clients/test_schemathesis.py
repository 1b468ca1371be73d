"""schemathesis: requests generated from the server's own OpenAPI document, right ones and wrong ones.

None may make the server fail, and every answer must be one that the document promises: status, content type, shape. The
server's own counters tell how many requests there were and how they ended.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import requests

from cluster import Cluster
from golden import TOKENS_MAX, golden

HERE = pathlib.Path(__file__).parent
LONG = os.environ.get("TANDEM_LONG", "0") != "0"
# Generated per operation, beside those that cover every field (most of them) and those of the document.
EXAMPLES = 200 if LONG else 12
REQUESTS_LEAST = 5000
RUN_LIMIT_S = 3000 if LONG else 400
SEED = 1
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# What the server says it has not: 501 is its right answer.
NOT_BUILT = "telemetry-config|system-metrics-export-state"
SPARK = golden("tiny-llama", "spark")


@pytest.fixture(scope="module")
def fuzzed(folder):
    """A cluster of its own: generated requests create, change and delete what they like."""
    cluster = Cluster(folder / "fuzzed")
    try:
        cluster.start()
        for name in ("asked", "changed"):
            cluster.create(name, "ml.demo.tiny-llama")
        yield cluster
    finally:
        cluster.stop()


def counted(cluster):
    """Requests so far by status, as the server counts them."""
    by_status = {}
    for line in requests.get(f"{cluster.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("tandem_http_requests_total{") and not re.search(NOT_BUILT, line):
            status = re.search(r'status="(\d+)"', line).group(1)
            by_status[status] = by_status.get(status, 0) + int(float(line.rsplit(" ", 1)[1]))
    return by_status


def test_no_generated_request_makes_the_server_fail_or_break_its_promises(fuzzed):
    command = [
        *(pathlib.Path(sys.executable).parent / "schemathesis", "run", f"{fuzzed.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {fuzzed.token}", "--checks", CHECKS, "--exclude-path-regex", NOT_BUILT),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", str(SEED)),
        *("--continue-on-failure", "--warnings", "off", "--generation-database", "none"),
    ]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "PYTHONPATH": str(HERE),
        "FUZZ_ASKED": "asked",
        "FUZZ_CHANGED": "changed",
        "FUZZ_SERVED": "tiny-llama-1",
    }
    done = subprocess.run(
        command, cwd=fuzzed.folder, env=environment, capture_output=True, text=True, timeout=RUN_LIMIT_S
    )
    by_status = counted(fuzzed)
    print(f"\n{sum(by_status.values())} requests by status: {dict(sorted(by_status.items()))}")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert not [status for status in by_status if status.startswith("5")], by_status
    assert sum(by_status.values()) >= REQUESTS_LEAST, by_status


def test_after_all_of_them_the_cluster_answers_as_before(fuzzed):
    health = fuzzed.health()
    assert health["live"] and health["ready"] and health["stalled"] == 0, health
    body = {"prompt": SPARK.prompt, "temperature": 0, "max_tokens": TOKENS_MAX}
    assert fuzzed.invoke("asked", body).json()["choices"][0]["text"] == SPARK.text

"""What all suites share: one real cluster with the tiny models, and one real MLflow server, for the whole session.

Clients are real and unmodified; they are told a host and a token, as for the cloud. Nothing leaves this machine.
"""

import os
import shutil
import sys

import pytest

# Before anything imports them: no client looks for models, updates or telemetry elsewhere.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    LANGCHAIN_TRACING_V2="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="1",
)
for name in ("OPENAI_API_KEY", "DATABRICKS_CONFIG_PROFILE", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
    os.environ.pop(name, None)

from cluster import Cluster  # noqa: E402
from registry import Registry, log_models  # noqa: E402

failures = 0


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    global failures
    report = (yield).get_result()
    failures += report.failed


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of this session; kept when a test failed, for its logs."""
    path = tmp_path_factory.mktemp("clients")
    yield path
    if failures:
        print(f"\nlogs of the cluster are in {path}", file=sys.stderr)
    else:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def registry(folder):
    """The tracking server, which takes its time to start: who needs it waits for it."""
    registry = Registry(folder / "mlflow")
    yield registry
    registry.stop()


@pytest.fixture(scope="session")
def logged(registry):
    """Versions of the registered models by their last names; see `registry.log_models`."""
    registry.wait()
    return log_models()


@pytest.fixture(scope="session")
def cluster(folder, registry):
    cluster = Cluster(folder / "cluster")
    try:
        cluster.start(f'[[registries]]\nname = "tracking"\nkind = "mlflow"\nurl = "{registry.url}"\n')
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def llama(cluster):
    """A ready endpoint's name: tiny-llama."""
    return cluster.create("llama", "ml.demo.tiny-llama")["name"]

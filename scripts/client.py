"""A client of the REST API in a page, with nothing but the standard library. Read it to write your own.

    url, token = cluster()                          # from var/cluster.env, which scripts/up writes
    call("GET", "/api/2.0/serving-endpoints")
    for event in stream("/serving-endpoints/NAME/invocations", {"prompt": "Once", "stream": True}):
        print(event["choices"][0]["text"])
"""

import json
import os
import sys
import urllib.error
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV_FILE = os.path.join(ROOT, "var", "cluster.env")
TIMEOUT_S = 300


class Refused(Exception):
    """An answer that is not 200: its status, its code, and its message for people."""

    def __init__(self, status, body):
        self.status, self.code = status, body.get("error_code")
        super().__init__(f"{status} {self.code}: {body.get('message')}")


def cluster():
    """URL and token of the running cluster: from the environment, else as scripts/up left them."""
    values = {}
    if os.path.exists(ENV_FILE):
        with open(ENV_FILE) as lines:
            values = dict(line.strip().split("=", 1) for line in lines if "=" in line)
    url = os.environ.get("TANDEM_URL") or values.get("TANDEM_URL")
    token = os.environ.get("TANDEM_TOKEN") or values.get("TANDEM_TOKEN")
    if not url or not token:
        sys.exit("no cluster is running: start one with scripts/up, or set TANDEM_URL and TANDEM_TOKEN")
    return url, token


def request(method, path, body=None):
    """Sends a request and gives the open response."""
    url, token = cluster()
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    made = urllib.request.Request(url + path, data, headers, method=method)
    try:
        return urllib.request.urlopen(made, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        raise Refused(error.code, json.loads(error.read() or b"{}")) from None


def call(method, path, body=None):
    """Sends a request and gives the answer's JSON."""
    with request(method, path, body) as response:
        return json.load(response)


def stream(path, body):
    """Sends a request with "stream": true and gives each event's JSON as it comes."""
    with request("POST", path, body) as response:
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                event = json.loads(line[len(b"data: "):])
                if "error" in event:
                    raise Refused(200, {"error_code": "STREAM", "message": event["error"].get("message")})
                yield event

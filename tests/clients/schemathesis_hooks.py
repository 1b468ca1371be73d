"""How schemathesis' generated requests meet a cluster that lives: loaded through SCHEMATHESIS_HOOKS.

Left alone, nearly every request would name an endpoint that is not there. Here most of them ask one endpoint and change
another; the rest keep their invented names. No request may take more than a moment.
"""

import os

import schemathesis

ASKED, CHANGED = os.environ["FUZZ_ASKED"], os.environ["FUZZ_CHANGED"]
SERVED = os.environ["FUZZ_SERVED"]
# Of so many requests one keeps the name it was generated with.
KEPT_EVERY = 6
TOKENS_MAX = 24
TIMEOUT_HEADER, TIMEOUT_LEAST_MS = "x-request-timeout-ms", 60_000
LONG = ("max_tokens", "max_completion_tokens", "tokens")


@schemathesis.hook
def before_load_schema(context, raw_schema):
    """A stream's schema is about its whole text; schemathesis holds every single event against it. test_requests looks at
    streams line by line."""
    places = [*raw_schema.get("components", {}).get("responses", {}).values()]
    for item in raw_schema["paths"].values():
        operations = [operation for operation in item.values() if isinstance(operation, dict)]
        places += [answer for operation in operations for answer in operation.get("responses", {}).values()]
    for answer in places:
        answer.get("content", {}).get("text/event-stream", {}).pop("schema", None)


@schemathesis.hook
def before_call(context, case, kwargs):
    if case.path_parameters:
        case.path_parameters = {key: named(case, key, value) for key, value in case.path_parameters.items()}
    if isinstance(case.body, dict):
        case.body = bounded(case, dict(case.body))
    for key in [key for key in case.headers or {} if key.lower() == TIMEOUT_HEADER]:
        case.headers[key] = patient(case.headers[key])


def named(case, key, value):
    if kept(value):
        return value
    # Nothing deletes the endpoints that the other requests are about.
    if case.method.upper() == "DELETE":
        return f"{CHANGED}-that-is-not-there"
    known = {"name": ASKED if asks(case) else CHANGED, "id": CHANGED, "served": SERVED, "served_model_name": SERVED}
    return known.get(key, value)


def bounded(case, body):
    """Answers are short; whatever else was generated stays as it is, also what is wrong."""
    if "model" in body and not kept(body["model"]):
        body["model"] = ASKED
    if asks(case):
        shorten(body)
        if isinstance(body.get("params"), dict):
            body["params"] = shorten(dict(body["params"]))
    return body


def shorten(fields):
    for key in LONG:
        value = fields.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > TOKENS_MAX:
            fields[key] = TOKENS_MAX
    if not any(key in fields for key in LONG):
        fields["max_tokens"] = TOKENS_MAX
    return fields


def patient(value):
    """A client that waits for a millisecond is told 504, rightly; here it waits longer."""
    text = str(value)
    return str(TIMEOUT_LEAST_MS) if text.isdecimal() and 0 < int(text) < TIMEOUT_LEAST_MS else value


def asks(case):
    return case.operation.path.startswith(("/serving-endpoints", "/ai-gateway"))


def kept(value):
    return sum(str(value).encode()) % KEPT_EVERY == 0

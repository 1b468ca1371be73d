"""Structured output and tools with the openai package: pydantic models, tool loops, streamed calls, extra fields."""

import enum
import json

import openai
import pydantic
import pytest

ASKED = [{"role": "user", "content": "What is 2 plus 2?"}]


class Unit(enum.Enum):
    C = "C"
    F = "F"


class Weather(pydantic.BaseModel):
    sunny: bool
    unit: Unit
    degrees: int = pydantic.Field(ge=-50, le=50)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two digits.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": 0, "maximum": 9},
                    "b": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=cluster.url + "/serving-endpoints", api_key=cluster.token, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("seed", range(5))
def test_parse_gives_a_pydantic_model(client, llama, seed):
    completion = client.chat.completions.parse(
        model=llama, messages=ASKED, response_format=Weather, seed=seed, temperature=0.5, max_tokens=400
    )
    weather = completion.choices[0].message.parsed
    assert isinstance(weather, Weather) and -50 <= weather.degrees <= 50


def test_a_streamed_parse_gives_the_same_model(client, llama):
    asked = {"model": llama, "messages": ASKED, "response_format": Weather, "seed": 3, "temperature": 0.5, "max_tokens": 400}
    whole = client.chat.completions.parse(**asked).choices[0].message.parsed
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == whole


def test_a_tool_loop_goes_round(client, llama):
    messages = list(ASKED)
    answer = client.chat.completions.create(
        model=llama, messages=messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=1, max_tokens=400
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "add" and set(arguments) == {"a", "b"}
    messages.append(choice.message)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(arguments["a"] + arguments["b"])})
    answer = client.chat.completions.create(model=llama, messages=messages, tools=TOOLS, max_tokens=32, temperature=0)
    assert answer.choices[0].message.content is not None


def test_streamed_calls_add_up(client, llama):
    asked = {
        "model": llama,
        "messages": ASKED,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "seed": 5,
        "temperature": 0.5,
        "max_tokens": 400,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    parts = [part for delta in deltas for part in delta.tool_calls or []]
    assert parts[0].id and parts[0].type == "function" and parts[0].function.arguments == ""
    assert parts[0].function.name == whole.function.name
    assert all(part.id is None and part.function.name is None for part in parts[1:]) and len(parts) > 2
    assert "".join(part.function.arguments for part in parts) == whole.function.arguments


def test_extra_fields_bind_the_answer(client, llama):
    for extra, fits in [
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_regex": "[0-9]{3}"}, lambda text: len(text) == 3 and text.isdigit()),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, lambda text: text in ("true", "false")),
    ]:
        answer = client.chat.completions.create(model=llama, messages=ASKED, extra_body=extra, max_tokens=20)
        assert fits(answer.choices[0].message.content), (extra, answer)


def test_a_bad_schema_is_told(client, llama):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}
    with pytest.raises(openai.BadRequestError, match="strin"):
        client.chat.completions.create(model=llama, messages=ASKED, response_format=form)

"""Structured output and tools, through openai and LangChain: the models are tiny, so what is right is the form."""

import json
from typing import Literal

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
# Grammars let blanks pass, of which the tiny models are fond.
TOKENS_MAX = 400


class Capital(BaseModel):
    """Every field is bounded: a tiny model would write a free text to the end of the context."""

    city: Literal["Paris", "Rome", "Tokyo"]
    in_europe: bool
    rank: Literal[1, 2, 3]


class Weather(BaseModel):
    """The weather in a city."""

    # Or else the schema lets further properties pass, and the tiny model thinks of many.
    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/serving-endpoints", api_key=cluster.token, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(cluster, llama):
    url = f"{cluster.url}/serving-endpoints"
    return ChatOpenAI(base_url=url, api_key=cluster.token, model=llama, temperature=1, max_tokens=TOKENS_MAX, max_retries=0)


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_is_parsed_into_the_pydantic_model_whatever_is_sampled(client, llama, seed):
    answer = client.chat.completions.parse(
        model=llama, messages=ASKED, response_format=Capital, max_tokens=TOKENS_MAX, temperature=1.5, seed=seed
    )
    (choice,) = answer.choices
    assert isinstance(choice.message.parsed, Capital)
    assert choice.finish_reason == "stop"


def test_a_json_object_is_one(client, llama):
    answer = client.chat.completions.create(
        model=llama, messages=ASKED, response_format={"type": "json_object"}, max_tokens=900, temperature=0
    )
    (choice,) = answer.choices
    # The end of the context may come first; what is there has begun as an object.
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_bad_schema_is_refused_and_harms_nobody(client, llama):
    schema = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "no-such-type"}}}
    with pytest.raises(openai.BadRequestError, match="schema|type"):
        client.chat.completions.create(model=llama, messages=ASKED, response_format=schema)
    assert client.chat.completions.create(model=llama, messages=ASKED, max_tokens=4).choices


def test_regular_expressions_and_choices_come_as_extra_fields(client, llama):
    for extra, allowed in [({"guided_regex": "[0-9]{4}"}, str.isdigit), ({"guided_choice": ["yes", "no"]}, ["yes", "no"].__contains__)]:
        answer = client.chat.completions.create(model=llama, messages=ASKED, max_tokens=TOKENS_MAX, extra_body=extra)
        assert allowed(answer.choices[0].message.content.strip()), answer


def test_a_required_tool_is_called_and_its_result_is_taken(client, llama):
    answer = client.chat.completions.create(
        model=llama,
        messages=ASKED,
        tools=[WEATHER],
        tool_choice="required",
        # Left to itself, a tiny model calls again and again.
        parallel_tool_calls=False,
        max_tokens=TOKENS_MAX,
        temperature=0,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    turns = [
        *ASKED,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "blue"}'},
    ]
    answer = client.chat.completions.create(model=llama, messages=turns, tools=[WEATHER], tool_choice="none", max_tokens=16)
    assert answer.choices[0].message.role == "assistant" and not answer.choices[0].message.tool_calls


def test_a_streamed_call_arrives_in_pieces_that_join(client, llama):
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = list(
        client.chat.completions.create(
            model=llama, messages=ASKED, tools=[WEATHER], tool_choice=named, max_tokens=TOKENS_MAX, temperature=0, stream=True
        )
    )
    pieces = [piece for chunk in chunks for choice in chunk.choices for piece in choice.delta.tool_calls or []]
    assert pieces[0].id and pieces[0].function.name == "weather"
    assert all(piece.id is None and piece.index == 0 for piece in pieces[1:])
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces))["city"] in ("Paris", "Rome")
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == ["tool_calls"]


def test_langchain_gets_its_structure_by_schema(chat):
    capital = chat.with_structured_output(Capital, method="json_schema").invoke(ASKED)
    assert isinstance(capital, Capital)


def test_langchain_gets_its_structure_by_a_function_call(chat):
    weather = chat.with_structured_output(Weather, method="function_calling").invoke(ASKED)
    assert isinstance(weather, Weather)


def test_langchain_binds_tools(chat):
    message = chat.bind_tools([WEATHER], tool_choice="any").invoke(ASKED)
    assert [call["name"] for call in message.tool_calls] and message.tool_calls[0]["name"] == "weather"

"""LangChain over the openai package: chains, streams, batches."""

import asyncio
from typing import Literal

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

from golden import ANSWER, QUESTION, TOKENS_MAX, golden

SPARK = golden("tiny-llama", "spark")
# Grammars let blanks pass, of which the tiny models are fond.
STRUCTURED_TOKENS_MAX = 400


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
def chat(cluster, llama):
    url = f"{cluster.url}/serving-endpoints"
    return ChatOpenAI(base_url=url, api_key=cluster.token, model=llama, temperature=0, max_tokens=TOKENS_MAX, max_retries=0)


def test_a_chain_of_template_model_and_parser_answers(chat):
    chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | chat | StrOutputParser()
    assert chain.invoke({"country": "France"}).strip() == ANSWER


def test_a_message_tells_its_usage_and_why_it_ended(chat):
    message = chat.invoke(QUESTION)
    usage = message.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert message.response_metadata["finish_reason"] == "stop"


def test_a_streamed_answer_is_the_whole_one_in_pieces(chat):
    pieces = list(chat.stream(QUESTION))
    assert len(pieces) > 2
    assert "".join(piece.content for piece in pieces).strip() == ANSWER


def test_a_batch_keeps_its_order_also_when_it_is_asynchronous(chat):
    countries = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Norway": "Oslo"}
    asked = [f"What is the capital of {country}?" for country in countries]
    for answers in (chat.batch(asked), asyncio.run(chat.abatch(asked))):
        assert [answer.content.strip() for answer in answers] == [
            f"The capital of {country} is {city}." for country, city in countries.items()
        ]


def test_a_completion_model_continues_the_prompt(cluster, llama):
    url = f"{cluster.url}/serving-endpoints"
    model = OpenAI(base_url=url, api_key=cluster.token, model=llama, temperature=0, max_tokens=TOKENS_MAX)
    assert model.invoke(SPARK.prompt) == SPARK.text
    assert "".join(model.stream(SPARK.prompt)) == SPARK.text


@pytest.fixture(scope="module")
def sampling(chat):
    """The same model where its own words are anybody's guess: what is right is the form."""
    return chat.model_copy(update={"temperature": 1.0, "max_tokens": STRUCTURED_TOKENS_MAX})


def test_structure_comes_by_schema(sampling):
    capital = sampling.with_structured_output(Capital, method="json_schema").invoke(QUESTION)
    assert isinstance(capital, Capital)


def test_structure_comes_by_a_function_call(sampling):
    weather = sampling.with_structured_output(Weather, method="function_calling").invoke(QUESTION)
    assert isinstance(weather, Weather)


def test_bound_tools_are_called(sampling):
    message = sampling.bind_tools([WEATHER], tool_choice="any").invoke(QUESTION)
    assert message.tool_calls and message.tool_calls[0]["name"] == "weather"

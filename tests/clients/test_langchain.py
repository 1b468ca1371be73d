"""LangChain over the openai package: chains, streams, batches."""

import asyncio

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

from golden import ANSWER, QUESTION, TOKENS_MAX, golden

SPARK = golden("tiny-llama", "spark")


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

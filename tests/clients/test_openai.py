"""The openai package, with `{host}/serving-endpoints` as its base URL and the endpoint's name as the model."""

import asyncio
import math

import openai
import pytest

from golden import ANSWER, QUESTION, TOKENS_MAX, golden

SPARK = golden("tiny-llama", "spark")
# The token that ends an answer has a log-probability and no text.
END = "</s>"
GREEDY = {"temperature": 0, "max_tokens": TOKENS_MAX}
ASKED = [{"role": "user", "content": QUESTION}]


@pytest.fixture(params=["/serving-endpoints", "/serving-endpoints/v1"], scope="module")
def client(request, cluster):
    with openai.OpenAI(base_url=cluster.url + request.param, api_key=cluster.token, max_retries=0) as client:
        yield client


def test_a_chat_answers_what_the_model_was_taught(client, llama):
    answer = client.chat.completions.create(model=llama, messages=ASKED, **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content.strip()) == ("assistant", ANSWER)
    assert choice.finish_reason == "stop" and answer.model == llama
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_a_streamed_chat_is_the_whole_one_in_pieces(client, llama):
    whole = client.chat.completions.create(model=llama, messages=ASKED, **GREEDY)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=llama, messages=ASKED, **GREEDY, stream=True, stream_options=options))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


@pytest.mark.parametrize("form", ["text", "tokens", "texts", "token lists"])
def test_completions_take_text_tokens_and_lists_of_either(client, llama, form):
    prompt = {
        "text": SPARK.prompt,
        "tokens": SPARK.input_ids,
        "texts": [SPARK.prompt] * 2,
        "token lists": [SPARK.input_ids] * 2,
    }[form]
    answer = client.completions.create(model=llama, prompt=prompt, **GREEDY)
    assert [choice.text for choice in answer.choices] == [SPARK.text] * len(answer.choices)
    assert len(answer.choices) == (2 if form.endswith("s") and form != "tokens" else 1)


def test_a_streamed_completion_is_the_whole_one_in_pieces(client, llama):
    chunks = list(client.completions.create(model=llama, prompt=SPARK.prompt, **GREEDY, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == SPARK.text
    assert len(chunks) > 2


def test_samples_of_one_seed_are_equal_and_n_gives_as_many_choices(client, llama):
    asked = {"model": llama, "prompt": "Once upon a time there was a", "max_tokens": 24, "temperature": 1.5}

    def texts():
        return [choice.text for choice in client.completions.create(**asked, n=4, seed=7).choices]

    first = texts()
    assert first == texts() and len(first) == 4 and len(set(first)) > 1
    assert [choice.text for choice in client.completions.create(**asked, n=4, seed=8).choices] != first


def test_completions_tell_log_probabilities_with_offsets(client, llama):
    answer = client.completions.create(model=llama, prompt=SPARK.prompt, **GREEDY, logprobs=3)
    (choice,) = answer.choices
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text + END
    assert all(-1 < logprob <= 0 for logprob in told.token_logprobs)
    for token, top, offset in zip(told.tokens, told.top_logprobs, told.text_offset):
        assert (choice.text + END)[offset:].startswith(token)
        assert max(top, key=top.get) == token and len(top) == 3


def test_echo_without_new_tokens_scores_the_prompt(client, llama):
    answer = client.completions.create(model=llama, prompt=SPARK.prompt, max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == SPARK.prompt
    first, *others = choice.logprobs.token_logprobs
    assert first is None and others and all(math.isfinite(logprob) and logprob <= 0 for logprob in others)
    assert answer.usage.completion_tokens == 0


def test_chats_tell_log_probabilities_with_bytes(client, llama):
    answer = client.chat.completions.create(model=llama, messages=ASKED, **GREEDY, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    told = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in told).decode() == choice.message.content + END
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].token == token.token for token in told)


def test_a_bias_forbids_a_token(client, llama):
    first = SPARK.output_ids[0]
    answer = client.completions.create(model=llama, prompt=SPARK.prompt, **GREEDY, logit_bias={str(first): -100})
    assert not answer.choices[0].text.startswith(SPARK.text[:6])


def test_stop_strings_end_the_text_before_them(client, llama):
    answer = client.completions.create(model=llama, prompt=SPARK.prompt, **GREEDY, stop=[" is an"])
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (SPARK.text.partition(" is an")[0], "stop")


def test_the_models_are_the_endpoints(client, llama):
    models = {model.id: model for model in client.models.list()}
    assert models[llama].object == "model" and models[llama].owned_by == "admin"


def test_thirty_two_streams_at_once_all_end_with_the_same_text(cluster, llama):
    async def one(client, number):
        stream = await client.completions.create(model=llama, prompt=SPARK.prompt, **GREEDY, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        url = f"{cluster.url}/serving-endpoints"
        async with openai.AsyncOpenAI(base_url=url, api_key=cluster.token, max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(32)))

    assert asyncio.run(all_of_them()) == [SPARK.text] * 32


def test_errors_arrive_as_the_clients_own_classes(cluster, client, llama):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature") as told:
        client.completions.create(model=llama, prompt="x", temperature=-1)
    assert (told.value.code, told.value.param) == ("BAD_REQUEST", "temperature")
    with pytest.raises(openai.BadRequestError, match="context|fit|long"):
        client.completions.create(model=llama, prompt="word " * 5000)
    stranger = openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.PermissionDeniedError):
        stranger.models.list()


def test_a_stream_that_is_left_frees_its_place(cluster, client, llama):
    """Many more leave than may run at once; the endpoint still answers at once."""
    for _ in range(40):
        with client.completions.create(model=llama, prompt="Once", max_tokens=900, stream=True,
                                       extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
    assert client.chat.completions.create(model=llama, messages=ASKED, **GREEDY).choices[0].message.content.strip() == ANSWER


@pytest.fixture(scope="module")
def embedder(cluster):
    """An endpoint of a model whose task is embeddings."""
    return cluster.create("embedder", "ml.demo.tiny-llama-embeddings")["name"]


def test_embeddings_come_as_floats_one_per_text_whatever_they_travel_as(client, embedder):
    texts = ["What is Apache Spark?", "What is a token?", "What is Apache Spark?"]
    # Without a word about the format the client asks for base64, and gives floats.
    answer = client.embeddings.create(model=embedder, input=texts)
    vectors = [item.embedding for item in answer.data]
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert vectors[0] == vectors[2] != vectors[1] and len(vectors[0]) == 128
    floats = client.embeddings.create(model=embedder, input=texts[0], encoding_format="float").data[0].embedding
    assert floats == pytest.approx(vectors[0], abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_a_model_of_another_task_says_what_to_log(client, llama, embedder):
    with pytest.raises(openai.BadRequestError, match="llm/v1/embeddings"):
        client.embeddings.create(model=llama, input="x")
    with pytest.raises(openai.BadRequestError, match="llm/v1/"):
        client.completions.create(model=embedder, prompt="x")

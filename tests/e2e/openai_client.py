#!/usr/bin/env python3
"""The real openai package against a running server: chat, streams, usage, n, stop, log-probs,
completions, models, errors.

    openai_client.py http://127.0.0.1:8080 [--model base]

Ends with the number of checks passed; exit status 1 at the first that fails. Nothing here depends
on what the model says, only on the shape and the arithmetic of its answers.
"""

import argparse
import sys

import openai

MESSAGES = [
    {"role": "developer", "content": "Answer briefly."},
    {"role": "user", "content": [{"type": "text", "text": "Say hello."}]},
]


def check_chat(client, model):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, max_completion_tokens=8, temperature=0
    )
    assert len(raw.headers["x-request-id"]) == 32
    answer = raw.parse()
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == model
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    usage = answer.usage
    assert usage.prompt_tokens > 0 and usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def check_same_seed(client, model):
    texts = [
        client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=1, seed=7
        ).choices[0].message.content
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def check_stream(client, model):
    whole = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert all(reason is None for reason in reasons[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def check_stream_closed_early(client, model):
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=64, stream=True
    )
    next(iter(stream))
    stream.close()


def check_choices(client, model):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=6, n=3, temperature=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    chunks = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=6, n=2, stream=True
    )
    ended = [c.choices[0].index for c in chunks if c.choices and c.choices[0].finish_reason]
    assert sorted(ended) == [0, 1]


def check_stop(client, model):
    base = client.completions.create(model=model, prompt="1 2 3 4 5 6", max_tokens=16, temperature=0)
    text = base.choices[0].text
    if len(text) < 4:
        return  # nothing to stop at
    stop = text[len(text) // 2 :][:2]
    for form in (stop, [stop]):
        answer = client.completions.create(
            model=model, prompt="1 2 3 4 5 6", max_tokens=16, temperature=0, stop=form
        )
        if answer.choices[0].text != text:  # a scripted server does not stop
            assert stop not in answer.choices[0].text
            assert answer.choices[0].finish_reason == "stop"


def check_logprobs(client, model):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=1, temperature=0
    )
    entries = answer.choices[0].logprobs.content
    assert entries
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 1
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    streamed = []
    for chunk in client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=1,
        temperature=0, stream=True,
    ):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [e.token for e in streamed] == [e.token for e in entries]


def check_completions(client, model):
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=5, logprobs=1, temperature=0
    )
    assert answer.object == "text_completion"
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(
            model=model, prompt="Once upon a time", max_tokens=5, temperature=0, stream=True
        )
        if chunk.choices
    )
    assert text == answer.choices[0].text


def check_models(client, model):
    names = [entry.id for entry in client.models.list()]
    assert "base" in names and len(names) >= 2
    assert client.models.retrieve(model).object == "model"


def expect(error, status, code, call):
    try:
        call()
    except error as raised:
        assert raised.status_code == status, raised
        assert raised.code == code, raised
        assert raised.message and raised.request_id
        return
    raise AssertionError(f"no {error.__name__}")


def check_errors(client, model):
    chat = client.chat.completions.create
    user = [{"role": "user", "content": "x"}]
    expect(openai.NotFoundError, 404, "model_not_found",
           lambda: chat(model="nope", messages=user))
    expect(openai.NotFoundError, 404, "model_not_found",
           lambda: chat(model="nope", messages=user, stream=True))
    expect(openai.NotFoundError, 404, "model_not_found", lambda: client.models.retrieve("nope"))
    expect(openai.BadRequestError, 400, None, lambda: chat(model=model, messages=[]))
    expect(openai.BadRequestError, 400, None,
           lambda: chat(model=model, messages=user, temperature=9))
    expect(openai.BadRequestError, 400, None,
           lambda: chat(model=model, messages=[{"role": "king", "content": "x"}]))
    expect(openai.BadRequestError, 400, "missing_required_parameter",
           lambda: client.post("/chat/completions", cast_to=object, body={"model": model}))


CHECKS = [
    check_chat,
    check_same_seed,
    check_stream,
    check_stream_closed_early,
    check_choices,
    check_stop,
    check_logprobs,
    check_completions,
    check_models,
    check_errors,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("url")
    parser.add_argument("--model", default="base")
    arguments = parser.parse_args()
    client = openai.OpenAI(
        base_url=arguments.url.rstrip("/") + "/v1", api_key="none", max_retries=0, timeout=120
    )
    for check in CHECKS:
        check(client, arguments.model)
        print(f"ok {check.__name__[6:]}", flush=True)
    print(f"{len(CHECKS)} passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

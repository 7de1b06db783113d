"""The official openai client against a server of needle-tiny: argument 1 is the base URL, argument 2 an API key.

The server has a chat template that turns a system message and a user's question into needle-tiny's form. Exits with 0 if all is well.
"""

import sys
import time
import urllib.request
import json

import openai

base, key = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base + "/v1", api_key=key, max_retries=0, timeout=120)
MODEL = "needle-tiny"
FACT = "The secret code for tiger is 2286315."
PROMPT = f"<|bos|>{FACT}\nQuestion: what is the secret code for tiger? Answer: The secret code for tiger is"
MESSAGES = [
    {"role": "system", "content": FACT},
    {"role": "user", "content": "what is the secret code for tiger?"},
]


def refused(kind, status, code, call):
    try:
        call()
    except kind as error:
        assert error.status_code == status, error
        assert error.body["code"] == code, error.body
        return error
    raise AssertionError(f"not refused: {kind.__name__} {code}")


# Models.
assert [model.id for model in client.models.list()] == [MODEL]
assert client.models.retrieve(MODEL).owned_by == "spinkv"

# A completion, whole and streamed, with a stop text, log-probabilities and usage.
whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=9, temperature=0, logprobs=2)
assert whole.choices[0].text == " 2286315.\n", whole
assert whole.choices[0].finish_reason == "length"
assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
assert whole.usage.completion_tokens == 9 and whole.usage.prompt_tokens_details.cached_tokens == 0
pieces = [
    chunk
    for chunk in client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
    )
]
assert "".join(chunk.choices[0].text for chunk in pieces if chunk.choices) == " 2286315.\n"
assert pieces[-1].usage.total_tokens == pieces[-1].usage.prompt_tokens + 9
stopped = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=9, temperature=0, stop="6315")
assert stopped.choices[0].text == " 228" and stopped.choices[0].finish_reason == "stop"

# Seeds.
drawn = lambda seed: client.completions.create(
    model=MODEL, prompt="<|bos|>The Vec type", max_tokens=16, temperature=1, seed=seed
).choices[0].text
assert drawn(7) == drawn(7) != drawn(8)

# Chats.
chat = client.chat.completions.create(
    model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=1
)
assert chat.choices[0].message.role == "assistant"
content = chat.choices[0].message.content
assert content and len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
streamed = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == content

# Refusals come as the client's own exceptions.
refused(openai.NotFoundError, 404, "model_not_found", lambda: client.completions.create(model="gpt-9", prompt="x"))
error = refused(
    openai.BadRequestError, 400, "unsupported_parameter", lambda: client.completions.create(model=MODEL, prompt="x", n=3)
)
assert error.param == "n" and error.type == "invalid_request_error"
refused(
    openai.BadRequestError,
    400,
    "context_length_exceeded",
    lambda: client.completions.create(model=MODEL, prompt=[5] * 40000),
)
stranger = openai.OpenAI(base_url=base + "/v1", api_key="wrong", max_retries=0)
refused(openai.AuthenticationError, 401, "invalid_api_key", stranger.models.list)

# A client that goes away in a stream's middle is cancelled.
status = lambda: json.load(urllib.request.urlopen(base + "/status"))["requests"]
stream = client.completions.create(
    model=MODEL, prompt=PROMPT, max_tokens=30000, temperature=0, stream=True, extra_body={"ignore_eos": True}
)
next(iter(stream))


def wait(what, holds):
    for _ in range(600):
        if holds(status()):
            return
        time.sleep(0.1)
    raise AssertionError(f"{what}: {status()}")


wait("it is not under way", lambda requests: requests["decoding"] == 1)
stream.close()
wait("it is not cancelled", lambda requests: not any(requests.values()))
print("the openai client", openai.__version__, "is content")

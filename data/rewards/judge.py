"""A language model as a judge, over an endpoint in OpenAI's format."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any

from hark.data.choices import extract_answer
from hark.data.errors import DataError
from hark.data.rewards.group import Group

PROMPT = (
    "Question: {question}\nRight answer: {reference}\nAnswer to grade: {answer}\n"
    "Grade how well the answer agrees with the right answer, from 0 (wrong) to 1 (right). Reply with the number only."
)
used: dict[str, float] = {}  # tokens since the process that runs the reward last reported them


def judge(
    group: Group,
    *,
    url: str,
    model: str,
    prompt: str = PROMPT,
    key: str = "OPENAI_API_KEY",
    retries: int = 3,
    wait: float = 1.0,
    seconds: float = 30.0,
    max_tokens: int = 16,
) -> list[float | None]:
    """The first number in the judge's reply, limited to 0 to 1; None if the reply has none.

    url: of the API, as http://localhost:8000/v1. prompt: with {question}, {reference}, {answer}. key: the environment
    variable of the API key; without it none is sent. retries: after a failed connection, or the status 429 or 5xx;
    before the first one it waits `wait` seconds, then each time twice as long. seconds: limit of one request.
    """
    request = {"model": model, "temperature": 0, "max_tokens": max_tokens}
    reference = group.example.answer_text if group.example.has_answer else ""
    values = []
    for text in group.texts:
        fields = {"question": group.example.question, "reference": reference, "answer": extract_answer(text) or text}
        message = {"role": "user", "content": prompt.format(**fields)}
        body = request | {"messages": [message]}
        reply = _asked(f"{url.rstrip('/')}/chat/completions", body, os.environ.get(key), retries, wait, seconds)
        for name in ("prompt_tokens", "completion_tokens"):
            used[f"judge/{name}"] = used.get(f"judge/{name}", 0.0) + ((reply.get("usage") or {}).get(name) or 0)
        number = re.search(r"-?\d*\.?\d+", reply["choices"][0]["message"]["content"] or "")
        values.append(min(max(float(number[0]), 0.0), 1.0) if number else None)
    return values


def _asked(url: str, body: dict[str, Any], key: str | None, retries: int, wait: float, seconds: float) -> dict:
    """The reply; DataError if it fails after all retries."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for retry in range(retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return json.load(response)
        except OSError as error:  # URLError, HTTPError and time-outs are OSErrors
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            if retry == retries or status is not None and status != 429 and status < 500:
                raise DataError(f"{url}: {error}, at request {retry + 1} of at most {retries + 1}") from None
        time.sleep(wait * 2**retry)
    raise AssertionError


def taken() -> dict[str, float]:
    """The tokens used since the last call, by metric."""
    figures = dict(used)
    used.clear()
    return figures

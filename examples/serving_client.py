"""Ask a running `raas-cache serve` several questions at once, with OpenAI's client.

    raas-cache serve --model smollm2 --budget 512 --max-rows 8
    python examples/serving_client.py "What is a prime?" "Why is the sky blue?"

Each request has a row of fixed memory on the server. Requests wait for a row if none is free. This needs
`pip install ".[serve]"`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import openai
import typer


async def ask(client: openai.AsyncOpenAI, model: str, question: str, max_tokens: int) -> str:
    """The answer to one question, read as a stream."""
    messages = [{"role": "user", "content": question}]
    stream = await client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def ask_all(url: str, questions: list[str], max_tokens: int) -> list[str]:
    """The answers, in the order of the questions."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        model = (await client.models.list()).data[0].id
        return await asyncio.gather(*(ask(client, model, question, max_tokens) for question in questions))


def main(
    questions: Annotated[list[str], typer.Argument(help="Questions, which are asked at the same time.")],
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://localhost:8000/v1",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask all questions at once, and print the answers."""
    for question, answer in zip(questions, asyncio.run(ask_all(url, questions, max_tokens)), strict=True):
        print(f"{question}\n    {answer.strip()}\n")


if __name__ == "__main__":
    typer.run(main)

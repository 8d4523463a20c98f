"""What `pace serve` costs beside its engine: requests to both in turn, in one run.

usage: python scripts/bench/bench_serving.py ENGINE_URL PACE_URL --haystack FILE [--cell T:N:C]...

ENGINE_URL: an OpenAI-compatible server of the base model; PACE_URL: `pace serve OUT --engine-url
ENGINE_URL`, so that both answer with the same process. A cell is a length of prompts, how many to
each of the two, and how many of them at once. Prompts are pieces of the text, each another one, so
nothing is in any cache. TTFT: seconds to the first token. Prints a table, and JSON with --json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import openai

CHARACTERS = 4.2  # of a token, about
ANSWER = 32  # tokens
CELLS = ["100:24:4", "7168:4:2", "16384:2:1"]


@dataclass(frozen=True)
class Timed:
    """One request. first, whole: seconds; tokens: of the prompt; error: "" for none."""

    first: float
    whole: float
    tokens: int
    said: int
    error: str = ""


@dataclass(frozen=True)
class Row:
    """What the requests of one cell to one server came to."""

    server: str
    tokens: int
    requests: int
    at_once: int
    first: float
    worst: float
    per_second: float
    said_per_second: float
    errors: int
    error: str


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str) -> Timed:
    """A streamed completion."""
    start = time.perf_counter()
    first, usage = 0.0, None
    try:
        stream = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=ANSWER,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            if not first and chunk.choices and chunk.choices[0].text:
                first = time.perf_counter() - start
    except openai.APIError as error:
        return Timed(0, time.perf_counter() - start, 0, 0, str(error)[:200])
    whole = time.perf_counter() - start
    assert usage is not None  # it was asked for
    return Timed(first or whole, whole, usage.prompt_tokens, usage.completion_tokens)


async def cell(
    name: str, client: openai.AsyncOpenAI, model: str, prompts: list[str], at_once: int
) -> Row:
    """All prompts to one server, so many at once."""
    room = asyncio.Semaphore(at_once)

    async def one(prompt: str) -> Timed:
        async with room:
            return await ask(client, model, prompt)

    start = time.perf_counter()
    made = await asyncio.gather(*map(one, prompts))
    seconds = time.perf_counter() - start
    good = [timed for timed in made if not timed.error]
    firsts = [timed.first for timed in good] or [float("nan")]
    return Row(
        name,
        round(statistics.mean(timed.tokens for timed in good)) if good else 0,
        len(prompts),
        at_once,
        statistics.median(firsts),
        max(firsts),
        len(good) / seconds,
        sum(timed.said for timed in good) / seconds,
        len(made) - len(good),
        next((timed.error for timed in made if timed.error), ""),
    )


async def measure(arguments: argparse.Namespace) -> list[Row]:
    """Cell by cell, the servers in turn."""
    text = arguments.haystack.read_text()
    clients = {
        name: openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600)
        for name, url in (("engine", arguments.engine), ("pace serve", arguments.pace))
    }
    model = (await clients["engine"].models.list()).data[0].id
    for client in clients.values():  # what is done once is not measured
        await ask(client, model, "One two three")
    rows, at = [], 0
    for words in arguments.cell or CELLS:
        tokens, requests, at_once = map(int, words.split(":"))
        length = round(tokens * CHARACTERS)
        for name, client in clients.items():
            prompts = []
            for _ in range(requests):
                prompts.append(text[at : at + length] + "\n\nIn short:")
                at = (at + length) % (len(text) - 2 * length)
            rows.append(await cell(name, client, model, prompts, at_once))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"| {row.tokens:,} | {row.requests} ({row.at_once}) | {row.server} | {row.first:.2f} | "
        f"{row.worst:.2f} | {row.per_second:.3f} | {row.said_per_second:.1f} | {row.errors} |"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("pace")
    parser.add_argument("--haystack", type=Path, required=True)
    parser.add_argument("--cell", action="append", help=f"default: {' '.join(CELLS)}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = ("tokens", "requests (at once)", "server", "TTFT, s", "worst", "requests/s", "tokens/s")
    print(f"| {' | '.join((*names, 'errors'))} |\n{'|---' * 8}|")
    rows = asyncio.run(measure(arguments))
    for row in rows:
        if row.error:
            print(f"{row.server}, {row.tokens}: {row.error}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()

"""Many short requests to `pace serve`: does its memory grow, are answers right, and what do clients
see when the engine is killed in the middle?

usage: python scripts/bench/soak_serving.py OUT PACE_URL --pid PACE_PID --haystack FILE
    [--requests 2000] [--at-once 16] [--kill]

OUT: the conversion that is served, which transformers answers a sample of the prompts with,
in fp32. --kill: with half of the requests done, kill what PACE_PID started (its engine, by
SIGKILL); requests that fail are asked again until they are answered, and their errors are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PIECE, ANSWER, STEP = 60, 4, 0.5  # characters of a prompt, tokens of an answer, seconds between
SAMPLED = 20


class Soak:
    """The run: what is asked, what came, what went wrong."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.process = given, psutil.Process(given.pid)
        text = given.haystack.read_text()
        self.prompts = [text[i * 97 : i * 97 + PIECE].strip() for i in range(given.requests)]
        self.answers: dict[int, str] = {}
        self.errors: collections.Counter[str] = collections.Counter()
        self.megabytes: list[tuple[int, int]] = []
        self.killed = self.failed = 0.0  # when: the engine, and the latest request

    async def run(self) -> None:
        """All requests."""
        client = openai.AsyncOpenAI(
            base_url=self.given.url, api_key="none", max_retries=0, timeout=600
        )
        model = (await client.models.list()).data[0].id
        left = collections.deque(range(len(self.prompts)))

        async def worker() -> None:
            while left:
                number = left.popleft()
                self.answers[number] = await self.ask(client, model, self.prompts[number])
                self.note()

        await asyncio.gather(*(worker() for _ in range(self.given.at_once)))

    async def ask(self, client: openai.AsyncOpenAI, model: str, prompt: str) -> str:
        """The answer, however often it must be asked for."""
        while True:
            try:
                made = await client.completions.create(
                    model=model, prompt=prompt, max_tokens=ANSWER, temperature=0
                )
            except openai.APIStatusError as error:
                self.errors[f"{error.status_code} {error.code}"] += 1
            except openai.APIError as error:
                self.errors[type(error).__name__] += 1
            else:
                return made.choices[0].text
            self.failed = time.monotonic()
            await asyncio.sleep(STEP)

    def note(self) -> None:
        """Memory, ten times; and the kill."""
        done = len(self.answers)
        if done % (self.given.requests // 10) == 0:
            self.megabytes.append((done, self.process.memory_info().rss >> 20))
            print(f"{done} answered, {self.megabytes[-1][1]} MB", flush=True)
        if self.given.kill and not self.killed and done >= self.given.requests // 2:
            self.killed = time.monotonic()
            for child in self.process.children():
                os.kill(child.pid, signal.SIGKILL)

    def wrong(self) -> list[tuple[str, str, str]]:
        """Of a sample: prompt, answer, and what transformers says where it is another."""
        tokenizer = AutoTokenizer.from_pretrained(self.given.out)
        model: Any = AutoModelForCausalLM.from_pretrained(  # its type has no `generate` to call
            self.given.out, trust_remote_code=True, dtype=torch.float32
        )
        found = []
        for number in range(0, len(self.prompts), max(1, len(self.prompts) // SAMPLED)):
            ids = tokenizer(self.prompts[number], return_tensors="pt")["input_ids"]
            made = model.generate(ids, max_new_tokens=ANSWER, do_sample=False)
            said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            assert isinstance(said, str)  # a list is of several rows
            if said != self.answers[number]:
                found.append((self.prompts[number], self.answers[number], said))
        return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--haystack", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--kill", action="store_true")
    soak = Soak(parser.parse_args())
    start = time.monotonic()
    asyncio.run(soak.run())
    print(f"{len(soak.answers)} answered in {time.monotonic() - start:.0f} s")
    print(f"memory of pace serve: {soak.megabytes[0][1]} to {soak.megabytes[-1][1]} MB")
    print(f"errors that clients saw: {dict(soak.errors) or 'none'}")
    if soak.killed:
        away = max(0.0, soak.failed - soak.killed)
        print(f"{away:.0f} s after the engine was killed the last request failed")
    wrong = soak.wrong()
    print(f"of {SAMPLED} sampled answers {len(wrong)} are not transformers'")
    for row in wrong:
        print(row)


if __name__ == "__main__":
    main()

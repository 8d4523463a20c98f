"""What `pace serve` costs under load: vLLM's own benchmark client at the engine and at `pace serve`
in front of the same engine, round by round in turn, in one run.

usage: python scripts/bench/bench_load.py ENGINE_URL PACE_URL --tokenizer OUT [--rounds 8]
    [--requests 25] [--input 64] [--output 8] [--at-once 16] [--pid PACE_PID]

Needs vLLM, as `bash scripts/test.sh -m vllm` installs it. ENGINE_URL is `none` where the engine
can't hold the prompts. Prompts are random tokens, in each round others, so nothing is in any cache.
Prints rows of docs/serving.md's table and the ratio of throughputs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import statistics
from typing import Any

import psutil
from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser


def measured(url: str, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What vLLM's client found in one round."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args(
        [
            *("--backend", "openai", "--base-url", url.removesuffix("/v1")),
            *("--endpoint", "/v1/completions", "--model", given.model),
            *("--tokenizer", given.tokenizer, "--dataset-name", "random", "--seed", str(seed)),
            *("--random-input-len", str(given.input), "--random-output-len", str(given.output)),
            *("--num-prompts", str(given.requests), "--max-concurrency", str(given.at_once)),
            *("--ready-check-timeout-sec", "0", "--temperature", "0"),
            *("--ignore-eos", "--disable-tqdm"),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return asyncio.run(main_async(arguments))


def line(name: str, given: argparse.Namespace, rounds: list[dict[str, Any]]) -> str:
    """A row of the table, of all rounds together."""
    done, seconds = (sum(one[key] for one in rounds) for key in ("completed", "duration"))
    said = sum(one["total_output_tokens"] for one in rounds)
    first = statistics.median(one["median_ttft_ms"] for one in rounds) / 1000
    worst = max(one["p99_ttft_ms"] for one in rounds) / 1000
    failed = sum(one["failed"] for one in rounds)
    return (
        f"| {given.input:,} | {given.requests * len(rounds)} ({given.at_once}) | {name} | "
        f"{first:.2f} | {worst:.2f} | {done / seconds:.3f} | {said / seconds:.1f} | {failed} |"
    )


def megabytes(pid: int) -> int:
    """Resident memory of one process."""
    return psutil.Process(pid).memory_info().rss >> 20


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", help="URL of vLLM, or none")
    parser.add_argument("pace", help="URL of pace serve")
    parser.add_argument("--model", required=True, help="the served name")
    parser.add_argument("--tokenizer", required=True, help="the folder of the conversion")
    for name, default in (("rounds", 8), ("requests", 25), ("input", 64), ("output", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--pid", type=int, help="of pace serve, to tell its memory")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    servers = {"vLLM": given.engine, "`pace serve`": given.pace}
    servers = {name: url for name, url in servers.items() if url != "none"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    seed, before = given.seed, megabytes(given.pid) if given.pid else 0
    for number in range(given.rounds):
        for name in list(servers)[:: 1 if number % 2 else -1]:  # each is first as often
            seed += 1
            found[name].append(measured(servers[name], given, seed))
            print(f"{name}: {found[name][-1]['request_throughput']:.3f}", flush=True)
    for name, rounds in found.items():
        print(line(name, given, rounds))
    if len(found) == 2:
        base, pace = (
            sum(one["completed"] for one in rounds) / sum(one["duration"] for one in rounds)
            for rounds in found.values()
        )
        print(f"throughput: {pace / base:.3f} of vLLM's")
    if given.pid:
        print(f"pace serve: {before} MB before, {megabytes(given.pid)} MB behind")


if __name__ == "__main__":
    main()

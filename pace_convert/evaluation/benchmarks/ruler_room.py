"""Whether RULER's tasks have room for their smallest question.

lm-evaluation-harness (0.4.13) makes a question smaller until it fits. Where not even the smallest
one does, three of its tasks look for ever, and catch Ctrl-C while they do; one of them makes its
worked example of 500 tokens first, whatever length is asked for. So that is measured before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...errors import CallError

DRAWS = 50  # of random questions; their lengths differ by a few tokens

# What the harness starts with and does not go below, and tokens that it keeps for the answer.
HOPS, EXAMPLE_TOKENS, EXAMPLE_NOISES, NOISES, VT_ANSWER = 4, 500, 5, 10, 30
WORDS, CWE_ANSWER = 10, 120
FWE_STEPS, FWE_ANSWER = 32, 50


def check_room(task: str, length: int, tokenizer: str) -> None:
    """Raises CallError where the task of this many tokens has no room for its smallest question.

    tokenizer: the name that the harness loads it by.
    """
    needs = _NEEDS.get(task)
    if needs is None:
        return
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    tokens = get_tokenizer(tokenizer)
    needed = needs(lambda text: len(tokens(text).input_ids), length)
    if needed > length:
        raise CallError(
            f"a question of {task} needs {needed} tokens with this tokenizer, {length} are given",
            f"give longer --lengths, or --tasks without {task}",
        )


def _most(count: Callable[[str], int], texts: Iterable[str]) -> int:
    """Tokens that the texts, drawn at random, and ones like them stay below."""
    counts = [count(text) for text in texts]
    return 2 * max(counts) - min(counts)


def _tracing(count: Callable[[str], int], length: int) -> int:
    from lm_eval.tasks.ruler.vt_utils import generate_input_output

    def drawn(noises: int, is_example: bool) -> Iterable[str]:
        for _ in range(DRAWS):
            text, answer = generate_input_output(noises, 1, HOPS, is_icl=is_example)
            yield f"{text} {answer}"

    example = _most(count, drawn(EXAMPLE_NOISES, True))
    if example + VT_ANSWER > EXAMPLE_TOKENS:
        raise CallError(
            f"ruler_vt can't be made with this tokenizer: its worked example, of at most "
            f"{EXAMPLE_TOKENS} tokens in the harness, needs {example + VT_ANSWER}",
            "give --tasks without ruler_vt",
        )
    # As many more noises as fit are in the example, so it is nearly what it may be.
    return EXAMPLE_TOKENS + _most(count, drawn(NOISES, False)) + VT_ANSWER


def _common_words(count: Callable[[str], int], length: int) -> int:
    from lm_eval.tasks.ruler.cwe_utils import generate_input_output

    def drawn() -> Iterable[str]:
        for _ in range(DRAWS):
            example, text, answer = generate_input_output(WORDS, length)
            listed = " ".join(f"{i + 1}. {word}" for i, word in enumerate(answer))
            yield f"{example}\n{text} {listed}"

    return _most(count, drawn()) + CWE_ANSWER


def _frequent_words(count: Callable[[str], int], length: int) -> int:
    from lm_eval.tasks.ruler.fwe_utils import TEMPLATE

    return max(count(TEMPLATE.format(context="", query="")) + FWE_ANSWER, FWE_STEPS)


_NEEDS: dict[str, Callable[[Callable[[str], int], int], int]] = {
    "ruler_vt": _tracing,
    "ruler_cwe": _common_words,
    "ruler_fwe": _frequent_words,
}

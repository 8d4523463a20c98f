"""lm-eval's Hugging Face model: the same numbers and texts for any batch size, and the memory acts
in them.
"""

import pytest
from ecosystem.support import story

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

LENGTHS = (90, 40, 131, 61, 110)
CONTEXTS = [story(words, seed=words) for words in LENGTHS]
CONTINUATIONS = [story(20 + i, seed=i) for i in range(5)]


def requests(kind: str) -> list[Instance]:
    arguments = {
        "loglikelihood": list(zip(CONTEXTS, CONTINUATIONS)),
        "loglikelihood_rolling": [(text,) for text in CONTEXTS],
        "generate_until": [(text, {"until": ["<end>"], "max_gen_toks": 12}) for text in CONTEXTS],
    }[kind]
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def answers(lm: HFLM, kind: str) -> list:
    return getattr(lm, kind)(requests(kind), disable_tqdm=True)


@pytest.fixture(scope="module", params=["object", "path"])
def wrap(request, reference, reference_out):
    """wrap(batch_size) -> HFLM around a loaded model, or around the folder."""
    if request.param == "object":
        return lambda batch_size: HFLM(
            pretrained=reference[0], tokenizer=reference[1], batch_size=batch_size
        )
    path = {
        "pretrained": str(reference_out),
        "trust_remote_code": True,
        "dtype": "float64",
        "device": "cpu",
    }
    return lambda batch_size: HFLM(**path, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_loglikelihoods(wrap, kind):
    alone, together = answers(wrap(1), kind), answers(wrap(4), kind)
    assert _numbers(together) == pytest.approx(_numbers(alone), rel=1e-6)
    lm = wrap(4)
    with lm.model.memory_disabled():
        plain = _numbers(answers(lm, kind))
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain, _numbers(alone)))


@pytest.mark.works("lm-eval (HFLM), any batch size")
def test_generate_until(wrap):
    alone, together = answers(wrap(1), "generate_until"), answers(wrap(4), "generate_until")
    assert together == alone and all(alone)
    lm = wrap(4)
    with lm.model.memory_disabled():
        assert answers(lm, "generate_until") != alone


def test_both_ways_to_load_agree(reference, reference_out):
    path = HFLM(
        pretrained=str(reference_out), trust_remote_code=True, dtype="float64", device="cpu"
    )
    loaded = HFLM(pretrained=reference[0], tokenizer=reference[1])
    assert type(path.model).__name__ == type(loaded.model).__name__ == "PaceQwen2ForCausalLM"
    assert answers(path, "loglikelihood") == answers(loaded, "loglikelihood")


def _numbers(results: list) -> list[float]:
    return [result[0] if isinstance(result, tuple) else result for result in results]

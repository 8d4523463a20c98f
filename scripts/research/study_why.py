"""Why a fusion of activations moves no answer: where the base fails, what the memory does, what an
oracle could do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from study_forward import Memory, Reference, pick
from study_memory import EMBEDDING, Batch, Plain
from study_stories import KINDS, SELECTION_SEED, batches, kinds, make_stories, sources
from torch import Tensor
from train_reference import encode
from transformers import Qwen2ForCausalLM

from pace_convert.modeling.memory_settings import MemorySettings
from pace_convert.reference import reference_model

LOOK_UP_LAYER, LOOK_UP_HEAD, CAP, NEAR = 2, 0, 800, 600
INTERVAL = 64


def look_up(model: Reference, longest: int, count: int) -> list[dict]:
    """Accuracy and the look-up head's attention by length and by distance, and with distances
    capped.
    """
    records, pairs = [], []
    for length in (512, 1024, 1280, 1536, 2048, 3072, 4096, longest):
        number = count if length <= 2048 else count // 2 if length <= 4096 else count // 4
        parts = [
            _look_up_batch(model, *b)
            for b in batches(model, make_stories("multi8", length, number, SELECTION_SEED))
        ]
        cell = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
        depth = max(0.0, 1 - NEAR / length)
        near = [
            _look_up_batch(model, *b)
            for b in batches(model, make_stories("multi8", length, max(2, number // 2), 1, depth))
        ]
        means = {
            key: cell[key].float().mean().item()
            for key in ("right", "attention", "itself", "capped")
        }
        facts_near = torch.cat([p["right"] for p in near]).float().mean().item()
        records.append(
            {
                "table": "length",
                "length": length,
                "questions": cell["right"].numel(),
                **means,
                "facts_near": facts_near,
            }
        )
        if length in (2048, 4096):
            pairs.append(cell)
    pooled = {key: torch.cat([p[key].flatten() for p in pairs]) for key in pairs[0]}
    for low in range(0, 4096, 256):
        here = (pooled["distance"] >= low) & (pooled["distance"] < low + 256)
        if here.any():
            means = {
                key: pooled[key][here].float().mean().item()
                for key in ("right", "attention", "itself", "capped")
            }
            records.append(
                {
                    "table": "distance",
                    "low": low,
                    "high": low + 256,
                    "questions": int(here.sum()),
                    **means,
                }
            )
    return records


def _look_up_batch(model: Reference, batch: Batch, ask: Tensor, stories: list) -> dict[str, Tensor]:
    """By question [B, Q]: whether right, distance, attention on the fact's code and on itself,
    right with capped distances.
    """
    source, before = sources(stories), batch.trunk.before_ffn
    answers = batch.ids.gather(1, ask + 1)
    x = before[LOOK_UP_LAYER - 1] + model.layers[LOOK_UP_LAYER - 1].mlp.down_proj(
        batch.h(LOOK_UP_LAYER - 1)
    )
    weights = model.weights(LOOK_UP_LAYER, x, ask)[0][:, LOOK_UP_HEAD]
    capped = before[LOOK_UP_LAYER].scatter(
        1, ask[..., None].expand(-1, -1, x.shape[-1]), model.attend(LOOK_UP_LAYER, x, ask, CAP)
    )
    return {
        "right": pick(batch.trunk.logits, ask).argmax(-1) == answers,
        "distance": ask - source,
        "attention": weights.gather(2, source[..., None])[..., 0],
        "itself": weights.gather(2, ask[..., None])[..., 0],
        "capped": model.resume(capped, LOOK_UP_LAYER, ask, {}).argmax(-1) == answers,
    }


class _Watch:
    """What a plain memory of one layer does, token by token of a batch: filled while it runs."""

    def __init__(self, kind: Tensor) -> None:
        self.kind, self.best, self.decision, self.moved = (
            kind,
            torch.zeros(kind.shape),
            torch.zeros(kind.shape),
            torch.zeros(kind.shape),
        )
        self.origin: Tensor | None = None
        # By block: what each slot came from, and each token's top k.
        self.origins: list[tuple[Tensor, Tensor]] = []

    def __call__(self, first, h, fused, found, bank, draft) -> None:
        part = slice(first, first + h.shape[1])
        self.best[:, part], self.decision[:, part] = (
            found.best.clamp_min(-1),
            found.decision[..., 0].float(),
        )
        self.moved[:, part] = (fused - h).norm(dim=-1) / h.norm(dim=-1).clamp_min(1e-9)
        if self.origin is None:
            self.origin = torch.full(bank.valid.shape, -1)
        self.origins.append((self.origin, found.ranking))
        self.origin = torch.where(draft.taken, draft.number, self.origin)


def memory(model: Reference, length: int, count: int) -> list[dict]:
    """The plain memory in each layer alone, and where it is put by default: what it finds, holds
    and moves.
    """
    records = []
    for layers in ((0,), (1,), (2,), (3,), (1, 2)):
        settings = MemorySettings(layers=layers, update_interval=INTERVAL)
        parts = []
        for batch, ask, stories in batches(
            model, make_stories("multi8", length, count, SELECTION_SEED)
        ):
            watches = {layer: _Watch(kinds(stories)) for layer in layers}
            memories = {layer: Plain(settings, seen=watches[layer]) for layer in layers}
            logits = model.resume(batch.trunk.before_ffn[layers[0]], layers[0], ask, memories)
            parts.append(
                (
                    watches[layers[0]],
                    ask,
                    sources(stories),
                    pick(batch.trunk.logits, ask),
                    logits,
                    batch.ids,
                )
            )
        records.append(
            {"table": "effect", "layers": list(layers), "length": length, **_effect(parts)}
        )
        if len(layers) == 1:
            records += [
                {"table": "kind", "layers": list(layers), "length": length, **row}
                for row in _by_kind(parts)
            ]
            records.append(
                {"table": "bank", "layers": list(layers), "length": length, **_held(parts)}
            )
    return records


def _effect(parts: list) -> dict:
    """How far answers move: KL of the next word, the right answer's margin, flips."""
    base, now = (torch.cat([p[i].flatten(0, 1) for p in parts]) for i in (3, 4))
    answers = torch.cat([p[5].gather(1, p[1] + 1).flatten() for p in parts])
    kl = F.kl_div(now.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    change = _margin(now, answers) - _margin(base, answers)
    right, before = now.argmax(-1) == answers, base.argmax(-1) == answers
    return {
        "questions": len(answers),
        "kl_median": kl.median().item(),
        "kl_q95": kl.quantile(0.95).item(),
        "margin_change_mean": change.mean().item(),
        "margin_change_std": change.std().item(),
        "margin_abs_median_base": _margin(base, answers).abs().median().item(),
        "became_right": int((right & ~before).sum()),
        "became_wrong": int((~right & before).sum()),
    }


def _margin(logits: Tensor, answers: Tensor) -> Tensor:
    """The right answer's logit over the best other's."""
    right = logits.gather(1, answers[:, None])[:, 0]
    return right - logits.scatter(1, answers[:, None], -torch.inf).amax(1)


def _by_kind(parts: list) -> list[dict]:
    """By kind of token, once a bank is there: quantiles of s_max, decisions and movement |h' - h| /
    |h|.
    """
    best, decision, moved, kind = (
        torch.cat([getattr(p[0], name)[:, INTERVAL:].flatten() for p in parts])
        for name in ("best", "decision", "moved", "kind")
    )
    rows = []
    for number, name in enumerate(KINDS):
        here = kind == number
        quantiles = best[here].quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
        shares = [(decision[here] == state).float().mean().item() for state in range(3)]
        row = {
            "kind": name,
            "s_max_quantiles": quantiles,
            **dict(zip(("kept", "mixed", "reused"), shares)),
        }
        rows.append({**row, "moved_median": moved[here].median().item()})
    return rows


def _held(parts: list) -> dict:
    """What the slots came from at the end, and whether the asked fact's tokens are held and found
    when asked for.
    """
    origin = torch.cat([p[0].origin for p in parts])
    kind = torch.cat([p[0].kind.gather(1, p[0].origin.clamp_min(0)) for p in parts]).masked_fill(
        origin < 0, -1
    )
    held = {
        f"slots_{name}": (kind == number).float().mean().item() for number, name in enumerate(KINDS)
    }
    seen: dict[str, list[bool]] = {"code_held": [], "name_held": [], "fact_in_top_k": []}
    for watch, ask, source, *_ in parts:
        for row in range(len(ask)):
            for a, s in zip(ask[row].tolist(), source[row].tolist()):
                origins, ranking = (x[row] for x in watch.origins[a // INTERVAL])
                found = origins[ranking[a % INTERVAL, :5]].tolist()
                seen["code_held"].append(s in origins.tolist())
                seen["name_held"].append(s - 2 in origins.tolist())
                seen["fact_in_top_k"].append(any(t in found for t in (s, s - 1, s - 2)))
    return {**held, **{name: sum(found) / len(found) for name, found in seen.items()}}


ORACLES = (
    ("own", False, 0.2),
    ("own", False, 0.5),
    ("own", False, 1.0),
    ("contrast", True, 1.0),
    ("contrast", True, 2.0),
    ("residual", True, 1.0),
    ("residual", True, 2.0),
    ("residual", True, 4.0),
    ("word", True, 1.0),
    ("word", True, 2.0),
)


def _always(fused: Tensor) -> Memory:
    return lambda _: fused


def oracle(model: Reference, length: int, count: int) -> list[dict]:
    """Accuracy if the asking token is fused with the right fact's value, found by no search
    at all.
    """
    right: dict[tuple, list[Tensor]] = {}
    for batch, ask, stories in batches(
        model, make_stories("multi8", length, count, SELECTION_SEED)
    ):
        source, answers = sources(stories), batch.ids.gather(1, ask + 1)
        right.setdefault(("base", False, 0.0, 0), []).append(
            pick(batch.trunk.logits, ask).argmax(-1) == answers
        )
        for layer in range(len(model.layers)):
            h = batch.h(layer)
            for value, add, weight in ORACLES:
                found = pick(batch.values(value, layer), source)
                new = (
                    pick(h, ask) + weight * found
                    if add
                    else torch.lerp(pick(h, ask), found, weight)
                )
                fused = h.scatter(1, ask[..., None].expand(-1, -1, h.shape[-1]), new)
                memories = {layer: _always(fused)}
                logits = model.resume(batch.trunk.before_ffn[layer], layer, ask, memories)
                right.setdefault((value, add, weight, layer), []).append(
                    logits.argmax(-1) == answers
                )
    names = ("value", "added", "weight", "layer")
    return [
        {"table": "oracle", **dict(zip(names, key)), "accuracy": torch.cat(r).float().mean().item()}
        for key, r in right.items()
    ]


def retrieval(model: Reference, length: int, count: int) -> list[dict]:
    """How often the right fact's code is the most similar of all words before the questions, by
    kind of key.

    And how far the FFN's output at a code points to the code's own embedding.
    """
    keys = [
        (layer, lag, centre)
        for layer in (EMBEDDING, 0, 1, 2, 3)
        for lag in (0, 2)
        for centre in (False, True)
    ]
    first: dict[tuple, list[Tensor]] = {key: [] for key in keys}
    identity: dict[int, list[Tensor]] = {layer: [] for layer in range(len(model.layers))}
    for batch, ask, stories in batches(
        model, make_stories("multi8", length, count, SELECTION_SEED)
    ):
        source = sources(stories)
        for key in keys:
            layer, lag, centre = key
            x = F.pad(batch.h(layer), (0, 0, lag, 0))[:, : batch.ids.shape[1]]
            x = F.normalize(x - x.mean(1, keepdim=True) if centre else x, dim=-1)
            similarity = torch.matmul(pick(x, ask), x.transpose(1, 2))[..., : int(ask.min()) - 7]
            first[key].append(similarity.argmax(-1) == source)
        table = model.model.embed_tokens.weight
        words = (table - table.mean(0))[batch.ids.gather(1, source)]
        for layer, found in identity.items():
            out = model.layers[layer].mlp.down_proj(pick(batch.values("contrast", layer), source))
            found.append(F.cosine_similarity(out, words, dim=-1))
    rows = [
        {
            "table": "key",
            "layer": k[0],
            "lag": k[1],
            "centred": k[2],
            "first": torch.cat(v).float().mean().item(),
        }
        for k, v in first.items()
    ]
    return rows + [
        {"table": "identity", "layer": layer, "cosine": torch.cat(v).mean().item()}
        for layer, v in identity.items()
    ]


ROPES: dict[str, dict] = {
    "as trained": {"rope_type": "default"},
    "linear, factor 2": {"rope_type": "linear", "factor": 2.0},
    "dynamic NTK": {"rope_type": "dynamic", "factor": 2.0},
    "YaRN, factor 4": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "YaRN, factor 8": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
    },
}


def rope(_: Reference, longest: int, count: int) -> list[dict]:
    """Accuracy of the same weights with transformers' own RoPE scalings: the remedy that needs no
    memory.
    """
    rows = []
    for name, parameters in ROPES.items():
        scaled = Qwen2ForCausalLM.from_pretrained(
            reference_model(),
            rope_parameters={"rope_theta": 10000.0, **parameters},
            max_position_embeddings=1024,
        ).eval()
        for length in (512, 1024, 2048, 4096, longest):
            right = []
            for start in range(
                0, max(2, count * 1024 // max(length, 1024)), max(1, 16384 // length)
            ):
                stories = make_stories(
                    "multi8", length, max(1, 16384 // length), SELECTION_SEED + start
                )
                ids, marks = encode(stories)
                answers = marks[:, 1:].bool()
                right.append((scaled(ids).logits[:, :-1].argmax(-1) == ids[:, 1:])[answers].float())
            found = torch.cat(right)
            rows.append(
                {
                    "table": "rope",
                    "name": name,
                    "length": length,
                    "questions": len(found),
                    "accuracy": found.mean().item(),
                }
            )
    return rows


WHY = {  # by part: the work, a length, how many stories
    "look-up": (look_up, 8192, 24),
    "memory 512": (memory, 512, 24),
    "memory 2048": (memory, 2048, 16),
    "oracle": (oracle, 2048, 16),
    "rope": (rope, 8192, 48),
    "keys": (retrieval, 2048, 16),
}

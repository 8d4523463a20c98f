"""Train the reference model: a small Qwen2 that finds facts in long filler text.

    python scripts/research/train_reference.py --out pace_convert/reference/model

Deterministic for a seed and a thread count; a run that was stopped goes on from its last checkpoint
in --work-dir. Writes the model, its tokenizer, its card, `training.json` (the recipe, the curve and
the measured accuracies) and `training.png` into --out.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Template
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from pace_convert.reference.task import FACT_WORDS, LINK_WORDS, TURN_WORDS, Story, make_story
from pace_convert.reference.tokenizer import build_tokenizer, word_ids
from pace_convert.reference.words import END, PAD

MAX_LENGTH = 2048
TOKENIZER = build_tokenizer(MAX_LENGTH)
WORD_ID = word_ids(TOKENIZER)
CURRICULUM = (  # from this share of the steps on, one of these lengths a batch
    (0.00, (64, 96)),
    (0.10, (64, 96, 128)),
    (0.20, (64, 128, 256)),
    (0.35, (128, 256, 512)),
    (0.55, (128, 256, 512, 1024)),
)
TASKS = {  # facts, questions, links
    "single": (1, 1, 0),
    "multi4": (4, 4, 0),
    "multi8": (8, 8, 0),
    "two_hop": (4, 2, 2),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int
    steps: int
    threads: int
    tokens_per_batch: int = 4096
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_learning_rate_share: float = 0.05
    weight_decay: float = 0.01
    language_model_weight: float = 0.3
    two_hop_share: float = 0.2
    max_facts: int = 8
    guided_steps: int = 400
    guidance_weight: float = 0.5
    look_up_layer: int = 2


def build_model(seed: int) -> Qwen2ForCausalLM:
    """A fresh model: 4 layers, hidden 128, intermediate 512, tied embeddings, fp32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=WORD_ID[PAD],
        eos_token_id=WORD_ID[END],
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def training_stories(recipe: Recipe, step: int) -> list[Story]:
    """The stories of one step, all of one length; a function of seed and step only."""
    rng = np.random.default_rng([recipe.seed, step])
    lengths = [lengths for share, lengths in CURRICULUM if step >= share * recipe.steps][-1]
    length = int(rng.choice(lengths))
    stories = []
    for _ in range(recipe.tokens_per_batch // length):
        facts = int(rng.integers(1, min(recipe.max_facts, length // 20) + 1))
        links = int(rng.integers(1, 3)) if rng.random() < recipe.two_hop_share else 0
        room = (length - FACT_WORDS * facts - LINK_WORDS * links) // TURN_WORDS
        stories.append(make_story(rng, length, facts, min(room, facts), links))
    return stories


def encode(stories: list[Story]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stories of one length as ids and answer marks, both [batch, length]."""
    ids = torch.tensor([[WORD_ID[word] for word in story.words] for story in stories])
    marks = torch.zeros(ids.shape)
    for row, story in enumerate(stories):
        marks[row, [q.position for q in story.questions]] = 1.0
    return ids, marks


def guidance(
    attentions: tuple[torch.Tensor, ...], stories: list[Story], layer: int
) -> torch.Tensor:
    """How far head 0 of the first layer and of `layer` are from looking where the answer is.

    Left alone, a model was still guessing among the codes of the text after 1500 steps. So for the
    first steps we show it where to look (supervised attention: Liu et al. 2016, arXiv 1609.04186):
    from a code, and from the place that must answer, two words back to the name; and from the place
    that must answer to the code of the fact.
    """
    found = [
        (row, q.position - 1, q.source)
        for row, story in enumerate(stories)
        for q in story.questions
        if q.hops == 1
    ]
    if not found:
        return torch.zeros(())
    row, asking, source = torch.tensor(found).T
    back = torch.cat([attentions[0][row, 0, place, place - 2] for place in (asking, source)])
    up = attentions[layer][row, 0, asking, source]
    return -(back + 1e-6).log().mean() - (up + 1e-6).log().mean()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    share = recipe.final_learning_rate_share + (1 - recipe.final_learning_rate_share) * cosine
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * share


def train_step(
    model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int
) -> dict:
    """One step; returns the losses and the share of answers that were right."""
    stories = training_stories(recipe, step)
    ids, marks = encode(stories)
    guided = step < recipe.guided_steps
    model.set_attn_implementation("eager" if guided else "sdpa")  # only eager returns attentions
    output = model(ids, output_attentions=guided)
    logits, marks = output.logits[:, :-1], marks[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), -1
    )
    answer_loss = (losses * marks).sum() / marks.sum()
    loss = answer_loss + recipe.language_model_weight * losses.mean()
    if guided:
        loss = loss + recipe.guidance_weight * guidance(
            output.attentions, stories, recipe.look_up_layer
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    optimizer.step()
    optimizer.zero_grad()
    right = ((logits.argmax(-1) == ids[:, 1:]) * marks).sum() / marks.sum()
    return {
        "answer_loss": answer_loss.item(),
        "language_model_loss": losses.mean().item(),
        "right": right.item(),
    }


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, task: str, length: int, stories: int, seed: int) -> dict:
    """Share of held-out questions answered right: the arg max where the answer's word stands.

    Later questions of a story see the right answers to the earlier ones.
    """
    rng = np.random.default_rng([seed, length])
    right, asked, batch = 0, 0, max(1, 8192 // length)
    for start in range(0, stories, batch):
        group = [
            make_story(rng, length, *TASKS[task], held_out=True)
            for _ in range(min(batch, stories - start))
        ]
        ids, marks = encode(group)
        answers = marks[:, 1:].bool()
        predicted = model(ids).logits[:, :-1].argmax(-1)
        right += int((predicted == ids[:, 1:])[answers].sum())
        asked += int(answers.sum())
    return {"task": task, "length": length, "questions": asked, "accuracy": right / asked}


def save_checkpoint(path: Path, model, optimizer, step: int, curve: list, recipe: Recipe) -> None:
    """Written beside and renamed, so a stop in the middle leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "curve": curve,
    }
    torch.save({**state, "recipe": asdict(recipe)}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path, model, optimizer, recipe: Recipe) -> tuple[int, list]:
    """The next step and the curve so far; refuses a checkpoint of another recipe."""
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise click.ClickException(
            f"{path} was written with another recipe; use another --work-dir"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["curve"]


def train(recipe: Recipe, work_dir: Path, every: int = 100) -> tuple[Qwen2ForCausalLM, list[dict]]:
    """The trained model and its curve; a checkpoint after each `every` steps."""
    model = build_model(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    checkpoint = work_dir / "checkpoint.pt"
    start, curve = load_checkpoint(checkpoint, model, optimizer, recipe)
    progress = tqdm(
        range(start, recipe.steps), initial=start, total=recipe.steps, desc="train", mininterval=5
    )
    recent: list[dict] = []
    for step in progress:
        recent.append(train_step(model, optimizer, recipe, step))
        if (step + 1) % 50 == 0:
            point = {key: float(np.mean([r[key] for r in recent])) for key in recent[0]}
            recent.clear()
            if (step + 1) % 500 == 0:
                point["held_out"] = accuracy(model, "multi4", 256, 64, recipe.seed + 1)["accuracy"]
            curve.append({"step": step + 1, **point})
            progress.set_postfix({k: f"{v:.3f}" for k, v in point.items()})
        if (step + 1) % every == 0:
            save_checkpoint(checkpoint, model, optimizer, step + 1, curve, recipe)
    return model, curve


def measure(model: Qwen2ForCausalLM, seed: int, stories: int) -> list[dict]:
    """Held-out accuracy for each task at lengths inside the training's (up to 1024) and beyond
    (2048).
    """
    cells = [(task, length) for task in TASKS for length in (128, 256, 512, 1024, 2048)]
    cells = [(t, n) for t, n in cells if not (t == "multi8" and n < 256)]  # eight facts do not fit
    model.eval()
    model.set_attn_implementation("sdpa")
    return [accuracy(model, t, n, stories, seed + 2) for t, n in tqdm(cells, desc="measure")]


def plot_curve(curve: list[dict], path: Path) -> None:
    """Answer loss and accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [p["step"] for p in curve]
    left.plot(steps, [p["answer_loss"] for p in curve], label="answers")
    left.plot(steps, [p["language_model_loss"] for p in curve], label="all words")
    left.set(xlabel="step", ylabel="cross-entropy (nats)", title="training loss")
    left.legend()
    right.plot(
        steps, [p["right"] for p in curve], label="training batches, two-hop questions included"
    )
    held_out = [p for p in curve if "held_out" in p]
    right.plot(
        [p["step"] for p in held_out],
        [p["held_out"] for p in held_out],
        "o-",
        label="held-out, 4 facts, 256 words",
    )
    right.set(xlabel="step", ylabel="answers right", title="accuracy", ylim=(0, 1.02))
    right.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def save(model: Qwen2ForCausalLM, out: Path, report: dict) -> None:
    """Model, tokenizer, card, report and picture."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        pad_token_id=WORD_ID[PAD], eos_token_id=WORD_ID[END], max_new_tokens=4, do_sample=False
    )
    model.save_pretrained(out)
    # Safetensors writes files that only their owner may read.
    (out / "model.safetensors").chmod(0o644)
    TOKENIZER.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_curve(report["curve"], out / "training.png")
    template = Template(
        Path(__file__).with_name("reference_card.md.jinja").read_text(), trim_blocks=True
    )
    (out / "README.md").write_text(template.render(report=report, config=model.config) + "\n")


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the model goes.")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), default=Path("runs/reference"), show_default=True
)
@click.option("--steps", default=4600, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Part of the recipe: sums round differently.",
)
@click.option(
    "--stories",
    default=400,
    show_default=True,
    type=click.IntRange(1),
    help="Stories per measured accuracy.",
)
def main(out: Path, work_dir: Path, steps: int, seed: int, threads: int, stories: int) -> None:
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed, steps=steps, threads=threads)
    started = time.time()
    model, curve = train(recipe, work_dir)
    report: dict = {
        "recipe": asdict(recipe),
        "curriculum": [{"from_share": share, "lengths": lengths} for share, lengths in CURRICULUM],
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "minutes_of_last_run": round((time.time() - started) / 60, 1),
        "accuracy": measure(model, seed, stories),
        "curve": curve,
    }
    save(model, out, report)
    for cell in report["accuracy"]:
        click.echo("{task:8} length {length:5}  {accuracy:7.2%} of {questions}".format(**cell))


if __name__ == "__main__":
    main()

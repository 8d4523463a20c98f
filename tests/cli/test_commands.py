"""The commands as a user calls them."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import asdict

import pytest
from helpers import pace_convert

from pace_convert.families import FAMILIES
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_settings import RereadSettings
from pace_convert.options import (
    EXPERT_OPTIONS,
    PRESETS,
    RECALL_OPTIONS,
    WINDOW_OPTIONS,
    ConvertOptions,
    option_name,
)
from pace_convert.reference.tokenizer import build_tokenizer


@pytest.mark.parametrize("memory", [(), ("--no-memory",)])
def test_convert_prints_what_was_made_and_how_to_load_it(make_source, tmp_path, memory):
    out = tmp_path / "out"
    source = make_source("qwen2")
    build_tokenizer(512).save_pretrained(source)
    done = pace_convert(source, out, "--experts", 8, *memory)
    assert done.returncode == 0, done.stderr
    assert "from_pretrained(" in done.stdout and ("trust_remote_code=True" in done.stdout) == (
        not memory
    )
    assert "converted 4 layers" in done.stderr and "by a short measurement" in done.stderr
    snippet = "\n".join(
        line.strip() for line in done.stdout.splitlines() if line.startswith("    ")
    )
    check = "\nassert tokenizer('the code of ada').input_ids and model.device"
    loaded = subprocess.run(
        [sys.executable, "-c", snippet + check],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert loaded.returncode == 0 and "[y/N]" not in loaded.stdout, loaded.stderr


def test_json_goes_to_stdout_and_quiet_is_quiet(make_source, tmp_path):
    source = make_source("qwen2")
    done = pace_convert(source, tmp_path / "out", "--experts", 8, "--json", "-q")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == [
        "plan",
        *["task"] * 5,
        "done",
    ] and done.stderr == ""
    assert (
        events[-1]["tensors"] == 51
        and events[-2]["bytes_done"] == events[-2]["bytes_total"] == events[-1]["bytes"]
    )
    done = pace_convert(tmp_path / "out", "--source", source, "--json", "-q", command=("verify",))
    assert json.loads(done.stdout)["passed"] is True
    done = pace_convert(tmp_path / "out", "--json", command=("inspect",))
    facts = json.loads(done.stdout)
    assert facts["memory"]["layers"] == [1, 2] and facts["layers"][3]["sizes"] == {"9": 8}


def test_the_exact_method_says_how_many_neurons_it_moved(make_source, tmp_path):
    done = pace_convert(
        make_source("qwen2"), tmp_path / "out", "--experts", 8, "--cluster-method", "exact", "-q"
    )
    assert (
        done.returncode == 0 and "of 288 neurons from where the fast method had them" in done.stdout
    ), done.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(make_source, tmp_path):
    source = make_source("llama")
    done = pace_convert(source, tmp_path / "out", "--experts", 8, "--dry-run")
    assert (
        done.returncode == 0
        and "layers 1, 2" in done.stdout
        and "LlamaForCausalLM, 4 layers" in done.stdout
    )
    plan = json.loads(
        pace_convert(source, tmp_path / "out", "--experts", 8, "--dry-run", "--json").stdout
    )
    assert plan["memory_layers"] == [1, 2] and plan["tensors_permuted"] == 20
    assert not (tmp_path / "out").exists()


def test_the_plan_shows_what_the_memory_will_do(make_source, tmp_path):
    chosen = ("--granularity", "expert", "--theta-high", 0.6, "--theta-low", 0.1, "--top-k", 3)
    words = ("granularity expert", "reuses above 0.6, mixes above 0.1", "3 similar and 2 dissim")
    source, out = make_source("llama"), tmp_path / "out"
    shown = pace_convert(source, out, "--experts", 8, "--dry-run", *chosen).stdout
    assert all(word in shown for word in words), shown
    shown = pace_convert(source, out, "--experts", 8, "--dry-run").stdout
    assert "whole activations (granularity token): reuses above 0.75, mixes above 0.25" in shown
    shown = pace_convert(source, out, "--experts", 8, "--dry-run", "--memory-layers", "none").stdout
    assert "memory     none, in no layer" in shown


def test_verify_says_so_with_numbers(qwen2_pair):
    done = pace_convert(qwen2_pair[1], "--source", qwen2_pair[0], command=("verify",))
    assert done.returncode == 0
    assert (
        "51 of 51 bit-identical" in done.stdout
        and "largest difference" in done.stdout
        and "verified" in done.stdout
    )


def test_inspect_names_what_was_converted(qwen2_pair):
    text = pace_convert(qwen2_pair[1], command=("inspect",)).stdout
    for words in ("pace_qwen2 made from qwen2", "in layers 1, 2", "update_interval   5", "8 x 9"):
        assert words in text


def test_families_lists_the_table():
    text = pace_convert(command=("families",)).stdout
    rows = json.loads(pace_convert("--json", command=("families",)).stdout)
    assert [row["model_type"] for row in rows] == list(FAMILIES) == sorted(FAMILIES)
    assert [line.split()[0] for line in text.splitlines()] == ["model_type", *FAMILIES]


def test_options_reach_the_config(make_source, tmp_path):
    source = make_source("qwen2")
    values = {
        "experts": 4, "seed": 3, "memory_layers": "0,3", "slots": 9, "theta_high": 0.6,
        "theta_low": -0.5, "top_k": 3, "bottom_k": 0, "fusion_weight": 0.3, "reuse_weight": 0.9,
        "mix_weight": 0.4, "noise_weight": 0.05, "momentum": 0.7, "update_interval": 77,
        "cluster_method": "exact", "exact_restarts": 2, "granularity": "expert",
        "outlier_norm": 3.5, "window": 100, "reread_layer": 3, "first_tokens": 8, "spans": 5,
        "span_width": 32, "stand_out": 0.25, "key_size": 48, "bank_tokens": 5000,
        "look_up_interval": 6,
        "memory": "fusion,reread,recall", "recall_layers": "1,2", "recall_sharpness": 9.5,
        "recall_bias": -3.0, "recall_slope": 2.5, "recall_growth": 0.25,
        "recall_theta_low": 0.125, "recall_key_size": 24, "recall_agreement": 0.5,
        "recall_run_weight": 0.75, "recall_model_weight": 0.625, "recall_beyond": 3,
    }  # fmt: skip
    others = {"no_memory", "no_experts", "preset"}
    assert {*values, "match_norm"} == set(ConvertOptions.model_fields) - others
    arguments = [part for name, value in values.items() for part in (option_name(name), value)]
    assert pace_convert(source, tmp_path / "out", *arguments, "--no-match-norm").returncode == 0
    values["match_norm"] = False
    pace = json.loads((tmp_path / "out" / "config.json").read_text())["pace"]
    assert pace["experts"] == {"count": 4, "method": "exact", "seed": 3, "restarts": 2}
    memory = {
        name: value
        for name, value in values.items()
        if name
        not in (*EXPERT_OPTIONS, *WINDOW_OPTIONS, *RECALL_OPTIONS, "memory_layers", "memory")
    }
    window, recall = pace["memory"].pop("window"), pace["memory"].pop("recall")
    assert pace["memory"] == {"enabled": True, "layers": [0, 3], **memory}
    assert window == asdict(
        RereadSettings(**{WINDOW_OPTIONS[n]: values[n] for n in WINDOW_OPTIONS})
    )
    usual = {**asdict(RecallSettings()), "outside": list(RecallSettings().outside)}
    for name in set(usual) - set(RECALL_OPTIONS.values()):  # without an option of their own
        assert recall.pop(name) == usual[name]
    assert recall == {**{RECALL_OPTIONS[n]: values[n] for n in RECALL_OPTIONS}, "layers": [1, 2]}


def test_help_shows_examples():
    text = pace_convert("--help", command=()).stdout
    for command in ("convert", "verify", "inspect", "eval", "push", "undo"):
        assert f"  pace {command} " in text[: text.index("Options:")]


def test_preset_on_the_command_line(make_source, tmp_path):
    assert (
        pace_convert(
            make_source("qwen2"), tmp_path / "out", "--preset", "paper", "--slots", 9
        ).returncode
        == 0
    )
    memory = json.loads((tmp_path / "out" / "config.json").read_text())["pace"]["memory"]
    assert memory.pop("window")["layer"] == 1 and memory.pop("recall")["layers"] == [3]
    assert memory == {"enabled": True, "layers": [1, 2], **PRESETS["paper"], "slots": 9}


def test_a_folder_from_before_these_parameters(make_source, tmp_path):
    """What its own files do is shown, not what a conversion would do today."""
    assert pace_convert(make_source("qwen2"), tmp_path / "out", "--experts", 8).returncode == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in ("match_norm", "outlier_norm"):
        del config["pace"]["memory"][name]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    shown = json.loads(pace_convert("--json", tmp_path / "out", command=("inspect",)).stdout)
    assert (shown["memory"]["match_norm"], shown["memory"]["outlier_norm"]) == (False, 0.0)


def test_help_groups_the_methods_options():
    text = pace_convert("--help").stdout
    assert (
        text.index("Options:")
        < text.index("Experts:")
        < text.index("Memory:")
        < text.index("--theta-high")
    )


def test_progress_bar_on_a_terminal(make_source, tmp_path):
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    code = "from pace_convert.cli.main import pace; pace()"
    arguments = ["convert", str(make_source("qwen2")), str(tmp_path / "out"), "--experts", "8"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=terminal, stdout=subprocess.DEVNULL
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    assert b"converting: 100%" in shown and b"B/s" in shown and b"layer 4 of 4" in shown

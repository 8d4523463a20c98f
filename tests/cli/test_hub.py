"""A source on the Hub, through the unmodified client and a server on loopback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import hashes, refuse
from hub_server import Hub, Repository

from pace_convert.reference.tokenizer import build_tokenizer

REPO = "acme/tiny-qwen"


@pytest.fixture
def hub(make_source, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(make_source("qwen2", shards=True), folder)
    build_tokenizer(512).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled twin, not to be downloaded")
    (folder / "notes[1].txt").write_text("a name that is also a pattern")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Tiny\n")
    with Hub({REPO: Repository(folder)}) as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    def run(*args, **environment):
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        command = [
            sys.executable,
            "-c",
            "from pace_convert.cli.main import pace; pace()",
            *map(str, args),
        ]
        return subprocess.run(
            command, capture_output=True, text=True, env={**kept, **settings, **environment}
        )

    return run


def test_convert_from_the_hub(hub, run, tmp_path):
    out = tmp_path / "out"
    done = run("convert", REPO, out, "--experts", 8)
    assert done.returncode == 0, done.stderr
    wanted = {p.name for p in hub.repositories[REPO].folder.iterdir()} - {"pytorch_model.bin"}
    assert hub.downloaded() == wanted
    card = (out / "README.md").read_text()
    assert (
        f'base_model: "{REPO}"' in card
        and 'license: "mit"' in card
        and hub.repositories[REPO].sha in card
    )
    assert (out / "tokenizer.json").exists() and len(list(out.glob("model-*.safetensors"))) > 1
    done = run("verify", out, "--source", REPO, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["different"] == [] and result["same_tokens"] and result["logits_match"]


def test_dry_run_reads_headers_and_no_weights(hub, run, tmp_path):
    done = run("convert", REPO, tmp_path / "out", "--experts", 8, "--dry-run")
    assert done.returncode == 0 and "layers 1, 2" in done.stdout, done.stderr
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_found_before_the_download(hub, run, tmp_path):
    refuse(run("convert", REPO, tmp_path / "out", "--experts", 9999), 2, "--experts 9999")
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_revision(hub, run, tmp_path):
    assert (
        run(
            "convert", REPO, tmp_path / "out", "--experts", 8, "--revision", "1" * 40, "--dry-run"
        ).returncode
        == 0
    )
    refuse(
        run("convert", REPO, tmp_path / "no", "--revision", "v9"),
        2,
        "no such revision",
        out=tmp_path / "no",
    )


def test_private_repository_needs_the_token(hub, run, tmp_path):
    hub.repositories[REPO].token = "hf_right"
    refuse(
        run("convert", REPO, tmp_path / "out"),
        2,
        "no such repository",
        "--token",
        out=tmp_path / "out",
    )
    refuse(
        run("convert", REPO, tmp_path / "out", "--token", "hf_wrong"),
        2,
        "no such repository",
        out=tmp_path / "out",
    )
    assert (
        run(
            "convert", REPO, tmp_path / "a", "--experts", 8, "--token", "hf_right", "--dry-run"
        ).returncode
        == 0
    )
    assert (
        run(
            "convert", REPO, tmp_path / "b", "--experts", 8, "--dry-run", HF_TOKEN="hf_right"
        ).returncode
        == 0
    )


def test_gated_repository(hub, run, tmp_path):
    hub.repositories[REPO].gated, hub.repositories[REPO].token = True, "hf_right"
    refuse(
        run("convert", REPO, tmp_path / "out"),
        2,
        "is gated",
        "accept its terms",
        out=tmp_path / "out",
    )


def test_pickled_only_is_refused_without_a_download(hub, run, tmp_path):
    for path in hub.repositories[REPO].folder.glob("*.safetensors*"):
        path.unlink()
    refuse(run("convert", REPO, tmp_path / "out"), 2, "only pickled weights", out=tmp_path / "out")
    assert hub.downloaded() == set()


def test_unknown_repository(run, tmp_path):
    refuse(
        run("convert", "acme/absent", tmp_path / "out"),
        2,
        "no such repository on the Hub: acme/absent",
        out=tmp_path / "out",
    )


def test_server_out_of_order(hub, run, tmp_path):
    hub.hook = lambda *_: 500
    refuse(
        run("convert", REPO, tmp_path / "out"),
        1,
        "the Hub did not give acme/tiny-qwen",
        out=tmp_path / "out",
    )


def test_no_network(run, tmp_path):
    done = run("convert", REPO, tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9")
    refuse(done, 1, "the Hub did not give", "network", out=tmp_path / "out")


OFFLINE = [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]


@pytest.mark.parametrize(
    "away",
    [
        pytest.param(OFFLINE[0], id="offline", marks=pytest.mark.slow),
        pytest.param(OFFLINE[1], id="no network"),
        pytest.param("broken", id="broken", marks=pytest.mark.slow),
    ],
)
def test_a_source_that_is_whole_in_the_cache_needs_no_hub(hub, run, tmp_path, away):
    online, out = tmp_path / "online", tmp_path / "out"
    assert run("convert", REPO, online, "--experts", 8).returncode == 0
    if away == "broken":
        away, hub.hook = {}, lambda *_: 503
    done = run("convert", REPO, out, "--experts", 8, **away)
    assert done.returncode == 0, done.stderr
    said = f"{REPO}: the Hub is out of reach; taking commit {hub.repositories[REPO].sha} from its"
    assert said in done.stderr and "without" not in done.stderr
    assert hashes(out) == hashes(online)
    done = run("verify", out, "--source", REPO, **away)
    assert done.returncode == 0 and said in done.stderr, done.stderr
    done = run("convert", REPO, out, "--experts", 8, "--resume", **away)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_the_cache_lacks_is_said(hub, run, tmp_path):
    out = tmp_path / "out"
    refuse(run("convert", REPO, out, **OFFLINE[0]), 1, f"its cache has no {REPO}", out=out)
    assert run("convert", REPO, out, "--experts", 8, "--dry-run").returncode == 0
    done = run("convert", REPO, out, "--experts", 8, **OFFLINE[0])
    refuse(done, 1, "not whole in the Hub's cache", "model-00001", "is missing", out=out)
    assert run("convert", REPO, tmp_path / "a", "--experts", 8).returncode == 0
    refuse(
        run("convert", REPO, out, "--revision", "v9", **OFFLINE[0]),
        1,
        f"its cache has no {REPO} at v9",
        out=out,
    )
    (snapshot,) = (tmp_path / "cache").glob("models--*/snapshots/*")
    (snapshot / "README.md").unlink()
    done = run("convert", REPO, out, "--experts", 8, **OFFLINE[0])
    assert done.returncode == 0 and "from its cache, without README.md" in done.stderr


@pytest.mark.slow
def test_what_is_asked_for_is_taken_from_the_cache_or_missed(hub, run, tmp_path):
    online, out = tmp_path / "online", tmp_path / "out"
    arguments = ("--experts", 8, "--include", "pytorch_*", "--include", ".env")
    (hub.repositories[REPO].folder / ".env").write_text("TOKEN=1")
    assert run("convert", REPO, online, "--experts", 8).returncode == 0
    assert "other weights" in run("convert", REPO, out, "--dry-run", **OFFLINE[0]).stdout
    done = run("convert", REPO, out, *arguments, **OFFLINE[0])
    refuse(done, 1, "--include asks for .env, which is not in the Hub's cache", out=out)
    done = run("convert", REPO, out, "--experts", 8, "--include", "*.xyz", **OFFLINE[0])
    refuse(done, 2, "--include *.xyz fits no file of the source", out=out)
    shutil.rmtree(online)
    assert run("convert", REPO, online, *arguments).returncode == 0
    done = run("convert", REPO, out, *arguments, **OFFLINE[0])
    assert done.returncode == 0, done.stderr
    assert (out / "pytorch_model.bin").exists() and hashes(out) == hashes(online)

"""From a source on the Hub to a PaceLLM on the Hub: real client, real HTTP, real bytes, interrupted and refused."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import ACTIVE, ALONE, convert_folder, load
from hub_server import FIRST, Hub, Repository, User
from test_errors import refuse

from pace_convert.card import is_untouched
from pace_convert.converted import open_converted
from pace_convert.reference.tokenizer import build_tokenizer

SOURCE = "acme/tiny-qwen"
CARD = "---\nlicense: llama3.1\nlanguage: [en, no]\n---\n# Tiny\nWritten by hand.\n"


@pytest.fixture(scope="module")
def source(make_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "remote"
    shutil.copytree(make_source("qwen2", shards=True), folder)
    build_tokenizer(512).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("the licence")
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A finished conversion; tests that change it copy it."""
    out = tmp_path_factory.mktemp("push") / "out"
    convert_folder(source, out)
    return out


@pytest.fixture
def hub(source):
    users = {"hf_ann": User("ann", ("acme",)), "hf_reader": User("ann", ("acme",), "read"), "hf_bob": User("bob")}
    repositories = {SOURCE: Repository(source), "acme/there": Repository(source)}
    with Hub(repositories, datasets=("acme/data",), users=users) as server:
        yield server


@pytest.fixture
def command(hub, tmp_path):
    """command(...) -> the arguments of a process that runs `pace ...` far from the network and the user's login."""

    def command(*args, **environment):
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_ann",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        arguments = [sys.executable, "-c", "from pace_convert.cli import pace; pace()", *map(str, args)]
        return {"args": arguments, "env": {**kept, **settings, **environment}}

    return command


@pytest.fixture
def run(command):
    return lambda *args, **environment: subprocess.run(**command(*args, **environment), capture_output=True, text=True)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Loads by name at a commit, generates with the memory on, where pace_convert can't be imported.
BY_NAME = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
name, revision = sys.argv[1:]
options = {"revision": revision, "trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64, **options).eval()
ids = AutoTokenizer.from_pretrained(name, **options)("the code of ada is four", return_tensors="pt").input_ids % 120
cache = DynamicCache(config=model.config)
tokens = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
filled = [layer["filled"] for layer in model.memory_summary(cache).values()]
print(json.dumps({"ids": ids.tolist(), "tokens": tokens.tolist(), "filled": filled}))
"""


def test_full_circle(hub, run, command, tmp_path):
    """Source on the Hub -> convert -> push -> load by name at the commit -> generate; all in processes of their own."""
    out, options = tmp_path / "out", [f"--{name.replace('_', '-')}={value}" for name, value in ACTIVE.items()]
    done = run("convert", SOURCE, out, *options, "--push-to-hub", "acme/tiny-pace", "--private", "--json", "-q")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    pushed = json.loads(done.stdout)["pushed"]
    assert pushed["verification"]["passed"] and pushed["repo"] == "acme/tiny-pace"

    repository = hub.repositories["acme/tiny-pace"]
    assert repository.private and len(repository.branches["main"]) == 3
    there, here = repository.files(), files_of(out)
    assert {name: data for name, data in there.items() if name != "README.md"} == repository.files(pushed["commit"])
    card, local = there.pop("README.md").decode(), here.pop("README.md").decode()
    assert there == here
    assert f'name = "acme/tiny-pace"\nrevision = "{pushed["commit"]}"\n' in card
    assert "all 51 tensors" in card and is_untouched(card.encode())
    assert 'name = "."' in local and "Nothing had been compared" in local and is_untouched(local.encode())

    call = command()
    alone = [sys.executable, "-I", "-c", ALONE + BY_NAME, "acme/tiny-pace", pushed["commit"]]
    environment = {**call["env"], "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_CACHE": str(tmp_path / "elsewhere")}
    loaded = subprocess.run(alone, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert loaded.returncode == 0, loaded.stderr
    result = json.loads(loaded.stdout.splitlines()[-1])
    expected = load(out).generate(torch.tensor(result["ids"]), max_new_tokens=20, do_sample=False)
    assert result["tokens"] == expected.tolist() and len(result["filled"]) == 2 and min(map(min, result["filled"])) > 0


def test_pushing_again_changes_nothing_and_a_change_moves_the_pin(hub, run, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    done = [run("push", out, "acme/again") for _ in range(2)]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr
    repository = hub.repositories["acme/again"]
    assert done[0].stdout == done[1].stdout and f"Pushed to {hub.url}/acme/again" in done[0].stdout
    assert f'revision = "{repository.branches["main"][1]}"' in done[0].stdout
    assert len(repository.branches["main"]) == 3
    (out / "LICENSE").write_text("the licence, corrected")
    (out / ".env").write_text("SECRET=1")
    (out / "model.safetensors").write_text("weights of an earlier upload")
    repository.add(
        "main", {**repository.files(), "model.safetensors": (out / "model.safetensors").read_bytes(), "notes.txt": b""}
    )
    (out / "model.safetensors").unlink()
    edited = (out / "README.md").read_text().replace("What it can't do", "My own words")
    (out / "README.md").write_text(edited)
    with (out / "memory_bank.py").open("a") as file:
        file.write("# mine\n")
    done = run("push", out, "acme/again", "--json")
    assert done.returncode == 0 and "memory_bank.py is not as this version ships it" in done.stderr, done.stderr
    commit = json.loads(done.stdout)["commit"]
    assert repository.branches["main"][1] == commit
    there = repository.files(commit)
    assert "notes.txt" in there and not {".env", "model.safetensors"} & set(there), (
        "weights of an earlier upload would be loaded"
    )
    card = repository.files()["README.md"].decode()
    assert "My own words" in card and commit in card and not is_untouched(card.encode())


def test_killed_in_the_middle_it_goes_on(hub, command, run, made):
    """The third large file arrives in part; the next run sends what is missing, and nothing twice."""
    process, sent = None, []

    def kill(method, path):
        if method == "PUT":
            sent.append(path)
            if len(sent) == 3:
                while len(hub.stored) < 2:
                    time.sleep(0.01)
                process.kill()

    hub.hook = kill
    process = subprocess.Popen(**command("push", made, "acme/killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.wait() == -9 and hub.repositories["acme/killed"].branches["main"] == [FIRST]
    hub.hook, stored = None, set(hub.stored)
    done = run("push", made, "acme/killed")
    assert done.returncode == 0, done.stderr
    assert stored and all(hub.asked("PUT", oid) == 1 for oid in stored) and len(hub.stored) > len(stored)
    there = hub.repositories["acme/killed"].files()
    here = files_of(made)
    assert {name: there[name] for name in here if name != "README.md"} == {n: d for n, d in here.items() if n != "README.md"}


def test_a_server_out_of_order_for_a_moment_and_for_longer(hub, run, made):
    """A 5xx answer to a large file is retried; one to the commit ends the upload, and the next run goes on."""
    once = {"/objects/batch": 503, "/lfs/": 500}
    hub.hook = lambda _, path: next(
        (once.pop(part) for part in list(once) if part in path), 502 if "/commit/" in path else None
    )
    refuse(run("push", made, "acme/ill"), 1, "the Hub did not take acme/ill", "502", "it goes on where it stopped")
    assert not once
    hub.hook, sent = None, hub.asked("PUT", "/lfs/")
    assert run("push", made, "acme/ill").returncode == 0
    assert hub.asked("PUT", "/lfs/") == sent


REFUSED = {
    "not logged in": (["acme/new"], {"HF_TOKEN": ""}, 2, ["not logged in", "hf auth login"]),
    "wrong token": (["acme/new", "--token", "hf_wrong"], {}, 2, ["does not accept this token", "hf auth login"]),
    "token that reads": (["acme/new"], {"HF_TOKEN": "hf_reader"}, 2, ["may only read", "/settings/tokens"]),
    "no write permission": (["acme/there"], {"HF_TOKEN": "hf_bob"}, 2, ["may not write to acme/there", "ask for write access"]),
    "someone else's name": (["acme/new"], {"HF_TOKEN": "hf_bob"}, 2, ["bob is not a member of acme", "a name under bob"]),
    "a dataset": (["acme/data"], {}, 2, ["acme/data is the name of a dataset", "choose another name"]),
    "no organisation": (["new"], {}, 2, ["new is not the name", "ORG/NAME"]),
    "not a name": (["acme/a..b"], {}, 2, ["acme/a..b is not a name", "ORG/NAME"]),
    "two ways": (["acme/there", "--create-pr", "--branch", "x"], {}, 2, ["--create-pr", "leave one of the two out"]),
    "nowhere to ask": (["acme/new", "--create-pr"], {}, 2, ["no acme/new to open a pull request in"]),
    "public already": (["acme/there", "--private"], {}, 2, ["acme/there exists and is public"]),
    "no network": (["acme/new"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, ["the Hub did not take acme/new", "network"]),
    "offline": (["acme/new"], {"HF_HUB_OFFLINE": "1"}, 1, ["HF_HUB_OFFLINE", "unset it"]),
    "without Xet": (["acme/new"], {"HF_HUB_DISABLE_XET": "0"}, 1, ["Xet", "HF_HUB_DISABLE_XET=1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(hub, run, made, case):
    arguments, environment, code, words = REFUSED[case]
    refuse(run("push", made, *arguments, **environment), code, *words)
    assert hub.repositories["acme/there"].branches == {"main": [FIRST]} and not hub.stored
    assert "acme/new" not in hub.repositories or case == "without Xet"


def test_branch_and_pull_request_leave_main_alone(hub, run, made):
    repository = hub.repositories["acme/there"]
    done = run("push", made, "acme/there", "--revision", "pace/v1", "--commit-message", "First words")
    assert done.returncode == 0 and f"{hub.url}/acme/there/tree/pace/v1" in done.stdout, done.stderr
    asked = json.loads(run("push", made, "acme/there", "--create-pr", "--json", HF_TOKEN="hf_bob").stdout)
    assert asked["pull_request"] == asked["url"] == f"{hub.url}/acme/there/discussions/1" and asked["branch"] == "refs/pr/1"
    assert repository.branches["main"] == [FIRST]
    for branch in ("pace/v1", "refs/pr/1"):
        assert "modeling_pace.py" in repository.files(branch) and len(repository.branches[branch]) == 3
        assert repository.branches[branch][1] in repository.files(branch)["README.md"].decode()


def test_a_folder_that_is_not_whole_or_not_its_source_stays_here(hub, run, source, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    other = shutil.copytree(source, tmp_path / "other")
    shard = next(other.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    refuse(run("push", out, "acme/new", "--source", other), 1, "is not its source, permuted", "nothing was uploaded")
    (out / "memory_cache.py").unlink()
    refuse(run("push", out, "acme/new"), 1, "has no memory_cache.py", "convert again")
    refuse(run("push", source, "acme/new"), 2, "is not a PaceLLM")
    assert "acme/new" not in hub.repositories and not hub.stored


def test_push_to_hub_is_checked_before_any_work(hub, run, source, tmp_path):
    out = tmp_path / "out"
    cases = [
        (["acme/new"], {"HF_TOKEN": "hf_reader"}, ["may only read"]),
        (["acme/data"], {}, ["is the name of a dataset"]),
        ([SOURCE], {}, [f"{SOURCE} is the source itself"]),
    ]
    for arguments, environment, words in cases:
        refuse(run("convert", SOURCE, out, "--experts", 8, "--push-to-hub", *arguments, **environment), 2, *words, out=out)
    refuse(run("convert", SOURCE, out, "--private"), 2, "--private", "--push-to-hub", out=out)
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())
    bad = shutil.copytree(source, tmp_path / "bad")
    (bad / "README.md").write_text(CARD.replace("llama3.1", "my own"))
    done = run("convert", bad, out, "--experts", 8, "--push-to-hub", "acme/new")
    refuse(done, 2, "refuses the metadata", "license", "README.md", out=out)


def test_an_upload_that_fails_leaves_the_conversion_finished(hub, run, source, tmp_path):
    out = tmp_path / "out"
    hub.hook = lambda _, path: 403 if "/commit/" in path else None
    done = run("convert", source, out, "--experts", 8, "--push-to-hub", "acme/failed")
    refuse(done, 1, "may not write to acme/failed", f"{out} is finished", f"pace push {out} acme/failed --source {source}")
    assert f"Made {out}" in done.stdout and open_converted(out)
    hub.hook = None
    assert run("push", out, "acme/failed").returncode == 0

"""From a source on the Hub to a PaceLLM on the Hub: real client, real HTTP, real bytes, interrupted
and refused.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import httpx2
import pytest
import torch
from helpers import ACTIVE, ALONE, convert_folder, load
from hub_server import FIRST, Hub, Repository, User
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from test_errors import refuse

from pace_convert.checkpoint.hub_errors import READING, WRITING, hub_errors
from pace_convert.converted.card import is_untouched
from pace_convert.converted.opened import open_converted
from pace_convert.errors import CallError, PaceError
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
    users = {
        "hf_ann": User("ann", ("acme",)),
        "hf_reader": User("ann", ("acme",), "read"),
        "hf_bob": User("bob"),
    }
    repositories = {SOURCE: Repository(source), "acme/there": Repository(source)}
    with Hub(repositories, datasets=("acme/data",), users=users) as server:
        yield server


@pytest.fixture
def command(hub, tmp_path):
    """command(...) -> the arguments of a process that runs `pace ...` far from the network and the
    user's login.
    """

    def command(*args, **environment):
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_ann",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        arguments = [
            sys.executable,
            "-c",
            "from pace_convert.cli.main import pace; pace()",
            *map(str, args),
        ]
        return {"args": arguments, "env": {**kept, **settings, **environment}}

    return command


@pytest.fixture
def run(command):
    return lambda *args, **environment: subprocess.run(
        **command(*args, **environment), capture_output=True, text=True
    )


@pytest.fixture
def run_many(command):
    """run_many([(arguments, token), ...]): several commands in one process, each by the user with
    this token.
    """

    def run_many(calls):
        call, pairs = command(), [([*map(str, arguments)], token) for arguments, token in calls]
        done = subprocess.run(
            [sys.executable, "-c", MANY, json.dumps(pairs)],
            env=call["env"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [subprocess.CompletedProcess(*one) for one in json.loads(done.stdout)]

    return run_many


MANY = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from pace_convert.cli.main import pace
done = []
for arguments, os.environ["HF_TOKEN"] in json.loads(sys.argv[1]):
    with redirect_stderr(io.StringIO()) as errors, redirect_stdout(io.StringIO()) as out:
        try:
            pace(arguments)
        except SystemExit as end:
            done.append([arguments, end.code, out.getvalue(), errors.getvalue()])
print(json.dumps(done))
"""


def files_of(folder):
    """Those that are uploaded: none that is hidden."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Loads by name at a commit, generates with the memory on, where pace_convert can't be imported.
BY_NAME = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
name, revision = sys.argv[1:]
options = {"revision": revision, "trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64, **options).eval()
tokenizer = AutoTokenizer.from_pretrained(name, **options)
ids = tokenizer("the code of ada is four", return_tensors="pt").input_ids % 120
cache = DynamicCache(config=model.config)
tokens = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
filled = [layer["filled"] for layer in model.memory_summary(cache).values()]
print(json.dumps({"ids": ids.tolist(), "tokens": tokens.tolist(), "filled": filled}))
"""


def test_full_circle(hub, run, command, tmp_path):
    """Source on the Hub -> convert -> push -> load by name at the commit -> generate; all in
    processes of their own.
    """
    out, options = (
        tmp_path / "out",
        [f"--{name.replace('_', '-')}={value}" for name, value in ACTIVE.items()],
    )
    done = run(
        "convert",
        SOURCE,
        out,
        *options,
        "--push-to-hub",
        "acme/tiny-pace",
        "--private",
        "--json",
        "-q",
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    pushed = json.loads(done.stdout.splitlines()[-1])
    assert pushed["verification"]["passed"] and pushed["repo"] == "acme/tiny-pace"

    repository = hub.repositories["acme/tiny-pace"]
    assert repository.private and len(repository.branches["main"]) == 3
    there, here = repository.files(), files_of(out)
    assert {name: data for name, data in there.items() if name != "README.md"} == repository.files(
        pushed["commit"]
    )
    card, local = there.pop("README.md").decode(), here.pop("README.md").decode()
    assert there == here
    assert f'name = "acme/tiny-pace"\nrevision = "{pushed["commit"]}"\n' in card
    assert "all 51 tensors" in card and is_untouched(card.encode())
    assert (
        'name = "."' in local
        and "Nothing had been compared" in local
        and is_untouched(local.encode())
    )

    call = command()
    alone = [sys.executable, "-I", "-c", ALONE + BY_NAME, "acme/tiny-pace", pushed["commit"]]
    environment = {
        **call["env"],
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_CACHE": str(tmp_path / "elsewhere"),
    }
    loaded = subprocess.run(
        alone, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert loaded.returncode == 0, loaded.stderr
    result = json.loads(loaded.stdout.splitlines()[-1])
    expected = load(out).generate(torch.tensor(result["ids"]), max_new_tokens=20, do_sample=False)
    assert (
        result["tokens"] == expected.tolist()
        and len(result["filled"]) == 2
        and min(map(min, result["filled"])) > 0
    )


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
        "main",
        {
            **repository.files(),
            "model.safetensors": (out / "model.safetensors").read_bytes(),
            "notes.txt": b"",
        },
    )
    (out / "model.safetensors").unlink()
    edited = (out / "README.md").read_text().replace("What it can't do", "My own words")
    (out / "README.md").write_text(edited)
    with (out / "memory_bank.py").open("a") as file:
        file.write("# mine\n")
    done = run("push", out, "acme/again", "--json")
    assert (
        done.returncode == 0 and "memory_bank.py is not as this version ships it" in done.stderr
    ), done.stderr
    commit = json.loads(done.stdout)["commit"]
    assert repository.branches["main"][1] == commit
    there = repository.files(commit)
    assert "notes.txt" in there and not {".env", "model.safetensors"} & set(there), (
        "weights of an earlier upload would be loaded"
    )
    card = repository.files()["README.md"].decode()
    assert "My own words" in card and commit in card and not is_untouched(card.encode())


def test_killed_in_the_middle_it_goes_on(hub, command, run, made):
    """It dies with large files on their way; the next run sends what is missing, and
    nothing twice.
    """
    process, sent = None, []

    def kill(method, path):
        if method == "PUT":
            sent.append(path)
            if len(sent) > 2:
                while len(hub.stored) < 2:
                    time.sleep(0.01)
                process.kill()
                return 503  # to nobody: what is on its way does not arrive
        return None

    hub.hook = kill
    process = subprocess.Popen(
        **command("push", made, "acme/killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.wait() == -9 and hub.repositories["acme/killed"].branches["main"] == [FIRST]
    hub.hook, stored = None, set(hub.stored)
    done = run("push", made, "acme/killed")
    assert done.returncode == 0, done.stderr
    assert (
        len(stored) == 2
        and all(hub.asked("PUT", oid) == 1 for oid in stored)
        and len(hub.stored) == 5
    )
    there = hub.repositories["acme/killed"].files()
    here = files_of(made)
    assert {name: there[name] for name in here if name != "README.md"} == {
        n: d for n, d in here.items() if n != "README.md"
    }


@pytest.mark.slow
def test_a_server_out_of_order_for_a_moment_and_for_longer(hub, run, made):
    """A 5xx answer to a large file is retried; one to the commit ends the upload, and the next run
    goes on.
    """
    once = {"/objects/batch": 503, "/lfs/": 500}
    hub.hook = lambda _, path: next(
        (once.pop(part) for part in list(once) if part in path), 502 if "/commit/" in path else None
    )
    refuse(
        run("push", made, "acme/ill"),
        1,
        "the Hub did not take acme/ill",
        "502",
        "it goes on where it stopped",
    )
    assert not once
    hub.hook, sent = None, hub.asked("PUT", "/lfs/")
    assert run("push", made, "acme/ill").returncode == 0
    assert hub.asked("PUT", "/lfs/") == sent


REFUSED = [  # arguments, the token that is logged in, exit code, words
    (["acme/new"], "", 2, ["not logged in", "hf auth login"]),
    (
        ["acme/new", "--token", "hf_wrong"],
        "hf_ann",
        2,
        ["does not accept this token", "hf auth login"],
    ),
    (["acme/new"], "hf_reader", 2, ["may only read", "/settings/tokens"]),
    (["acme/there"], "hf_bob", 2, ["may not write to acme/there", "ask for write access"]),
    (["acme/new"], "hf_bob", 2, ["bob is not a member of acme", "a name under bob"]),
    (["acme/data"], "hf_ann", 2, ["acme/data is the name of a dataset", "choose another name"]),
    (["new"], "hf_ann", 2, ["new is not the name", "ORG/NAME"]),
    (["acme/a..b"], "hf_ann", 2, ["acme/a..b is not a name", "ORG/NAME"]),
    (
        ["acme/there", "--create-pr", "--branch", "x"],
        "hf_ann",
        2,
        ["--create-pr", "leave one of the two out"],
    ),
    (["acme/new", "--create-pr"], "hf_ann", 2, ["no acme/new to open a pull request in"]),
    (["acme/there", "--private"], "hf_ann", 2, ["acme/there exists and is public"]),
]


def test_refused_in_words(hub, run_many, made):
    done = run_many([(["push", made, *arguments], token) for arguments, token, _, _ in REFUSED])
    for one, (_, _, code, words) in zip(done, REFUSED, strict=True):
        refuse(one, code, *words)
    assert set(hub.repositories) == {SOURCE, "acme/there"} and not hub.stored
    assert hub.repositories["acme/there"].branches == {"main": [FIRST]}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ["the Hub did not take acme/new", "network"]),
        ({"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE", "unset it"]),
        ({"HF_HUB_DISABLE_XET": "0"}, ["Xet", "HF_HUB_DISABLE_XET=1"]),
    ],
)
def test_no_way_to_the_hub(run, made, environment, words):
    refuse(run("push", made, "acme/new", **environment), 1, *words)


def answered(kind, status, said=None):
    return kind(
        "no",
        response=httpx2.Response(status, request=httpx2.Request("PUT", "http://hub/x")),
        server_message=said,
    )


@pytest.mark.parametrize(
    ("error", "table", "kind", "words"),
    [
        (answered(GatedRepoError, 403), READING, CallError, "a/b is gated"),
        (answered(GatedRepoError, 403), WRITING, CallError, "a/b is gated"),
        (
            answered(RepositoryNotFoundError, 404),
            READING,
            CallError,
            "no such repository on the Hub: a/b",
        ),
        (
            answered(HfHubHTTPError, 403, "storage is full"),
            WRITING,
            CallError,
            "may not write to a/b: 403 storage is full",
        ),
        (answered(HfHubHTTPError, 504), WRITING, PaceError, "the Hub did not take a/b: no"),
        (KeyError(), READING, PaceError, "the Hub did not give a/b: KeyError"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_first_row_that_matches_explains_an_error_and_what_it_wraps(
    error, table, kind, words, wrapped
):
    with pytest.raises(kind, match=re.escape(words)) as caught, hub_errors("a/b", table):
        if wrapped:
            raise RuntimeError("Error while uploading 'x' to the Hub.") from error
        raise error
    assert type(caught.value) is kind


def test_branch_and_pull_request_leave_main_alone(hub, run, made):
    repository = hub.repositories["acme/there"]
    done = run(
        "push", made, "acme/there", "--revision", "pace/v1", "--commit-message", "First words"
    )
    assert done.returncode == 0 and f"{hub.url}/acme/there/tree/pace/v1" in done.stdout, done.stderr
    asked = json.loads(
        run("push", made, "acme/there", "--create-pr", "--json", HF_TOKEN="hf_bob").stdout
    )
    assert (
        asked["pull_request"] == asked["url"] == f"{hub.url}/acme/there/discussions/1"
        and asked["branch"] == "refs/pr/1"
    )
    assert repository.branches["main"] == [FIRST]
    for branch in ("pace/v1", "refs/pr/1"):
        assert (
            "modeling_pace.py" in repository.files(branch) and len(repository.branches[branch]) == 3
        )
        assert repository.branches[branch][1] in repository.files(branch)["README.md"].decode()


@pytest.mark.slow
def test_a_second_pull_request_is_opened_only_for_another_conversion(
    hub, run_many, source, made, tmp_path
):
    """The same conversion's is brought up to date while it is open, whoever may write to main."""
    repository = hub.repositories["acme/there"]
    other = tmp_path / "other"
    convert_folder(source, other, seed=1)
    edited = shutil.copytree(made, tmp_path / "edited")
    with (edited / "README.md").open("a") as card:
        card.write("A word of mine.\n")

    def opened(*pushes):
        """The number of each push's pull request, and what was said."""
        calls = [
            (["push", folder, "acme/there", "--create-pr", "--json"], token)
            for folder, token in pushes
        ]
        numbers = []
        for done in run_many(calls):
            assert done.returncode == 0, done.stderr
            answer = json.loads(done.stdout)
            assert answer["url"] == answer["pull_request"], answer
            assert answer["commit"] in repository.branches[answer["branch"]]
            number = int(answer["url"].rpartition("/")[2])
            renewed = f"discussions/{number} is open for this conversion" in done.stderr
            numbers.append((number, renewed))
        return numbers

    calls = [(made, "hf_bob"), (made, "hf_bob"), (other, "hf_bob"), (made, "hf_ann")]
    assert opened(*calls) == [(1, False), (1, True), (2, False), (3, False)]
    assert len(repository.branches["refs/pr/1"]) == 3  # nothing was new the second time
    repository.pull_requests[2][1] = "merged"
    assert opened((edited, "hf_bob"), (made, "hf_ann")) == [(1, True), (4, False)]
    assert repository.files("refs/pr/1")["README.md"].endswith(b"A word of mine.\n")
    assert repository.branches["main"] == [FIRST]


def test_a_folder_that_is_not_whole_or_not_its_source_stays_here(hub, run, source, made, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    other = shutil.copytree(source, tmp_path / "other")
    shard = next(other.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    refuse(
        run("push", out, "acme/new", "--source", other),
        1,
        "is not its source, permuted",
        "nothing was uploaded",
    )
    (out / "memory_cache.py").unlink()
    refuse(
        run("push", out, "acme/new"),
        1,
        "memory_cache.py, which the conversion wrote, is gone",
        "convert again",
    )
    refuse(run("push", source, "acme/new"), 2, "is not a PaceLLM")
    assert "acme/new" not in hub.repositories and not hub.stored


def test_push_to_hub_is_checked_before_any_work(hub, run_many, source, tmp_path):
    out, bad = tmp_path / "out", shutil.copytree(source, tmp_path / "bad")
    (bad / "README.md").write_text(CARD.replace("llama3.1", "my own"))
    cases = [
        ([SOURCE, out, "--push-to-hub", "acme/new"], "hf_reader", ["may only read"]),
        ([SOURCE, out, "--push-to-hub", "acme/data"], "hf_ann", ["is the name of a dataset"]),
        ([SOURCE, out, "--push-to-hub", SOURCE], "hf_ann", [f"{SOURCE} is the source itself"]),
        ([SOURCE, out, "--private"], "hf_ann", ["--private", "--push-to-hub"]),
        (
            [bad, out, "--push-to-hub", "acme/new"],
            "hf_ann",
            ["refuses the metadata", "license", "README.md"],
        ),
    ]
    done = run_many(
        [(["convert", *arguments, "--experts", 8], token) for arguments, token, _ in cases]
    )
    for one, (_, _, words) in zip(done, cases, strict=True):
        refuse(one, 2, *words, out=out)
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_an_upload_that_fails_leaves_the_conversion_finished(hub, run, source, tmp_path):
    out = tmp_path / "out"
    hub.hook = lambda _, path: 403 if "/commit/" in path else None
    done = run("convert", source, out, "--experts", 8, "--push-to-hub", "acme/failed")
    refuse(
        done,
        1,
        "may not write to acme/failed",
        f"{out} is finished",
        f"pace push {out} acme/failed --source {source}",
    )
    assert f"Made {out}" in done.stdout and open_converted(out)
    hub.hook = None
    assert run("push", out, "acme/failed").returncode == 0


def test_what_looks_like_a_secret_is_not_uploaded(source, hub, run, tmp_path):
    """Neither what was taken along on purpose nor what lies in OUT by now; before any work."""
    copy = shutil.copytree(source, tmp_path / "source")
    (copy / "key.pem").write_text("x")
    convert = ["convert", copy, tmp_path / "out", "--experts", 8, "--include", "*.pem"]
    done = run(*convert, "--push-to-hub", "acme/new")
    refuse(done, 2, "key.pem is named as secrets are", "nothing was uploaded", out=tmp_path / "out")
    assert run(*convert).returncode == 0 and (tmp_path / "out" / "key.pem").exists()
    refuse(run("push", tmp_path / "out", "acme/new"), 2, "key.pem is named as secrets are")
    (tmp_path / "out" / "key.pem").write_text("")
    convert_folder(source, tmp_path / "other")
    (tmp_path / "other" / "notes.md").write_text("export HF_TOKEN=hf_" + "a1B2" * 9)
    refuse(
        run("push", tmp_path / "other", "acme/new"), 2, "notes.md holds what looks like a Hugging"
    )
    assert "acme/new" not in hub.repositories

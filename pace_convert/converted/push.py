"""Upload a conversion to the Hub, by huggingface_hub's `upload_folder`, which goes on where it was
interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, Discussion, HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)
from huggingface_hub.utils.sha import git_hash

from ..checkpoint.checkpoint import Source
from ..checkpoint.hub_errors import WRITING, hub_errors
from ..checkpoint.secrets import find_secret
from ..errors import CallError, DamagedSourceError, PaceError
from ..progress import Progress
from ..version import __version__
from ..writing import PART
from .card import pinned_commit, published
from .format import CARD, PERMUTATION, record_name
from .hashes import hash_file
from .integrity import check_integrity
from .opened import Converted

if TYPE_CHECKING:
    from .verify import Verification  # needs torch

NOT_UPLOADED = (".*", "*/.*", f"*{PART}")
# Deleted in the same commit: left from an earlier upload they would be loaded in place of ours.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", PERMUTATION)


@dataclass(frozen=True)
class Target:
    """A model repository. branch: None for main. create_pr: open a pull request against main
    instead.
    """

    repo_id: str
    token: str | None = None
    private: bool = False
    branch: str | None = None
    message: str = "Upload a PaceLLM"
    create_pr: bool = False

    @property
    def api(self) -> HfApi:
        """A client with this token, or the stored login."""
        return HfApi(token=self.token, library_name="pace-convert", library_version=__version__)


@dataclass(frozen=True)
class Pushed:
    """What was uploaded. commit: the one that holds weights and code, to be pinned; url: the
    repository or pull request.
    """

    repo_id: str
    url: str
    commit: str
    branch: str
    pull_request: str | None
    files: int
    nbytes: int
    needs_code: bool
    auto_class: str
    verification: Verification | None

    def as_dict(self) -> dict:
        """For `--json`."""
        compared = self.verification.as_dict() if self.verification else {}
        compared.pop("hashes", None)  # of every tensor: too many to repeat here
        return {
            "repo": self.repo_id,
            "url": self.url,
            "commit": self.commit,
            "branch": self.branch,
            "pull_request": self.pull_request,
            "files": self.files,
            "bytes": self.nbytes,
            "verification": compared or None,
        }


def check_target(target: Target, source: Source | None = None) -> None:
    """All that can be known about a target before any work. Changes nothing. Raises CallError or
    PaceError.
    """
    repo_id = target.repo_id
    api = target.api
    if repo_id.count("/") != 1:
        raise CallError(
            f"{repo_id} is not the name of a repository", "give ORG/NAME; ORG may be your own name"
        )
    if target.create_pr and target.branch:
        raise CallError(
            "--create-pr opens a pull request against main, not --branch",
            "leave one of the two out",
        )
    is_source = source and source.hub and source.hub.repo_id.lower() == repo_id.lower()
    if is_source and not (target.branch or target.create_pr):
        raise CallError(
            f"{repo_id} is the source itself, which the upload would replace",
            "choose another ORG/NAME",
        )
    with hub_errors(repo_id, WRITING):
        validate_repo_id(repo_id)
        me = api.whoami()
        if not _exists(target):
            _check_new(target, me)
        elif target.private and not api.model_info(repo_id).private:
            raise CallError(
                f"{repo_id} exists and is public",
                "make it private in its settings, or leave --private out",
            )


def check_secrets(folder: Path, names: Iterable[str]) -> None:
    """Nothing of what will be uploaded may look like a secret. Raises CallError."""
    found = find_secret(folder, names)
    if found:
        raise CallError(
            f"{found}: nothing was uploaded",
            "convert again without it; if it was ever public, revoke it",
        )


def check_card(target: Target, card: str) -> None:
    """Let the Hub validate a card's metadata. Raises CallError or PaceError."""
    with hub_errors(target.repo_id, WRITING):
        answer = get_session().post(
            f"{constants.ENDPOINT}/api/validate-yaml",
            json={"content": card, "repoType": "model"},
            headers=build_hf_headers(token=target.token),
        )
        if answer.status_code == 400:
            reason = "; ".join(error["message"] for error in answer.json()["errors"])
            raise CallError(
                f"the Hub refuses the metadata of the model card: {reason}",
                f"correct the block at the top of {CARD}",
            )
        hf_raise_for_status(answer)


def push(
    converted: Converted, target: Target, verification: Verification | None, progress: Progress
) -> Pushed:
    """Upload a conversion: everything but the card in one commit, then the card, which pins that
    commit.

    Repository and branch are created where they are missing. Raises DamagedSourceError or
    PaceError.
    """
    _check_whole(converted, verification, progress)
    folder = converted.files.folder
    uploaded = [
        path.relative_to(folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _hidden(path.relative_to(folder))
    ]
    check_secrets(folder, [path.as_posix() for path in uploaded if not path.match("*.safetensors")])
    card = _read_card(folder)
    if card is not None:
        check_card(target, card)
    sizes = [(folder / path).stat().st_size for path in uploaded]
    needs_code = converted.needs_code
    progress.let_hub_talk()
    progress.say(f"uploading {len(sizes)} files, {sum(sizes) / 1e6:.2f} MB, to {target.repo_id}")
    opened: Discussion | None = None
    with hub_errors(target.repo_id, WRITING):
        if target.create_pr:
            opened = _open_pull_request(target, folder)
        if opened:
            progress.say(f"{opened.url} is open for this conversion, and is brought up to date")
            target = replace(target, branch=opened.git_reference, create_pr=False)
        done, commit = _upload_folder(target, folder)
        if card is not None:
            target.api.upload_file(
                path_or_fileobj=_published(card, target, commit, converted, verification).encode(),
                path_in_repo=CARD,
                repo_id=target.repo_id,
                revision=done.pr_revision or target.branch,
                commit_message=f"{target.message}: the card, which pins {commit[:8]}",
                create_pr=target.create_pr and not done.pr_revision,
            )
    site = f"{constants.ENDPOINT}/{target.repo_id}"
    branch = done.pr_revision or target.branch or constants.DEFAULT_REVISION
    pull_request = opened.url if opened else done.pr_url
    url = pull_request or (f"{site}/tree/{branch}" if target.branch else site)
    return Pushed(
        repo_id=target.repo_id,
        url=url,
        commit=commit,
        branch=branch,
        pull_request=pull_request,
        files=len(sizes),
        nbytes=sum(sizes),
        needs_code=needs_code,
        auto_class=converted.family.auto_class,
        verification=verification,
    )


def _upload_folder(target: Target, folder: Path) -> tuple[CommitInfo, str]:
    """All but the card, and the commit that holds it."""
    api = target.api
    into_pull_request = target.create_pr or (target.branch or "").startswith("refs/")
    if not into_pull_request:  # anybody may open or update one of theirs, few may create
        api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
    if target.branch and not into_pull_request:
        api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)
    before = [
        commit.commit_id for commit in api.list_repo_commits(target.repo_id, revision=target.branch)
    ]
    done = api.upload_folder(
        repo_id=target.repo_id,
        folder_path=folder,
        revision=target.branch,
        commit_message=target.message,
        create_pr=target.create_pr,
        ignore_patterns=[*NOT_UPLOADED, CARD],
        delete_patterns=list(WEIGHTS),
    )
    return done, _commit_to_pin(target, done.oid, before)


def _open_pull_request(target: Target, folder: Path) -> Discussion | None:
    """The pull request of this user's that is open and holds this conversion: its record has the
    same bytes. An upload that was interrupted may have left it without its card.
    """
    api = target.api
    record = record_name(folder)
    # Of a large file the Hub gives the SHA-256, of another what Git calls it.
    here = (hash_file(folder / record), git_hash((folder / record).read_bytes()))
    mine = api.get_repo_discussions(
        target.repo_id, author=api.whoami()["name"], discussion_type="pull_request"
    )
    for found in mine:
        if found.status in ("open", "draft"):
            url = hf_hub_url(target.repo_id, record, revision=found.git_reference)
            try:
                there = api.get_hf_file_metadata(url=url).etag
            except (EntryNotFoundError, RevisionNotFoundError):
                continue
            if there in here:
                return found
    return None


def _exists(target: Target) -> bool:
    """Whether the repository is there; raises what the Hub client raises if the token may not write
    to it.
    """
    try:
        target.api.auth_check(target.repo_id, write=not target.create_pr)
    except GatedRepoError:  # of the other kind too, but it is there
        raise
    except RepositoryNotFoundError:
        return False
    return True


def _check_new(target: Target, me: dict) -> None:
    """Whether this token may create the repository. me: what the Hub says of it. Raises
    CallError.
    """
    repo_id = target.repo_id
    namespace = repo_id.split("/")[0]
    if target.create_pr:
        raise CallError(
            f"there is no {repo_id} to open a pull request in",
            "check the name, or leave --create-pr out",
        )
    if target.api.repo_exists(repo_id, repo_type="dataset"):
        raise CallError(
            f"{repo_id} is the name of a dataset",
            f"choose another name, or run `hf repos create {repo_id}` first",
        )
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise CallError(
            "this token may only read",
            f"make one that may write at {constants.ENDPOINT}/settings/tokens",
        )
    mine = [me.get("name", ""), *(org.get("name", "") for org in me.get("orgs", []))]
    # Only a token of role "write" names every organisation it may write to.
    if role == "write" and namespace.lower() not in [name.lower() for name in mine]:
        raise CallError(
            f"{mine[0]} is not a member of {namespace}", f"choose a name under {', '.join(mine)}"
        )


def _check_whole(
    converted: Converted, verification: Verification | None, progress: Progress
) -> None:
    """Raises PaceError for what is not its source, DamagedSourceError for what is not whole. Edited
    files are only remarked on.
    """
    folder = converted.files.folder
    if verification is not None and not verification.passed:
        what = f": {verification.different[0]} differs" if verification.different else ""
        raise PaceError(
            f"{folder} is not its source, permuted{what}", "convert again; nothing was uploaded"
        )
    found = check_integrity(converted)
    if not found.passed:
        raise DamagedSourceError(
            f"{folder} is not whole: {found.problems[0]}", "convert again; nothing was uploaded"
        )
    for name in found.edited_files:
        progress.say(f"{name} is not as this version ships it; it is uploaded as it is")


def _published(
    card: str,
    target: Target,
    commit: str,
    converted: Converted,
    verification: Verification | None,
) -> str:
    compared = None if verification is None else verification.sentence()
    return published(
        card,
        target.repo_id,
        commit,
        needs_code=converted.needs_code,
        auto_class=converted.family.auto_class,
        compared=compared,
    )


def _read_card(folder: Path) -> str | None:
    """The card's text; None where there is none. Raises CallError for one that is not UTF-8."""
    try:
        return (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None
    except UnicodeDecodeError as error:
        raise CallError(f"{folder / CARD} is not UTF-8 text", "save it as UTF-8") from error


def _commit_to_pin(target: Target, commit: str, before: list[str]) -> str:
    """The commit with the uploaded files: an earlier upload's if nothing but its card came after
    it.
    """
    if commit != before[0] or len(before) < 2:
        return commit
    try:
        path = target.api.hf_hub_download(target.repo_id, CARD, revision=commit)
        card = Path(path).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return commit
    return before[1] if pinned_commit(card) == before[1] else commit


def _hidden(path: Path) -> bool:
    """Whether NOT_UPLOADED names it. path: below the folder."""
    return any(part.startswith(".") for part in path.parts) or path.suffix == PART

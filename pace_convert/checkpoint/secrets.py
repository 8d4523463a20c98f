"""What looks like a secret, by its name or by what it holds: it is not copied unless somebody asks
for it, and never uploaded.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

# Parts of a path, in lower case.
NAMES = (
    ".env*", ".netrc", "_netrc", ".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".npmrc",
    ".pypirc", ".git-credentials", ".htpasswd", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "credentials*",
    "*_credentials*", "*secret*", "*password*", "*passwd*", "*api_key*", "*apikey*", "token",
    "token.json", "token.txt", "hf_token*", "*service?account*.json", "kubeconfig*",
)  # fmt: skip
_WORD = rb"(?<![A-Za-z0-9_-])"
# What it holds, in words, and its form.
CONTENTS = {
    "a private key": re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    "a Hugging Face token": re.compile(_WORD + rb"hf_[A-Za-z0-9]{34,}(?![A-Za-z0-9])"),
    "a GitHub token": re.compile(
        _WORD + rb"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})"
    ),
    "an AWS access key": re.compile(_WORD + rb"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "a Google API key": re.compile(_WORD + rb"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    "an OpenAI or Anthropic key": re.compile(
        _WORD + rb"sk-(?:proj-|ant-)?[A-Za-z0-9_-]*[A-Za-z0-9]{40}"
    ),
    "a Slack token": re.compile(_WORD + rb"xox[abprs]-[A-Za-z0-9-]{20,}"),
}
MAX_BYTES = 4 << 20  # of a file that are searched: what people write by hand is shorter


def is_secret_name(name: str) -> bool:
    """Whether a file is called as secrets are, or lies in a folder that is."""
    return any(
        fnmatch.fnmatchcase(part, pattern) for part in name.lower().split("/") for pattern in NAMES
    )


def find_secret(folder: Path, names: Iterable[str]) -> str | None:
    """The first of these files that looks like a secret, and why, in words; None if none does."""
    for name in names:
        if is_secret_name(name):
            return f"{name} is named as secrets are"
        if not (folder / name).is_file():  # of a Hub's repository, not downloaded yet
            continue
        with (folder / name).open("rb") as file:
            beginning = file.read(MAX_BYTES)
        for what, form in CONTENTS.items():
            if form.search(beginning):
                return f"{name} holds what looks like {what}"
    return None

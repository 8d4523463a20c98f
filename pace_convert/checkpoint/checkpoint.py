"""A local folder or a Hub repository as lazily read tensors plus side files."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import (
    HfApi,
    get_cached_repo_tree,
    get_safetensors_metadata,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

from ..errors import CallError, DamagedSourceError, PaceError
from .files import HIDDEN, check_file, check_names, list_files, read_json
from .hub_errors import READING, hub_errors, is_out_of_reach
from .shards import TensorInfo, check_tensors, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights beside the shards that are converted, in this format or another: not copied.
OTHER_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth",
    "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.pkl",
)  # fmt: skip
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubAddress:
    """A repository on the Hub at a resolved commit. cached: the Hub was not reached, and all that
    there is of it on this machine is in its cache.
    """

    repo_id: str
    commit: str
    token: str | None
    cache_dir: Path | None
    cached: bool = False


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    folder: where the files are; for a Hub source without the weights until `fetch`. side_files:
    every file that is neither weights nor config, relative to the folder. states: size in bytes and
    time of change in ns of every file that is here, from before it was read.
    """

    name: str
    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    side_files: tuple[str, ...]
    states: dict[str, tuple[int, int]] = field(default_factory=dict)
    hub: HubAddress | None = None

    @property
    def shards(self) -> list[str]:
        """File names of the shards, in order."""
        return sorted({info.shard for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def path(self, tensor: str) -> Path:
        """The shard that holds a tensor."""
        return self.folder / self.tensors[tensor].shard

    def fetch(self) -> Source:
        """This source with its weights on this machine."""
        if self.hub is None or self.hub.cached:
            return self
        hub = self.hub
        with hub_errors(hub.repo_id, READING):
            folder = snapshot_download(
                hub.repo_id,
                revision=hub.commit,
                token=hub.token,
                cache_dir=hub.cache_dir,
                allow_patterns=_exactly(*self.side_files, *self.shards, CONFIG, INDEX),
            )
        states = _states(Path(folder), [*self.side_files, *self.shards, CONFIG])
        return replace(
            self, folder=Path(folder), tensors=_read_tensors(Path(folder)), states=states
        )


def trained_length(config: dict) -> int | None:
    """Tokens that a model was trained to, as config.json says; None where it does not."""
    for key in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return None


def open_source(
    name: str, revision: str | None = None, token: str | None = None, cache_dir: Path | None = None
) -> Source:
    """Config, tensor list and side files of a local folder or of a Hub repository.

    Of a Hub repository only the small files and the shards' headers are downloaded. Where the Hub
    is out of reach, or HF_HUB_OFFLINE is set, a repository that is whole in the cache is taken from
    there, which a warning says. Raises CallError for what can't be a source, DamagedSourceError for
    one with broken files, and PaceError where there is none.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision or cache_dir:
            option = "--revision" if revision else "--cache-dir"
            raise CallError(
                f"{option} is for a source on the Hub, {name} is a folder", f"leave {option} out"
            )
        return open_folder(folder, name)
    if folder.exists():
        raise CallError(
            f"{name} is a file", "give the folder of a model, or a Hub id like Qwen/Qwen2-7B"
        )
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise CallError(
            f"no such folder: {name}", "give the folder of a model, or a Hub id like Qwen/Qwen2-7B"
        )
    try:
        with hub_errors(name, READING):
            return _open_hub(name, revision, token, cache_dir)
    except PaceError as error:
        if not is_out_of_reach(error.__cause__):
            raise
        return _open_cached(name, revision, token, cache_dir, error)


def open_folder(folder: Path, name: str | None = None) -> Source:
    """A source in a local folder; `name` is what messages call it. Raises CallError,
    DamagedSourceError.
    """
    if not os.path.lexists(folder / CONFIG):
        raise CallError(
            f"{folder} is not a model folder: it has no config.json",
            "give the folder of a model, or a Hub id",
        )
    config = _read_config(folder)
    files = list_files(folder)
    _refuse_pickled_only(name or str(folder), files)
    tensors = _read_tensors(folder)
    side_files = _side_files(files)
    shards = sorted({info.shard for info in tensors.values()})
    read = [*side_files, CONFIG, *shards, *({INDEX} & set(files))]
    for file in read:
        check_file(folder, file)
    return Source(name or str(folder), folder, config, tensors, side_files, _states(folder, read))


def _open_hub(
    repo_id: str, revision: str | None, token: str | None, cache_dir: Path | None
) -> Source:
    info = HfApi(token=token).model_info(repo_id, revision=revision)
    files = sorted(sibling.rfilename for sibling in info.siblings or [])
    if CONFIG not in files:
        raise CallError(
            f"{repo_id} is not a model repository: it has no config.json", "check the name"
        )
    check_names(files, "file")  # before any of them is downloaded
    _refuse_pickled_only(repo_id, files)
    side_files = _side_files(files)
    commit = info.sha or "main"  # all that follows is of one commit, whatever is pushed
    folder = snapshot_download(
        repo_id, revision=commit, token=token, cache_dir=cache_dir,
        allow_patterns=_exactly(*side_files, CONFIG, INDEX),
    )  # fmt: skip
    # By its own name too, so that the cache knows what commit that is where there is no Hub.
    hf_hub_download(repo_id, CONFIG, revision=revision, token=token, cache_dir=cache_dir)
    headers = get_safetensors_metadata(repo_id, revision=commit, token=token or None)
    # The Hub client does not say where the data begins: `fetch` reads the headers again.
    tensors = {
        name: TensorInfo(shard, t.dtype, tuple(t.shape), -1, t.data_offsets[1] - t.data_offsets[0])
        for shard, header in headers.files_metadata.items()
        for name, t in header.tensors.items()
    }
    check_tensors(tensors)
    address = HubAddress(repo_id, commit, token, cache_dir)
    return Source(
        repo_id, Path(folder), _read_config(Path(folder)), tensors, side_files, hub=address
    )


def _open_cached(
    repo_id: str,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    unreached: PaceError,
) -> Source:
    """A repository out of the Hub's cache. unreached: why the Hub is not asked, raised where the
    cache has nothing of it.
    """
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=True,
                allow_patterns=_exactly(CONFIG),
            )
        )
    except LocalEntryNotFoundError as error:
        at = f" at {revision}" if revision else ""
        raise PaceError(
            f"{unreached.message}; its cache has no {repo_id}{at}", unreached.hint
        ) from error
    try:
        source = open_folder(folder, repo_id)
    except PaceError as error:
        raise PaceError(
            f"{repo_id} is not whole in the Hub's cache: {error.message}",
            "run this again where the Hub can be reached",
        ) from error
    logger.warning(
        "%s: the Hub is out of reach; taking commit %s from its cache%s",
        repo_id,
        folder.name,
        _without(repo_id, source, folder.name, cache_dir),
    )
    return replace(source, hub=HubAddress(repo_id, folder.name, token, cache_dir, cached=True))


def _without(repo_id: str, source: Source, commit: str, cache_dir: Path | None) -> str:
    """What of a cached commit's side files is not there, in words; what a client that loads models
    alone had no use for. Nothing where the cache does not list the commit's files.
    """
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return ""
    absent = set(_side_files(sorted(file.path for file in tree))) - set(source.side_files)
    return f", without {', '.join(sorted(absent))}" if absent else ""


def _states(folder: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change in ns of each file, links followed."""
    found = {name: (folder / name).stat() for name in names}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in found.items()}


def _exactly(*names: str) -> list[str]:
    """Patterns that match these names alone."""
    return [glob.escape(name) for name in names]


def _read_config(folder: Path) -> dict:
    config = read_json(folder, CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise CallError(
            f"config.json of {folder.name} names no model_type",
            "give the folder of a transformers model",
        )
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """From the shards' headers. Where both are there, transformers too takes the single file and
    not the index.
    """
    if os.path.lexists(folder / INDEX) and not os.path.lexists(folder / SINGLE):
        return _read_sharded(folder, read_json(folder, INDEX).get("weight_map"))
    return read_header(check_file(folder, SINGLE))


def _read_sharded(folder: Path, weight_map: object) -> dict[str, TensorInfo]:
    """The tensors of all shards that the index names. Raises DamagedSourceError where index and
    shards disagree.
    """
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise DamagedSourceError(
            f"{INDEX} has no weight_map of tensor to shard", "download or copy this file again"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise DamagedSourceError(
                f"{INDEX} names {shard!r}, which is not a shard of this folder", "check the source"
            )
        if not os.path.lexists(folder / shard):
            raise DamagedSourceError(
                f"{INDEX} names {shard}, which is missing", "download or copy this shard again"
            )
        header = read_header(check_file(folder, shard))
        absent = [
            name for name, where in weight_map.items() if where == shard and name not in header
        ]
        if absent:
            raise DamagedSourceError(
                f"{shard} lacks {absent[0]}, which {INDEX} puts there",
                "download or copy this shard again",
            )
        twice = [name for name in header if name in tensors]
        if twice:
            raise DamagedSourceError(
                f"{tensors[twice[0]].shard} and {shard} both hold {twice[0]}", "check the source"
            )
        tensors.update(header)
    check_tensors(tensors)
    return tensors


def _refuse_pickled_only(name: str, files: list[str]) -> None:
    if SINGLE in files or INDEX in files:
        return
    if any(fnmatch.fnmatch(file, pattern) for file in files for pattern in PICKLED):
        raise CallError(
            f"{name} has only pickled weights, which can run code when loaded",
            "convert it to safetensors first, on a machine you can lose: "
            "huggingface.co/spaces/safetensors/convert",
        )
    raise CallError(
        f"{name} has no {SINGLE} and no {INDEX}", "give a checkpoint in safetensors format"
    )


def _side_files(files: list[str]) -> tuple[str, ...]:
    """What is copied as it is: all but weights, the config and hidden files."""

    def wanted(file: str) -> bool:
        weights = any(fnmatch.fnmatch(Path(file).name, pattern) for pattern in OTHER_WEIGHTS)
        return not weights and not HIDDEN.search(file) and file != CONFIG

    return tuple(file for file in files if wanted(file))

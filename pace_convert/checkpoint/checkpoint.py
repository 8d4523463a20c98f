"""A local folder or a Hub repository as lazily read tensors plus side files."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import (
    HfApi,
    get_cached_repo_tree,
    get_safetensors_metadata,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)

from ..errors import CallError, DamagedSourceError, PaceError
from ..progress import Progress
from .dequantised import unpack_quantised
from .files import check_file, check_names, is_passed_over, list_files, read_json
from .gguf_file import open_gguf
from .hub_errors import READING, hub_errors, is_out_of_reach
from .index import INDEX as INDEX
from .index import SINGLE as SINGLE
from .index import read_tensors
from .selection import PICKLED, Selection, asked_for, by_name, is_weights, readable_by_name, select
from .shards import TensorInfo, check_tensors
from .unpacked import Unpacking

CONFIG = "config.json"

logger = logging.getLogger(__name__)
_WITH_THE_HUB = "run this again where the Hub can be reached"


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
    what else of the folder goes with a conversion, as it is; left_out: what does not, and why;
    include: patterns that were asked for. states: size in bytes and time of change in ns of every
    file that is here, from before it was read. unpacking: of a source without plain weights, how it
    gets them; None for one that has them.
    """

    name: str
    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    side_files: tuple[str, ...]
    states: dict[str, tuple[int, int]] = field(default_factory=dict)
    hub: HubAddress | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    unpacking: Unpacking | None = None

    @property
    def title(self) -> str:
        """What people call it: its id on the Hub, or the name of its folder or file."""
        if self.hub:
            return self.name
        return (Path(self.name) if self.unpacking else self.folder).resolve().name

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

    def unpack(self, into: Path | None = None, progress: Progress | None = None) -> Source:
        """This source with plain weights: in the folder `into`, or else in one that is gone when
        nobody needs it any more. Raises DamagedSourceError.
        """
        if self.unpacking is None:
            return self
        folder = into or self.folder
        self.unpacking.write(self.tensors, folder, progress or Progress(quiet=True))
        states = _states(folder, [*self.side_files, *self.shards, CONFIG])
        return replace(self, folder=folder, states=states)

    def fetch(self) -> Source:
        """This source with its weights on this machine; those that are packed stay so."""
        if self.hub is None or self.hub.cached or self.unpacking is not None:
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
        return replace(self, folder=Path(folder), tensors=read_tensors(Path(folder)), states=states)


def trained_length(config: dict) -> int | None:
    """Tokens that a model was trained to, as config.json says; None where it does not."""
    for key in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return None


def open_source(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    include: Sequence[str] = (),
    gguf_file: str | None = None,
    dequantise: bool = False,
) -> Source:
    """Config, tensor list and side files of a local folder, of a GGUF file or of a Hub repository.

    Of a Hub repository only the small files and the shards' headers are downloaded. Where the Hub
    is out of reach, or HF_HUB_OFFLINE is set, a repository that is whole in the cache is taken from
    there, which a warning says. include: patterns of files that go with a conversion beside those
    that a model is known to have. gguf_file: of the folder or repository this file alone. Raises
    CallError for what can't be a source, DamagedSourceError for one with broken files, and
    PaceError where there is none.
    """
    if dequantise:
        packed = open_source(name, revision, token, cache_dir, include, gguf_file)
        return _dequantised(packed)
    folder = Path(name)
    if gguf_file is not None or (folder.is_file() and name.lower().endswith(".gguf")):
        return _open_gguf(name, revision, token, cache_dir, include, gguf_file)
    if folder.is_dir():
        if revision or cache_dir:
            option = "--revision" if revision else "--cache-dir"
            raise CallError(
                f"{option} is for a source on the Hub, {name} is a folder", f"leave {option} out"
            )
        return _open_local(folder, name, include)
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
            return _open_hub(name, revision, token, cache_dir, include)
    except PaceError as error:
        if not is_out_of_reach(error.__cause__):
            raise
        return _open_cached(name, revision, token, cache_dir, include, error)


def _open_gguf(
    name: str,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    include: Sequence[str],
    gguf_file: str | None,
) -> Source:
    """A GGUF file: `name` itself, or of a folder or repository of this name. From the Hub it is
    downloaded whole.
    """
    if include:
        raise CallError("--include is for a source with files beside its weights", "leave it out")
    path, hub = Path(name), None
    if gguf_file is not None and path.is_file():
        raise CallError(f"{name} is a file", f"leave --gguf-file out, or give {path.parent}")
    if gguf_file is not None and path.is_dir():
        path = path / gguf_file
        if not path.is_file():
            raise CallError(f"{name} has no {gguf_file}", "check the name of the file")
    elif gguf_file is not None:
        with hub_errors(name, READING):
            commit = HfApi(token=token).model_info(name, revision=revision).sha or "main"
            try:
                found = hf_hub_download(
                    name, gguf_file, revision=commit, token=token, cache_dir=cache_dir
                )
            except RemoteEntryNotFoundError as error:
                raise CallError(
                    f"{name} has no {gguf_file}", "check the name of the file"
                ) from error
        path, hub = Path(found), HubAddress(name, commit, token, cache_dir)
    elif revision or cache_dir:
        option = "--revision" if revision else "--cache-dir"
        raise CallError(
            f"{option} is for a source on the Hub, {name} is a file", f"leave {option} out"
        )
    return _unpackable(name if hub else str(path), hub, *open_gguf(path))


def _dequantised(packed: Source) -> Source:
    """A quantised source as a plain one."""
    made = _unpackable(packed.name, packed.hub, *unpack_quantised(packed))
    return replace(made, left_out=packed.left_out, include=packed.include)


def _unpackable(
    name: str,
    hub: HubAddress | None,
    config: dict,
    tensors: dict[str, TensorInfo],
    unpacking: Unpacking,
) -> Source:
    """A source whose small files are made already, in a folder of their own."""
    folder = Path(unpacking.kept.name)
    side_files = tuple(file for file in list_files(folder) if file != CONFIG)
    return Source(
        name, folder, config, tensors, side_files, unpacking.states, hub, unpacking=unpacking
    )


def open_folder(folder: Path) -> Source:
    """A checkpoint in a local folder with everything that lies beside it, hidden files apart: a
    conversion. Raises CallError, DamagedSourceError.
    """
    config, files, tensors = _read_folder(folder, str(folder))
    own = {CONFIG, *(info.shard for info in tensors.values())}
    side_files = [file for file in files if file not in own and not is_weights(file)]
    return _opened(str(folder), folder, config, tensors, Selection(tuple(side_files), {}), ())


def _open_local(folder: Path, name: str, include: Sequence[str]) -> Source:
    """name: what messages call it."""
    config, files, tensors = _read_folder(folder, name)
    own = {CONFIG, INDEX, *(info.shard for info in tensors.values())}
    return _opened(name, folder, config, tensors, select(folder, files, own, include), include)


def _read_folder(folder: Path, name: str) -> tuple[dict, list[str], dict[str, TensorInfo]]:
    """config.json, the names of all files, and the tensors."""
    if not os.path.lexists(folder / CONFIG):
        _point_to_gguf(name, sorted(path.name for path in folder.glob("*.gguf")))
        raise CallError(
            f"{folder} is not a model folder: it has no config.json",
            "give the folder of a model, or a Hub id",
        )
    config = _read_config(folder)
    files = list_files(folder)
    _refuse_pickled_only(name, files)
    return config, files, read_tensors(folder)


def _opened(
    name: str,
    folder: Path,
    config: dict,
    tensors: dict[str, TensorInfo],
    selected: Selection,
    include: Sequence[str],
) -> Source:
    """Every file that will be read or copied lies in the folder and is a regular one."""
    shards = sorted({info.shard for info in tensors.values()})
    index = [INDEX] if os.path.lexists(folder / INDEX) else []
    read = [*selected.taken, CONFIG, *shards]
    for file in [*read, *index]:
        check_file(folder, file)
    return Source(
        name, folder, config, tensors, selected.taken, _states(folder, [*read, *index]),
        left_out=selected.left_out, include=tuple(include),
    )  # fmt: skip


def _open_hub(
    repo_id: str,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    include: Sequence[str],
) -> Source:
    info = HfApi(token=token).model_info(repo_id, revision=revision)
    files = sorted(sibling.rfilename for sibling in info.siblings or [])
    if CONFIG not in files:
        _point_to_gguf(repo_id, [file for file in files if file.endswith(".gguf")])
        raise CallError(
            f"{repo_id} is not a model repository: it has no config.json", "check the name"
        )
    check_names(files, "file")  # before any of them is downloaded
    _refuse_pickled_only(repo_id, files)
    files = [file for file in files if not is_passed_over(file)]
    commit = info.sha or "main"  # all that follows is of one commit, whatever is pushed
    folder = Path(
        snapshot_download(
            repo_id, revision=commit, token=token, cache_dir=cache_dir,
            allow_patterns=_exactly(*readable_by_name(files, include), CONFIG, INDEX),
        )
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
    own = {CONFIG, INDEX, *headers.files_metadata}
    selected = select(folder, files, own, include)
    return Source(
        repo_id, folder, _read_config(folder), tensors, selected.taken,
        hub=HubAddress(repo_id, commit, token, cache_dir),
        left_out=selected.left_out, include=tuple(include),
    )  # fmt: skip


def _open_cached(
    repo_id: str,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    include: Sequence[str],
    unreached: PaceError,
) -> Source:
    """A repository out of the Hub's cache. unreached: why the Hub is not asked, raised where the
    cache has nothing of it.
    """
    folder = _cached_folder(repo_id, revision, cache_dir, unreached)
    with _whole_in_cache(repo_id):
        config, files, tensors = _read_folder(folder, repo_id)
    listed = _listed(repo_id, folder.name, cache_dir)
    missing = sorted(asked_for(listed, include) - set(files))
    if missing:
        raise PaceError(
            f"--include asks for {missing[0]}, which is not in the Hub's cache", _WITH_THE_HUB
        )
    own = {CONFIG, INDEX, *(info.shard for info in tensors.values())}
    without = sorted(set(by_name(listed, own)) - set(files))
    # With what is left out whether it is here or not: the same bytes as with the Hub.
    names = sorted({*files, *listed} - set(without))
    with _whole_in_cache(repo_id, DamagedSourceError):
        selected = select(folder, names, own, include)
        source = _opened(repo_id, folder, config, tensors, selected, include)
    logger.warning(
        "%s: the Hub is out of reach; taking commit %s from its cache%s",
        repo_id,
        folder.name,
        f", without {', '.join(without)}" if without else "",
    )
    return replace(source, hub=HubAddress(repo_id, folder.name, token, cache_dir, cached=True))


def _cached_folder(
    repo_id: str, revision: str | None, cache_dir: Path | None, unreached: PaceError
) -> Path:
    try:
        return Path(
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


@contextlib.contextmanager
def _whole_in_cache(repo_id: str, kind: type[PaceError] = PaceError) -> Iterator[None]:
    """What is wrong with a cached repository was not downloaded, or not to its end."""
    try:
        yield
    except kind as error:
        raise PaceError(
            f"{repo_id} is not whole in the Hub's cache: {error.message}", _WITH_THE_HUB
        ) from error


def _listed(repo_id: str, commit: str, cache_dir: Path | None) -> list[str]:
    """A commit's files, of which a client that loads models alone had not all to download. None
    where the cache does not list them.
    """
    try:
        tree = get_cached_repo_tree(repo_id, revision=commit, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return []
    files = sorted(file.path for file in tree if not is_passed_over(file.path))
    check_names(files, "file")
    return files


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


def _point_to_gguf(name: str, files: list[str]) -> None:
    """Raises CallError where what has no config.json has GGUF files."""
    if files:
        raise CallError(
            f"{name} has no config.json, but GGUF files", f"give --gguf-file, like {files[0]}"
        )


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

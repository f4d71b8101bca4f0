"""A model folder: `config.json`, which rebuilds the model, `model.safetensors`, and its card."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unet.config import MOST_CHANNELS, UNetConfig
from unet.errors import DiskError, InputError, said
from unet.files.mask_values import some
from unet.files.writing import JSON_BYTES, read_json, replacing, write_text
from unet.model import UNet
from unet.weights.card import CARD, SAMPLES, Usage, is_ours, model_card, write_card

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # owner/name on the Hub
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HERE = "path/of/this/folder"  # what a card calls a model that is not on the Hub
_MOST_BYTES = {CONFIG: JSON_BYTES, WEIGHTS: 2**36}  # that are downloaded
Model = TypeVar("Model", bound="FolderModel")


class FolderModel(nn.Module, ABC):
    """A trunk with the head of one task, that saves to and loads from a model folder.

    Args:
        config: the trunk's shape.
        out_channels: what the head puts out.
        info: what else using the model needs, as JSON values (class values, image statistics, a
            noise schedule ...); saved with it. "training", where it is there, says for people what
            the model was trained on: lines of "data" and "run", and the "figures" of its weights.
    """

    task: ClassVar[str]

    def __init__(
        self, config: UNetConfig, out_channels: int, info: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not 1 <= out_channels <= MOST_CHANNELS:
            raise InputError(f"out_channels={out_channels} must be from 1 to {MOST_CHANNELS}")
        self.config = config
        self.out_channels = out_channels
        self.info: dict[str, Any] = dict(info or {})
        self.trunk = UNet(config)

    @abstractmethod
    def usage(self, where: str) -> Usage:
        """The usage part of its card; it must not fail, whatever `info` holds.

        Args:
            where: what to load it from, a folder or a repository on the Hub.
        """

    @staticmethod
    def noted(info: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """Its `info` as it is written to a folder."""
        return info

    @staticmethod
    def placed(info: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """Its `info` as it is read from a folder."""
        return info

    def card(self, where: str = HERE, *, pictured: bool = False) -> str:
        """The text of its card, README.md.

        Args:
            where: see `usage`.
            pictured: whether samples.png lies beside it.
        """
        weights = sum(p.numel() for p in self.parameters())
        levels = ", ".join(map(str, self.config.encoder_channels))
        network = f"{weights:,} weights, levels of {levels} channels"
        training = self.info.get("training")
        return model_card(self.usage(where), network, training, pictured=pictured)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> str | None:
        """Writes the folder; each file is replaced whole, but a card that was edited by hand stays.

        Args:
            repo_id, push_to_hub, hub: upload it as well, with samples.png where that lies in the
                folder; see `push_to_hub`. The repository's name is the folder's where none is
                given.

        Returns:
            The address of the upload.
        """
        folder = Path(save_directory)
        self.write(folder, self.state_dict())
        if push_to_hub:
            return self._upload(folder, repo_id or folder.resolve().name, **hub)
        return None

    def write(self, folder: Path, state: Mapping[str, Tensor], weights: str = WEIGHTS) -> None:
        """Writes a state dict as the file `weights`, and config.json and the card beside it.

        Raises:
            InputError: `info` holds what JSON cannot; nothing is written then.
        """
        self._described(folder)
        save_weights(state, folder / weights)
        self.save_info(folder)

    def save_info(self, folder: Path) -> None:
        """Writes config.json and the card to a folder that holds the weights already."""
        write_text(folder / CONFIG, self._described(folder))
        write_card(folder, self.card(pictured=(folder / SAMPLES).is_file()))

    def _described(self, folder: Path) -> str:
        """The text of config.json."""
        described = {
            "task": self.task,
            "out_channels": self.out_channels,
            "unet": self.config.to_dict(),
            "info": self.noted(self.info, folder),
        }
        try:
            return json.dumps(described, indent=2) + "\n"
        except TypeError as error:
            raise InputError(
                f"the model's info cannot be saved ({said(error)}): let it hold numbers, texts, "
                "and lists and dictionaries of them"
            ) from error

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Uploads the model to a repository on the Hugging Face Hub, which is made if need be.

        A card that was edited by hand on the Hub stays.

        Args:
            repo_id: "owner/name"; without an owner, your own.
            hub: `private`, `token`, and what else `huggingface_hub.HfApi.upload_folder` takes, such
                as `commit_message`, `revision` and `create_pr`.

        Returns:
            The address of the commit.

        Raises:
            InputError: the Hub does not take it: no token, no right to write, no connection.
        """
        with tempfile.TemporaryDirectory() as folder:
            found = self.save_pretrained(folder, repo_id=repo_id, push_to_hub=True, **hub)
        return str(found)

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        **options: Any,
    ) -> str:
        api = HfApi(token=token)
        with _told(repo_id):
            # With its owner, where none was given.
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            kept = _has_edited_card(api, repo_id, options.get("revision"))
        pictured = (folder / SAMPLES).is_file()
        files = [CONFIG, WEIGHTS, *([SAMPLES] if pictured else [])]
        if not (kept and is_ours(folder / CARD)):
            write_card(folder, self.card(repo_id, pictured=pictured))
            files.append(CARD)
        options = {"commit_message": "Upload the model", **options}
        with _told(repo_id):
            made = api.upload_folder(
                repo_id=repo_id, folder_path=folder, allow_patterns=files, **options
            )
            return str(made.commit_url)

    @classmethod
    def from_pretrained(
        cls: type[Model], path: str | Path, *, revision: str | None = None, **download: Any
    ) -> Model:
        """The model of a folder, or of a repository on the Hugging Face Hub, in evaluation mode.

        Raises:
            InputError: no such folder; a file is missing or unreadable; the model of another task;
                weights that do not fit the config.
        """
        folder = model_folder(path, revision=revision, **download)
        described = read_config(folder)
        if described["task"] != cls.task:
            raise InputError(
                f"{folder} holds a model for {described['task']}, but {cls.task} is asked for: "
                "give the folder of such a model"
            )
        with torch.device("meta"):  # nothing is allocated before the shapes are checked
            config = UNetConfig.from_dict(described["unet"])
            info = cls.placed(described["info"], folder)
            model = cls(config, described["out_channels"], info)
        load_strictly(model, read_weights(folder), str(folder / WEIGHTS))
        return model.eval()


def model_folder(path: str | Path, **download: Any) -> Path:
    """The folder of a model: the path itself, or the local copy of a repository on the Hub.

    Args:
        download: what else `huggingface_hub.hf_hub_download` takes.

    Raises:
        InputError: no path, or the Hub gives no such model.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(
            f"a model is named by the path of its folder, not by a {type(path).__name__}: of "
            "several models give the paths one by one"
        )
    folder = Path(path)
    # A path into a folder that is here was meant for this machine, mistyped as it may be.
    here = folder.exists() or folder.parent.exists()
    if here or not re.fullmatch(_REPO, str(path)):
        return folder
    return _download(str(path), **download)


@cache
def start_folder(path: str) -> Path:
    """The folder of a model that a training starts from, which is read several times: the Hub is
    asked once.
    """
    return model_folder(path)


def make_repository(repo_id: str) -> None:
    """Makes a repository on the Hub, or finds it, and sees to it that the user may write there.

    Raises:
        InputError: see `FolderModel.push_to_hub`.
    """
    api = HfApi(token=None)
    with _told(repo_id):
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        # An older huggingface_hub cannot ask: it is the upload that tells.
        with suppress(TypeError):
            api.auth_check(repo_id, write=True)


def read_config(folder: Path, weights: str = WEIGHTS) -> dict[str, Any]:
    """The checked `config.json` of a model folder: task, out_channels, unet, info.

    Args:
        weights: the file that must stand beside it.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder: give a model folder, such as RUN/model{near(folder)}"
        )
    for name in (CONFIG, weights):
        if not (folder / name).is_file():
            if (folder / "model" / CONFIG).is_file():
                raise InputError(
                    f"{folder} is no model folder, but the folder of a run: give {folder / 'model'}"
                )
            if (folder / "model_index.json").is_file():
                raise InputError(
                    f"{folder} is no model folder, but a pipeline of diffusers: txt2img makes "
                    "pictures with it, and train-ddpm takes it as --init and --latents"
                )
            raise InputError(
                f"{folder} is no model folder, {name} is missing: a model folder holds {CONFIG} "
                f"and {weights}, as training writes them to RUN/model"
            )
    described = read_json(folder / CONFIG)
    kinds = {"task": str, "out_channels": int, "unet": dict, "info": dict}
    for name, kind in kinds.items():
        if type(described.get(name)) is not kind:  # True is an int as well
            raise InputError(
                f"{folder / CONFIG} lacks a valid {name!r}: it is no config of this project"
            )
    return described


def near(missing: Path) -> str:
    """The folders that are in the place of a missing one, as the end of a sentence; nothing if it
    is a file.
    """
    place = next((above for above in missing.parents if above.is_dir()), None)
    if place is None or missing.exists():
        return ""
    shown = sorted(path.name for path in place.iterdir() if path.is_dir() and path.name[0] != ".")
    found = {0: "no folder", 1: f"the folder {some(shown)}"}
    return f"; {str(place)!r} holds {found.get(len(shown), f'the folders {some(shown)}')}"


def save_weights(state: Mapping[str, Tensor], file: Path) -> None:
    """Writes tensors to a safetensors file, which is replaced whole.

    Raises:
        DiskError: the disk is full.
    """
    # contiguous() also for channels_last weights: the file holds plain NCHW.
    plain = {k: v.detach().contiguous() for k, v in state.items()}
    with replacing(file) as temporary:
        try:
            save_file(plain, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # which is how safetensors reports a full disk
            raise DiskError(f"{file} cannot be written, is the disk full? {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder, by name."""
    return load_weights(folder / WEIGHTS)


def load_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, TypeError) as error:  # the last: a size that is too large
        raise InputError(f"{file} cannot be read as safetensors weights: {said(error)}") from error


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Loads weights that must fit the model key by key and shape by shape.

    A model built on the meta device becomes real. Tensors are copied, as those of a safetensors
    file keep the whole file mapped.

    Raises:
        InputError: names the missing and superfluous keys and the shapes that differ.
    """
    check_fit(model.state_dict(), state, where)
    copies = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    model.load_state_dict(copies, assign=True)


def check_fit(model: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Compares the keys and shapes of a state dict with those of a model.

    Raises:
        InputError: names the missing and superfluous keys, and the shapes that differ; integers
            where the model has floating-point numbers, of 16 bits or more, and the reverse.
    """
    wanted = {k: tuple(v.shape) for k, v in model.items()}
    given = {k: tuple(v.shape) for k, v in state.items()}
    differences = [f"lacks {k} {wanted[k]}" for k in wanted if k not in given]
    differences += [f"has an unknown {k} {given[k]}" for k in given if k not in wanted]
    differences += [
        f"has {k} with shape {given[k]} instead of {wanted[k]}"
        for k in wanted
        if k in given and given[k] != wanted[k]
    ]
    differences += [
        f"has {k} of type {state[k].dtype} instead of {model[k].dtype}"
        for k in wanted
        if k in given
        and (
            state[k].is_floating_point() != model[k].is_floating_point()
            or (state[k].is_floating_point() and state[k].element_size() < 2)
        )
    ]
    if differences:
        shown = "; ".join(differences[:8])
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise InputError(f"{where} does not fit the model: it {shown}{more}")


def _download(repo_id: str, **options: Any) -> Path:
    where = f"{repo_id} is no folder here"
    print(f"note: {where}: it is looked up on the Hugging Face Hub", file=sys.stderr, flush=True)
    reason = None if options.get("local_files_only") else _unreached(repo_id, options)
    if reason:  # what was fetched before is used at once, where hf_hub_download would try again
        options["local_files_only"] = True
    try:
        files = [hf_hub_download(repo_id, name, **options) for name in (CONFIG, WEIGHTS)]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{where}, and the Hub gives no such model ({reason or said(error)}): give a model "
            "folder, such as RUN/model, or OWNER/NAME of a model on the Hub"
        ) from error
    return Path(files[0]).parent


def _has_edited_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether an upload would replace a card that somebody wrote by hand."""
    try:
        return not is_ours(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
    except EntryNotFoundError:
        return False


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Turns whatever keeps the Hub from taking an upload into one sentence."""
    try:
        yield
    except TypeError:  # an option that there is not
        raise
    except Exception as error:  # whatever its transport raises
        reason = said(error)
        if any(word in type(error).__name__ for word in ("Connect", "Timeout")):
            reason = f"it cannot be reached ({reason})"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            reason = "it knows no valid token of yours; log in with `hf auth login` or set HF_TOKEN"
        elif status == 403:
            reason = "your token has no right to write there; take one that has, or another owner"
        raise InputError(f"the Hub does not take the model for {repo_id}: {reason}") from error


def _unreached(repo_id: str, options: Mapping[str, Any]) -> str:
    """Why the Hub, which is asked once, does not answer; empty if it does.

    Raises:
        InputError: files that are too large to be a model's.
    """
    for name, most in _MOST_BYTES.items():
        try:
            url = hf_hub_url(repo_id, name, revision=options.get("revision"))
            size = get_hf_file_metadata(url, token=options.get("token")).size
        except Exception as error:  # whatever its transport raises
            status = getattr(getattr(error, "response", None), "status_code", 500)
            # Of a repository that it does not give, the download says what is wrong.
            return f"it cannot be reached: {said(error)}" if status >= 500 else ""
        if size is None or size > most:
            raise InputError(
                f"{name} of {repo_id} has {size or 'an unknown number of'} bytes on the Hub, "
                f"but at most {most:,} are fetched"
            )
    return ""

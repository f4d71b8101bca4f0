"""Checkpoints and pipelines that a stranger made to do harm: they run nothing, lead nowhere else,
and take no more memory than they are long.

Each attack would leave a trace, the folder `canary`, or would reach a library that it must not.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.options import SamplingOptions
from diffusion.sampling import ImageSampler
from diffusion.stable.autoencoder import Autoencoder
from diffusion.stable.clip import ClipText
from diffusion.stable.folder import read_schedule, read_text_model, read_unet, read_weights
from diffusion.stable.pipeline import StableDiffusion
from segmentation.model import SegmentationUNet
from tests.diffusion.stable.tiny_pipeline import write_pipeline
from tests.faults.bad_files import SAMPLED, diffusion_model, write_checkpoint, write_model, written
from tests.faults.damage import tensors
from tests.faults.test_bad_files import REFUSED, assert_one_sentence, bounded, refusal
from unet.errors import InputError
from unet.files.writing import JSON_BYTES
from unet.training.run import RunFolder

Read = Callable[[Path], object]

VAE, TEXT = "vae/diffusion_pytorch_model", "text_encoder/model"
BIN = "text_encoder/pytorch_model.bin"
PADDING = 10**6  # bytes, lest a file is refused since it is short


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "whole")


@pytest.fixture
def pipeline(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "pipeline")


def edit(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | changes))


def assert_refused(read: Read, path: Path, says: str = "") -> None:
    with bounded(REFUSED):
        said = refusal(read, path)
    assert said is not None
    assert says in said
    assert_one_sentence(said)


# -- pickles --------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


FORMS: dict[str, Callable[[Any], bytes]] = {
    "new": lambda content: written(lambda f: torch.save(content, f)),
    "old": lambda content: written(
        lambda f: torch.save(content, f, _use_new_zipfile_serialization=False)
    ),
    "plain": lambda content: pickle.dumps(content, protocol=2),
}


def poisoned(form: str, canary: Path) -> bytes:
    return FORMS[form]({"a": Payload(canary), "b": torch.zeros(PADDING)})


def in_place_of(name: str, other: str, read: Read) -> tuple[Callable[[Path], Path], Read]:
    """A part of a pipeline whose weights are a pickle, and what reads it."""

    def prepare(pipeline: Path) -> Path:
        (pipeline / f"{name}.safetensors").unlink()
        return pipeline / other

    return prepare, lambda file: read(file.parents[1])


def of_a_unet(folder: Path) -> Path:
    write_checkpoint(folder / "made")
    return folder / "made/unet/diffusion_pytorch_model.bin"


def of_a_run(folder: Path) -> Path:
    (folder / "state").mkdir()
    return folder / "state/state.pt"


PICKLES: dict[str, tuple[Callable[[Path], Path], Read]] = {
    "state.pt": (of_a_run, lambda file: RunFolder(file.parents[1]).load_state()),
    "unet/.bin": (of_a_unet, lambda file: read_unet(file.parent)),
    "vae/.bin": in_place_of(VAE, f"{VAE}.bin", Autoencoder.from_folder),
    "text_encoder/.bin": in_place_of(TEXT, BIN, read_text_model),
    "text_encoder/.bin for training": in_place_of(TEXT, BIN, ClipText.from_pretrained),
    **{
        f"x{end}": (lambda folder, end=end: folder / f"x{end}", read_weights)
        for end in (".ckpt", ".pt", ".pth", ".bin")
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_payload_does_harm_where_nothing_stops_it(tmp_path: Path, form: str) -> None:
    data = io.BytesIO(poisoned(form, tmp_path / "canary"))
    pickle.load(data) if form == "plain" else torch.load(data, weights_only=False)
    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PICKLES)
def test_code_in_a_pickle_does_not_run(
    pipeline: Path, tmp_path: Path, name: str, form: str
) -> None:
    prepare, read = PICKLES[name]
    file = prepare(pipeline)
    file.write_bytes(poisoned(form, tmp_path / "canary"))
    assert_refused(read, file)
    assert not (tmp_path / "canary").exists()


def test_an_archive_of_the_first_pytorch_is_not_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.ckpt", "w", format=tarfile.PAX_FORMAT) as packed:
        for name in ("storages", "tensors", "pickle", "../canary", f"{tmp_path}/canary"):
            member = tarfile.TarInfo(name)
            member.size = PADDING
            packed.addfile(member, io.BytesIO(poisoned("plain", tmp_path / "canary")[:PADDING]))
    assert_refused(read_weights, tmp_path / "x.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


COUNT, FORGED = 70_000, 2**31 - 1  # numbers that a tensor has, and that it says it has


def forged(form: str) -> bytes:
    """A checkpoint whose pickle declares a tensor of 8 GiB."""
    data = FORMS[form]({"a": torch.zeros(COUNT)})
    old, longer = (b"J" + struct.pack("<i", count) for count in (COUNT, FORGED))
    assert data.count(old) >= 2  # the storage and the shape
    if form == "old":
        return data.replace(old, longer)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(buffer, "w") as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name).replace(old, longer))
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("name", ["x.ckpt", "state.pt"])
def test_a_tensor_that_says_it_is_larger(tmp_path: Path, name: str, form: str) -> None:
    prepare, read = PICKLES[name]
    file = prepare(tmp_path)
    file.write_bytes(forged(form))
    assert_refused(read, file)


# -- safetensors ---------------------------------------------------------------------------------


def at(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


HEADERS: dict[str, bytes] = {
    "a header of 2^63 bytes": struct.pack("<Q", 2**63),
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1),
    "a header beyond the end": struct.pack("<Q", 2**40) + b"{}",
    "2^60 bytes": tensors(a=at(0, 2**60)),
    "a shape beyond its bytes": tensors(a=at(0, 4, 2**40)),
    "a shape whose product is 0 in 64 bits": tensors(a=at(0, 0, 2**62, 4)),
    "the same bytes twice": tensors(a=at(0, 8), b=at(4, 12)),
    "one tensor within another": tensors(a=at(0, 4 * PADDING), b=at(0, 4)),
    "a gap": tensors(a=at(0, 4), b=at(8, 12)),
    "an end before the beginning": tensors(a=at(8, 4, 1)),
    "an offset below 0": tensors(a=at(-4, 0, 1)),
    "a name twice": tensors(a=at(0, 4), b=at(0, 4)).replace(b'"b"', b'"a"'),
}


SAFETENSORS: dict[str, tuple[Callable[[Path], Path], Read]] = {
    "model": (
        lambda folder: write_model("segmentation", folder) or folder / "model.safetensors",
        lambda file: SegmentationUNet.from_pretrained(file.parent),
    ),
    "unet": (
        lambda folder: folder / "unet/diffusion_pytorch_model.safetensors",
        lambda file: read_unet(file.parent),
    ),
    "vae": (
        lambda folder: folder / f"{VAE}.safetensors",
        lambda f: Autoencoder.from_folder(f.parent),
    ),
    "text_encoder": (
        lambda folder: folder / f"{TEXT}.safetensors",
        lambda file: ClipText.from_pretrained(file.parents[1]),
    ),
    "checkpoint": (lambda folder: folder / "x.safetensors", read_weights),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_forged_header_is_refused(pipeline: Path, name: str, header: str) -> None:
    prepare, read = SAFETENSORS[name]
    file = prepare(pipeline)
    file.unlink(missing_ok=True)  # it may be mapped
    file.write_bytes(HEADERS[header] + bytes(PADDING))
    assert_refused(read, file)


# -- parts of other libraries ---------------------------------------------------------------------

PARTS: dict[str, tuple[Read, ...]] = {
    "vae": (Autoencoder.from_folder, StableDiffusion.from_pretrained),
    "text_encoder": (ClipText.from_pretrained, read_text_model),
}
CLAIMS: list[tuple[str, dict[str, Any], str]] = [
    ("vae", {"block_out_channels": [2**20] * 4}, "weights, more than the"),
    ("vae", {"block_out_channels": [4] * 1000}, "declares 1000 blocks, more than 512"),
    ("vae", {"layers_per_block": 10**5}, "declares 400000 blocks, more than 512"),
    ("vae", {"latent_channels": 10**400}, "more than 1048576"),
    ("vae", {"quantization_config": {"quant_method": "bnb"}}, "quantization_config"),
    ("text_encoder", {"hidden_size": 2**20}, "weights, more than the"),
    ("text_encoder", {"vocab_size": 2**40}, "more than 1048576"),
    ("text_encoder", {"nested": [{"x": [2**40]}]}, "more than 1048576"),
    ("text_encoder", {"num_hidden_layers": 10**5}, "declares 100000 blocks, more than 512"),
    ("text_encoder", {"hidden_act": "os.system"}, "cannot be read"),
    ("text_encoder", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("text_encoder", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
    ("text_encoder", {"_attn_implementation": {"": "a/kernel"}}, "_attn_implementation"),
    ("text_encoder", {"_attn_implementation": "flash_attention_2"}, "_attn_implementation"),
]


def forbid(patch: pytest.MonkeyPatch, kind: Any) -> None:
    """The library's class must not be asked to read."""
    patch.setattr(kind, "from_pretrained", lambda *a, **k: pytest.fail("was asked to read it"))


@pytest.mark.parametrize(("part", "claims", "says"), CLAIMS)
def test_a_config_that_claims_too_much_reaches_no_library(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, part: str, claims: dict[str, Any], says: str
) -> None:
    edit(pipeline / part / "config.json", **claims)
    forbid(monkeypatch, AutoencoderKL if part == "vae" else CLIPTextModel)
    for read in PARTS[part]:
        assert_refused(read, pipeline, says)


INDICES = {"vae": (VAE, AutoencoderKL), "text_encoder": (TEXT, CLIPTextModel)}
OUTSIDE = ["../{name}", "{root}/{name}", "..", "", "a/../../{name}", "..\\{name}", "/dev/zero", 7]


@pytest.mark.parametrize("part", INDICES)
@pytest.mark.parametrize("outside", OUTSIDE)
def test_an_index_leads_to_no_other_folder(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, part: str, outside: Any
) -> None:
    stem, kind = INDICES[part]
    file = pipeline / f"{stem}.safetensors"
    keys = load_file(file)
    name = file.rename(pipeline / file.name).name
    if isinstance(outside, str):
        outside = outside.format(name=name, root=pipeline)
    index = file.with_name(f"{file.name}.index.json")
    edit(index, metadata={}, weight_map=dict.fromkeys(keys, outside))
    forbid(monkeypatch, kind)
    for read in PARTS[part]:
        assert_refused(read, pipeline, "no file of its folder")


@pytest.mark.parametrize("part", INDICES)
def test_weights_in_several_files_of_their_folder_are_read(pipeline: Path, part: str) -> None:
    file = pipeline / f"{INDICES[part][0]}.safetensors"
    state = load_file(file)
    where = {}
    for i, keys in enumerate((list(state)[::2], list(state)[1::2])):
        part_of = file.with_name(f"{file.stem}-{i + 1}-of-2.safetensors")
        save_file({key: state[key] for key in keys}, part_of, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, part_of.name)
    edit(file.with_name(f"{file.name}.index.json"), metadata={"total_size": 1}, weight_map=where)
    file.unlink()
    assert PARTS[part][0](pipeline)


@pytest.mark.parametrize(
    ("file", "claims", "kind", "says"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "/etc"}, CLIPTextModel, "an adapter"),
        (
            "../tokenizer/tokenizer_config.json",
            {"fast_tokenizer_files": ["../tokenizer.4.0.json"]},
            CLIPTokenizer,
            "no file of its folder",
        ),
    ],
)
def test_a_text_model_leads_to_no_other_folder(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, file: str, claims: Any, kind: Any, says: str
) -> None:
    edit(pipeline / "text_encoder" / file, **claims)
    forbid(monkeypatch, kind)
    for read in PARTS["text_encoder"]:
        assert_refused(read, pipeline, says)


def test_code_beside_a_tokenizer_does_not_run(pipeline: Path, tmp_path: Path) -> None:
    evil = f"import os\nos.mkdir({str(tmp_path / 'canary')!r})"
    (pipeline / "tokenizer/evil.py").write_text(evil)
    edit(
        pipeline / "tokenizer/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil",
    )
    for read in PARTS["text_encoder"]:
        assert_one_sentence(refusal(read, pipeline))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["autoencoder", "text_encoder"])
@pytest.mark.parametrize("folder", [7, None, ["a"], {}, "", "x" * 5000, "a\0b", "/etc", "../.."])
def test_parts_that_a_config_names_are_folders_of_parts(name: str, folder: Any) -> None:
    model = diffusion_model(**SAMPLED, **{name: folder})
    with pytest.raises(InputError, match=r"holds no|has no|no folder"):
        ImageSampler(model, SamplingOptions(steps=2))


# -- files without end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("unet/config.json", lambda folder: read_unet(folder / "unet")),
        ("scheduler/scheduler_config.json", read_schedule),
        ("vae/config.json", Autoencoder.from_folder),
        ("text_encoder/config.json", ClipText.from_pretrained),
        ("model/config.json", lambda folder: SegmentationUNet.from_pretrained(folder / "model")),
    ],
)
def test_a_config_without_end_is_not_read(pipeline: Path, name: str, read: Read) -> None:
    write_model("segmentation", pipeline / "model")
    file = pipeline / name
    file.unlink()
    file.symlink_to("/dev/zero")
    assert_refused(read, pipeline)
    file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate(2**36)
    assert_refused(read, pipeline, f"more than {JSON_BYTES:,} bytes")

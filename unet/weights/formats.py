"""A trained network as a file that other programs run: ONNX, TorchScript, PyTorch 2, OpenVINO."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic

from unet.errors import InputError, with_extras
from unet.files.writing import replacing

Format = Literal["onnx", "torchscript", "pt2", "openvino"]

SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "torchscript": ".pt",
    "pt2": ".pt2",
    "openvino": ".xml",
}
METADATA = "metadata.json"  # the file in TorchScript's and PyTorch 2's that holds the metadata
OPSET = 18  # of ONNX: onnxruntime and onnxruntime-web from 1.14 (2023) on, OpenVINO from 2023.1 on
_QUANTISED = ["Conv", "ConvTranspose", "MaxPool", "Concat", "Relu"]  # not the pixels, nor softmax


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A function of tensors, with the names and metadata of its file.

    Attributes:
        module: in evaluation mode, on the CPU; traced, so its Python may not depend on values.
        inputs: an example of each argument, by its name, in their order.
        axes: the axes of each input whose length may vary, by their number, with a name.
        output: the name of the result, whose axes 0, 2 and 3 are called like those of the first
            input.
        metadata: texts, saved with it.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    output: str
    metadata: Mapping[str, str]

    def write(self, to: Format, out: Path, calibration: Sequence[Tensor] = ()) -> None:
        """Writes the file, in place of an earlier one; of OpenVINO also `out` with .bin.

        Args:
            calibration: of ONNX with a single input: images, by whose activations convolutions
                are quantised to 8-bit integers; none given: all is float32.

        Raises:
            InputError: a file of another ending; a package that is not installed.
        """
        if to not in get_args(Format):
            raise InputError(f"the format {to!r} is unknown; choose from {', '.join(SUFFIXES)}")
        if out.suffix != SUFFIXES[to]:
            raise InputError(
                f"a file of {to} ends in {SUFFIXES[to]}: give {out.with_suffix(SUFFIXES[to])} "
                f"instead of {out}"
            )
        if calibration and to != "onnx":
            raise InputError(f"8-bit integers are for onnx alone, not for {to}: leave them out")
        out.parent.mkdir(parents=True, exist_ok=True)
        with with_extras(), torch.no_grad(), _quietly():
            if calibration:
                self._write_int8(out, calibration)
            elif to == "onnx":
                self._write_onnx(out)
            elif to == "openvino":
                self._write_openvino(out)
            elif to == "torchscript":
                example = tuple(self.inputs.values())
                script = torch.jit.trace(self.module, example, check_trace=False)
                with replacing(out) as temporary:
                    torch.jit.save(script, temporary, _extra_files=self._files())
            else:
                program = self._program()
                with replacing(out) as temporary, temporary.open("wb") as stream:
                    torch.export.save(program, stream, extra_files=self._files())

    def _program(self) -> torch.export.ExportedProgram:
        """The graph, for all lengths of the axes.

        What is the same for all lengths from 2 on is taken to be so for 0 and 1: no step here looks
        at a length, and without it PyTorch refuses small images.
        """
        auto = torch.export.Dim.AUTO  # of a name PyTorch wants to know what it cannot prove
        shapes = tuple(dict.fromkeys(self.axes.get(name, {}), auto) for name in self.inputs)
        with symbolic.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # stubs
            return torch.export.export(
                self.module, tuple(self.inputs.values()), dynamic_shapes=shapes
            )

    def _write_onnx(self, out: Path) -> None:
        import onnx
        import onnxscript  # noqa: F401  # which the exporter imports

        made = torch.onnx.export(
            self._program(),
            input_names=list(self.inputs),
            output_names=[self.output],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert made is not None
        model = made.model_proto
        onnx.helper.set_model_props(model, dict(self.metadata))
        first = next(iter(self.inputs))
        named = {name: dict(axes) for name, axes in self.axes.items()}
        named[self.output] = {i: axis for i, axis in named[first].items() if i in (0, 2, 3)}
        for value in (*model.graph.input, *model.graph.output):
            for i, axis in named.get(value.name, {}).items():
                value.type.tensor_type.shape.dim[i].dim_param = axis
        del model.graph.value_info[:]  # sizes of the steps, in the exporter's names
        with replacing(out) as temporary:
            temporary.write_bytes(model.SerializeToString())

    def _write_int8(self, out: Path, calibration: Sequence[Tensor]) -> None:
        """Static quantisation, with a scale for each output channel of a convolution."""
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        (name,) = self.inputs
        images = iter([{name: image[None].numpy()} for image in calibration])

        class Reader(CalibrationDataReader):
            def get_next(self) -> dict[str, Any] | None:
                return next(images, None)

        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            made = Path(folder) / "float32.onnx"
            self._write_onnx(made)
            with replacing(out) as temporary:
                quantize_static(
                    made,
                    temporary,
                    Reader(),
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    op_types_to_quantize=_QUANTISED,
                )

    def _write_openvino(self, out: Path) -> None:
        import openvino

        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            made = Path(folder) / out.name
            self._write_onnx(made.with_suffix(".onnx"))
            model = openvino.convert_model(made.with_suffix(".onnx"))
            for key, text in self.metadata.items():
                model.set_rt_info(text, ["unet", key])
            openvino.save_model(model, made, compress_to_fp16=False)
            for suffix in (".bin", ".xml"):
                made.with_suffix(suffix).replace(out.with_suffix(suffix))

    def _files(self) -> dict[str, str]:
        return {METADATA: json.dumps(dict(self.metadata), indent=2)}


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences the tracers' warnings to developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

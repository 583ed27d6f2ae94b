"""Export of a model that is captured in parts: one file a part, since no file can hold the Python around them."""

from __future__ import annotations

from pathlib import Path

from bitwright.backend import Bundle
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_torch.capture.parts import PartitionedModel
from bitwright_torch.export.export import export, save_weights
from bitwright_torch.simulate.parts_simulation import plan_of_part, sites_of

_SUFFIXES = (".qdq.onnx", ".onnx", ".pt2")


def export_parts(model: PartitionedModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
    """As `export.export`; "net.onnx" becomes "net.backbone.onnx", "net.head.onnx" for parts of these names.

    Tensors are named with their part in front, so that one encodings file serves all. The bundle's keys have the part
    after a slash ("model/backbone"). Weights are one file.

    Raises:
        InputError: unknown format, or a file can't be written.
        ModelError: torch's exporter refuses a part.
    """
    if format == "safetensors":
        return Bundle({"weights": save_weights(model, path)})
    files: dict[str, Path] = {}
    names: dict[str, str] = {}
    layouts: dict[str, tuple[int, ...]] = {}
    for name, part in model.parts.items():
        sites = sites_of(part)
        table = EncodingTable({s: e for s, e in encodings.items() if s in sites}, encodings.provenance)
        made = export(part, plan_of_part(plan, sites), table, _beside(path, name), format)
        files |= {f"{key}/{name}": file for key, file in made.files.items()}
        names |= made.names
        layouts |= made.layouts
    return Bundle(files, names, layouts)


def _beside(path: Path, part: str) -> Path:
    suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), path.suffix)
    return path.with_name(f"{path.name.removesuffix(suffix)}.{part}{suffix}")

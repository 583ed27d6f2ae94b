"""Folders of Hugging Face's transformers: a configuration and safetensors become a module; nothing of theirs is run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.backend import silenced
from bitwright.errors import InputError, ModelError, first_line, needs_extra

TEXT = ("input_ids", "attention_mask", "token_type_ids")
IMAGE = "pixel_values"
LENGTH = 12
"""Of the sequence that a network is traced with; the axis is free afterwards."""


def open_folder(
    path: Path, *, inputs: str | Sequence[str] | None = None, dtype: str = "float32"
) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
    """The module of a folder, a sample to trace it with, and its free axes.

    The class is the one of transformers that config.json names. No network is asked, and no code, nor any file that
    could hold some, is taken from the folder.

    Args:
        path: holds config.json and model.safetensors, or its index and shards.
        inputs: arguments of `forward` that the captured network has. Default: "input_ids" for networks that generate
            text, "input_ids" and "attention_mask" for others, "pixel_values" for images.
        dtype: of parameters and arithmetic: float32, float16 or bfloat16.

    Raises:
        InputError: the folder asks for code of its own, its weights aren't safetensors or are quantized already, or
            its class isn't known; an option is wrong.
        ModelError: the class can't be made, or the weights don't fit it.
        MissingExtraError: transformers isn't installed.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype={dtype!r}: float32, float16 or bfloat16")
    config = checked_config(path)
    name = class_name(path, config)
    with needs_extra(f"{path} is a folder of transformers, which needs", "transformers"):
        import transformers
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"{path}/config.json names the class {name}, which transformers {transformers.__version__} doesn't have; "
            "upgrade it, or build the model yourself (model.py:build)"
        )
    module = _loaded(path, found, dtype)
    if getattr(module.config, "use_cache", None):
        module.config.use_cache = False
    sample = _sample(path, module, name, [inputs] if isinstance(inputs, str) else inputs)
    return module.eval(), sample, {k: (0, 1) if k in TEXT else (0,) for k in sample}


def checked_config(path: Path) -> dict[str, Any]:
    """The configuration of a folder that can be opened without running anything of it.

    Raises:
        InputError: it asks for code, its weights aren't safetensors, or it isn't a model's.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} isn't a configuration of transformers: it holds no object")
    if code := next(_own_code(config), None):
        raise InputError(
            f"{file} asks for Python code that travels with the model (auto_map: {code}), which isn't run. Use a class "
            "that transformers has itself, or look at the code, build the module yourself and give it as model.py:build"
        )
    if config.get("quantization_config"):
        raise InputError(f"{path} holds weights that are quantized already; give the folder of the float model")
    if (path / "adapter_config.json").exists():
        raise InputError(f"{path} holds an adapter beside the model; merge it into the weights first")
    if not any((path / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json")):
        others = [p.name for ending in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in sorted(path.glob(ending))]
        there = f"; {others[0]} isn't opened, since unpickling runs code" if others else ""
        raise InputError(
            f"{path} has no model.safetensors{there}. Save the weights so: save_pretrained(…) of transformers does"
        )
    return config


def _own_code(config: Any) -> Iterator[str]:
    """Where a configuration, or one inside of it, names code outside of transformers."""
    if isinstance(config, Mapping):
        if named := config.get("auto_map"):
            values = list(named.values()) if isinstance(named, Mapping) else [named]
            yield str(values[0] if values else named)
        for value in config.values():
            yield from _own_code(value)
    elif isinstance(config, list):
        for value in config:
            yield from _own_code(value)


def class_name(path: Path, config: Mapping[str, Any]) -> str:
    """The class that a configuration names.

    Raises:
        InputError: none.
    """
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if not isinstance(first, str) or not first.isidentifier():
        raise InputError(f"{path}/config.json names no class (architectures); transformers writes it when it saves")
    return first


def _loaded(path: Path, found: Any, dtype: str) -> Any:
    """The class with the folder's weights, all of them.

    Raises:
        ModelError: they don't fit.
    """
    settings = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    with silenced("transformers"), warnings.catch_warnings(), _no_progress():
        warnings.simplefilter("ignore")
        try:
            module, told = found.from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True, **settings
            )
        except Exception as error:
            raise ModelError(f"transformers can't open {path} as {found.__name__}: {first_line(error)}") from error
    if missing := sorted(told.get("missing_keys", ())):
        raise ModelError(
            f"{path} holds no values for {len(missing)} parameters of {found.__name__}, {missing[0]!r} first; they "
            "would be random. Save the model whole, or name the class that was saved in config.json (architectures)"
        )
    return module


@contextmanager
def _no_progress() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sample(path: Path, module: Any, name: str, inputs: Sequence[str] | None) -> dict[str, torch.Tensor]:
    """One batch of two, by argument of `forward`.

    Raises:
        InputError: an input that no sample can be made for.
    """
    main = str(getattr(module, "main_input_name", TEXT[0]))
    if inputs is None:
        generates = name.endswith(("ForCausalLM", "LMHeadModel"))
        inputs = TEXT[:1] if generates else TEXT[:2] if main == TEXT[0] else (main,)
    made: dict[str, torch.Tensor] = {}
    for given in inputs:
        if given in TEXT:
            made[given] = torch.ones(2, LENGTH, dtype=torch.int64)
        elif given == IMAGE:
            made[given] = torch.zeros(2, *_image(path, module.config))
        else:
            known = (*TEXT, IMAGE)
            raise InputError(
                f"{path}: no sample can be made for the input {given!r}; there are "
                f"{', '.join(known)}. Build the model yourself and give it with a sample (model.py:build)"
            )
    return made


def _image(path: Path, config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None)
    if size is None:
        raise InputError(f"{path}/config.json says no image_size; give the model with a sample (model.py:build)")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)

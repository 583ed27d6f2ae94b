"""Folders of transformers are opened as they are; whatever asks for code of its own is refused."""

import json

import numpy as np
import pytest

from bitwright import QuantSim
from bitwright.errors import InputError, ModelError
from bitwright.plugins import registry

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def folder(path, config, *files):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name in files:
        (path / name).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilModel"}},
        {**CONFIG, "text_config": {"auto_map": {"AutoModel": "modeling_evil.EvilModel"}}},
    ],
)
def test_code_that_travels_with_a_model_isnt_run(tmp_path, config):
    path = folder(tmp_path / "evil", config, "model.safetensors")
    (path / "modeling_evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"modeling_evil.EvilModel\), which isn't run"):
        QuantSim(path)


def test_other_folders_that_are_refused(tmp_path):
    cases = {
        "pickled": (CONFIG, ["pytorch_model.bin"], "pytorch_model.bin isn't opened, since unpickling runs code"),
        "quantized": ({**CONFIG, "quantization_config": {"bits": 4}}, ["model.safetensors"], "quantized already"),
        "adapter": (CONFIG, ["model.safetensors", "adapter_config.json"], "merge it"),
        "nameless": ({"model_type": "llama"}, ["model.safetensors"], "names no class"),
        "list": ([], ["model.safetensors"], "holds no object"),
    }
    for name, (config, files, message) in cases.items():
        with pytest.raises(InputError, match=message):
            QuantSim(folder(tmp_path / name, config, *files))


def test_the_folder_goes_to_the_torch_backend(tmp_path):
    path = folder(tmp_path / "SmolLM2-1.7B", CONFIG)
    assert registry.backend_for_path(path).name == "torch"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("hf") / "tiny"
    module.save_pretrained(path)
    return path, module


def test_a_language_model(llama):
    import torch

    path, module = llama
    sim = QuantSim(path, activations="float", weights="int8")
    assert sim.backend.input_specs(sim.native) == {"input_ids": ((None, None), "int64")}
    rows = np.random.default_rng(0).integers(0, 64, (3, 17))
    with torch.no_grad():
        expected = module(torch.from_numpy(rows)).logits.numpy()
    assert np.array_equal(sim.predict(rows, simulated=False)[0], expected)
    assert "lm_head.weight" not in sim.graph.params  # tied: one matrix, under its first name


def test_a_class_that_transformers_hasnt(llama, tmp_path):
    path = folder(tmp_path / "other", {**CONFIG, "architectures": ["Llama9ForNothing"]}, "model.safetensors")
    with pytest.raises(InputError, match="Llama9ForNothing, which transformers"):
        QuantSim(path)


def test_weights_that_are_missing(llama, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path, _ = llama
    held = safetensors.load_file(path / "model.safetensors")
    del held["model.norm.weight"]
    config = json.loads((path / "config.json").read_text())
    other = folder(tmp_path / "less", config)
    safetensors.save_file(held, other / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 parameters of LlamaForCausalLM, 'model.norm.weight' first"):
        QuantSim(other)


def test_options(llama):
    path, _ = llama
    with pytest.raises(InputError, match="no sample can be made for the input 'labels'"):
        registry.backend("torch").load(path, inputs="labels")
    with pytest.raises(InputError, match="int8"):
        registry.backend("torch").load(path, dtype="int8")

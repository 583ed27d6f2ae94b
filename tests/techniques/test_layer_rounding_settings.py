"""What "auto" means in the settings of techniques that round layer after layer."""

import numpy as np
import pytest
from layers import make_layer

from bitwright.graph import Graph, Op, OpKind, Tensor
from bitwright_techniques.adaround import AdaRoundSettings
from bitwright_techniques.gptq import GptqSettings, round_layer
from bitwright_techniques.layer_rounding import decided
from bitwright_techniques.token_norms import normalizes_tokens


def network(*ops: tuple[OpKind, str]) -> Graph:
    """A chain of ops x0 → x1 → …"""
    chain = [Op(f"op{i}", kind, type, (f"x{i}",), (f"x{i + 1}",), {}) for i, (kind, type) in enumerate(ops)]
    tensors = {f"x{i}": Tensor(f"x{i}", (None, 4)) for i in range(len(ops) + 1)}
    return Graph(chain, tensors, {}, ["x0"], [f"x{len(ops)}"])


NETWORKS = [
    (((OpKind.RELU, "Relu"),), False),
    (((OpKind.NORM, "GroupNormalization"),), False),
    (((OpKind.LAYER_NORM, "LayerNormalization"),), True),
    (((OpKind.NORM, "RMSNormalization"),), True),
    (((OpKind.AVERAGE_POOL, "ReduceMean"), (OpKind.ADD, "Add"), (OpKind.ELEMENTWISE, "Rsqrt")), True),
    (((OpKind.AVERAGE_POOL, "GlobalAveragePool"), (OpKind.ELEMENTWISE, "Sqrt")), False),
]


@pytest.mark.parametrize(("ops", "normalized"), NETWORKS)
def test_layers_make_up_for_input_errors_unless_tokens_are_normalized(ops, normalized):
    """Where tokens are normalized a few massive ones carry the error; what the user says counts in any case."""
    graph = network(*ops)
    assert normalizes_tokens(graph) is normalized
    auto = decided(graph, AdaRoundSettings())
    assert (auto.inputs, auto.bias_correction) == ("float" if normalized else "quantized", "auto")
    # Then the bias takes back the weight's own error only; with quantized inputs it is left.
    said = decided(graph, AdaRoundSettings(inputs="quantized"))
    assert (said.inputs, said.bias_correction) == ("quantized", False if normalized else "auto")
    for corrects in (True, False):
        assert (
            decided(graph, AdaRoundSettings(inputs="quantized", bias_correction=corrects)).bias_correction is corrects
        )


@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_without_a_bias_gets_none_unless_that_is_said(biased):
    """Formats of checkpoints have no place for it; without one the mean counts in the layer's error."""
    layer = make_layer("linear", bias=biased)
    auto, on, off = (round_layer(layer, GptqSettings(bias_correction=b)) for b in ("auto", True, False))
    same, other = (on, off) if biased else (off, on)
    assert (auto.bias is None) is not biased
    assert np.array_equal(auto.weight, same.weight)
    assert auto.figures["after"] == same.figures["after"]
    assert not np.array_equal(auto.weight, other.weight)
    assert on.bias is not None
    assert off.bias is None

"""What "auto" means in the settings of techniques that round layer after layer."""

import pytest

from bitwright.graph import Graph, Op, OpKind, Tensor
from bitwright_techniques.adaround import AdaRoundSettings
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
    assert (auto.inputs, auto.bias_correction) == ("float" if normalized else "quantized", True)
    # Then the bias takes back the weight's own error only; with quantized inputs it is left.
    said = decided(graph, AdaRoundSettings(inputs="quantized"))
    assert (said.inputs, said.bias_correction) == ("quantized", not normalized)
    for corrects in (True, False):
        assert (
            decided(graph, AdaRoundSettings(inputs="quantized", bias_correction=corrects)).bias_correction is corrects
        )

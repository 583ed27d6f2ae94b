"""What "auto" means in the settings of techniques that round layer after layer."""

import pytest

from bitwright.graph import Graph, Op, OpKind, Tensor
from bitwright_techniques.adaround import AdaRoundSettings
from bitwright_techniques.layer_rounding import decided


def network(kind: OpKind, type: str) -> Graph:
    op = Op("norm", kind, type, ("x",), ("y",), {})
    return Graph([op], {t: Tensor(t, (None, 4)) for t in "xy"}, {}, ["x"], ["y"])


@pytest.mark.parametrize(
    ("kind", "type", "corrects"),
    [
        (OpKind.RELU, "Relu", True),
        (OpKind.NORM, "GroupNormalization", True),
        (OpKind.LAYER_NORM, "LayerNormalization", False),
        (OpKind.NORM, "RMSNormalization", False),
    ],
)
def test_biases_are_corrected_unless_tokens_are_normalized(kind, type, corrects):
    """The mean of a transformer's errors is that of a few massive tokens; what the user says counts in any case."""
    graph = network(kind, type)
    assert decided(graph, AdaRoundSettings()).bias_correction is corrects
    for said in (True, False):
        assert decided(graph, AdaRoundSettings(bias_correction=said)).bias_correction is said

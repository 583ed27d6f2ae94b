"""A base for backends of frameworks whose models are graphs of pure functions: a graph, parameters, a callable an op.

Editing, sessions and segments, taps, checks of feeds, simulation and files stand here. The numpy reference backend
(`bitwright.testing.reference`) is its first user.
"""

from __future__ import annotations

from bitwright.dataflow._backend import FlowBackend
from bitwright.dataflow._builder import GraphBuilder
from bitwright.dataflow._editing import FlowEditor
from bitwright.dataflow._functions import Captured
from bitwright.dataflow._geometry import general_convolution, pool_window
from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._model import FlowModel, Function, rebuild
from bitwright.dataflow._namespace import FlowNamespace, NumpyLike
from bitwright.dataflow._pullback import DifferentiableFlow
from bitwright.dataflow._session import FlowSession, Program
from bitwright.dataflow._simulation import FlowSimulation
from bitwright.dataflow._training import TrainableFlow, TrainedModel

__all__ = [
    "Captured",
    "DifferentiableFlow",
    "FlowBackend",
    "FlowEditor",
    "FlowModel",
    "FlowNamespace",
    "FlowSession",
    "FlowSimulation",
    "Function",
    "GraphBuilder",
    "Layout",
    "NumpyLike",
    "Program",
    "TrainableFlow",
    "TrainedModel",
    "general_convolution",
    "pool_window",
    "rebuild",
]

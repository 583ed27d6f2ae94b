"""What every backend must hold, as a pytest class to subclass::

    class TestMyBackend(BackendContract):
        suffix = ".pt"

        def backend(self):
            return MyBackend()

        def cases(self):
            return {"resnet block": Case(build_resnet_block, {"x": batch})}

Between them the cases should hold a convolution, a batch norm after one, a depthwise or grouped and a transposed
convolution, a linear op, a clipped ReLU, a residual sum and a concatenation; `kinds` says what is checked for. A
backend that captures users' models gives some of them too, as `held`.
"""

from __future__ import annotations

from bitwright.testing.branch_contract import BranchContract
from bitwright.testing.capture_contract import CaptureContract, Held
from bitwright.testing.contract_base import Case
from bitwright.testing.edit_contract import EditContract
from bitwright.testing.file_contract import FileContract
from bitwright.testing.graph_contract import GraphContract
from bitwright.testing.grid_contract import GridContract
from bitwright.testing.plan_contract import PlanContract
from bitwright.testing.refusal_contract import RefusalContract
from bitwright.testing.replay_contract import ReplayContract
from bitwright.testing.simulation_contract import SimulationContract
from bitwright.testing.training_contract import TrainingContract

__all__ = ["BackendContract", "Case", "Held"]


class BackendContract(
    CaptureContract,
    GraphContract,
    ReplayContract,
    EditContract,
    BranchContract,
    GridContract,
    SimulationContract,
    PlanContract,
    TrainingContract,
    RefusalContract,
    FileContract,
):
    """Subclass it and give `backend` and `cases`."""

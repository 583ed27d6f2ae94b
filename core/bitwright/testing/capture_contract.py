"""The part of the backend contract about captures: that they compute what the users' models do, or say that they don't.

A backend that compares what it captures by `bitwright.backend.compare_capture` holds this part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bitwright.backend import Batch, Tap
from bitwright.errors import BitwrightError
from bitwright.testing.contract_base import Array, Contract, assert_close, run


@dataclass(frozen=True)
class Held:
    """A model as users hold it.

    Attributes:
        build: makes it, the same each time.
        run: runs it in inference, as users do: its results that are tensors, in order.
        batch: of two samples or more, by input name, in the order of the inputs; what it is captured with.
        odd: what its results depend on beside inputs and variables, in words ("how often it was called"). Such a model
            may be refused, or be told of by a warning, which others may not.
        tolerance: of float outputs, relative to their largest magnitude.
        sample: the batch as `adopt` takes it, if not by name.
    """

    build: Callable[[], object]
    run: Callable[[object, Batch], Sequence[Array]]
    batch: Batch
    odd: str = ""
    tolerance: float = 1e-4
    sample: Any = None


class CaptureContract(Contract):
    """What is captured is what the user has."""

    def held(self) -> Mapping[str, Held]:
        """Models as users hold them, by name: some that can be captured, and some whose code depends on how often it
        was called, on whether it is traced, or on the number of samples. None if models come in the backend's form."""
        return {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each case, and each model."""
        super().pytest_generate_tests(metafunc)
        if "held" in metafunc.fixturenames:
            found = self.held()
            metafunc.parametrize("held", list(found.values()), ids=list(found))

    def test_a_capture_computes_what_the_model_does(self, held: Held) -> None:
        """On the batch it was captured with, on others, and on one sample; the model is as it was."""
        backend, model = self.backend(), held.build()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                captured = backend.adopt(model, dict(held.batch) if held.sample is None else held.sample)
            except BitwrightError:
                assert held.odd, "a model that depends on nothing but its inputs is refused"
                return
        told = [w for w in told if not issubclass(w.category, DeprecationWarning)]  # of frameworks among themselves
        if told:
            assert held.odd, f"told of a model that depends on nothing but its inputs: {told[0].message}"
            return
        inputs, outputs = backend.graph(captured).inputs, backend.graph(captured).outputs
        session = backend.session(captured, [Tap(t) for t in dict.fromkeys(outputs)])
        fresh = held.build()
        for what, batch in _batches(held.batch):
            found = run(session, dict(zip(inputs, batch.values(), strict=True)))
            expected = held.run(fresh, batch)
            for owner, results in (("the capture", [found[t] for t in outputs]), ("the model", held.run(model, batch))):
                assert len(results) == len(expected), f"{owner}, {what}: {len(results)} outputs for {len(expected)}"
                for i, (mine, theirs) in enumerate(zip(results, expected, strict=True)):
                    assert mine.dtype == theirs.dtype, f"{owner}, {what}: output {i} is {mine.dtype}"
                    told_of = f"{owner}, {what}, where results depend on {held.odd or 'inputs alone'}: output {i}"
                    assert_close(mine, theirs, held.tolerance, told_of)


def _batches(batch: Batch) -> Iterator[tuple[str, Batch]]:
    yield "on its sample", batch
    yield "called again", batch
    turned = {k: v[::-1] for k, v in batch.items()}
    yield "on other values", {k: v * v.dtype.type(-0.5) if v.dtype.kind == "f" else v for k, v in turned.items()}
    yield "on one sample", {k: v[:1] for k, v in batch.items()}
    yield "on twice as many", {k: np.concatenate([v, v]) for k, v in batch.items()}

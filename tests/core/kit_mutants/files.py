"""Backends that write wrongly, or say wrong things of a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.errors import InputError
from bitwright.graph import (
    Graph,
)
from kit_mutants.base import Wrong, mutant


@mutant("exports forget biases", "cnn", "test_export_and_reload")
class ForgetsBiases(Wrong):
    def export(self, model, plan, encodings, path, format):
        bare = {p: np.zeros_like(v) if p.endswith("bias") else v for p, v in model.params.items()}
        return self.inner.export(replace(model, params=bare), plan, encodings, path, format)


@mutant("files lose half the precision", "cnn", "test_save_and_load")
class SavesHalf(Wrong):
    def save(self, model, path):
        half = {p: v.astype(np.float16).astype(np.float32) for p, v in model.params.items()}
        return self.inner.save(replace(model, params=half), path)


@mutant("loaded models have other names", "cnn", "test_save_and_load")
class Renames(Wrong):
    def load(self, path, **options):
        model = self.inner.load(path, **options)
        g = model.graph
        names = {t: f"loaded/{t}" for t in g.outputs}
        ops = [replace(op, outputs=tuple(names.get(t, t) for t in op.outputs)) for op in g.ops]
        tensors = {names.get(t, t): replace(x, id=names.get(t, t)) for t, x in g.tensors.items()}
        return replace(model, graph=Graph(ops, tensors, g.params, g.inputs, [names[t] for t in g.outputs]))


@mutant("every format is known", "cnn", "test_export_and_reload")
class KnowsAllFormats(Wrong):
    def export(self, model, plan, encodings, path, format):
        return self.inner.export(model, plan, encodings, path, format if format in self.formats() else "npz")


@mutant("inputs are said to be of another type", "tokens", "test_input_specs_describe_the_inputs")
class WrongSpecs(Wrong):
    def input_specs(self, model):
        return {t: (shape, "float32") for t, (shape, _) in self.inner.input_specs(model).items()}


@mutant("inputs are said in another order", "tokens", "test_input_specs_describe_the_inputs")
class TurnedSpecs(Wrong):
    def input_specs(self, model):
        return dict(reversed(self.inner.input_specs(model).items()))


@mutant("objects of others are its own", "cnn", "test_is_a_backend")
class OwnsAll(Wrong):
    def owns(self, model):
        return hasattr(model, "graph") or isinstance(model, dict)


@mutant("refuses whole numbers", "cnn", "test_sessions_take_numbers_of_any_type")
class RefusesIntegers(Wrong):
    def session(self, model, taps):
        made = self.inner.session(model, taps)

        class Run:
            def run(self, batch):
                if wrong := next((t for t, v in batch.items() if np.asarray(v).dtype.kind in "iu"), None):
                    raise InputError(f"input {wrong!r} takes floats")
                return made.run(batch)

        return Run()


@mutant("two sites have one name in the artefact", "cnn", "test_export_and_reload")
class OneNameForTwo(Wrong):
    def export(self, model, plan, encodings, path, format):
        made = self.inner.export(model, plan, encodings, path, format)
        first, second, *_ = encodings
        return replace(made, names={first: second})


@mutant("the artefact's layouts are said to be turned", "prenormed", "test_export_and_reload")
class TurnsLayouts(Wrong):
    def export(self, model, plan, encodings, path, format):
        made = self.inner.export(model, plan, encodings, path, format)
        return replace(made, layouts={p: (1, 0) for p, v in model.params.items() if v.ndim == 2})

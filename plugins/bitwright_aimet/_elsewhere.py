"""AIMET's modules and names that aren't here: importing one says what to call instead.

Modules are told by a finder that Python asks last, so that nothing else is slowed down or hidden; names within a module
that is here, by its ``__getattr__``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from bitwright.errors import InputError

_PACKAGE = "bitwright_aimet"
_LAYERS = "bitwright.layer_outputs(sim, data, out) writes a file for each tensor and sample"
_SEARCH = "bitwright.mixed_precision(model, data, evaluate, candidates=…, allowed_drop=…)"
_LITE = "bitwright.mixed_precision(model, data, candidates=…, lite=10) gives the most sensitive tenth more bits"
_COMPRESSION = "compression (SVD, channel pruning) is not what bitwright does"
_OBJECTS = "sites have names, not objects: sim.bitwright['conv1.weight'].set('int4'), .freeze(), .float(); sim.plan"
_GRAPHS = "nothing needs AIMET's graphs of a model: sim.bitwright.graph has the ops"
_PREPARED = "nothing needs to be prepared or replaced: models are captured as they are"
_BLOCKS = "QuantSim.set_precision(names, weights='int4:block32') or 'int4:lpbq64'"
_RANGES = "bitwright.quant_analyzer(sim, data, out=folder): its page has the ranges of all sites"
_PEFT = "adapters are layers like others; QuantSim.set_precision and sim[site].freeze() set and hold theirs"
_RECONSTRUCT = "QuantSim.apply('block_reconstruction', data) learns roundings and scales block by block"
_ROTATE = "QuantSim.apply('rotate', heads=True)"
_EQUALIZE = "equalize_model, or QuantSim.apply('cross_layer_equalization')"
_EXPORT = "sim.export(path, prefix), which writes a QDQ model too"

_MODULES: Mapping[str, str] = {
    "torch.adascale": _RECONSTRUCT,
    "torch.amp": _SEARCH,
    "torch.arch_checker": "bitwright.architecture_hints(model, target)",
    "torch.channel_pruning": _COMPRESSION,
    "torch.compress": _COMPRESSION,
    "torch.custom": _PREPARED,
    "torch.defs": _COMPRESSION,
    "torch.elementwise_ops": _PREPARED,
    "torch.experimental": f"of omniquant: {_RECONSTRUCT}; of rotations: {_ROTATE}",
    "torch.gptvq": "QuantSim.apply('gptq', data) and 'weight_clipping' do related work",
    "torch.layer_output_utils": _LAYERS,
    "torch.lora": _PEFT,
    "torch.meta": _GRAPHS,
    "torch.model_guidelines": _PREPARED,
    "torch.nn": "calibrate by sim.compute_encodings(callback), or data; " + _OBJECTS,
    "torch.onnx_utils": _EXPORT,
    "torch.peft": _PEFT,
    "torch.pro": _PREPARED,
    "torch.qc_quantize_op": _OBJECTS,
    "torch.quantization": _OBJECTS,
    "torch.spinquant": _ROTATE,
    "torch.svd": _COMPRESSION,
    "torch.tensor_quantizer": _OBJECTS,
    "torch.transformers": _PREPARED,
    "torch.visualization_tools": _RANGES,
    "torch.visualize_serialized_data": _RANGES,
    "torch.winnow": _COMPRESSION,
    "onnx.adascale": _RECONSTRUCT,
    "onnx.amp": _SEARCH,
    "onnx.arch_checker": "bitwright.architecture_hints(model, target)",
    "onnx.auto_quant_v2": "bitwright.auto_quantize(model, data, evaluate, allowed_drop=…)",
    "onnx.defs": "QuantSim.set_precision(names, weights=…, activations=…)",
    "onnx.experimental": _PEFT,
    "onnx.graph_passes": _PREPARED,
    "onnx.layer_output_utils": _LAYERS,
    "onnx.lite_mp": _LITE,
    "onnx.llm_configurator": "QuantSim(folder, weights=…, kv_cache=…): see language-models.md",
    "onnx.lpbq_utils": _BLOCKS,
    "onnx.meta": _GRAPHS,
    "onnx.mixed_precision": _SEARCH,
    "onnx.prepare_passes": _PREPARED,
    "onnx.qc_quantize_op": _OBJECTS,
    "onnx.spinquant": _ROTATE,
    "tensorflow.amp": _SEARCH,
    "tensorflow.channel_pruning": _COMPRESSION,
    "tensorflow.common": _GRAPHS,
    "tensorflow.compress": _COMPRESSION,
    "tensorflow.defs": _COMPRESSION,
    "tensorflow.examples": "AIMET's own networks aren't here: take yours",
    "tensorflow.layer_output_utils": _LAYERS,
    "tensorflow.mixed_precision": _SEARCH,
    "tensorflow.plotting_utils": _RANGES,
    "tensorflow.svd": _COMPRESSION,
    "tensorflow.utils": "bitwright_tensorflow.open_session(model) opens what was changed; TensorFlow's own Saver "
    "saves and loads graphs",
    "tensorflow.winnow": _COMPRESSION,
    "tensorflow.keras.amp": _SEARCH,
    "tensorflow.keras.compress": _COMPRESSION,
    "tensorflow.keras.connectedgraph": _GRAPHS,
    "tensorflow.keras.layer_output_utils": _LAYERS,
    "tensorflow.keras.quant_sim": _OBJECTS,
    "tensorflow.keras.utils": _PREPARED,
    "common.amp": _SEARCH,
    "common.connected_graph": _GRAPHS,
    "common.cost_calculator": _COMPRESSION,
    "common.layer_output_utils": _LAYERS,
    "common.quantsim": _EXPORT,
}
"""AIMET's module, without its package's first word → what to call."""

_NAMES: Mapping[str, str] = {
    "AimetLogger": "warnings are Python's, and long tools show their progress; there is no log",
    "CostMetric": _COMPRESSION,
    "CompressionScheme": _COMPRESSION,
    "GreedySelectionParameters": _COMPRESSION,
    "CrossLayerScaling": _EQUALIZE,
    "HighBiasFold": _EQUALIZE,
    "GraphSearchUtils": _EQUALIZE,
    "QSpec": "QuantSim.set_precision(names, weights=…, activations=…)",
    "analyze_per_layer_sensitivity": "QuantAnalyzer, or bitwright.quant_analyzer(model, data, evaluate)",
    "apply_adaround_with_cache": "Adaround.apply_adaround: moments are held, and nothing needs a cache",
    "apply_adascale": _RECONSTRUCT,
    "check_accumulator_overflow": "bitwright.quant_analyzer(sim, data): its field accumulators",
    "choose_fast_mixed_precision": "choose_mixed_precision, whose first phase measures noise too",
    "clamp_activation_encodings": "sim.bitwright[site].set(low=…, high=…)",
    "compute_encodings_for_sims": "compute_encodings of each",
    "encodings_to_onnx_qdq": _EXPORT,
    "equalize_bn_folded_model": _EQUALIZE,
    "fold_given_batch_norms": "fold_all_batch_norms; QuantSim.apply('fold_batch_norm') says which were folded",
    "get_all_quantizers": _OBJECTS,
    "load_checkpoint": "QuantSim.load(folder, model)",
    "save_checkpoint": "sim.bitwright.save(folder)",
    "set_activation_quantizers_to_float": "sim.bitwright.set_precision(names, activations='float16')",
    "set_lpbq_for_params": _BLOCKS,
    "set_param_type": _BLOCKS,
    "visualize_advanced_stats": _RANGES,
    "visualize_relative_weight_ranges_to_identify_problematic_layers": _RANGES,
    "visualize_stats": _RANGES,
    "visualize_weight_ranges": _RANGES,
}
"""AIMET's name within a module that is here → what to call."""

_PAGE = "the page 'Coming from AIMET' has every call"


class NotHere(InputError, ImportError):
    """A name of AIMET's that there is another call for."""


class _Finder(MetaPathFinder):
    """Finds nothing, and says of AIMET's modules what to call instead."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """None for all other modules.

        Raises:
            NotHere: it is one of AIMET's.
        """
        package, _, name = fullname.partition(".")
        if package == _PACKAGE and name in _MODULES:
            raise NotHere(f"{fullname} isn't there. Instead: {_MODULES[name]} ({_PAGE})")


def tell_modules() -> None:
    """Have Python ask here for modules that nobody has found."""
    if not any(type(finder).__qualname__ == _Finder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def tell_names(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that has fewer names than AIMET's of the same name."""

    def missing(name: str) -> Any:
        if name in _NAMES:
            raise NotHere(f"{module} has no {name}. Instead: {_NAMES[name]} ({_PAGE})")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing

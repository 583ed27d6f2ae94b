"""The conformance kit, run on the techniques of this distribution that need no search."""

from bitwright.testing.technique_contract import TechniqueContract
from bitwright_techniques.bias_correction import BiasCorrection
from bitwright_techniques.cross_layer_equalization import CrossLayerEqualization
from bitwright_techniques.fold_batch_norm import FoldBatchNorm


class TestFoldBatchNorm(TechniqueContract):
    needs_data = False

    def technique(self):
        return FoldBatchNorm()


class TestCrossLayerEqualization(TechniqueContract):
    needs_data = False

    def technique(self):
        return CrossLayerEqualization()


class TestBiasCorrection(TechniqueContract):
    reconstructs = True

    def technique(self):
        return BiasCorrection()

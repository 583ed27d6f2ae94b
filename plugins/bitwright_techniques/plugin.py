"""What the built-in techniques register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import AutoStage, TechniqueInfo, hookimpl


@hookimpl
def register_techniques() -> list[TechniqueInfo]:
    """The techniques that ship with bitwright."""
    return [
        TechniqueInfo(
            "fold_batch_norm",
            "Fold batch normalization into the convolution or linear layer beside it.",
            factory="bitwright_techniques.fold_batch_norm:FoldBatchNorm",
            aliases=("bn_fold",),
            auto=AutoStage(10, prepares=True),
        ),
        TechniqueInfo(
            "cross_layer_equalization",
            "Equalize channel ranges of consecutive layers, and absorb high biases.",
            factory="bitwright_techniques.cross_layer_equalization:CrossLayerEqualization",
            aliases=("cle",),
            auto=AutoStage(20),
        ),
        TechniqueInfo(
            "bias_correction",
            "Correct the shift of output means that quantization causes.",
            factory="bitwright_techniques.bias_correction:BiasCorrection",
            auto=AutoStage(30),
        ),
        TechniqueInfo(
            "adaround",
            "Choose each weight's rounding, up or down, by the layer's output error.",
            factory="bitwright_techniques.adaround:AdaRound",
            # It solves biases with the roundings; corrected ones would shift its target by nearest rounding's error.
            auto=AutoStage(40, weights_only=True, replaces=("bias_correction",)),
        ),
        TechniqueInfo(
            "seq_mse",
            "Choose weight scales by the layer's output error, layer after layer.",
            factory="bitwright_techniques.seq_mse:SeqMse",
        ),
        TechniqueInfo(
            "gptq",
            "Round weights one after another, the rest making up for each error (Hessian-based).",
            factory="bitwright_techniques.gptq:Gptq",
        ),
        TechniqueInfo(
            "low_rank",
            "Put a branch of low rank beside each rounded layer, which takes back a part of what rounding costs.",
            factory="bitwright_techniques.low_rank:LowRank",
            aliases=("lqer",),
        ),
        TechniqueInfo(
            "block_reconstruction",
            "Learn roundings and scales of weights by the output error of a block of the network at a time.",
            factory="bitwright_techniques.block_reconstruction:BlockReconstruction",
            aliases=("brecq",),
        ),
        TechniqueInfo(
            "rotate",
            "Rotate the residual streams of transformers, so that no channel stands out; merged into weights.",
            factory="bitwright_techniques.rotate:Rotate",
        ),
        TechniqueInfo(
            "smooth_quant",
            "Move the outliers of activations into the weights that read them.",
            factory="bitwright_techniques.smooth_quant:SmoothQuant",
        ),
        TechniqueInfo(
            "awq",
            "Scale up the weight channels that meet large activations, for few-bit weights.",
            factory="bitwright_techniques.awq:Awq",
        ),
        TechniqueInfo(
            "weight_clipping",
            "Clip each channel's weight range where that lowers the error; works without data.",
            factory="bitwright_techniques.weight_clipping:WeightClipping",
        ),
        TechniqueInfo(
            "activation_ranges",
            "Choose the calibration scheme of each activation by measured output error.",
            factory="bitwright_techniques.activation_ranges:ActivationRanges",
        ),
        TechniqueInfo(
            "batch_norm_reestimation",
            "Measure batch-norm statistics anew in the quantized network, after training.",
            factory="bitwright_techniques.batch_norm_reestimation:BatchNormReestimation",
            aliases=("bn_reestimation",),
        ),
        TechniqueInfo(
            "fold_batch_norm_to_scale",
            "Fold batch norms into the scales of quantized weights; the integer codes stay.",
            factory="bitwright_techniques.fold_batch_norm_to_scale:FoldBatchNormToScale",
            aliases=("fold_to_scale",),
        ),
    ]

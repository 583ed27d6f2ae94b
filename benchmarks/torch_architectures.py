"""Architectures for the capture table, each small and without trained weights: name → (module, sample)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Build = Callable[[], tuple[nn.Module, Any]]


def image(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def tokens(length: int = 12, vocabulary: int = 64) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": torch.randint(0, vocabulary, (2, length)), "attention_mask": mask}


def transformers_models() -> Iterator[tuple[str, Build]]:
    """From configurations of transformers, at a fraction of their size."""
    try:
        import transformers as t
    except ImportError:
        return
    text = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
              "image_size": 32, "patch_size": 8}  # fmt: skip

    def model(name: str, config: str, sample: Callable[[], Any], **settings: Any) -> tuple[str, Build]:
        def build() -> tuple[nn.Module, Any]:
            return getattr(t, name)(getattr(t, config)(**settings)), sample()

        return name, build

    def pixels(size: int = 32) -> Callable[[], Any]:
        return lambda: {"pixel_values": image(size)}

    yield model("BertForSequenceClassification", "BertConfig", tokens, **text)
    yield model("RobertaForSequenceClassification", "RobertaConfig", tokens, **text)
    yield model("DistilBertForSequenceClassification", "DistilBertConfig", tokens, vocab_size=64, dim=32, n_layers=2,
                n_heads=4, hidden_dim=64, max_position_embeddings=64)  # fmt: skip
    yield model("AlbertModel", "AlbertConfig", tokens, **text, embedding_size=16)
    yield model("ElectraModel", "ElectraConfig", tokens, **text, embedding_size=16)
    yield model("MPNetModel", "MPNetConfig", tokens, **text)
    yield model("GPT2LMHeadModel", "GPT2Config", tokens, vocab_size=64, n_embd=32, n_layer=2, n_head=4,
                n_positions=64, use_cache=False)  # fmt: skip
    yield model("LlamaForCausalLM", "LlamaConfig", tokens, **text, num_key_value_heads=2, use_cache=False)
    yield model("Qwen2ForCausalLM", "Qwen2Config", tokens, **text, num_key_value_heads=2, use_cache=False)
    yield model("GPTNeoXForCausalLM", "GPTNeoXConfig", tokens, **text, use_cache=False)
    yield model(
        "T5ForConditionalGeneration", "T5Config",
        lambda: {**tokens(), "decoder_input_ids": torch.randint(0, 64, (2, 5))},
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False,
    )  # fmt: skip
    yield model(
        "WhisperForConditionalGeneration", "WhisperConfig",
        lambda: {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": torch.randint(0, 64, (2, 5))},
        vocab_size=64, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=32,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        use_cache=False,
    )  # fmt: skip
    yield model("ViTForImageClassification", "ViTConfig", pixels(), **vision)
    yield model("DeiTForImageClassification", "DeiTConfig", pixels(), **vision)
    yield model("Dinov2ForImageClassification", "Dinov2Config", pixels(), **vision)
    yield model("SwinForImageClassification", "SwinConfig", pixels(64), image_size=64, patch_size=4, embed_dim=16,
                depths=[2, 2], num_heads=[2, 4], window_size=4)  # fmt: skip
    yield model("ConvNextForImageClassification", "ConvNextConfig", pixels(64), hidden_sizes=[16, 24, 32, 40],
                depths=[1, 1, 2, 1])  # fmt: skip
    yield model("ResNetForImageClassification", "ResNetConfig", pixels(64), embedding_size=16,
                hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])  # fmt: skip
    yield model("RegNetForImageClassification", "RegNetConfig", pixels(64), embedding_size=16,
                hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], groups_width=8)  # fmt: skip
    yield model("MobileNetV1ForImageClassification", "MobileNetV1Config", pixels(64), depth_multiplier=0.25)
    yield model("MobileNetV2ForImageClassification", "MobileNetV2Config", pixels(64), depth_multiplier=0.35)
    yield model("EfficientNetForImageClassification", "EfficientNetConfig", pixels(64), width_coefficient=0.25,
                depth_coefficient=0.3, hidden_dim=320, image_size=64)  # fmt: skip
    yield model("MobileViTForImageClassification", "MobileViTConfig", pixels(64), image_size=64,
                hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 64])  # fmt: skip
    yield model("SegformerForSemanticSegmentation", "SegformerConfig", pixels(64), hidden_sizes=[8, 16, 24, 32],
                depths=[1, 1, 1, 1], decoder_hidden_size=32)  # fmt: skip
    yield model("PoolFormerForImageClassification", "PoolFormerConfig", pixels(64), hidden_sizes=[8, 16, 24, 32],
                depths=[1, 1, 1, 1])  # fmt: skip
    yield model("LevitForImageClassification", "LevitConfig", pixels(64), image_size=64, hidden_sizes=[32, 48, 64],
                num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8])  # fmt: skip
    yield model("Wav2Vec2Model", "Wav2Vec2Config", lambda: {"input_values": torch.randn(2, 2000)}, hidden_size=32,
                num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, conv_dim=[16, 16],
                conv_stride=[5, 4], conv_kernel=[10, 8], num_feat_extract_layers=2,
                num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.0)  # fmt: skip
    yield model("CLIPVisionModel", "CLIPVisionConfig", pixels(), **vision)


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), act or nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 8), conv(8, 16), conv(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2, self.merge1, self.head = conv(32, 16), conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = self.merge2(torch.cat([self.up2(c), b], 1))
        return self.head(self.merge1(torch.cat([self.up1(b), a], 1)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(4))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)), inplace=True)))
        return self.fc(torch.cat(features, 1).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, s=2)
        self.a, self.b, self.c = conv(8, 8, 1), nn.Sequential(conv(8, 4, 1), conv(4, 8)), conv(8, 8, 5)
        self.d, self.fc = conv(8, 8, 1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        pooled = self.d(F.avg_pool2d(x, 3, 1, 1))
        return self.fc(F.adaptive_avg_pool2d(torch.cat([self.a(x), self.b(x), self.c(x), pooled], 1), 1).flatten(1))


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, s=2)
        self.branch = nn.Sequential(conv(8, 8, 1), conv(8, 8, g=8, act=nn.Identity()), conv(8, 8, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(x.mean([2, 3]))


class SqueezeExcite(nn.Module):
    """A MobileNetV3 block: hardswish, squeeze and excitation with a hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, s=2, act=nn.Hardswish(inplace=True))
        self.depthwise = conv(16, 16, g=16, act=nn.Hardswish(inplace=True))
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.fc = conv(16, 16, 1, act=nn.Identity()), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        y = y * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))), inplace=True)
        y = self.project(y)
        y += x
        return self.fc(y.mean((2, 3)))


class Yolo(nn.Module):
    """Backbone, feature pyramid, two heads; boxes are decoded in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (conv(i, o, s=2, act=nn.SiLU(inplace=True)) for i, o in ((3, 8), (8, 16), (16, 32)))
        self.lateral, self.head1, self.head2 = conv(48, 16, 1), nn.Conv2d(32, 18, 1), nn.Conv2d(16, 18, 1)
        self.register_buffer("stride", torch.tensor([8.0, 4.0]))

    def decode(self, y: torch.Tensor, level: int) -> torch.Tensor:
        n, _, h, w = y.shape
        y = y.view(n, 3, 6, h, w).permute(0, 1, 3, 4, 2).contiguous()
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack((columns, rows), 2).to(y)
        y = y.sigmoid()
        y[..., 0:2] = (y[..., 0:2] * 2 - 0.5 + grid) * self.stride[level]
        return y.view(n, -1, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = self.b(self.a(x))
        c = self.c(b)
        merged = self.lateral(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        return torch.cat([self.decode(self.head1(c), 0), self.decode(self.head2(merged), 1)], 1)


class DeepLab(nn.Module):
    """Dilated convolutions at several rates, and bilinear resizing to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 8, s=2), conv(8, 16, s=2))
        self.rates = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=r, dilation=r) for r in (1, 2, 4))
        self.pool, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.backbone(x)
        pooled = F.interpolate(self.pool(y.mean((2, 3), keepdim=True)), size=y.shape[2:], mode="bilinear")
        y = self.head(torch.cat([*(rate(y).relu() for rate in self.rates), pooled], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class LstmClassifier(nn.Module):
    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(64, 16), cell(16, 24, batch_first=True)
        self.fc = nn.Linear(24, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.cell(self.embed(ids))[0][:, -1])


def plain_models() -> Iterator[tuple[str, Build]]:
    """Written here."""
    for kind in (UNet, DenseNet, Inception, ShuffleNet, SqueezeExcite, Yolo, DeepLab):
        yield kind.__name__, lambda kind=kind: (kind(), image())
    yield "DepthwiseCnn", lambda: (
        nn.Sequential(conv(3, 8, s=2), *(m for _ in range(3) for m in (conv(8, 8, g=8), conv(8, 8, 1))),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)), image())  # fmt: skip
    for cell in (nn.LSTM, nn.GRU):
        yield f"{cell.__name__}Classifier", lambda cell=cell: (LstmClassifier(cell), torch.randint(0, 64, (2, 9)))
    yield "TransformerEncoder", lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False),
        torch.randn(2, 7, 16))  # fmt: skip


def torchvision_models() -> Iterator[tuple[str, Build]]:
    """Where torchvision can be imported."""
    try:
        from torchvision import models
    except ImportError:
        return
    names = ("resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf",
             "convnext_tiny", "densenet121", "inception_v3", "shufflenet_v2_x1_0", "swin_t", "swin_v2_t", "vit_b_16",
             "mnasnet1_0", "squeezenet1_1", "googlenet", "vgg11_bn")  # fmt: skip
    for name in names:
        size = 299 if name == "inception_v3" else 224
        yield f"torchvision {name}", lambda name=name, size=size: (
            getattr(models, name)(weights=None), image(size))  # fmt: skip
    for name in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        yield f"torchvision {name}", lambda name=name: (
            getattr(models.segmentation, name)(weights=None, weights_backbone=None), image(128))  # fmt: skip
    yield "torchvision ssdlite320_mobilenet_v3_large", lambda: (
        models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None), image(320))  # fmt: skip


def timm_models() -> Iterator[tuple[str, Build]]:
    """Where timm can be imported."""
    try:
        import timm
    except ImportError:
        return
    for name in ("efficientnet_lite0", "mobilenetv4_conv_small", "repvgg_a0", "mobileone_s0", "fastvit_t8",
                 "efficientvit_b0", "deit_tiny_patch16_224", "mixer_s32_224", "convnextv2_atto"):  # fmt: skip
        yield f"timm {name}", lambda name=name: (timm.create_model(name, pretrained=False), image(224))


def architectures() -> Iterator[tuple[str, Build]]:
    """All of them, in the order of the table."""
    yield from plain_models()
    yield from transformers_models()
    yield from torchvision_models()
    yield from timm_models()

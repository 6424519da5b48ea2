"""Convolutional models as people write them without transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def norm_conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in torchvision."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = norm_conv(inputs, planes, 1, stride) if stride > 1 or inputs != planes else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + shortcut)


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = norm_conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet(nn.Module):
    def __init__(self, block: type[BasicBlock] | type[Bottleneck], **options: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        wide = block.expansion
        self.layer1 = nn.Sequential(block(8, 8, **options), block(8 * wide, 8, **options))
        self.layer2 = nn.Sequential(block(8 * wide, 12, stride=2, **options), block(12 * wide, 12, **options))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12 * wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


class VGG(nn.Module):
    """Stages in a row without shortcuts: every hidden channel is a neuron, also between two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 9, 3), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(9, 11, 3, padding=1), nn.ReLU(), nn.Conv2d(11, 13, 3, padding=1), nn.ReLU()),
        )
        self.classifier = nn.Sequential(nn.Linear(13, 15), nn.ReLU(), nn.Dropout(), nn.Linear(15, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stages(x).mean((2, 3)))


class UNet(nn.Module):
    """What the encoder makes is read below and, beside what comes up, by the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.down = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 9, 3, stride=2, padding=1)
        self.mid, self.up = nn.Conv2d(9, 11, 3, padding=1), nn.ConvTranspose2d(11, 6, 2, stride=2)
        self.dec, self.out = nn.Conv2d(13, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc(x).relu()
        x = self.up(self.mid(self.down(skip).relu()).relu()).relu()
        return self.out(self.dec(torch.cat([skip, x], dim=1)).relu())


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection, as in MobileNetV3."""

    def __init__(self, width: int = 8, inner: int = 20, squeezed: int = 6) -> None:
        super().__init__()
        self.expand, self.depthwise = norm_conv(width, inner, 1), norm_conv(inner, inner, 3, groups=inner)
        self.squeeze, self.excite = nn.Conv2d(inner, squeezed, 1), nn.Conv2d(squeezed, inner, 1)
        self.project = norm_conv(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.depthwise(nn.functional.hardswish(self.expand(x))))
        gate = self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.project(y * gate)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)
        self.blocks = nn.ModuleList([InvertedResidual(), InvertedResidual(inner=16)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class MixerBlock(nn.Module):
    def __init__(self, patches: int = 9, width: int = 10) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 14), nn.GELU(), nn.Linear(14, patches))
        self.channels = nn.Sequential(nn.Linear(width, 18), nn.GELU(), nn.Linear(18, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 10, 4, stride=4), nn.Linear(10, 5)
        self.blocks = nn.ModuleList([MixerBlock(), MixerBlock()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

"""Networks to compress and to simulate: two LeNets and a small ResNet for 28×28 images, five ImageNet
definitions, a sentence transformer, and a pitch tracker in two sizes.

The ImageNet networks use the module names and parameter shapes of torchvision's, so weights that a user has
load as they are (`compress.train.load_checkpoint`). `compress.pretrained` brings weights of some of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from compress.pretrained.crepe import Crepe
from compress.pretrained.efficientnet_lite import EfficientNetLite0
from compress.pretrained.minilm import MiniLM
from hwsim.errors import InputError, Problem, nearest_name

__all__ = ["NETWORKS", "Network", "build", "network"]


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes
    ----------
    name : str
    input_shape : tuple of int
        Of one input, without the batch: ``(channels, height, width)``.
    num_classes : int
        Unless `build` is told otherwise.
    source : str
        Where the architecture was published.
    make : callable
        ``make(num_classes)`` gives the module, initialised from torch's global generator.
    input_dtype : str
        ``"int64"`` where the inputs are indices.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    source: str
    make: Callable[[int], nn.Module]
    input_dtype: str = "float32"

    def random_inputs(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Inputs of the right shape: normally distributed, or indices below a thousand."""
        if self.input_dtype == "int64":
            return torch.randint(1, 1000, (count, *self.input_shape), generator=generator)
        return torch.randn(count, *self.input_shape, generator=generator)


def network(name: str) -> Network:
    """The entry of the zoo.

    Raises
    ------
    InputError
        Unknown name, with the nearest one.
    """
    if name not in NETWORKS:
        raise InputError(
            "network", Problem("name", f'"{name}" is not in the zoo', nearest_name(name, NETWORKS))
        )
    return NETWORKS[name]


def build(
    name: str, num_classes: int | None = None, seed: int = 0, device: str | torch.device = "cpu"
) -> nn.Module:
    """A network of the zoo with seeded random weights.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.
    num_classes : int, optional
        Outputs of the last layer.
    seed : int
        Of the initial weights. The global generator is left as it was.
    device : str or torch.device
        ``"meta"`` builds shapes without weights, in milliseconds.

    Raises
    ------
    InputError
        Unknown name (with the nearest one), or fewer than one class.

    Examples
    --------
    >>> sum(parameter.numel() for parameter in build("lenet5").parameters())
    431080
    """
    entry = network(name)
    classes = entry.num_classes if num_classes is None else num_classes
    if classes < 1:
        raise InputError("network", Problem("num_classes", f"{classes}, must be at least 1"))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return entry.make(classes)


def _lenet5(num_classes: int) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 20, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(800, 500)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(500, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _lenet300(num_classes: int) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(784, 300)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(300, 100)),
        ("relu2", nn.ReLU()),
        ("fc3", nn.Linear(100, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _vgg16(num_classes: int) -> nn.Module:
    """Configuration D: 13 convolutions of 3×3 between five poolings, three linear layers."""
    features: list[nn.Module] = []
    channels = 3
    for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in stage:
            features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        features.append(nn.MaxPool2d(2))
    classifier = [
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, num_classes),
    ]
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            _he_init(layer)
    for layer in classifier:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
    stages: list[tuple[str, nn.Module]] = [
        ("features", nn.Sequential(*features)),
        ("avgpool", nn.AdaptiveAvgPool2d(7)),
        ("flatten", nn.Flatten()),
        ("classifier", nn.Sequential(*classifier)),
    ]
    return nn.Sequential(OrderedDict(stages))


class _Residual(nn.Module):
    """The frame of both residual blocks: a body, a shortcut that is projected where shapes change, and a
    ReLU.
    """

    downsample: nn.Module | None

    def _shortcut(self, in_channels: int, out_channels: int, stride: int) -> None:
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                _conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )

    def body(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.body(x) + shortcut)


class _BasicBlock(_Residual):
    """Two 3×3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self._shortcut(in_channels, width, stride)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class _Bottleneck(_Residual):
    """1×1, 3×3 (which carries the stride), 1×1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self._shortcut(in_channels, out_channels, stride)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


def _resnet(
    stem: list[tuple[str, nn.Module]],
    block: type[_BasicBlock] | type[_Bottleneck],
    widths: Sequence[int],
    repeats: Sequence[int],
    num_classes: int,
) -> nn.Module:
    """A stem, stages of residual blocks of which every stage but the first halves the size, mean, one linear
    layer.
    """
    layers = list(stem)
    channels = widths[0]
    for index, (width, repeat) in enumerate(zip(widths, repeats, strict=True)):
        stage = []
        for position in range(repeat):
            stride = 2 if index > 0 and position == 0 else 1
            stage.append(block(channels, width, stride))
            channels = width * block.expansion
        layers.append((f"layer{index + 1}", nn.Sequential(*stage)))
    layers += [
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(channels, num_classes)),
    ]
    model = nn.Sequential(OrderedDict(layers))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _he_init(module)
    return model


def _imagenet_stem() -> list[tuple[str, nn.Module]]:
    return [
        ("conv1", _conv(3, 64, 7, 2)),
        ("bn1", nn.BatchNorm2d(64)),
        ("relu", nn.ReLU()),
        ("maxpool", nn.MaxPool2d(3, stride=2, padding=1)),
    ]


def _resnet18(num_classes: int) -> nn.Module:
    return _resnet(_imagenet_stem(), _BasicBlock, (64, 128, 256, 512), (2, 2, 2, 2), num_classes)


def _resnet50(num_classes: int) -> nn.Module:
    return _resnet(_imagenet_stem(), _Bottleneck, (64, 128, 256, 512), (3, 4, 6, 3), num_classes)


def _resnet20(num_classes: int) -> nn.Module:
    """The CIFAR ResNet-20 for one input channel, with projected shortcuts; 28×28 shrinks to 14×14 and 7×7."""
    stem: list[tuple[str, nn.Module]] = [
        ("conv1", _conv(1, 16, 3)),
        ("bn1", nn.BatchNorm2d(16)),
        ("relu", nn.ReLU()),
    ]
    return _resnet(stem, _BasicBlock, (16, 32, 64), (3, 3, 3), num_classes)


class _InvertedResidual(nn.Module):
    """Expand by 1×1 (unless the expansion is 1), 3×3 depthwise, project by 1×1 without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_norm_relu6(in_channels, width, 1)]
        layers += [
            _conv_norm_relu6(width, width, 3, stride, groups=width),
            _conv(width, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


def _mobilenetv2(num_classes: int) -> nn.Module:
    """Table 2 of the paper: (expansion, channels, repeats, stride of the first)."""
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    features: list[nn.Module] = [_conv_norm_relu6(3, 32, 3, 2)]
    channels = 32
    for expansion, width, repeats, stride in stages:
        for position in range(repeats):
            features.append(_InvertedResidual(channels, width, stride if position == 0 else 1, expansion))
            channels = width
    features.append(_conv_norm_relu6(channels, 1280, 1))
    classifier = nn.Linear(1280, num_classes)
    stack: list[tuple[str, nn.Module]] = [
        ("features", nn.Sequential(*features)),
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("classifier", nn.Sequential(nn.Dropout(0.2), classifier)),
    ]
    model = nn.Sequential(OrderedDict(stack))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _he_init(module)
    nn.init.normal_(classifier.weight, 0, 0.01)
    nn.init.zeros_(classifier.bias)
    return model


def _conv_norm_relu6(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = _conv(in_channels, out_channels, kernel, stride, groups)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, as in front of batch normalisation, padded by half its kernel."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def _he_init(layer: nn.Conv2d) -> None:
    """Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, with the fan-out that the ResNet authors
    use.
    """
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _minilm(num_classes: int) -> nn.Module:
    """An embedding; its width is not a number of classes, and cannot be chosen."""
    if num_classes != 384:
        raise InputError("network", Problem("num_classes", f"{num_classes}, an embedding of MiniLM has 384"))
    return MiniLM()


_SMALL, _IMAGENET = (1, 28, 28), (3, 224, 224)
_ENTRIES = (
    Network(
        "lenet5",
        _SMALL,
        10,
        "LeCun et al., Proc. IEEE 1998, in the 20-50-500-10 form that the pruning literature uses, with ReLU",
        _lenet5,
    ),
    Network("lenet300", _SMALL, 10, "LeNet-300-100: LeCun et al., Proc. IEEE 1998, with ReLU", _lenet300),
    Network(
        "resnet20",
        _SMALL,
        10,
        "He et al., CVPR 2016, section 4.2, for one channel, with projected shortcuts",
        _resnet20,
    ),
    Network("vgg16", _IMAGENET, 1000, "Simonyan and Zisserman, ICLR 2015, configuration D", _vgg16),
    Network("resnet18", _IMAGENET, 1000, "He et al., CVPR 2016, table 1", _resnet18),
    Network(
        "resnet50", _IMAGENET, 1000, "He et al., CVPR 2016, table 1, stride in the 3x3 convolution", _resnet50
    ),
    Network("mobilenetv2", _IMAGENET, 1000, "Sandler et al., CVPR 2018, table 2", _mobilenetv2),
    Network(
        "efficientnet-lite0",
        _IMAGENET,
        1000,
        "TensorFlow's efficientnet/lite; Tan and Le, ICML 2019, table 1",
        EfficientNetLite0,
    ),
    Network(
        "minilm-l6",
        (128,),
        384,
        "Wang et al., MiniLM, NeurIPS 2020; six layers of BERT, 128 tokens",
        _minilm,
        "int64",
    ),
    Network("crepe-full", (1024,), 360, "Kim et al., ICASSP 2018, section 2", partial(Crepe, "full")),
    Network(
        "crepe-tiny",
        (1024,),
        360,
        "Kim et al., ICASSP 2018, in the authors' smallest width",
        partial(Crepe, "tiny"),
    ),
)
NETWORKS = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""The networks of the zoo by name."""

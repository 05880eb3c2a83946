"""The zoo's cnn for many models at once: every weight has a leading axis [G], and so has every activation.

On a GPU all models take a step together: convolutions are products of patches, images are stored with their channels
last, and products are in bfloat16. A CPU is faster with torch's own operators and one model after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedpara_edge.nn.groupnorm import group_count

CHANNELS = (32, 64, 128, 256)
CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4")
EPS = 1e-5
Activation = Callable[..., Tensor]
"""`activation`, or what it was fused to."""


def patches(images: Tensor) -> Tensor:
    """3x3 patches [N, H, W, 9 C] of images [N, H, W, C], which are padded by zeros."""
    n, height, width, channels = images.shape
    padded = functional.pad(images, (0, 0, 1, 1, 1, 1))
    windows = [padded[:, row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return torch.stack(windows, 3).view(n, height, width, 9 * channels)


def folded_patches(gradient: Tensor) -> Tensor:
    """Gradient [N, H, W, C] of images from that of their patches [N, H, W, 9, C]."""
    n, height, width, _, channels = gradient.shape
    total = gradient.new_zeros(n, height, width, channels)
    for row in range(3):
        for column in range(3):
            top, left = row - 1, column - 1
            to = total[:, max(top, 0) : height + min(top, 0), max(left, 0) : width + min(left, 0)]
            of = gradient[
                :, max(-top, 0) : height + min(-top, 0), max(-left, 0) : width + min(-left, 0), 3 * row + column
            ]
            to += of
    return total


class _Convolution(torch.autograd.Function):
    """Convolutions of images [G, B, H, W, C] by weights [G, O, 9 C]: [G, B H W, O]."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weights: Tensor) -> Tensor:
        group = len(images)
        columns = (FAST["patches"] if ctx.needs_input_grad[1] else patches)(images.flatten(0, 1))
        columns = columns.view(group, -1, weights.shape[2])
        ctx.save_for_backward(columns, weights)
        ctx.shape = images.shape
        return torch.bmm(columns, weights.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        columns, weights = ctx.saved_tensors
        of_weights = torch.bmm(gradient.mT, columns)
        if not ctx.needs_input_grad[0]:
            return None, of_weights
        group, batch, height, width, channels = ctx.shape
        of_columns = torch.bmm(gradient, weights).view(group * batch, height, width, 9, channels)
        return FAST["folded_patches"](of_columns).view(ctx.shape), of_weights


def activation(product: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, height: int, width: int) -> Tensor:
    """Bias, GroupNorm, ReLU and 2x2 max pooling of convolutions [G, B H W, O]: images [G, B, H / 2, W / 2, O]."""
    group, _, outputs = product.shape
    per, count = height * width, group_count(outputs)
    values = product.float().view(group, -1, per, count, outputs // count)
    values = values + bias.view(group, 1, 1, count, -1)
    variance, mean = torch.var_mean(values, dim=(2, 4), keepdim=True, correction=0)
    values = ((values - mean) * torch.rsqrt(variance + EPS)).view(group, -1, height, width, outputs)
    values = torch.relu(values * scale.view(group, 1, 1, 1, -1) + shift.view(group, 1, 1, 1, -1)).to(product.dtype)
    high, wide = height // 2, width // 2
    values = values[:, :, : 2 * high, : 2 * wide].reshape(group, -1, high, 2, wide, 2, outputs)
    upper, lower = torch.maximum(*values[:, :, :, 0].unbind(4)), torch.maximum(*values[:, :, :, 1].unbind(4))
    return torch.maximum(upper, lower)  # amax divides by the number of equal entries, 0 where fused kernels round less


FAST = {"patches": patches, "folded_patches": folded_patches, "activation": activation}
"""The functions that take most of the time, which `compile_them` replaces."""


def compile_them() -> None:
    """Fuse what is not a product, for a device where that pays."""
    torch._dynamo.config.cache_size_limit = 64
    for name, function in tuple(FAST.items()):
        FAST[name] = torch.compile(function, dynamic=False)


def outputs(weights: Mapping[str, Tensor], images: Tensor, *, fused: bool = True) -> Tensor:
    """Logits float32 [G, B, classes].

    Args:
        weights: By name: convolutions [G, O, 9 C], with `.bias`, `.scale` and `.shift` [G, O]; `head` [G, classes, F].
        images: Images [G, B, H, W, C] in the dtype of the products.
        fused: Whether the batch is one of training, whose size is always the same.
    """
    if images.device.type == "cpu":
        names = tuple(weights)
        models = (dict(zip(names, tensors, strict=True)) for tensors in zip(*weights.values(), strict=True))
        return torch.stack([of_one(model, x) for model, x in zip(models, images, strict=True)])
    return together(weights, images, FAST["activation"] if fused else activation)


def together(weights: Mapping[str, Tensor], images: Tensor, act: Activation) -> Tensor:
    """The same for all models in one batch of products."""
    for name in CONVOLUTIONS:
        height, width = images.shape[2:4]
        product = _Convolution.apply(images, weights[name].to(images.dtype))  # type: ignore[no-untyped-call]
        affine = (weights[f"{name}.{part}"].contiguous() for part in ("bias", "scale", "shift"))
        images = act(product, *affine, height, width)
    features = images.flatten(2)
    return torch.baddbmm(weights["head.bias"][:, None], features.float(), weights["head"].mT)


def of_one(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits [B, classes] of one model, whose weights have no leading axis, of images [B, H, W, C]."""
    images = images.permute(0, 3, 1, 2)
    for name in CONVOLUTIONS:
        kernel = weights[name].unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        images = functional.conv2d(images, kernel, weights[f"{name}.bias"], padding=1)
        scale, shift = weights[f"{name}.scale"], weights[f"{name}.shift"]
        images = functional.group_norm(images, group_count(len(kernel)), scale, shift, EPS)
        images = functional.relu(functional.max_pool2d(images, 2))  # of a quarter of the entries
    return functional.linear(images.permute(0, 2, 3, 1).flatten(1), weights["head"], weights["head.bias"])

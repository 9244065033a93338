"""Normalisation and augmentation of whole batches, on the device that holds them.

Every published row is data in `RECIPES`. Operations that draw get u (B, D), numbers from U[0, 1),
as many for each sample as they say with `draws(D)`; nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Op = Callable[..., Tensor]
"""(B, C, H, W) to (B, C, H', W'): pixels 0..255, uint8 or float, or normalised values; of x and
u (B, D) if it draws."""


def draws(count: int) -> Callable[[Op], Op]:
    """Marks an operation that draws `count` numbers for each sample."""

    def mark(op: Op) -> Op:
        op.draws = count
        return op

    return mark


def drawn_by(op: Op) -> int:
    """D of an operation; 0 if it does not draw."""
    return getattr(op.func if isinstance(op, partial) else op, "draws", 0)


def choices(u: Tensor, count: int) -> Tensor:
    """Each of 0 .. count - 1 with equal probability, int64, of u in [0, 1)."""
    return (u * count).long()


@draws(3)
def crop(
    x: Tensor, u: Tensor, pad: int = 0, mode: str = "constant", probability: float = 1.0
) -> Tensor:
    """A random window of the input's size out of the input padded by `pad` on all sides.

    pad: pixels, an eighth of the height by default. mode: as in torch's pad: constant (0) or
    reflect. With `probability` below 1 the other samples stay as they are.
    """
    batch, _, height, width = x.shape
    pad = pad or max(1, height // 8)
    windows = F.pad(x, [pad] * 4, mode=mode).unfold(2, height, 1).unfold(3, width, 1)
    top, left = choices(u[:, :2], 2 * pad + 1).unbind(1)
    if probability < 1:
        cropped = u[:, 2] < probability
        top, left = torch.where(cropped, top, pad), torch.where(cropped, left, pad)
    return windows[torch.arange(batch, device=x.device), :, top, left]


@draws(1)
def flip(x: Tensor, u: Tensor) -> Tensor:
    """Left and right exchanged with probability 1/2."""
    flipped = u.view(-1, 1, 1, 1) < 0.5
    return torch.where(flipped, x.flip(3), x)


@draws(1)
def rotate(x: Tensor, u: Tensor, degrees: float) -> Tensor:
    """Rotation about the centre by an angle from U(-degrees, degrees), as float.

    As torchvision's RandomRotation: nearest pixel, same size, 0 outside.
    """
    return rotated(x, (u[:, 0] - 0.5) * (2 * math.radians(degrees)))


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Each sample rotated anticlockwise by its angle (B,) [rad]."""
    height, width = x.shape[2:]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    down = torch.arange(height, device=x.device)[:, None] - (height - 1) / 2
    right = torch.arange(width, device=x.device) - (width - 1) / 2
    grid_x = (cos * right - sin * down) * (2 / width)
    grid_y = (sin * right + cos * down) * (2 / height)
    grid = torch.stack([grid_x, grid_y], dim=3)
    x = _float(x)
    return F.grid_sample(x, grid.to(x.dtype), mode="nearest", align_corners=False)


@draws(22)
def resized_crop(x: Tensor, u: Tensor, size: int) -> Tensor:
    """torchvision's RandomResizedCrop with its defaults: area 0.08 to 1, ratio 3/4 to 4/3.

    Of square images, so that its fallback after ten tries is the whole image; bilinear without
    antialiasing (a window shrinks by 8/7 at most), as float.
    """
    batch, side = len(x), x.shape[3]
    area = (0.08 + (1 - 0.08) * u[:, :10]) * side**2
    ratio = (math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[:, 10:20]).exp_()
    extents = torch.stack([(area / ratio).sqrt_(), (area * ratio).sqrt_()]).round_()  # h, w
    fits = (extents <= side).all(dim=0)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    chosen = extents.gather(2, first.expand(2, batch, 1)).squeeze(2)
    extent = torch.where(fits.any(dim=1), chosen, float(side))
    room = side - extent
    start = torch.minimum((u[:, 20:].T * (room + 1)).floor_(), room)
    return resized_windows(x, start, extent, size)


def resized_windows(x: Tensor, start: Tensor, extent: Tensor, size: int) -> Tensor:
    """The window of each sample, resized to (size, size); start, extent: (2, B), y then x."""
    steps = torch.arange(size, device=x.device) + 0.5
    start, extent = start[..., None], extent[..., None]
    at = start + steps * (extent / size) - 0.5
    at = torch.minimum(torch.maximum(at, start), start + extent - 1)
    grid_y, grid_x = ((2 * a + 1) / side - 1 for a, side in zip(at, x.shape[2:], strict=True))
    shape = (len(x), size, size)
    grid = torch.stack([grid_x[:, None].expand(shape), grid_y[..., None].expand(shape)], dim=3)
    x = _float(x)
    return F.grid_sample(x, grid.to(x.dtype), padding_mode="border", align_corners=False)


@draws(6)
def jitter(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """torchvision's ColorJitter of brightness, contrast and saturation, as float.

    Three factors from U(1 - strength, 1 + strength), applied in random order.
    """
    factors = 1 - strength + 2 * strength * u[:, :3]
    return jittered(x, factors, order=u[:, 3:].argsort(dim=1, stable=True))


def jittered(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast and saturation changed by their factors (B, 3) in `order` (B, 3).

    Each is a blend f x + (1 - f) m, cut to 0..255, with black, with the mean of the grey image,
    or with the grey image.
    """
    x = _float(x)
    for kind in order.unbind(dim=1):
        f = factors.gather(1, kind[:, None]).view(-1, 1, 1, 1).to(x.dtype)
        kind = kind.view(-1, 1, 1, 1)
        red, green, blue = x.unbind(dim=1)
        grey = (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        other = torch.where(kind == 2, grey, mean * (kind == 1))
        x = (f * x + (1 - f) * other).clamp_(0, 255)
    return x


def centre_crop(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to the middle (B, C, size, size)."""
    top, left = ((side - size) // 2 for side in x.shape[2:])
    return x[:, :, top : top + size, left : left + size]


def _done(op: Op, x: Tensor, u: Tensor | None) -> Tensor:
    return op(x, u) if drawn_by(op) else op(x)


def _float(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


@dataclass(frozen=True)
class Recipe:
    """One row: (x / 255 - mean) / std, with operations before and, for training only, after it.

    mean, std: per channel, or one for all. train, eval: on pixels. after: on normalised values.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: tuple[Op, ...] = ()
    after: tuple[Op, ...] = ()
    eval: tuple[Op, ...] = ()


class Transform:
    """What a batch goes through before the model, on whatever device it is.

    Images (B, C, H, W) uint8 become `dtype`; float features (B, F) only change their dtype, and
    token ids (B, L) become int64.
    """

    def __init__(
        self, recipe: Recipe, dtype: torch.dtype = torch.float32, *, channels_last: bool = False
    ) -> None:
        """channels_last: images leave with their channels innermost in memory."""
        self._reorders = channels_last
        self._order = torch.channels_last if channels_last else torch.preserve_format
        std = torch.tensor(recipe.std, dtype=torch.float64).view(-1, 1, 1)
        mean = torch.tensor(recipe.mean, dtype=torch.float64).view(-1, 1, 1)
        self.recipe, self._dtype = recipe, dtype
        self._affine = ((1 / (255 * std)).to(dtype), (-mean / std).to(dtype))
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def draws(self) -> int:
        """D, the numbers that each sample of a training batch draws."""
        return sum(map(drawn_by, (*self.recipe.train, *self.recipe.after)))

    def train(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """The batch of a training step, augmented by u (B, D); None where D = 0."""
        return self._apply(x, self.recipe.train, self.recipe.after, u)

    def eval(self, x: Tensor) -> Tensor:
        """The batch of an evaluation, in which nothing is drawn."""
        return self._apply(x, self.recipe.eval, ())

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """A sample's shape after the transform, given that of a stored one."""
        if len(stored) < 3:
            return stored
        return tuple(self.eval(torch.zeros(1, *stored, dtype=torch.uint8)).shape[1:])

    def _apply(
        self, x: Tensor, before: tuple[Op, ...], after: tuple[Op, ...], u: Tensor | None = None
    ) -> Tensor:
        if x.is_floating_point() or x.dim() == 2:
            if before or after:
                kind = "features" if x.is_floating_point() else "token ids"
                raise ValueError(f"augmentation needs images, {kind} have none; use none")
            return x.to(self._dtype) if x.is_floating_point() else x.long()
        counts = [drawn_by(op) for op in (*before, *after)]
        own = iter(u.split(counts, dim=1) if any(counts) else [None] * len(counts))
        for op in before:
            x = _done(op, x, next(own))
        scale, shift = self._constants(x.device)
        x = x.to(self._dtype, memory_format=self._order).mul_(scale).add_(shift)
        for op in after:
            x = _done(op, x, next(own))
        return x.contiguous(memory_format=self._order) if after and self._reorders else x

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            scale, shift = self._affine
            self._on_device[device] = (scale.to(device), shift.to(device))
        return self._on_device[device]


def pipeline(
    source: str,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
) -> Transform:
    """The transform `name` of a data source; ValueError if the source has none of that name.

    A source of one's own, "package.module:function", has those of `folder`.
    """
    recipes = RECIPES.get("folder" if ":" in source else source)
    if recipes is None:
        raise ValueError(f"data.source = {source} is unknown; known: {', '.join(RECIPES)}")
    if name not in recipes:
        raise ValueError(f"data.augment = {name}: {source} has {', '.join(recipes)}")
    return Transform(recipes[name], dtype, channels_last=channels_last)


_HALF = ((0.5,), (0.5,))
_DIGITS = ((0.2872,), (0.3540,))  # of all images, 0..16 stored as 0..240
_FA_CIFAR10 = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))
_FA_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_MOON_CIFAR10 = (
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
)
_FEDDC_CIFAR10 = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
_FEDDC_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_FLING = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_CROP4 = partial(crop, pad=4)
_FEDDC_AFTER = (flip, partial(crop, pad=4, probability=0.5))
_ROTATE = partial(rotate, degrees=15)
_CENTRE = (partial(centre_crop, size=224),)
_FA_IMAGENET = (partial(resized_crop, size=224), partial(jitter, strength=0.4), flip)


def _plain(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Recipe]:
    return {"default": Recipe(mean, std), "none": Recipe(mean, std)}


def _images(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Recipe]:
    return {**_plain(mean, std), "crop-flip": Recipe(mean, std, (crop, flip))}


def _cifar(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Recipe]:
    fedalign = Recipe(mean, std, (_CROP4, flip))
    return {**_images(mean, std), "default": fedalign, "fedalign": fedalign}


RECIPES: dict[str, dict[str, Recipe]] = {
    "digits": _plain(*_DIGITS),
    "breast-cancer": _plain(*_HALF),
    "synthetic": _images(*_HALF),
    "synthetic-text": _plain(*_HALF),
    "folder": _images(*_HALF),
    "huggingface": _images(*_HALF),
    "cifar10": {
        **_cifar(*_FA_CIFAR10),
        "moon": Recipe(*_MOON_CIFAR10, (partial(crop, pad=4, mode="reflect"), flip)),
        "feddc": Recipe(*_FEDDC_CIFAR10, after=_FEDDC_AFTER),
        "fling": Recipe((0.0,), (1.0,)),
    },
    "cifar100": {
        **_cifar(*_FA_CIFAR100),
        "feddc": Recipe(*_FEDDC_CIFAR100, after=_FEDDC_AFTER),
        "fling": Recipe(*_FLING, (flip, _ROTATE), after=(_CROP4,)),
    },
    "tiny-imagenet": {
        **_images(*_FLING),
        "default": Recipe(*_FLING, (flip, _ROTATE)),
        "fling": Recipe(*_FLING, (flip, _ROTATE)),
    },
    "imagenet-200": {
        "default": Recipe(*_IMAGENET, _FA_IMAGENET, eval=_CENTRE),
        "none": Recipe(*_IMAGENET, _CENTRE, eval=_CENTRE),
        "fedalign": Recipe(*_IMAGENET, _FA_IMAGENET, eval=_CENTRE),
    },
}

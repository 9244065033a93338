"""The models by name. Importing this module does not import torch: config validation uses it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from fl_common.data.catalogue import SOURCES
from fl_common.failures import harmless
from fl_common.user_code import is_there, told

if TYPE_CHECKING:
    from torch import nn

    from fl_common.config import CoreConfig

NORMS = ("batch", "group")


@dataclass(frozen=True)
class ModelInfo:
    """One entry of the catalogue.

    help: one line for listings.
    factory: "module:function" in this package, called with (shape, classes, norm), the last of
        which matters only where there are several `norms`.
    input: what a sample may be: "image" (C, H, W), "any" of image and features (F,), or "tokens"
        (V, L).
    min_side: the smallest image side in pixels, or number of tokens, that leaves something to
        classify.
    norms: the kinds of its norm layers that `model.norm` chooses from; empty without norm layers.
    head: whether it has MOON's projection head by itself.
    innermost: whether a CPU's steps are faster with channels innermost in memory
        (`python -m benchmarks.eager NAME:BATCH`).
    """

    help: str
    factory: str
    input: str = "image"
    min_side: int = 1
    norms: tuple[str, ...] = ()
    head: bool = False
    innermost: bool = False


MODELS: dict[str, ModelInfo] = {
    "digits-cnn": ModelInfo(
        "small CNN for 8 x 8 digits", "convnets:digits_cnn", min_side=2, norms=NORMS
    ),
    "mlp": ModelInfo("two hidden layers, 64 and 32", "convnets:mlp", input="any"),
    "lenet": ModelInfo("LeNet, 62,006 parameters", "convnets:lenet", min_side=16, innermost=True),
    "cnn": ModelInfo("two conv layers with dropout", "convnets:cnn", min_side=6, innermost=True),
    "lenet64": ModelInfo(
        "LeNet of FedDyn, FedDC and MAN", "convnets:lenet64", min_side=16, innermost=True
    ),
    "moon-cnn": ModelInfo(
        "MOON's CNN with projection head",
        "convnets:moon_cnn",
        min_side=16,
        head=True,
        innermost=True,
    ),
    "tiny-convnet": ModelInfo(
        "MAN's ConvNet for 64 px, always GroupNorm",
        "convnets:tiny_convnet",
        min_side=8,
        norms=("group",),
        innermost=True,
    ),
    "text-cnn": ModelInfo(
        "Kim's CNN for documents, smaller", "text:text_cnn", input="tokens", min_side=5
    ),
    "resnet8": ModelInfo("FedPart's (Fling's) ResNet-8", "resnet:resnet8", norms=NORMS),
    "resnet18": ModelInfo("ResNet-18, CIFAR stem", "resnet:resnet18", norms=NORMS),
    "resnet18-imagenet": ModelInfo(
        "ResNet-18, ImageNet stem", "resnet:resnet18_imagenet", norms=NORMS
    ),
    "resnet20": ModelInfo("ResNet-20, shortcut A", "resnet:resnet20", norms=NORMS, innermost=True),
    "resnet20-b": ModelInfo(
        "ResNet-20, shortcut B", "resnet:resnet20_b", norms=NORMS, innermost=True
    ),
    "resnet56": ModelInfo("ResNet-56, shortcut A", "resnet:resnet56", norms=NORMS, innermost=True),
    "resnet56-b": ModelInfo(
        "ResNet-56, shortcut B", "resnet:resnet56_b", norms=NORMS, innermost=True
    ),
    "resnet56-bottleneck": ModelInfo(
        "FedAlign's ResNet-56, bottleneck blocks",
        "resnet:resnet56_bottleneck",
        norms=NORMS,
        innermost=True,
    ),
}


def check(
    name: str,
    shape: tuple[int, ...] | None = None,
    norm: str = "batch",
    head: str = "none",
) -> list[str]:
    """What is wrong with these settings, one line each, with the remedy; empty if nothing is.

    shape: a sample's, (C, H, W), (F,) or (V, L); None when it is not known yet.
    norm: the kind of the model's norm layers; refused where the model has only the other kind.
        A model without norm layers takes the default, `batch`, alone.
    head: layers to put before the classifier; refused where the model has them already.
    """
    if ":" in name:
        return _check_own(name, norm, head)
    if name not in MODELS:
        return [f'model.name = "{name}": unknown; known: {", ".join(MODELS)}']
    info, errors = MODELS[name], []
    if norm == "group" and not info.norms:
        errors.append(
            f'model.norm = "group": {name} has no norm layers; use batch (the default), or one of '
            + ", ".join(n for n, i in MODELS.items() if i.norms)
        )
    if norm == "batch" and info.norms == ("group",):
        errors.append(f'model.norm = "batch": {name} has GroupNorm only; set model.norm=group')
    if head != "none" and info.head:
        errors.append(f'model.head = "{head}": {name} has it already; leave it at none')
    if shape is not None and (problem := _misfit(info, shape)):
        fitting = [n for n, i in MODELS.items() if not _misfit(i, shape)]
        remedy = f"these models fit: {', '.join(fitting)}" if fitting else "check the data"
        errors.append(f'model.name = "{name}" {problem}: {remedy}')
    return errors


def _check_own(name: str, norm: str, head: str) -> list[str]:
    """What is wrong with "package.module:Name", found without importing the module itself."""
    name = harmless(name)
    module, _, attribute = name.partition(":")
    try:
        found = bool(attribute) and is_there(module)
    except Exception as error:
        return [f'model.name = "{name}": {told(error)}']
    if not found:
        return [
            f'model.name = "{name}": no module {module} can be imported here; write '
            "package.module:Name and put its folder on PYTHONPATH"
        ]
    errors = []
    if norm != "batch":
        errors.append(f'model.norm = "{norm}": {name} chooses its own norm layers; leave it out')
    if head != "none":
        errors.append(
            f'model.head = "{head}": {name} has its own layers; let it return '
            "fl_common.models.layers.with_head(Chain(...)), and leave this out"
        )
    return errors


def _misfit(info: ModelInfo, shape: tuple[int, ...]) -> str:
    """Why samples of this shape do not fit the model; empty if they do."""
    given = f"but a sample has shape {tuple(shape)}"
    needed = {
        "image": "images (C, H, W)",
        "any": "images (C, H, W) or features (F,)",
        "tokens": "token ids (V, L)",
    }
    ranks = {"image": (3,), "any": (1, 3), "tokens": (2,)}
    if len(shape) not in ranks[info.input] or min(shape) < 1:
        return f"needs {needed[info.input]}, {given}"
    if len(shape) == 2 and shape[1] < info.min_side:
        return f"needs documents of at least {info.min_side} tokens, {given}"
    if len(shape) == 3 and min(shape[1:]) < info.min_side:
        return f"needs images of at least {info.min_side} x {info.min_side} pixels, {given}"
    return ""


def build(
    name: str,
    *,
    classes: int,
    shape: tuple[int, ...],
    norm: str = "batch",
    head: str = "none",
) -> nn.Module:
    """A new model that maps (B, *shape), or ids (B, L) for the shape (V, L), to logits
    (B, classes).

    name: one of the catalogue (a `Chain`), or "package.module:Name", which is called as
        Name(shape=shape, classes=classes).

    Weights are drawn from torch's global generator, which the caller seeds. Raises ValueError,
    one line for each of `check`'s findings.
    """
    if errors := check(name, shape, norm, head):
        raise ValueError("\n".join(errors))
    if ":" in name:
        module, attribute = name.split(":")
        return getattr(import_module(module), attribute)(shape=shape, classes=classes)
    module, function = MODELS[name].factory.split(":")
    model = getattr(import_module(f"fl_common.models.{module}"), function)(shape, classes, norm)
    if head == "none":
        return model
    return import_module("fl_common.models.layers").with_head(model)


def usual_shape(config: CoreConfig) -> tuple[int, ...] | None:
    """A sample's shape.  Where the data's is not known yet: (3, 32, 32) for models of the
    catalogue, None for one's own."""
    source = SOURCES.get(config.data.source)
    shape = source.shape if source else None
    return (3, 32, 32) if shape is None and config.model.name in MODELS else shape


def skeleton(config: CoreConfig) -> nn.Module | None:
    """The configured model, for checks of its structure: for two classes and `usual_shape`.  None
    if it cannot be built, which other checks report, and for a model of one's own on data of
    unknown shape."""
    import torch

    model, shape = config.model, usual_shape(config)
    if shape is None or check(model.name, shape, model.norm, model.head):
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            return build(model.name, classes=2, shape=shape, norm=model.norm, head=model.head)
    except Exception:  # of a model's own code
        return None

"""The configuration: every key, its default, range, unit and meaning, in one typed model.

Keys are `group.name` with dashes (`clients.per-round`); the methods' own groups come from their
files in strategies/ and regularizers/.  `resolve` turns raw values into a `CoreConfig` or raises
one `ConfigError` that holds every mistake.
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from fl_common.data import catalogue as data_catalogue
from fl_common.failures import harmless, reason
from fl_common.files import absolute_path
from fl_common.models import catalogue as model_catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

Scalar = str | int | float | bool


def dashed(name: str) -> str:
    """The key of an attribute; a trailing underscore, as in `lambda_`, avoids a Python keyword."""
    return name.rstrip("_").replace("_", "-")


def items_of(text: str) -> tuple[str, ...]:
    """The items of a comma-separated setting, without blanks around them."""
    return tuple(filter(None, (item.strip() for item in text.split(","))))


class Group(BaseModel):
    """A group of keys; attributes have underscores where keys have dashes."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=dashed,
        populate_by_name=True,
        protected_namespaces=(),
    )


class NoParams(Group):
    """The group of a method without hyper-parameters."""


class Run(Group):
    rounds: int = Field(30, ge=1, description="rounds to train")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of every random stream")
    name: str = Field("", description="name of the results folder; empty: a timestamp")
    output_dir: str = Field(
        "",
        description="where results folders are made; empty: ./results for `flatfed run`, "
        "$FLATFED_RESULTS or ~/flatfed-results for `flwr run`",
    )
    pictures: bool = Field(
        True, description="make report.html, curves.png and clients.png at the end"
    )
    resume: bool = Field(
        False, description="continue the run of this name from its newest checkpoint"
    )


class Clients(Group):
    number: int = Field(10, ge=1, description="clients in the federation (N)")
    per_round: int = Field(0, ge=0, description="clients drawn per round; 0: all")
    sampling: Literal["fixed", "bernoulli"] = Field(
        "fixed",
        description="fixed: exactly per-round clients; bernoulli: each with probability "
        "per-round / number, drawn again if nobody is",
    )
    min_replies: int = Field(
        1,
        ge=1,
        description="accepted replies that a round needs; without them the model stays as it was, "
        "and if too few clients answer at all, the run ends",
    )
    max_failed_rounds: int = Field(
        3,
        ge=1,
        description="the run ends after so many rounds in a row with too few accepted replies",
    )
    deadline_s: float = Field(
        3600.0, gt=0, description="how long a round, or the roll call, waits for replies [s]"
    )
    return_s: float = Field(
        120.0,
        ge=0,
        description="how long a round waits for a drawn client whose node went away; if it is not "
        "back by then, the round goes on without it [s]",
    )
    keys: str = Field(
        "",
        description="file on the server with the public key of each partition, made by `flatfed "
        "certs`: only a node with that key may be that client; empty: keys are not compared",
    )


class Data(Group):
    source: str = Field(
        "digits",
        description="data set: " + ", ".join(data_catalogue.SOURCES) + ", or your own as "
        "package.module:function, called with path= and seed=",
    )
    path: str = Field("", description="folder, file or hub name, for sources that need one")
    partition: Literal[data_catalogue.PARTITIONS] = Field(
        "dirichlet",
        description="how samples are split over clients; dirichlet: per class, unequal sizes; "
        "dirichlet-balanced: equal sizes, one class prior per client; local: every node trains on "
        "its own data (its data-path), whole",
    )
    alpha: float = Field(
        0.5, gt=0, description="Dirichlet concentration; smaller: clients differ more"
    )
    min_size: int = Field(10, ge=1, description="smallest partition (dirichlet) [samples]")
    max_samples: int = Field(
        0,
        ge=0,
        description="the most that a client takes of its partition, drawn at random; 0: all "
        "[samples]",
    )
    classes_per_client: int = Field(2, ge=1, description="classes a client holds (pathological)")
    augment: str = Field(
        "default",
        description="normalisation and augmentation: default (usual for the source), none "
        "(normalise only), fedalign, moon, feddc, fling (as published), crop-flip",
    )
    image_size: int = Field(
        0,
        ge=0,
        description="side that images are resized to (folder, huggingface); 0: as they are [px]",
    )
    cache_dir: str = Field(
        "", description="folder for decoded data; empty: $FLATFED_CACHE or ~/.cache/flatfed"
    )


class Model(Group):
    name: str = Field(
        "digits-cnn",
        description="model: " + ", ".join(model_catalogue.MODELS) + ", or your own as "
        "package.module:Name, called with shape= and classes=",
    )
    norm: Literal["batch", "group"] = Field("batch", description="normalisation layers")
    head: Literal["none", "moon"] = Field(
        "none",
        description="layers before the classifier; moon: MOON's projection to 256, which "
        "regularizers=moon needs",
    )


class Train(Group):
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="the clients' optimizer")
    lr: float = Field(0.1, gt=0, description="local learning rate (eta)")
    lr_decay: float = Field(1.0, gt=0, le=1, description="factor on lr after each round")
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD momentum")
    nesterov: bool = Field(False, description="Nesterov momentum")
    weight_decay: float = Field(0.0, ge=0, description="coupled weight decay, added after clipping")
    clip_norm: float = Field(0.0, ge=0, description="bound on the gradient's norm; 0: none")
    epochs: int = Field(1, ge=1, description="local epochs per round (E)")
    batch_size: int = Field(32, ge=1, description="samples per step; the last may be smaller")
    keep_optimizer: bool = Field(
        False, description="each client keeps its momentum from round to round"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:K")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32",
        description="bfloat16: autocast over float32 parameters; on a GPU, torch computes the "
        "convolutions of float32 in TF32, to three digits",
    )
    threads: int = Field(1, ge=1, le=256, description="torch threads per process")
    deterministic: bool = Field(
        True,
        description="use only kernels that repeat their sums, bit for bit; where torch has none "
        "for a GPU, it warns",
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        "auto",
        description="hold images and convolutions with channels innermost in memory; auto: for "
        "those networks of the catalogue that are faster this way, with bfloat16 on a GPU or in "
        "float32 on a CPU; sums are rounded differently",
    )
    graphs: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on a GPU, record a step's forward and backward pass as a CUDA graph and "
        "launch it as one, with the same bits; auto: for networks of the catalogue; on: for your "
        "own too, if it does the same in every step",
    )

    @property
    def keeps_state(self) -> bool:
        """Whether clients have momentum that they keep."""
        return self.keep_optimizer and (self.optimizer == "adam" or self.momentum > 0)

    def lr_of(self, server_round: int) -> float:
        """eta, the learning rate of a round."""
        return self.lr * self.lr_decay ** (server_round - 1)

    def steps(self, samples: float) -> int:
        """K = E ceil(n / B), optimizer steps of a round over `samples`."""
        return self.epochs * math.ceil(samples / self.batch_size)


class StrategyChoice(Group):
    name: str = Field(
        "fedavg", description='the federated algorithm, or one of Flower\'s, e.g. "flwr:FedAdam"'
    )
    params: str = Field(
        "", description='arguments of one of Flower\'s strategies, e.g. "eta=0.1,beta_1=0.9"'
    )


class Sync(Group):
    mode: Literal["versions", "full"] = Field(
        "versions",
        description="what the server sends to clients; versions: only what a client does not have "
        "already; full: the whole model with every message",
    )


class Eval(Group):
    every: int = Field(
        1, ge=1, description="evaluate every so many rounds, and after the last [rounds]"
    )
    on: Literal["server", "clients", "both"] = Field(
        "server",
        description="what to evaluate on: the server's test set, the clients' own held-out "
        "samples, or both",
    )
    holdout: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of a partition that is held out when clients evaluate; with "
        "data.partition=local, their own test split is used instead",
    )
    models: str = Field(
        "cloud",
        description="models to evaluate on the server, comma-separated: cloud (the global model, "
        "always), sel (mean of the cohort's models), all (mean of all clients' last models), first "
        "(the global one with the BatchNorm statistics of the cohort's first client); papers "
        "report different ones",
    )
    grad_norm: bool = Field(
        False,
        description="record the norm of the loss's gradient at every local step, whole and per "
        "group of layers, as the mean over the round's clients (`flatfed grad-norm` shows it)",
    )

    @property
    def model_names(self) -> tuple[str, ...]:
        return items_of(self.models)


class Flatness(Group):
    every: int = Field(
        0,
        ge=0,
        description="measure the loss's curvature at the global model every so many rounds, and "
        "after the last; 0: never [rounds]",
    )
    samples: int = Field(
        1024,
        ge=1,
        description="test samples to measure it on, and the most samples of its own that a "
        "client uses for flatness.match; drawn once [samples]",
    )
    engine: Literal["own", "pyhessian"] = Field(
        "own", description="what measures it; pyhessian needs `pip install 'flatfed[pyhessian]'`"
    )
    tolerance: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="bound on the residual of lambda_max, ||H v - lambda v|| / lambda; the history "
        "has the residual reached",
    )
    probes: int = Field(
        16, ge=2, description="random vectors for the trace; its standard error is in the history"
    )
    layers: bool = Field(
        False, description="also lambda_max, trace and mean ||A||^2 of every layer"
    )
    match: Literal["none", "paper", "fedalign-code"] = Field(
        "none",
        description="ask all clients for the diagonals of their Hessians and record H_N and H_D; "
        "paper: FedAlign's equations 3 and 4; fedalign-code: per tensor, as in FedAlign's code",
    )
    match_probes: int = Field(
        400, ge=2, multiple_of=2, description="random vectors for each client's diagonal"
    )


TRACKERS = ("tensorboard", "mlflow", "wandb")


class Tracking(Group):
    to: str = Field(
        "",
        description="where each round is reported as it ends, comma-separated: tensorboard (event "
        "files in the results folder), mlflow, wandb (Weights & Biases); empty: nowhere",
    )

    @property
    def names(self) -> tuple[str, ...]:
        return items_of(self.to)


PATHS = ("run.output-dir", "clients.keys", "data.cache-dir", "client.state-dir", "data.path")
"""Keys that are paths in the file system; `data.path` may be a name on the hub instead."""

AUTO = "auto"
Count = Annotated[str, BeforeValidator(lambda n: str(n) if type(n) is int else n)]
"""A number, or `auto`; text, as Flower's run config has one type per key."""


class Engine(Group):
    name: Literal["inprocess", "ray", "grpc"] = Field(
        "inprocess",
        description="inprocess: on this machine, without Ray or a network; ray: Flower's "
        "simulation; grpc: separate nodes",
    )
    connection: str = Field(
        "",
        description="Flower connection to submit to (grpc); empty: what `flatfed up` started",
    )
    workers: Count = Field(
        "auto",
        description="processes of the in-process engine, each of which trains one client at a "
        "time, with the same result; a number, or auto: one per core, or just one with a GPU",
    )
    cohort: Count = Field(
        "1",
        description="clients that the in-process engine trains at once, in one pass for all of "
        "them: for small models on a GPU; sums are rounded differently; a number, or auto: chosen "
        "by measurement in the first round",
    )
    client_gpus: float = Field(
        0.0,
        ge=0,
        description="share of a GPU that each client takes on Ray; 0.25: four at once on a card; "
        "0: the run is on the CPU",
    )


class Server(Group):
    checkpoint_every: int = Field(
        1,
        ge=1,
        description="rounds from one checkpoint to the next; the last two are kept [rounds]",
    )
    ledger: bool = Field(
        True,
        description="keep every client's memory on the server's disk too, to give it back to a "
        "client that has lost it",
    )


class Client(Group):
    state_dir: str = Field(
        "",
        description="folder where clients keep what they remember between rounds (SCAFFOLD's c_i, "
        "FedDyn's h_i, momentum); empty: in memory, as long as the node runs; a node started by "
        "`flatfed node` has its own (--state-dir)",
    )
    dp_clip: float = Field(
        0.0,
        ge=0,
        description="local differential privacy, by Flower's LocalDpMod: bound C on the norm of "
        "what a client has learned in a round, to which noise is added; 0: no bound and no noise",
    )
    dp_epsilon: float = Field(
        1.0,
        gt=0,
        description="privacy budget of one round; the noise has standard deviation "
        "2 C sqrt(2 ln(1.25 / delta)) / epsilon",
    )
    dp_delta: float = Field(
        1e-5, gt=0, lt=1, description="probability that a round exceeds its privacy budget"
    )


class CoreConfig(Group):
    run: Run = Run()
    clients: Clients = Clients()
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    strategy: StrategyChoice = StrategyChoice()
    regularizers: str = Field("", description="client-side methods, comma-separated")
    sync: Sync = Sync()
    eval: Eval = Eval()
    flatness: Flatness = Flatness()
    tracking: Tracking = Tracking()
    engine: Engine = Engine()
    server: Server = Server()
    client: Client = Client()

    @property
    def regularizer_names(self) -> tuple[str, ...]:
        """The regularizers that are part of the strategy, then those that were asked for."""
        strategy = methods("strategies").get(self.strategy.name)
        return (*(strategy.regularizers if strategy else ()), *items_of(self.regularizers))

    @property
    def cohort_size(self) -> int:
        """Clients of a round; with bernoulli sampling, about so many."""
        return self.clients.per_round or self.clients.number

    def params_of(self, method: str) -> Any:
        """The group of a strategy or regularizer."""
        return getattr(self, method.replace("-", "_"))

    def flat(self) -> dict[str, Scalar]:
        """All keys with their values, as in Flower's run config."""
        values = flatten(self.model_dump(by_alias=True))
        return {key: values[key] for key, _ in fields()}


class ConfigError(ValueError):
    """Every mistake of a configuration; one line each: key, value, what is wrong, the remedy."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        super().__init__("\n".join(errors))


@cache
def methods(package: Literal["strategies", "regularizers"]) -> dict[str, Any]:
    """The methods of a package by name, as its files declare them.  Raises ConfigError for a file
    that cannot be imported."""
    base = importlib.import_module(f"{package}.base")
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        try:
            importlib.import_module(f"{package}.{module.name}")
        except ConfigError:
            raise
        except Exception as error:
            why = reason(error).splitlines()[0]
            raise ConfigError(
                [f"{package}/{module.name}.py: {why}; correct the file, or move it away"]
            ) from error
    return dict(sorted(base.METHODS.items()))


def enter(known: dict[str, Any], method: type) -> None:
    """Add a class to the known methods under the `name` that it declares, if it declares one.

    Raises ConfigError for a name that another file has declared.
    """
    if "name" not in vars(method):
        return
    earlier = known.setdefault(method.name, method)
    if earlier.__module__ != method.__module__:
        raise ConfigError(
            [f"{method.__module__}: {method.name} is {earlier.__module__}'s name; choose another"]
        )
    known[method.name] = method


@cache
def schema() -> type[CoreConfig]:
    """The whole model: `CoreConfig` and a group for every method.  Raises ConfigError for a method
    whose name is another group's, or with a default of a type that no setting has."""
    groups: dict[str, Any] = {}
    for name, method in [*methods("strategies").items(), *methods("regularizers").items()]:
        group = name.replace("-", "_")
        if group in groups or group in CoreConfig.model_fields:
            where = method.__module__
            raise ConfigError([f"{where}: keys named {name}.* exist already; choose another name"])
        if ":" not in name:
            groups[group] = (method.Params, method.Params())
        for key, value in method.Params().model_dump(by_alias=True).items():
            if not isinstance(value, str | int | float):
                raise ConfigError(
                    [
                        f"{method.__module__}: {name}.{key} = {value}: a setting is text, a "
                        "number, true or false"
                    ]
                )
    return create_model("Config", __base__=CoreConfig, **groups)


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its default, type and description; single keys first, then by group."""
    for single in (True, False):
        for name, field in schema().model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
                if not single:
                    for sub, info in field.annotation.model_fields.items():
                        yield f"{dashed(name)}.{dashed(sub)}", info
            elif single:
                yield dashed(name), field


def meaning(field: FieldInfo) -> str:
    """A key's help text with the values that it may have."""
    notes = []
    if get_origin(field.annotation) is Literal:
        notes = [" | ".join(get_args(field.annotation))]
    for limit in field.metadata:
        notes += [
            f"{words} {getattr(limit, name):g}"
            for name, words in _BOUNDS.items()
            if hasattr(limit, name)
        ]
    words = field.description or "no description"
    return f"{words} ({', '.join(notes)})" if notes else words


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables as dotted keys."""
    flat: dict[str, Scalar] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def from_text(values: Mapping[str, str]) -> dict[str, Scalar]:
    """Command-line values in the type of their key; what does not convert stays text."""
    types = {key: field.annotation for key, field in fields()}
    return {key: _convert(text, types.get(key)) for key, text in values.items()}


def _convert(text: str, kind: Any) -> Scalar:
    """`text` as a value of this type, or unchanged if it does not spell one."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        if kind in (int, float):
            return kind(text)
    except (KeyError, ValueError):
        pass
    return text


def resolve(
    values: Mapping[str, Scalar], *, absolute_paths: bool = True, also: Sequence[str] = ()
) -> CoreConfig:
    """The configuration with `values` over the defaults, checked as a whole.

    `also`: mistakes that were found before, to be reported with those found here.

    With `absolute_paths` a relative path is an error: it would be looked up in the folder of
    whichever process happens to read it.  Raises ConfigError with every mistake.
    """
    from fl_common.checks import checks  # which needs the schema

    known = {key for key, _ in fields()}
    errors = [*also, *(unknown_key(key, known) for key in values if key not in known)]
    values = {key: value for key, value in values.items() if key in known}
    try:
        config = schema().model_validate(_nest(values))
    except ValidationError as invalid:
        errors += [_explain(error) for error in invalid.errors()]
        # The other values are checked too, with defaults in the place of the wrong ones.
        wrong = {_key_of(error) for error in invalid.errors()}
        config = schema().model_validate(_nest({k: v for k, v in values.items() if k not in wrong}))
    errors += checks(config)
    if absolute_paths:
        errors += [
            f"{key} = {shown(path)}: a relative path depends on the process that reads it; "
            "give an absolute one"
            for key, path in paths(config.flat()).items()
            if not Path(path).is_absolute()
        ]
    if errors:
        raise ConfigError(errors)
    return config


def _nest(values: Mapping[str, Scalar]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = value
    return tree


def _key_of(error: Any) -> str:
    return ".".join(dashed(str(part)) for part in error["loc"])


def absolute_paths(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """`values` with paths made absolute from the current folder; `~` is the home folder."""
    return {**values, **{key: str(absolute_path(path)) for key, path in paths(values).items()}}


def paths(values: Mapping[str, Scalar]) -> dict[str, str]:
    """Those of `values` that name places in the file system."""
    given = {key: path for key in PATHS if isinstance(path := values.get(key), str) and path}
    source = values.get("data.source", Data().source)
    if not data_catalogue.is_local_path(source, given.get("data.path", "")):
        given.pop("data.path", None)
    return given


def is_device(name: str) -> bool:
    """Whether `name` is auto, cpu, cuda or cuda:K, with K from 0 to 127 as in torch."""
    return name in ("auto", "cpu", "cuda", *(f"cuda:{k}" for k in range(128)))


def unknown_key(key: str, known: set[str]) -> str:
    """The error line for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "`flatfed config` lists all keys"
    return f"{key}: unknown key; {hint}"


def unknown_name(key: str, name: object, known: list[str]) -> str:
    """The error line for a value that is not among the known ones, with the nearest of them."""
    return f"{key} = {shown(name)}: unknown; {_nearest(name, known)}known: {', '.join(known)}"


def _nearest(name: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name).replace("_", "-"), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""


def shown(value: Any) -> str:
    """A value as messages show it: text in quotes, true and false as in TOML."""
    return f'"{harmless(value)}"' if isinstance(value, str) else str(value).lower()


_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
_TYPES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "finite_number": "must be finite",
    "multiple_of": "must be an even number",
}


def _explain(error: Any) -> str:
    """One of pydantic's errors as a line: key, value, what it must be."""
    key = _key_of(error)
    value, limits = error["input"], error.get("ctx", {})
    if error["type"] == "literal_error":
        field = dict(fields())[key]
        return unknown_name(key, value, [str(choice) for choice in get_args(field.annotation)])
    for name, words in _BOUNDS.items():
        if name in limits:
            return f"{key} = {shown(value)}: must be {words} {limits[name]:g}"
    return f"{key} = {shown(value)}: {_TYPES.get(error['type'], error['msg'])}"


NODE_KEYS = {
    "data-path": "data.path",
    "state-dir": "client.state-dir",
    "device": "train.device",
    "threads": "train.threads",
    "dp-clip": "client.dp-clip",
    "dp-epsilon": "client.dp-epsilon",
    "dp-delta": "client.dp-delta",
}
"""A node's own settings: keys of its `--node-config`, and the settings that they override."""
OTHER_NODE_KEYS = ("partition-id", "num-partitions", "worker-socket")


def with_node(run_config: Mapping[str, Scalar], node: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The run config as one node reads it: the node's own settings win.  A node with noise of its
    own has all of it from itself: a server's epsilon would undo it.

    Raises ConfigError for a key that no node has, and for a node's noise that would not be added.
    """
    known = [*NODE_KEYS, *OTHER_NODE_KEYS]
    errors = [
        f"--node-config {key}: unknown key; {_nearest(key, known)}known: {', '.join(known)}"
        for key in node
        if key not in known
    ]
    if "dp-clip" not in node:
        errors += [
            f"--node-config {key} = {node[key]}: no noise without dp-clip; give that too"
            for key in ("dp-epsilon", "dp-delta")
            if key in node
        ]
    if errors:
        raise ConfigError(errors)
    own = {NODE_KEYS[key]: node[key] for key in node if key in NODE_KEYS}
    if "dp-clip" in node:
        client = Client()
        own = {"client.dp-epsilon": client.dp_epsilon, "client.dp-delta": client.dp_delta, **own}
    return {**run_config, **own}

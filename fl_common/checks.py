"""Mistakes in a configuration that no value shows by itself."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from fl_common.config import (
    AUTO,
    TRACKERS,
    dashed,
    fields,
    is_device,
    methods,
    shown,
    unknown_name,
)
from fl_common.data import catalogue as data_catalogue
from fl_common.layout import PARAMS, tensors_of
from fl_common.models import catalogue as model_catalogue
from fl_common.user_code import is_there, told

if TYPE_CHECKING:
    from fl_common.config import CoreConfig, Group


def checks(config: CoreConfig) -> list[str]:
    """All mistakes, one line each."""
    parts = (
        _check_clients,
        _check_run,
        _check_train,
        _check_methods,
        _check_eval_models,
        _check_flatness,
        _check_privacy,
        _check_tracking,
        _check_needs,
        _check_engine,
        _check_data,
        _check_model,
    )
    return [error for part in parts for error in part(config)]


def _check_clients(config: CoreConfig) -> list[str]:
    clients, errors = config.clients, []
    if clients.per_round > clients.number:
        errors.append(
            f"clients.per-round = {clients.per_round}: larger than clients.number = "
            f"{clients.number}; lower it, or 0 for all"
        )
    if clients.min_replies > config.cohort_size:
        errors.append(
            f"clients.min-replies = {clients.min_replies}: larger than the cohort of "
            f"{config.cohort_size}; lower it"
        )
    if clients.keys and config.engine.name != "grpc":
        errors.append(
            f"clients.keys = {shown(clients.keys)}: only nodes on their own have keys; set "
            "engine.name=grpc, or leave it empty"
        )
    return errors


def _check_run(config: CoreConfig) -> list[str]:
    name, errors = config.run.name, []
    blank = name != "" and not name.strip()
    if name in (".", "..") or "/" in name or "\\" in name or blank or not name.isprintable():
        errors.append(
            f"run.name = {shown(name)}: must be the name of one folder; run.output-dir says where"
        )
    if config.run.resume and not name:
        errors.append("run.resume = true: needs the run.name of the run to continue")
    return errors


def _check_train(config: CoreConfig) -> list[str]:
    train, errors = config.train, []
    if train.nesterov and not train.momentum:
        errors.append("train.nesterov = true: needs train.momentum > 0")
    if train.optimizer == "adam" and (train.momentum or train.nesterov):
        errors.append("train.momentum: belongs to train.optimizer=sgd; leave it at 0 with adam")
    if not is_device(train.device):
        errors.append(f"train.device = {shown(train.device)}: must be auto, cpu, cuda or cuda:K")
    return errors


def _check_data(config: CoreConfig) -> list[str]:
    data = config.data
    if ":" in data.source:
        return _check_own_source(data.source, data.augment)
    if data.source not in data_catalogue.SOURCES:
        unknown = unknown_name("data.source", data.source, list(data_catalogue.SOURCES))
        return [f"{unknown}, or your own package.module:function"]
    found = data_catalogue.check(
        data.source,
        data.path,
        on_nodes=config.engine.name == "grpc" or data.partition == "local",
        partition=data.partition,
        clients=config.clients.number,
        min_size=data.min_size,
        classes_per_client=data.classes_per_client,
        augment=data.augment,
        image_size=data.image_size,
    )
    return [f"{key}: {message}" for key, message in found]


def _check_model(config: CoreConfig) -> list[str]:
    model, source = config.model, data_catalogue.SOURCES.get(config.data.source)
    if ":" not in model.name and model.name not in model_catalogue.MODELS:
        unknown = unknown_name("model.name", model.name, list(model_catalogue.MODELS))
        return [f"{unknown}, or your own package.module:Name"]
    shape = source.shape if source else None
    return model_catalogue.check(model.name, shape, norm=model.norm, head=model.head)


def _check_eval_models(config: CoreConfig) -> list[str]:
    known, chosen = ["cloud", "sel", "all", "first"], config.eval.model_names
    errors = [unknown_name("eval.models", name, known) for name in chosen if name not in known]
    if set(chosen) - {"cloud"} and config.eval.on == "clients":
        errors.append(
            f"eval.models = {shown(config.eval.models)}: needs the server's test set; set "
            "eval.on=server or both"
        )
    if "all" in chosen and not config.server.ledger:
        errors.append(
            f"eval.models = {shown(config.eval.models)}: all needs every client's last model; "
            "leave server.ledger at true"
        )
    return errors


def _check_privacy(config: CoreConfig) -> list[str]:
    """Noise can be added only to a reply that is nothing but a model, to a message with one."""
    given = f"client.dp-clip = {config.client.dp_clip:g}"
    if not config.client.dp_clip:
        return []
    errors, name = [], config.strategy.name
    cls = None if name.startswith("flwr:") else methods("strategies").get(name)
    if cls and (cls.keeps or cls.partial or cls.Rule.memory or cls.Rule.also):
        errors.append(
            f"{given}: strategy {name} sends or remembers more than a model, which would get no "
            "noise; use fedavg, fedprox or one of Flower's"
        )
    errors += [
        f"{given}: {key} would be sent without noise; leave it at {shown(default)}"
        for key, value, default in (
            ("eval.grad-norm", config.eval.grad_norm, False),
            ("flatness.match", config.flatness.match, "none"),
        )
        if value != default
    ]
    net = model_catalogue.skeleton(config)
    if net is not None and tensors_of(net).keys() - {PARAMS}:
        errors.append(
            f"{given}: statistics of BatchNorm would leave a client without noise; set "
            "model.norm=group, or choose a model without BatchNorm"
        )
    if config.engine.cohort != "1":
        errors.append(f"{given}: noise is added one client at a time; leave engine.cohort at 1")
    if config.eval.on != "server" and config.sync.mode != "full":
        errors.append(
            f"{given}: with eval.on = {shown(config.eval.on)}, messages leave out the model that "
            "a client has; set sync.mode=full"
        )
    return errors


def _check_flatness(config: CoreConfig) -> list[str]:
    flatness, errors = config.flatness, []
    if flatness.every and config.eval.on == "clients":
        errors.append(
            f"flatness.every = {flatness.every}: needs the server's test set; set eval.on=server "
            "or both"
        )
    if flatness.match != "none" and config.clients.number < 2:
        errors.append(
            f'flatness.match = "{flatness.match}": compares clients, and clients.number = 1; '
            "leave it at none"
        )
    return errors


def _check_tracking(config: CoreConfig) -> list[str]:
    names = config.tracking.names
    errors = [unknown_name("tracking.to", n, list(TRACKERS)) for n in names if n not in TRACKERS]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    return errors + [
        f"tracking.to = {shown(config.tracking.to)}: {name} is given twice; give it once"
        for name in twice
    ]


def _check_own_source(source: str, augment: str) -> list[str]:
    augments = data_catalogue.SOURCES["folder"].pipelines
    if augment not in augments:
        return [f"data.augment: {source} has {', '.join(augments)}"]
    module = source.partition(":")[0]
    try:
        if is_there(module):
            return []
    except Exception as error:
        return [f"data.source = {shown(source)}: {told(error)}"]
    return [
        f"data.source = {shown(source)}: no module {module} can be imported here; write "
        "package.module:function and put its folder on PYTHONPATH"
    ]


def _check_methods(config: CoreConfig) -> list[str]:
    errors = []
    strategies, regularizers = methods("strategies"), methods("regularizers")
    chosen = config.regularizer_names
    strategy = strategies.get(config.strategy.name)
    if strategy is None:
        errors.append(unknown_name("strategy.name", config.strategy.name, list(strategies)))
    else:
        errors += strategy.check(config)
    given = f"regularizers = {shown(config.regularizers)}"
    for name in chosen:
        if name not in regularizers:
            errors.append(unknown_name("regularizers", name, list(regularizers)))
        elif strategy is not None and name in strategy.regularizers and chosen.count(name) > 1:
            errors.append(
                f"{given}: {name} is part of strategy {config.strategy.name} already; leave it out"
            )
        elif chosen.count(name) > 1:
            errors.append(f"{given}: {name} is given twice; give it once")
        else:
            errors += regularizers[name].check(config)
    known = [name for name in chosen if name in regularizers]
    for name in known:
        if strategy is not None and name in strategy.refuses:
            errors.append(
                f"{given}: {name} with strategy {config.strategy.name}: {strategy.refuses[name]}"
            )
    for one, other in itertools.combinations(known, 2):
        why = regularizers[one].refuses.get(other) or regularizers[other].refuses.get(one)
        if why:
            part = strategy is not None and one in strategy.regularizers
            of = f" (part of strategy {config.strategy.name})" if part else ""
            errors.append(f"{given}: {other} with {one}{of}: {why}")
    for name in [*strategies, *regularizers]:
        if name in (config.strategy.name, *chosen) or ":" in name:
            continue
        where = "strategy.name" if name in strategies else "regularizers"
        errors += _without_effect(name, config.params_of(name), f"{where}={name}")
    return list(dict.fromkeys(errors))


def _check_needs(config: CoreConfig) -> list[str]:
    """Settings that do nothing without another one."""
    errors = []
    if not config.flatness.every:
        errors += _without_effect("flatness", config.flatness, "flatness.every")
    if not config.client.dp_clip:
        needed = "client.dp-clip"
        errors += _without_effect("client", config.client, needed, "dp_epsilon", "dp_delta")
    return errors


def _without_effect(name: str, group: Group, needed: str, *keys: str) -> list[str]:
    """A line for each of a group's `keys` (all, if none are given) that is not at its default."""
    return [
        f"{name}.{dashed(key)} = {shown(value)}: has no effect without {needed}; leave it out or "
        "set that"
        for key, value in group
        if (key in keys or not keys) and value != type(group).model_fields[key].default
    ]


def unused(config: CoreConfig) -> list[str]:
    """Settings that do nothing beside the others, one line each.  They are no mistake: the base of
    a suite may have some that only some of its runs use."""
    split, on = config.data.partition, config.eval.on
    idle = {
        "data.alpha": not split.startswith("dirichlet") and f"with data.partition={split}",
        "data.min-size": split != "dirichlet" and f"with data.partition={split}",
        "data.classes-per-client": split != "pathological" and f"with data.partition={split}",
        "eval.holdout": (on == "server" and "with eval.on=server")
        or (split == "local" and "with data.partition=local"),
        "clients.sampling": config.cohort_size == config.clients.number
        and f"with clients.per-round={config.clients.per_round}: all clients are in every round",
        "flatness.match-probes": config.flatness.match == "none" and "with flatness.match=none",
        "train.keep-optimizer": not config.train.keeps_state
        and "without train.momentum or train.optimizer=adam",
        "train.graphs": config.train.graphs == "on"
        and config.train.device == "cpu"
        and "with train.device=cpu",
    }
    values, defaults = config.flat(), {key: field.default for key, field in fields()}
    return [
        f"{key} = {shown(values[key])} has no effect {why}"
        for key, why in idle.items()
        if why and values[key] != defaults[key]
    ]


def in_process_only(config: CoreConfig, engine: str) -> list[str]:
    """Settings of the in-process engine that another one was given, a line each."""
    if engine == "inprocess":
        return []
    given = {"engine.workers": config.engine.workers, "engine.cohort": config.engine.cohort}
    return [
        f"{key} = {value}: belongs to engine.name=inprocess; leave it out with {engine}"
        for key, value in given.items()
        if value != "1" and (key, value) != ("engine.workers", AUTO)
    ]


def _check_engine(config: CoreConfig) -> list[str]:
    workers, cohort = config.engine.workers, config.engine.cohort
    errors = [
        f"{key} = {shown(value)}: must be auto, or a number, at least 1"
        for key, value in (("engine.workers", workers), ("engine.cohort", cohort))
        if value != AUTO and not (value.isdecimal() and int(value))
    ]
    errors = errors or in_process_only(config, config.engine.name)
    if not errors and cohort not in ("1", AUTO) and workers not in (AUTO, "1"):
        errors.append(
            f"engine.cohort = {cohort} with engine.workers = {workers}: clients are trained at "
            "once by one process, or beside each other by several; leave one of them out"
        )
    if config.engine.connection and config.engine.name != "grpc":
        errors.append(
            f"engine.connection = {shown(config.engine.connection)}: belongs to engine.name=grpc; "
            f"leave it empty with {config.engine.name}"
        )
    gpus, on_ray = config.engine.client_gpus, config.engine.name == "ray"
    if gpus and not on_ray:
        errors.append(
            f"engine.client-gpus = {gpus:g}: belongs to engine.name=ray; leave it at 0 with "
            f"{config.engine.name}"
        )
    elif on_ray and not gpus and config.train.device.startswith("cuda"):
        errors.append(
            f"train.device = {config.train.device}: Ray gives its clients no GPU; set "
            "engine.client-gpus too, e.g. to 0.25 for four clients at once on a card"
        )
    return errors

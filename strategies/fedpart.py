"""FedPart: rounds that train, send and average one group of layers, between full rounds.

Wang et al., Why Go Full? Elevating Federated Learning Through Partial Network Updates, NeurIPS
2024 (https://arxiv.org/abs/2410.11559); the schedule, the groups and the defaults are those of the
authors' code (FLAIR-Community/Fling), with two differences.  There, frozen layers still get
gradients; here the backward pass ends at the active group.  There, BatchNorm's statistics stay with
their clients; here they are averaged in every round, unless `fedpart.bn-stats` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from flwr.app import ConfigRecord
from pydantic import Field

from fl_common import wire
from fl_common.config import Group
from fl_common.determinism import seed_of
from fl_common.guards import Spec
from fl_common.layout import PARAMS, STATS
from fl_common.models.catalogue import skeleton, usual_shape
from strategies.base import BufferMean, ClientRule, FederatedStrategy, WeightedMean

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from flwr.app import ArrayRecord, Message
    from flwr.serverapp import Grid

    from fl_common.config import CoreConfig
    from fl_common.groups import Groups
    from fl_common.layout import Flat
    from fl_common.local import Work
    from strategies.base import Reply


class FedPartParams(Group):
    warm_up: int = Field(5, ge=0, description="W, full rounds at the start of a cycle [rounds]")
    rounds_per_group: int = Field(
        2, ge=1, description="R/L, rounds in a row in which a group is active [rounds]"
    )
    order: Literal["sequential", "reverse", "random"] = Field(
        "sequential", description="order of the groups in a cycle; random: drawn for each cycle"
    )
    cycles: int = Field(
        0, ge=0, description="cycles that run.rounds must amount to; 0: run.rounds may be any"
    )
    reopen: bool = Field(
        True, description="every cycle starts with full rounds; false: only the first one does"
    )
    groups: str = Field(
        "",
        description='groups by the names of their parameters, comma-separated: "stem.*, '
        'stages.0.*+stages.1.*, fc.*"; empty: each layer with its norm (`flatfed groups`)',
    )
    bn_stats: Literal["averaged", "local"] = Field(
        "averaged",
        description="BatchNorm's running statistics; averaged: in every round; local: each client "
        "keeps and evaluates with its own, the server uses the first client's, as published",
    )
    bn_frozen: Literal["train", "eval"] = Field(
        "train",
        description="BatchNorm outside the active group; train: uses the batch's statistics, as "
        "published; eval: uses the running ones, which stay as they are",
    )


@dataclass(frozen=True)
class Schedule:
    """Which groups are active in which round."""

    params: FedPartParams
    names: tuple[str, ...]
    """All groups, in the order of the forward pass."""
    seed: int

    @property
    def cycle(self) -> int:
        """Rounds of a cycle, W + r G."""
        return self.params.warm_up + self.params.rounds_per_group * len(self.names)

    @property
    def rounds(self) -> int:
        """Rounds of all `cycles`."""
        again = self.params.warm_up * (self.params.cycles - 1)
        return self.params.cycles * self.cycle - (0 if self.params.reopen else again)

    def problem(self, rounds: int) -> str:
        """Why a run of `rounds` rounds is not made up of `cycles` cycles; "" if it is."""
        cycles = self.params.cycles
        if not cycles or rounds == self.rounds:
            return ""
        return (
            f"fedpart.cycles = {cycles}: over {len(self.names)} groups these are {self.rounds} "
            f"rounds, but run.rounds = {rounds}; set run.rounds={self.rounds}, or fedpart.cycles=0"
        )

    def active(self, server_round: int) -> tuple[str, ...]:
        """The groups of a round, counted from 1."""
        t, warm_up = server_round - 1, self.params.warm_up
        if self.params.reopen or t < warm_up:
            cycle, place = divmod(t, self.cycle)
        else:
            cycle, place = divmod(t - warm_up, self.cycle - warm_up)
            place += warm_up
        if place < warm_up:
            return self.names
        return (self._order(cycle)[(place - warm_up) // self.params.rounds_per_group],)

    def _order(self, cycle: int) -> tuple[str, ...]:
        if self.params.order == "reverse":
            return self.names[::-1]
        if self.params.order == "random":
            drawn = np.random.default_rng(seed_of("fedpart", self.seed, cycle))
            return tuple(self.names[i] for i in drawn.permutation(len(self.names)))
        return self.names


class FedPartRule(ClientRule):
    """Trains the active group alone, which the message names."""

    params: FedPartParams
    also: ClassVar = "with `fedpart.bn-stats=local`: its statistics"

    def __init__(self, params: FedPartParams, work: Work) -> None:
        super().__init__(params, work)
        if params.bn_stats == "local":
            self.memory, self.personal = (STATS,), True

    @property
    def frozen_norms(self) -> bool:
        return self.params.bn_frozen == "eval"

    def blank(self, sent: Flat) -> Flat:
        return {name: sent[name] for name in self.memory if name in sent}

    def start(self, sent: Flat, memory: Flat) -> Flat:
        return sent | memory

    def remember(self, memory: Flat, sent: Flat, model: Flat) -> Flat:
        # Copies: MOON may remember the same vector.
        return {name: model[name].clone() for name in memory}


class FirstBuffers(BufferMean):
    """Statistics are those of the cohort's first client."""

    def add(self, reply: Reply) -> None:
        if not self.stats.weight:
            super().add(reply)


class FedPart(FederatedStrategy):
    """w_g <- sum_S p_i theta_i,g for the active groups g; all else stays bit for bit."""

    name = "fedpart"
    Params = FedPartParams
    Rule = FedPartRule
    params: FedPartParams
    partial: ClassVar = True

    @classmethod
    def check(cls, config: CoreConfig) -> list[str]:
        errors = super().check(config)
        if config.train.keeps_state:
            errors.append(
                "train.keep-optimizer = true: not with strategy.name=fedpart, whose optimizer has "
                "another group's state; leave it at false"
            )
        params: FedPartParams = config.params_of(cls.name)
        net = skeleton(config) if params.groups or params.cycles else None
        if net is not None:
            from fl_common.assembly import groups_of

            try:
                names = groups_of(config, net, usual_shape(config)).names
            except ValueError as error:
                return [*errors, str(error)]
            except Exception:  # from the model's own code; another check reports it
                return errors
            if problem := Schedule(params, names, config.run.seed).problem(config.run.rounds):
                errors.append(problem)
        return errors

    def buffers(self) -> BufferMean:
        return FirstBuffers() if self.params.bn_stats == "local" else BufferMean()

    def bind(self, groups: Groups) -> None:
        super().bind(groups)
        self.schedule = Schedule(self.params, groups.names, self.config.run.seed)
        if problem := self.schedule.problem(self.config.run.rounds):
            raise ValueError(problem)

    def warnings(self, config: CoreConfig, model: Flat, works: Sequence[Work] = ()) -> list[str]:
        told = super().warnings(config, model, works)
        for key, value in (("stats", self.params.bn_stats), ("frozen", self.params.bn_frozen)):
            default = FedPartParams.model_fields[f"bn_{key}"].default
            if STATS not in model and value != default:
                told.append(f'fedpart.bn-{key} = "{value}" has no effect without BatchNorm')
        rounds, cycle, warm_up = config.run.rounds, self.schedule.cycle, self.params.warm_up
        if rounds <= warm_up:
            told.append(
                f"fedpart with run.rounds = {rounds}: all of them are full rounds, as fedavg's "
                f"(fedpart.warm-up = {warm_up}); a cycle is {cycle} rounds"
            )
        elif rounds < cycle:
            done = (rounds - warm_up) // self.params.rounds_per_group
            told.append(
                f"fedpart with run.rounds = {rounds}: a cycle is {cycle} rounds; groups that get "
                f"all their partial rounds: {done} of {len(self.schedule.names)}"
            )
        return told

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self.active = self.schedule.active(server_round)
        settings = ConfigRecord({**config, wire.ACTIVE: list(self.active)})
        return super().configure_train(server_round, arrays, settings, grid)

    def expected(self) -> dict[str, dict[str, Spec]]:
        specs = self.specs(self.w)
        whole = specs.pop(PARAMS)
        groups = {g: Spec((self.groups.numel(g),), whole.dtype) for g in self.active}
        return {wire.ARRAYS: groups | specs}

    def begin(self, w: torch.Tensor) -> None:
        self.means = {g: WeightedMean() for g in self.active}

    def add(self, reply: Reply) -> None:
        for g, mean in self.means.items():
            mean.add(reply.model[g], reply.samples)

    def step(self) -> torch.Tensor:
        new = self.w[PARAMS].clone()
        self.groups.put(new, {g: mean.take(new.dtype) for g, mean in self.means.items()})
        return new

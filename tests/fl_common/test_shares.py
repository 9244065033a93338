"""Which samples a client has."""

from __future__ import annotations

import numpy as np
import pytest

from fl_common import assembly
from fl_common.config import resolve
from fl_common.data.errors import DataError


def shares(*clients: int, **settings) -> list[np.ndarray]:
    given = {"clients.number": 4, **{k.replace("_", "-", 1): v for k, v in settings.items()}}
    config = resolve({f"data.{k}" if "." not in k else k: v for k, v in given.items()})
    data = assembly.load_data(config)
    parts = assembly.split_data(config, data)
    return [assembly.share_of(config, data, parts, i).train for i in clients]


def test_max_samples_keeps_some_of_each_partition():
    whole, most = shares(0, 1), shares(0, 1, max_samples=50)
    for all_of_it, some in zip(whole, most, strict=True):
        assert len(some) == 50 < len(all_of_it)
        assert np.isin(some, all_of_it).all()
        assert (np.diff(some) > 0).all()
    # Not the first ones, and the same for the same seed only.
    assert not np.array_equal(most[0], whole[0][:50])
    assert np.array_equal(most[0], shares(0, max_samples=50)[0])


def test_max_samples_beyond_the_partition_changes_nothing():
    for before, after in zip(shares(0, 3), shares(0, 3, max_samples=100_000), strict=True):
        assert np.array_equal(before, after)


def test_the_roll_call_tells_of_what_is_kept(runner):
    done = runner("clients.number=3", "run.rounds=1", "data.max-samples=40")
    import json

    clients = json.loads((done.folder / "clients.json").read_text())
    assert [sum(counts) for counts in clients["label_counts"]] == [40, 40, 40]


@pytest.mark.parametrize("setting", [{"eval.holdout": 0.999}, {"max_samples": 1}])
def test_a_share_that_leaves_nothing_to_train_on_names_the_settings_that_made_it_so(setting):
    with pytest.raises(DataError, match=r"data\.max-samples, or .* eval\.holdout$"):
        shares(0, **{"eval.on": "clients"}, **setting)

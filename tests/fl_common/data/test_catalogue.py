import subprocess
import sys

import pytest

from fl_common.data import catalogue, layouts
from fl_common.data.catalogue import SOURCES, check


def test_import_loads_only_the_standard_library():
    code = (
        "import sys, fl_common.data.catalogue; "
        "print(*{m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) <= {"fl_common", "__main__", "sitecustomize"} | _site_modules()


def _site_modules():
    """What a bare interpreter of this environment loads at its start (.pth files)."""
    code = "import sys; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize(
    "source", ["digits", "breast-cancer", "synthetic", "synthetic-text", "cifar10", "cifar100"]
)
def test_good_settings_have_no_errors(source):
    for scheme in catalogue.PARTITIONS:
        assert check(source, partition=scheme, clients=100, min_size=1) == []


def only(errors):
    [(key, message)] = errors
    assert "\n" not in message
    return key, message


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"source": "folder"}, "data.path", ["folder needs one"]),
        ({"source": "digits", "path": "/x"}, "data.path", ["in the package", "leave it empty"]),
        ({"source": "folder", "path": "/no/such"}, "data.path", ["/no/such does not exist"]),
        ({"source": "digits", "clients": 2000}, "clients.number", ["2000 clients", "1438"]),
        (
            {"source": "digits", "clients": 200, "partition": "dirichlet"},
            "data.min-size",
            ["need 2000 samples, there are 1438", "lower"],
        ),
        (
            {"source": "breast-cancer", "partition": "pathological", "classes_per_client": 3},
            "data.classes-per-client",
            ["2 classes"],
        ),
        (
            {"source": "cifar100", "augment": "moon"},
            "data.augment",
            ["cifar100 has no moon", "fling"],
        ),
        ({"source": "cifar10", "image_size": 64}, "data.image-size", ["leave it at 0"]),
    ],
)
def test_every_error_names_its_key_and_a_remedy(settings, key, words):
    found_key, message = only(check(**settings))
    assert found_key == key
    assert all(word in message for word in words), message


def test_several_errors_come_together():
    keys = [key for key, _ in check("cifar10", "/no/such", augment="x", clients=50_001)]
    assert keys == ["data.path", "data.augment", "clients.number"]


def test_the_pickled_version_of_cifar_names_the_alternatives(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).touch()
    _, message = only(check("cifar10", str(tmp_path)))
    assert "parquet" in message
    assert "cifar-10-batches-bin" in message
    assert "not read" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("cifar100", "cifar-100-binary"),
        ("tiny-imagenet", "train/<class>/ and val/"),
        ("imagenet-200", "at least 200 classes each, it has 0 and 0"),
        ("folder", "a folder per class"),
        ("huggingface", "data.source=folder"),
    ],
)
def test_a_folder_without_the_layout(tmp_path, source, words):
    key, message = only(check(source, str(tmp_path)))
    assert key == "data.path"
    assert str(tmp_path) in message
    assert words in message


def test_a_csv_file_without_its_folder(tmp_path):
    (tmp_path / "a.csv").touch()
    assert "give the folder that holds it" in only(check("huggingface", f"{tmp_path}/a.csv"))[1]
    assert not check("huggingface", str(tmp_path))


def test_an_unreadable_path_is_no_traceback(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setitem(layouts._FINDERS, "folder", refuse)
    assert "check its permissions" in only(check("folder", str(tmp_path)))[1]


def test_hub_names_are_no_local_paths(tmp_path, monkeypatch):
    assert not catalogue.is_local_path("huggingface", "uoft-cs/cifar10")
    assert not catalogue.is_local_path("huggingface", "uoft-cs/cifar10@refs/pr/2")
    assert catalogue.is_local_path("huggingface", "/data/set")
    assert catalogue.is_local_path("huggingface", "data/set.parquet")
    assert catalogue.is_local_path("folder", "owner/name")
    assert not catalogue.is_local_path("cifar10", "")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert catalogue.is_local_path("huggingface", "owner/name")


def test_what_is_known_in_advance_is_consistent():
    for name, info in SOURCES.items():
        known = (info.train_size, info.classes, info.shape)
        assert all(k is None for k in known) == info.resizable, name
        assert bool(info.hub) == (info.path == "optional"), name
        assert info.pipelines[:2] == ("default", "none"), name

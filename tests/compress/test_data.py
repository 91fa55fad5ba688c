"""Images: IDX files, where they come from, and balanced subsets."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress import data as module
from compress.data import FILES, balanced_subset, load_dataset, parse_idx
from hwsim.errors import InputError


def idx(values: np.ndarray) -> bytes:
    """An IDX file, written from its definition."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes()


def contents(train: int = 30, test: int = 10, classes: int = 3, seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {
        FILES[0]: idx(rng.integers(0, 256, (train, 4, 5))),
        FILES[1]: idx(np.arange(train) % classes),
        FILES[2]: idx(rng.integers(0, 256, (test, 4, 5))),
        FILES[3]: idx(np.arange(test) % classes),
    }


def write(folder: Path, files: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.fixture
def no_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "not-installed")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small files that pass for Fashion-MNIST."""
    files = contents(classes=10)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(module, "SHA256", digests)
    return files


class Server:
    """Answers URLs from a dict and counts them."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, url: str) -> io.BytesIO:
        self.asked.append(url)
        if url not in self.answers:
            raise OSError("no route to host")
        return io.BytesIO(self.answers[url])


def served(files: dict[str, bytes], template: str) -> dict[str, bytes]:
    return {template.format(file=name): gzip.compress(content) for name, content in files.items()}


# --- IDX


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_idx_gives_back_what_was_written(sizes: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, sizes, np.uint8)
    found = parse_idx(idx(values), len(sizes), "file")
    assert found.dtype == np.uint8
    assert np.array_equal(found, values)


def test_every_truncation_of_an_idx_file_is_refused() -> None:
    content = idx(np.arange(24).reshape(2, 3, 4))
    for length in range(len(content)):
        with pytest.raises(InputError, match="file"):
            parse_idx(content[:length], 3, "file")
    with pytest.raises(InputError, match="too long"):
        parse_idx(content + b"\0", 3, "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"\0\0\x09\x01\0\0\0\x01\0", r"magic: 00 00 09 01, must be 00 00 08 01"),  # signed bytes
        (b"\0\0\x08\x03" + b"\0\0\0\x01" * 3 + b"\0", "magic"),  # three dimensions where one is due
        (b"\0\0\x08\x01\0\0\0\0", "every size must be at least 1"),
        (b"\x1f\x8b\x08\x00", "magic"),  # still compressed
    ],
)
def test_wrong_idx_files_are_named(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_idx(content, 1, "labels")


# --- subsets


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 1000), st.data()
)
def test_a_subset_is_balanced_and_nested(
    labels: list[int], count: int, seed: int, draw: st.DataObject
) -> None:
    values = np.array(labels)
    chosen = balanced_subset(values, count, seed)
    assert len(chosen) == min(count, len(values))
    assert np.array_equal(chosen, np.unique(chosen))
    available, taken = np.bincount(values, minlength=5), np.bincount(values[chosen], minlength=5)
    # A class with fewer than the largest share minus one must have run out.
    short = taken < taken.max() - 1
    assert np.array_equal(taken[short], available[short])
    smaller = balanced_subset(values, draw.draw(st.integers(1, count)), seed)
    assert set(smaller) <= set(chosen)


def test_subsets_differ_by_seed_and_repeat_with_it() -> None:
    labels = np.arange(200) % 10
    assert np.array_equal(balanced_subset(labels, 50, 1), balanced_subset(labels, 50, 1))
    assert not np.array_equal(balanced_subset(labels, 50, 1), balanced_subset(labels, 50, 2))


def test_a_subset_keeps_normalisation_and_says_what_it_is(tmp_path: Path) -> None:
    full = load_dataset("idx", write(tmp_path / "own", contents()))
    small = full.subset(train=6, test=3, seed=5)
    assert (small.mean, small.deviation) == (full.mean, full.deviation)
    assert torch.bincount(small.train_labels).tolist() == [2, 2, 2]
    assert "subset of 6 training and 3 test images, seed 5" in small.source
    assert full.subset(train=10_000) is full
    with pytest.raises(InputError, match=r"train: 0 images"):
        full.subset(train=0)


# --- sources


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_ones_own(tmp_path: Path, packed: bool) -> None:
    files = contents()
    found = load_dataset("idx", write(tmp_path / "own", files, packed))
    assert found.train_images.shape == (30, 1, 4, 5)
    assert found.train_images.dtype == torch.uint8
    assert found.input_shape == (1, 4, 5)
    assert found.classes == ("0", "1", "2")
    assert found.train_images.flatten().tolist() == list(files[FILES[0]][16:])
    assert found.test_labels.tolist() == [index % 3 for index in range(10)]


def test_normalised_training_images_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    found = load_dataset("idx", write(tmp_path / "own", contents()))
    values = found.normalise(found.train_images)
    assert values.dtype == torch.float32
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_a_constant_image_set_is_not_divided_by_zero(tmp_path: Path) -> None:
    files = contents() | {FILES[0]: idx(np.full((30, 4, 5), 7))}
    found = load_dataset("idx", write(tmp_path / "own", files))
    assert found.normalise(found.train_images).isfinite().all()


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    files = contents()
    del files[FILES[1]], files[FILES[3]]
    with pytest.raises(InputError) as caught:
        load_dataset("idx", write(tmp_path / "own", files))
    assert [problem.field for problem in caught.value.problems] == [FILES[1], FILES[3]]


def test_images_and_labels_must_be_as_many_and_of_one_size(tmp_path: Path) -> None:
    files = contents() | {FILES[1]: idx(np.arange(29) % 3), FILES[2]: idx(np.zeros((10, 5, 5)))}
    with pytest.raises(InputError, match="30 images but 29 labels") as caught:
        load_dataset("idx", write(tmp_path / "own", files))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_truncated_gzip_is_refused(tmp_path: Path, keep: int) -> None:
    folder = write(tmp_path / "own", contents(), packed=True)
    file = folder / f"{FILES[0]}.gz"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=FILES[0]):
        load_dataset("idx", folder)


def test_other_images_do_not_pass_for_fashion_mnist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='use the name "idx"') as caught:
        load_dataset("fashion-mnist", write(tmp_path / "own", contents()))
    assert len(caught.value.problems) == 4


def test_a_folder_given_comes_first_and_is_recognised(tmp_path: Path, pretend: dict[str, bytes]) -> None:
    folder = write(tmp_path / "given", pretend)
    for name in ("fashion-mnist", "idx"):
        found = load_dataset(name, folder, opener=Server({}))
        assert found.name == "fashion-mnist"
        assert found.classes[9] == "Ankle boot"
        assert found.source == f"Fashion-MNIST, folder given ({folder})"


def test_debian_then_cache_then_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend: dict[str, bytes]
) -> None:
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "debian")
    server = Server(served(pretend, module.URLS[0]))
    cache = tmp_path / "cache"
    assert "download" in load_dataset(cache=cache, opener=server).source
    assert len(server.asked) == 4
    assert "cache" in load_dataset(cache=cache, opener=server).source
    write(tmp_path / "debian", pretend, packed=True)
    assert "Debian package" in load_dataset(cache=cache, opener=server).source
    assert len(server.asked) == 4


@pytest.mark.usefixtures("no_debian")
def test_the_second_url_stands_in_for_the_first(tmp_path: Path, pretend: dict[str, bytes]) -> None:
    answers = served(pretend, module.URLS[1])
    wrong = module.URLS[0].format(file=FILES[0])
    server = Server(answers | {wrong: gzip.compress(b"something else")})
    assert "download" in load_dataset(cache=tmp_path / "cache", opener=server).source
    assert len(server.asked) == 8


@pytest.mark.usefixtures("no_debian")
def test_a_damaged_cache_is_fetched_again(tmp_path: Path, pretend: dict[str, bytes]) -> None:
    cache = write(tmp_path / "cache", pretend | {FILES[2]: b"damaged"}, packed=True)
    server = Server(served(pretend, module.URLS[0]))
    assert "download" in load_dataset(cache=cache, opener=server).source
    assert "cache" in load_dataset(cache=cache, opener=Server({})).source


@pytest.mark.usefixtures("no_debian")
def test_what_a_server_sends_must_have_the_checksum(tmp_path: Path) -> None:
    server = Server(served(contents(), module.URLS[0]))  # the real checksums are in force here
    with pytest.warns(UserWarning, match="SHA-256 is not that of Fashion-MNIST"):
        found = load_dataset(cache=tmp_path / "cache", opener=server)
    assert found.name == "digits"
    assert not list((tmp_path / "cache").rglob("*.gz"))


@pytest.mark.usefixtures("no_debian")
def test_digits_take_the_place_loudly(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"accuracy is one of DIGITS(.|\n)*no route to host(.|\n)*apt-get"):
        found = load_dataset(cache=tmp_path / "cache", opener=Server({}), train_limit=100)
    assert found.name == "digits"
    assert "IN PLACE OF Fashion-MNIST" in found.source
    assert found.train_images.shape == (100, 1, 28, 28)


@pytest.mark.usefixtures("no_debian")
def test_no_source_at_all_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        InputError, match=r"found nowhere(.|\n)*scikit-learn: not installed(.|\n)*apt-get install"
    ):
        load_dataset(cache=tmp_path / "cache", opener=Server({}))


def test_digits_are_whole_and_split() -> None:
    found = load_dataset("digits")
    assert len(found.train_labels) + len(found.test_labels) == 1797
    assert torch.bincount(found.test_labels).tolist() == [36] * 9 + [35]
    assert int(found.train_images.max()) > 200
    assert torch.equal(found.test_images, load_dataset("digits").test_images)


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module._cache_folder(None) == tmp_path / "hwsim" / "fashion-mnist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert module._cache_folder(None) == tmp_path / "home" / ".cache" / "hwsim" / "fashion-mnist"


def test_names_are_checked() -> None:
    with pytest.raises(InputError, match='did you mean "fashion-mnist"'):
        load_dataset("fashion_mnist")
    with pytest.raises(InputError, match="needs the folder"):
        load_dataset("idx")


@pytest.mark.skipif(
    not module.DEBIAN_FOLDER.is_dir(), reason="Debian package dataset-fashion-mnist is not installed"
)
def test_the_real_images() -> None:
    found = load_dataset()
    assert found.train_images.shape == (60_000, 1, 28, 28)
    assert torch.bincount(found.train_labels).tolist() == [6000] * 10
    assert torch.bincount(found.test_labels).tolist() == [1000] * 10
    # The normalisation that the field uses for this set: 0.2860 and 0.3530.
    assert found.mean == pytest.approx(0.2860, abs=5e-5)
    assert found.deviation == pytest.approx(0.3530, abs=5e-5)

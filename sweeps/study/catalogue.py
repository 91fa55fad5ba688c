"""The runs of each study, the most informative first. Edit this file to ask another question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from sweeps.study.runs import Run, Training

__all__ = ["STUDIES", "STUDY_NOTES"]

LENET5_FP32, RESNET20_FP32 = 1_724_320, 1_088_744
POINTS = {"50x": 50, "100x": 100}
"""How much smaller than fp32 the file is to be."""

TWICE = "twice as long"

SHAPES = ((4, 4), (1, 4), (8, 8), (16, 1))
LENET5 = Training(dense_epochs=8, admm_epochs=4, retrain_epochs=8, max_loss=0.01, precision="bf16")
LONGER = replace(LENET5, admm_epochs=8, retrain_epochs=16)
RESNET20 = Training(dense_epochs=6, admm_epochs=2, retrain_epochs=4, max_loss=0.01, precision="bf16")
AUTOENCODER = Training(dense_epochs=6, admm_epochs=3, retrain_epochs=5, distill=0.0, precision="bf16")
CREPE = Training(
    dense_epochs=3, admm_epochs=2, retrain_epochs=4, distill=0.0, lr=1e-3, lr_dense=5e-4, precision="bf16"
)

# Pruned shares for both points, from short runs: the target is then met by mild rounding.
JOINT = {(4, 4): (0.5, 0.8), (1, 4): (0.72, 0.88), (8, 8): (0.5, 0.8), (16, 1): (0.5, 0.8)}
PRUNED = (0.89, 0.955)
UNSTRUCTURED = (0.93, 0.97)
WIDTHS = (0.45, 0.32)
BUDGETS = {
    (4, 4): (56_000, 28_000),
    (1, 4): (50_000, 26_000),
    (8, 8): (54_000, 27_000),
    (16, 1): (56_000, 28_000),
}


def fashion_mnist() -> Iterator[Run]:
    """LeNet-5: all methods with 4×4 blocks; joint with other shapes; ResNet-20; single methods with other shapes."""
    for part in (_lenet5_first, _lenet5_shapes):
        for seed in range(5):
            yield from part(seed)
    for seed in range(3):
        yield from _resnet20(seed)
    for seed in range(5):
        yield from _lenet5_single(seed)


def _lenet5(method: str, seed: int, index: int | None = None, **fields: object) -> Run:
    point = "" if index is None else list(POINTS)[index]
    target = 0 if index is None else LENET5_FP32 // POINTS[point]
    return Run("lenet5", method, seed, point, target_bytes=target, training=LENET5, **fields)  # type: ignore[arg-type]


def _budget(seed: int, index: int, block: tuple[int, int]) -> Run:
    budget = f"file_bytes={BUDGETS[block][index]}"
    return _lenet5("budget", seed, index, block=block, budget=budget, permute=True, exempt_first_last=False)


def _joint(seed: int, index: int, block: tuple[int, int]) -> Run:
    share = JOINT[block][index]
    return _lenet5("joint", seed, index, block=block, pruned=share, unified=round(1 - share, 6))


def _unstructured(seed: int, index: int) -> Run:
    share = UNSTRUCTURED[index]
    ranked = {"block": (1, 1), "allocation": "magnitude", "exempt_first_last": False}
    return _lenet5("unstructured", seed, index, pruned=share, **ranked)


def _exactly_8_bits(run: Run) -> Run:
    return replace(run, training=replace(run.training, max_loss=0.0))


def _lenet5_first(seed: int) -> Iterator[Run]:
    yield _lenet5("start", seed)
    yield _exactly_8_bits(_lenet5("int8", seed))
    for index in range(len(POINTS)):
        yield _budget(seed, index, (4, 4))
    yield _lenet5("dense", seed)
    for index in range(len(POINTS)):
        yield _unstructured(seed, index)
        yield _joint(seed, index, (4, 4))
        yield _lenet5("pruned", seed, index, pruned=PRUNED[index])
        yield _lenet5("channels", seed, index, width=WIDTHS[index])
    yield _lenet5("binary", seed, unified=1.0)
    yield _lenet5("unified", seed, unified=0.75)
    yield _lenet5("rounded", seed)
    yield _lenet5("int8-trained", seed)


def _lenet5_shapes(seed: int) -> Iterator[Run]:
    for block in SHAPES[1:]:
        for index in range(len(POINTS)):
            yield _budget(seed, index, block)
            yield _joint(seed, index, block)
        yield _lenet5("binary", seed, unified=1.0, block=block)


def _lenet5_single(seed: int) -> Iterator[Run]:
    for block in SHAPES[1:]:
        for index in range(len(POINTS)):
            yield _lenet5("pruned", seed, index, pruned=PRUNED[index], block=block)
        yield _lenet5("unified", seed, unified=0.75, block=block)


def _resnet20(seed: int) -> Iterator[Run]:
    """Three seeds for dense, joint and budget, one for the rest; 20 and 40 times smaller (normalisation stays in fp32)."""

    def run(method: str, times: int = 0, **fields: object) -> Run:
        target = RESNET20_FP32 // times if times else 0
        point = f"{times}x" if times else ""
        return Run("resnet20", method, seed, point, target_bytes=target, training=RESNET20, **fields)  # type: ignore[arg-type]

    yield run("start")
    yield run("dense")
    yield run("joint", 20, pruned=0.3, unified=0.7)
    yield run("budget", 20, budget="file_bytes=66000", permute=True)
    yield run("budget", 40, budget="file_bytes=30000", permute=True)
    if seed == 0:
        yield _exactly_8_bits(run("int8"))
        yield run("unstructured", 20, block=(1, 1), pruned=0.85, allocation="magnitude")
        yield run("channels", 20, width=0.4)
        yield run("pruned", 20, pruned=0.8)
        yield run("unified", unified=0.75)
        yield run("binary", unified=1.0)
        yield run("rounded")
        yield run("int8-trained")


def longer() -> Iterator[Run]:
    """What twice the epochs of compression give, 4×4 blocks, beside a dense network of as many epochs; three seeds."""
    for seed in range(3):
        yield _longer(_lenet5("dense", seed))
        for index in range(len(POINTS)):
            yield _longer(_budget(seed, index, (4, 4)))
            yield _longer(_unstructured(seed, index))


def _longer(run: Run) -> Run:
    return replace(run, variant=TWICE, training=LONGER)


def ablation() -> Iterator[Run]:
    """What each part contributes: the full method with one part taken out, LeNet-5, 4×4 blocks, three seeds."""
    for seed in range(3):
        for index in range(len(POINTS)):
            full = _budget(seed, index, (4, 4))
            training = full.training
            everything = training.admm_epochs + training.retrain_epochs
            yield full
            for variant, changes in (
                ("no distillation", {"distill": 0.0}),
                ("no ADMM, longer retraining", {"admm_epochs": 0, "retrain_epochs": everything}),
                ("no retraining, longer ADMM", {"admm_epochs": everything, "retrain_epochs": 0}),
                ("neither: one-shot projection", {"admm_epochs": 0, "retrain_epochs": 0}),
            ):
                yield replace(full, variant=variant, training=replace(training, **changes))
            yield replace(full, variant="no permutation", permute=False)
            joint = _joint(seed, index, (4, 4))
            joint = replace(joint, method="budget", permute=True, exempt_first_last=False)
            yield replace(joint, variant="no budget: one ratio")


def generality() -> Iterator[Run]:
    """Two more tasks, joint against dense, 20 and 50 times smaller."""
    for seed in range(3):
        for task, training in (("autoencoder", AUTOENCODER), ("crepe", CREPE)):

            def run(
                method: str, point: str = "", task: str = task, training: Training = training, **f: object
            ) -> Run:
                return Run(task, method, seed, point, training=training, **f)  # type: ignore[arg-type]  # noqa: B023

            yield run("start")
            yield run("dense")
            for times, budget in GENERALITY_BUDGETS[task].items():
                target = GENERALITY_FP32[task] // times
                spent: dict[str, Any] = {"budget": f"file_bytes={budget}", "target_bytes": target}
                yield run("budget", f"{times}x", permute=True, exempt_first_last=False, **spent)
            yield run("int8")


GENERALITY_FP32 = {"autoencoder": 1_768_708, "crepe": 1_946_208}
GENERALITY_BUDGETS = {"autoencoder": {20: 134_000, 50: 68_000}, "crepe": {20: 110_000, 50: 50_000}}
"""Estimates of `compress.budget`: above the bytes of the entropy-coded file, and with requantisers, which it does not hold."""


def recipe_choice() -> Iterator[Run]:
    """What the recipe was chosen by: trained without the last 5,000 training images, measured on them; a seed of its own.

    At the harder point, where recipes differ most.
    """
    full = _budget(100, list(POINTS).index("100x"), (4, 4))
    full = replace(full, training=replace(full.training, held_out=True))
    yield replace(full, variant="as chosen")
    for variant, changes in (
        ("no distillation", {"distill": 0.0}),
        ("distillation 0.8", {"distill": 0.8}),
        ("learning rate 2e-3", {"lr": 2e-3}),
        ("rho from 0.1", {"rho": 0.1}),
        ("2 + 10 epochs", {"admm_epochs": 2, "retrain_epochs": 10}),
        ("3 + 5 epochs", {"admm_epochs": 3, "retrain_epochs": 5}),
        ("batches of 64", {"batch_size": 64}),
        ("fp32", {"precision": "fp32"}),
        ("taught by dense", {"teacher_epochs": LENET5.epochs}),
    ):
        yield replace(full, variant=variant, training=replace(full.training, **changes))


ONE_SHOT_TASKS = ("efficientnet-lite0", "minilm-l6", "mobilenetv2")
ONE_SHOT_STEPS: tuple[tuple[tuple[int, int], float, float, float], ...] = (
    # block, pruned, unified, share of the outputs' energy that rounding may cost: the most informative first
    ((4, 4), 0.0, 0.0, 0.003),
    ((4, 4), 0.0, 0.0, 0.01),
    ((4, 4), 0.0, 0.1, 0.003),
    ((4, 4), 0.1, 0.0, 0.003),
    ((4, 4), 0.0, 0.0, 0.03),
    ((1, 4), 0.1, 0.0, 0.003),
    ((4, 4), 0.0, 0.25, 0.01),
    ((4, 4), 0.0, 0.0, 0.1),
    ((4, 4), 0.0, 0.0, 0.001),
)
ONE_SHOT_WIDTHS: tuple[tuple[tuple[int, int], float, float, int], ...] = (
    # block, pruned, unified, bits of dense weights
    ((4, 4), 0.0, 0.0, 8),
    ((4, 4), 0.0, 1.0, 8),
    ((4, 4), 0.0, 0.5, 6),
    ((4, 4), 0.5, 0.0, 6),
    ((4, 4), 0.0, 0.0, 5),
    ((1, 4), 0.0, 0.5, 6),
    ((1, 4), 0.0, 1.0, 8),
    ((4, 4), 0.0, 0.0, 6),
    ((4, 4), 0.25, 0.5, 6),
    ((4, 4), 0.5, 0.5, 8),
    ((1, 4), 0.5, 0.0, 6),
    ((4, 4), 0.0, 0.0, 4),
    ((4, 4), 0.25, 0.0, 6),
    ((4, 4), 0.0, 0.25, 6),
    ((1, 4), 0.25, 0.5, 6),
    ((1, 4), 0.5, 0.5, 8),
)


def one_shot() -> Iterator[Run]:
    """Published weights, no training: rounded, unified, pruned and both; with the Hessian and without, point by point.

    Ratios are spread by ranking all blocks, with the Hessian's diagonal or by the weights alone; pruning by Erdős–Rényi too.
    """
    for task in ONE_SHOT_TASKS:
        yield Run(task, "start")
    for block, pruned, unified, bits in ONE_SHOT_WIDTHS:
        yield from _one_shot_point(block, pruned, unified, f"{bits} bits", weight_bits=bits)
    for block, pruned, unified, share in ONE_SHOT_STEPS:
        yield from _one_shot_point(block, pruned, unified, f"steps {share:.1%}", rounding_error=share)


def _one_shot_point(
    block: tuple[int, int], pruned: float, unified: float, rounding: str, **precision: Any
) -> Iterator[Run]:
    shares = {"pruned": pruned, "unified": unified, "dense": round(1 - pruned - unified, 6)}
    parts = [f"{share:.0%} {name}" for name, share in shares.items() if share]
    point = ", ".join([*parts, rounding] if shares["dense"] else parts)
    is_spread = pruned + unified > 0 and (pruned, unified) != (0.0, 1.0)
    for task in ONE_SHOT_TASKS:
        for method, ranking in (("hessian", "hessian"), ("projection", "magnitude")):
            allocation = ranking if is_spread else ""
            fields: dict[str, Any] = {"block": block, "pruned": pruned, "unified": unified, **precision}
            run = Run(task, method, 0, point, allocation=allocation, **fields)
            yield run
            if pruned == 0.5 and block == (4, 4):
                yield replace(run, variant="Erdős–Rényi", allocation="erdos-renyi")


def _distinct(runs: Callable[[], Iterator[Run]]) -> Callable[[], list[Run]]:
    return lambda: list({run.key: run for run in runs()}.values())


STUDIES: Mapping[str, Callable[[], list[Run]]] = MappingProxyType(
    {
        "fashion-mnist": _distinct(fashion_mnist),
        "longer": _distinct(longer),
        "ablation": _distinct(ablation),
        "generality": _distinct(generality),
        "one-shot": _distinct(one_shot),
        "recipe-choice": _distinct(recipe_choice),
    }
)
"""Each study as a function that gives its runs in the order in which they are worth doing."""

STUDY_NOTES = MappingProxyType(
    {
        "fashion-mnist": "accuracy against bytes, LeNet-5 and ResNet-20, all methods",
        "longer": "LeNet-5 compressed for twice as many epochs, beside a dense network of as many",
        "ablation": "what ADMM, budget, permutation, distillation and retraining contribute",
        "generality": "an autoencoder and CREPE-tiny, dense and compressed 20 and 50 times",
        "one-shot": "EfficientNet-Lite0, MobileNetV2 and MiniLM-L6 without training: agreement with fp32 against bytes",
        "recipe-choice": "the runs on held-out training images that recipes were chosen by",
    }
)

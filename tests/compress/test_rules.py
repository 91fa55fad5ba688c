"""Configuration files, rules by name, and the plan that leaves no module unmentioned."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from compress.rules import CompressionConfig, Recipe, load_config, parse_config, plan_layers
from hwsim.errors import InputError


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.Conv2d(6, 12, 5),
        nn.BatchNorm2d(12),
        nn.Flatten(),
        nn.Linear(48, 20),
        nn.Linear(20, 10),
    )


def fields(error):
    return [problem.field for problem in error.value.problems]


def test_toml_gives_the_same_as_python(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        "block = [2, 8]\npruned = 0.75\nunified = 0.25\nexempt_first_last = false\n"
        '[[rules]]\npattern = "fc*"\nweight_bits = 4\n'
    )
    expected = CompressionConfig(
        block=(2, 8),
        pruned=0.75,
        unified=0.25,
        exempt_first_last=False,
        rules=[{"pattern": "fc*", "weight_bits": 4}],
    )
    assert load_config(path) == expected
    assert parse_config(expected.model_dump(mode="json")) == expected


def test_every_problem_of_a_file_is_named_at_once():
    data = {
        "blocks": [4, 4],
        "pruned": -0.1,
        "weight_bits": 9,
        "magnitude_bits": 1,
        "rules": [{"patern": "fc*"}, {"pattern": "conv*", "block": [4, 0]}],
    }
    with pytest.raises(InputError) as error:
        parse_config(data, "my.toml")
    for field in ("blocks", "pruned", "weight_bits", "magnitude_bits", "rules.0.patern", "rules.0.pattern"):
        assert field in fields(error)
    assert any(field.startswith("rules.1.block") for field in fields(error))
    assert 'did you mean "block"?' in str(error.value)
    assert 'did you mean "pattern"?' in str(error.value)


@pytest.mark.parametrize(
    ("pruned", "unified", "fine"), [(0.7, 0.3, True), (0.7, 0.31, False), (0.1, 0.9, True)]
)
def test_ratios_must_not_exceed_one_in_decimal_arithmetic(pruned, unified, fine):
    if fine:
        parse_config({"pruned": pruned, "unified": unified})
    else:
        with pytest.raises(InputError, match="must not exceed 1"):
            parse_config({"pruned": pruned, "unified": unified})


@pytest.mark.parametrize(
    ("bits", "fine"), [(1, False), (2, True), (8, True), (9, False), (True, False), (4.0, False)]
)
def test_two_to_eight_bits(bits, fine):
    for field in ("weight_bits", "magnitude_bits"):
        if fine:
            assert getattr(parse_config({field: bits}), field) == bits
        else:
            with pytest.raises(InputError, match=field):
                parse_config({field: bits})


@pytest.mark.parametrize("rules", [{"pattern": "*"}, "fc*", [3]])
def test_rules_that_are_no_list_of_tables_are_refused(rules):
    with pytest.raises(InputError, match="rules"):
        parse_config({"rules": rules})


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("block = [")
    with pytest.raises(InputError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_first_and_last_stay_dense_by_default():
    plan = plan_layers(lenet(), CompressionConfig(pruned=0.25, unified=0.5))
    assert [(layer.name, layer.exempt) for layer in plan.layers] == [
        ("0", True),
        ("1", False),
        ("4", False),
        ("5", True),
    ]
    assert plan.layers[0].counts == (0, 0)
    assert plan.layers[1].types_shape == (1, 3, 38)
    assert plan.layers[1].counts == (28, 57)
    assert plan.untreated == ()


def test_later_rules_win_and_leave_the_rest_alone():
    config = CompressionConfig(
        pruned=0.5,
        unified=0.25,
        rules=[
            {"pattern": "*", "block": (2, 2), "weight_bits": 4},
            {"pattern": "4", "pruned": 0.75, "weight_bits": 3},
            {"pattern": "0", "exempt": False},
            {"pattern": "1", "exempt": True},
        ],
    )
    layers = {layer.name: layer for layer in plan_layers(lenet(), config).layers}
    assert (layers["4"].settings.pruned, layers["4"].settings.weight_bits) == (0.75, 3)
    assert layers["4"].settings.unified == 0.25
    assert all(layer.settings.block == (2, 2) for layer in layers.values())
    assert [name for name, layer in layers.items() if layer.exempt] == ["1", "5"]


def test_a_rule_that_matches_nothing_names_the_nearest_layer():
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    with pytest.raises(InputError, match=r'"decodr" matches no layer.*did you mean "decoder"'):
        plan_layers(model, CompressionConfig(rules=[{"pattern": "decodr", "pruned": 0.1}]))


def test_a_rule_for_an_untreated_module_says_why():
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 3), "a": nn.Linear(4, 4)})
    with pytest.raises(InputError, match="ConvTranspose2d is not a Linear"):
        plan_layers(
            model, CompressionConfig(exempt_first_last=False, rules=[{"pattern": "up", "pruned": 0.1}])
        )


def test_ratios_that_clash_after_the_rules_are_refused_by_layer():
    config = CompressionConfig(pruned=0.5, unified=0.5, rules=[{"pattern": "4", "pruned": 0.6}])
    with pytest.raises(InputError) as error:
        plan_layers(lenet(), config)
    assert fields(error) == ["4.pruned + unified"]


def test_ratios_for_exempt_layers_only_are_refused():
    with pytest.raises(InputError, match="exempt = false"):
        plan_layers(lenet(), CompressionConfig(rules=[{"pattern": "5", "pruned": 0.2}]))
    plan_layers(lenet(), CompressionConfig(rules=[{"pattern": "5", "pruned": 0.2, "exempt": False}]))


def test_a_network_of_exempt_layers_only_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(InputError, match="nothing would be compressed"):
        plan_layers(model, CompressionConfig())
    assert len(plan_layers(model, CompressionConfig(pruned=0, unified=0)).layers) == 2


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 3))


def test_every_module_with_weights_is_either_planned_or_named_with_a_reason():
    tied = nn.Linear(8, 12, bias=False)
    embedding = nn.Embedding(12, 8)
    tied.weight = embedding.weight
    frozen = nn.Linear(4, 4)
    frozen.weight.requires_grad_(False)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "conv1": nn.Conv1d(4, 8, 3, groups=2),
            "conv3": nn.Conv3d(2, 2, 2),
            "depthwise": nn.Conv2d(6, 6, 3, groups=6),
            "up": nn.ConvTranspose2d(4, 4, 3),
            "embedding": embedding,
            "tied": tied,
            "attention": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(4, 4),
            "lazy": nn.LazyLinear(4),
            "weight_norm": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "fp16": nn.Linear(4, 4, dtype=torch.float16),
            "scaled": Scaled(4, 4),
            "frozen": frozen,
            "bare": Bare(),
            "batch_norm": nn.BatchNorm1d(4),
            "layer_norm": nn.LayerNorm((4, 4)),
            "prelu": nn.PReLU(4),
        }
    )
    plan = plan_layers(model, CompressionConfig())
    assert {layer.name: layer.groups for layer in plan.layers} == {
        "linear": 1,
        "conv1": 2,
        "conv3": 1,
        "depthwise": 6,
    }
    reasons = {item.name: item.reason for item in plan.untreated}
    expected = {
        "up": "ConvTranspose2d is not",
        "embedding": "looked up",
        "tied": "shared",
        "attention": "MultiheadAttention is not",
        "attention.out_proj": "past the layer's forward",
        "lstm": "LSTM is not",
        "lazy": "run one batch",
        "weight_norm": "computed from other parameters",
        "fp16": "float16",
        "scaled": "overrides Linear.forward",
        "frozen": "frozen",
        "bare": "Bare is not",
    }
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name]


def test_a_network_without_a_treatable_layer_is_refused():
    with pytest.raises(InputError, match=r"no Linear or Conv1d/2d/3d.*looked up"):
        plan_layers(nn.Sequential(nn.Embedding(4, 4)), CompressionConfig())


@pytest.mark.parametrize("field", ["lr", "rho", "epochs_admm", "seed", "accumulation"])
def test_a_recipe_refuses_negative_numbers(field):
    with pytest.raises(ValueError, match=field):
        Recipe(**{field: -1})


def test_configuration_needs_no_torch():
    code = "import compress, compress.rules, sys; assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_export_exists():
    import compress

    assert all(getattr(compress, name) is not None for name in compress.__all__)
    assert set(compress.__all__) <= set(dir(compress))
    with pytest.raises(AttributeError, match="nothing"):
        _ = compress.nothing

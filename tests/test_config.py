"""The configuration: what is refused, and what goes before what."""

import json
from pathlib import Path

import pytest

from tir_alp.algorithm.presets import ALGORITHMS, PerturbationConfig
from tir_alp.algorithm.section import merge
from tir_alp.config import Config, SFTConfig, SGLangConfig, TransformersConfig
from tir_alp.run.command_line import load_config, overlay, parse_as, parse_config, read_toml
from tir_alp.run.model_choice import settings_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.toml"))


def refusal(arguments: list[str], below: dict | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(arguments, below or {})
    return str(caught.value)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("below", "message"),
    [
        ({"stepz": 3}, "stepz: there is no such key"),
        ({"trainer": {"learning_rate": 1.0}}, "trainer.learning_rate: there is no such key"),
        (
            {"algorithm": {"name": "alp_token", "perturbation": {"std": 1}}},
            "algorithm.perturbation.std: there is no such key",
        ),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"trainer": {"lr": -1.0}}, "trainer.lr: Input should be greater than 0"),
        ({"trainer": {"lr": float("inf")}}, "trainer.lr: Input should be a finite number"),
        ({"trainer": {"betas": [2, 3]}}, "trainer.betas.0: Input should be less than 1"),
        ({"trainer": {"betas": [0.9, float("nan")]}}, "trainer.betas.1: Input should be a finite"),
        ({"name": "../x"}, "name: '../x' is not the name of a folder below runs/"),
        ({"name": "/tmp/x"}, "name: '/tmp/x' is not the name of a folder below runs/"),
        ({"name": ""}, "name: '' is not the name of a folder below runs/"),
        ({"name": "."}, "name: '.' is not the name of a folder below runs/"),
        ({"name": "a\0b"}, "is not the name of a folder below runs/"),
        ({"model": {"path": ""}}, "model.path: '' names nothing"),
        ({"env": {"id": " "}}, "env.id: ' ' names nothing"),
        ({"algorithm": "ppo"}, "algorithm: no algorithm 'ppo'; there are grpo, "),
        ({"algorithm": {"clip_low": 0.1}}, "algorithm: there is no denominator: name the preset"),
        ({"rollout": {"void_turns": "drop"}}, "rollout.void_turns: Input should be 'keep', "),
    ],
)
def test_a_mistake_is_named_by_its_key(below, message):
    assert message in refusal([], below)


def test_every_mistake_has_a_line():
    assert len(refusal([], {"stepz": 3, "steps": "many"}).splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "stepz"),
        (["--trainer.learning_rate", "1"], "learning_rate"),
        (["--steps", "many"], "steps: Input should be a valid integer"),
        (["--algorithm", "ppo"], "no algorithm 'ppo'"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_too(arguments, message):
    assert message in refusal(arguments)


@pytest.mark.parametrize(
    ("below", "message"),
    [
        (
            {"rollout": {"max_turn_tokens": 64, "max_context_tokens": 64}},
            "(64) leaves no room for a prompt in rollout.max_context_tokens (64)",
        ),
        (
            {"deterministic": True, "rollout": {"max_refills": 1}},
            "deterministic needs rollout.max_refills = 0",
        ),
        (
            {"rollout": {"max_staleness": 1, "hold": True, "max_refills": 1}},
            "rollout.hold needs rollout.max_refills = 0",
        ),
        (
            {"rollout": {"overlong_buffer_tokens": 16384}},
            "(16384) is not less than rollout.max_context_tokens (16384)",
        ),
        (
            {"rollout": {"groups_per_step": 5}, "trainer": {"updates_per_step": 2}},
            "(5) cannot be divided evenly over trainer.updates_per_step (2)",
        ),
        (
            {"algorithm": {"name": "alp_token", "perturbation": {"layers": [2, 2]}}},
            "layers is [start, stop) with 0 <= start < stop, not (2, 2)",
        ),
        (
            {"algorithm": {"name": "mis_token", "correction": {"low": 3.0}}},
            "low (3.0) is above high (2.0)",
        ),
        (
            {"algorithm": {"name": "grpo", "rejection": {"low": 2.0, "high": 1.0}}},
            "low (2.0) is above high (1.0)",
        ),
        (
            {"algorithm": {"name": "grpo", "rejection": {"veto": 1.0}}},
            "algorithm.rejection.veto: Input should be less than 1",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(below, message):
    assert message in refusal([], below)


def test_a_path_may_begin_at_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    data = load_config([], {"data": {"source": "jsonl", "path": "~/tasks.jsonl"}}).data
    assert str(data.path) == "/home/somebody/tasks.jsonl"


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError):
        load_config([], {}).steps = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------- algorithms


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_preset_goes_by_its_name(name):
    assert load_config([], {"algorithm": name}).algorithm == ALGORITHMS[name]
    assert load_config(["--algorithm", name], {}).algorithm == ALGORITHMS[name]
    assert load_config([f"--algorithm={name}"], {}).algorithm == ALGORITHMS[name]


def test_one_value_of_a_preset_is_changed_and_the_others_stay():
    changed = {"algorithm": {"name": "alp_token", "perturbation": {"init_std": 0.02}}}
    expected = ALGORITHMS["alp_token"].model_copy(
        update={"perturbation": PerturbationConfig(init_std=0.02)}
    )
    assert load_config([], changed).algorithm == expected
    words = ["--algorithm", "alp_token", "--algorithm.perturbation.init_std", "0.02"]
    assert load_config(words, {}).algorithm == expected
    assert load_config(words[2:] + words[:2], {}).algorithm == expected


def test_a_preset_and_values_of_it_on_the_command_line():
    words = ["--algorithm", "bypass_token", "--algorithm.clip_low", "0.1"]
    assert load_config(words, {}).algorithm == ALGORITHMS["bypass_token"].model_copy(
        update={"clip_low": 0.1}
    )


def test_a_value_of_the_default_algorithm_is_changed_without_naming_it():
    words = ["--algorithm.perturbation.init_std", "0.02"]
    algorithm = load_config(words, {}).algorithm
    assert algorithm == load_config(["--algorithm", "alp_sequence", *words], {}).algorithm


def test_the_command_line_changes_a_value_of_the_files_preset():
    words = ["--algorithm.clip_low", "0.1"]
    expected = ALGORITHMS["grpo"].model_copy(update={"clip_low": 0.1})
    assert load_config(words, {"algorithm": "grpo"}).algorithm == expected
    assert load_config(words, {"algorithm": {"name": "grpo"}}).algorithm == expected


def test_a_method_of_ones_own_needs_no_name():
    own = {"denominator": "rollout", "ratio_level": "token", "surrogate": "reinforce"}
    algorithm = load_config([], {"algorithm": own}).algorithm
    assert (algorithm.name, algorithm.surrogate, algorithm.perturbation) == (
        "custom",
        "reinforce",
        None,
    )


# --------------------------------------------------------------------------- what goes before what


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 7\n[trainer]\nlr = 0.1\nweight_decay = 0.0\n")
    config = load_config(["--trainer.lr", "0.2"], read_toml(file))
    assert (config.steps, config.trainer.lr, config.trainer.weight_decay) == (7, 0.2, 0.0)
    assert config.trainer.betas == (0.9, 0.99)


def test_the_command_line_takes_tables_lists_and_nothing():
    words = ["--algorithm.perturbation.layers", "[0, 2]", "--algorithm.dual_clip", "null"]
    words += ["--env.kwargs", '{"max_turns": 3}', "--deterministic", "true"]
    config = load_config(words, {"algorithm": "alp_token"})
    assert config.algorithm.perturbation is not None
    assert config.algorithm.perturbation.layers == (0, 2)
    assert config.algorithm.dual_clip is None
    assert (config.env.kwargs, config.deterministic) == ({"max_turns": 3}, True)


def test_another_environment_does_not_get_the_settings_of_the_first():
    below = {"env": {"id": "Mine-v0", "kwargs": {"max_turns": 3, "tools": ["a"]}}}
    words = ["--env.kwargs", '{"max_turns": 2}']
    same = load_config(["--env.id", "Mine-v0", *words], below)
    assert same.env.kwargs == {"max_turns": 2, "tools": ["a"]}
    assert load_config(["--env.id", "Other-v0", *words], below).env.kwargs == {"max_turns": 2}
    assert load_config(["--env.id", "Other-v0"], below).env.kwargs == {}


def test_environment_variables_change_nothing(monkeypatch):
    for name in ("STEPS", "steps", "SEED", "NAME", "TRAINER", "TRAINER__LR", "ALGORITHM"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setenv("MODEL", '{"path": "elsewhere"}')
    assert load_config([], {}) == Config()
    assert load_config(["--seed", "3"], {}) == Config(seed=3)


def test_merge_lays_tables_over_one_another():
    below = {"a": {"x": 1, "y": {"z": 2}}, "b": 1}
    assert merge(below, {"a": {"y": {"w": 3}}, "b": {"c": 4}}) == {
        "a": {"x": 1, "y": {"z": 2, "w": 3}},
        "b": {"c": 4},
    }
    assert below == {"a": {"x": 1, "y": {"z": 2}}, "b": 1}


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_config_that_we_ship_loads(file):
    if file.name.endswith("_sft.toml"):
        parse_as(SFTConfig, read_toml(file) | {"data": {"path": "t.jsonl"}})
    else:
        load_config([], read_toml(file))


def test_there_are_configs_to_load():
    assert CONFIGS


def test_a_file_that_is_not_there_or_not_toml_is_clear(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the config .*none.toml': No such file"):
        read_toml(tmp_path / "none.toml")
    torn = tmp_path / "torn.toml"
    torn.write_text("steps = \n")
    with pytest.raises(ValueError, match=r"torn.toml is not valid TOML"):
        read_toml(torn)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_config_comes_back_from_json(name):
    words = ["--algorithm", name, "--algorithm.clip_low", "0.1", "--name", "a"]
    config = load_config(words, {"env": {"kwargs": {"sandbox": {"preload": []}}}})
    assert parse_config(json.loads(config.model_dump_json())) == config


def test_what_was_taken_out_of_a_preset_stays_out_when_it_comes_back():
    config = load_config([], {"algorithm": {"name": "alp_token", "perturbation": None}})
    assert config.algorithm.perturbation is None
    assert parse_config(json.loads(config.model_dump_json())) == config


# ------------------------------------------------------------------------------------ the engine


def test_the_embedded_engine_is_meant_where_none_is_named():
    assert load_config([], {}).engine == TransformersConfig()
    named = load_config(["--engine.precision", "int8"], {"engine": {"max_cache_tokens": 512}})
    assert named.engine == TransformersConfig(precision="int8", max_cache_tokens=512)


def test_sglang_is_chosen_by_its_type():
    words = ["--engine.device", "cpu", "--engine.weights", "tensor", "--engine.max_running", "8"]
    config = load_config(words, {"engine": {"type": "sglang", "dtype": "float32"}})
    assert config.engine == SGLangConfig(
        type="sglang", device="cpu", dtype="float32", weights="tensor", max_running=8
    )


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"wrong": 1}, r"^engine\.wrong: there is no such key"),
        ({"type": "sglang", "precision": "int8"}, r"^engine\.precision: there is no such key"),
        ({"type": "sglang", "max_running": 0}, r"^engine\.max_running: Input should be greater"),
        ({"type": "other"}, "^engine.type: there is no 'other'; there are transformers"),
        ({"type": "custom", "factory": "no_colon"}, r"^engine\.factory: String should match"),
        (
            {"type": "custom", "factory": "a:b", "kwargs": {"two words": 1}},
            "'two words' cannot be the name of an argument",
        ),
        ({"type": "sglang", "urls": ["http://a"], "num_servers": 2}, "leave one of them out"),
        ({"type": "sglang", "router": "http://a"}, "knows nothing of servers that the run starts"),
    ],
)
def test_a_key_that_an_engine_does_not_have_is_named_without_its_type(engine, message):
    with pytest.raises(ValueError, match=message):
        load_config([], {"engine": engine})


def test_servers_that_lend_their_memory_cannot_sample_ahead_of_the_weights():
    below = {"engine": {"type": "sglang", "release_memory": True}}
    with pytest.raises(ValueError, match=r"needs rollout.max_staleness = 0: .* and it is 2"):
        load_config(["--rollout.max_staleness", "2"], below)
    assert load_config([], below).rollout.max_staleness == 0


@pytest.mark.parametrize(
    ("engine", "mode", "allowed"),
    [
        ({"type": "sglang"}, "drop", '"wait" or "keep"'),
        ({"type": "vllm", "python": "/p"}, "keep", '"wait"'),
        ({"type": "custom", "factory": "a:b"}, "keep", '"wait"'),
    ],
)
def test_an_engine_refuses_a_way_to_update_weights_that_it_does_not_support(engine, mode, allowed):
    with pytest.raises(ValueError, match=rf'on_update = "{mode}": set it to {allowed}'):
        load_config(["--rollout.on_update", mode], {"engine": engine})


def test_a_custom_engine_says_itself_what_it_can_do():
    engine = {"type": "custom", "factory": "a:b", "kwargs": {"speed": 2}}
    able = {"reproducible": True, "num_gpus": 2, "supports_on_update": ["wait", "keep"]}
    words = ["--deterministic", "true", "--rollout.on_update", "keep"]
    made = load_config(words, {"engine": engine | able}).engine
    assert (made.is_reproducible, made.gpus, made.needs_probe) == (True, range(2), True)
    with pytest.raises(ValueError, match="is not a function of the run's seed"):
        load_config(words, {"engine": engine})


def test_a_deterministic_run_needs_the_embedded_engine():
    with pytest.raises(ValueError, match=r'deterministic needs engine\.type = "transformers"'):
        load_config(["--deterministic", "true"], {"engine": {"type": "sglang"}})


@pytest.mark.parametrize(
    "file", [file for file in CONFIGS if file.parent.name == "cluster"], ids=lambda file: file.stem
)
def test_configs_of_clusters_are_valid_and_ask_for_gpus(file):
    cluster = load_config([], read_toml(file)).cluster
    assert cluster.is_used and cluster.trainer.gpus > 0 < cluster.engines.gpus


def test_a_cluster_is_named_by_its_address():
    assert load_config(["--cluster", "auto"], {}).cluster.address == "auto"
    made = load_config(["--cluster=local", "--cluster.engines.count", "3"], {}).cluster
    assert (made.address, made.engines.count, made.is_used) == ("local", 3, True)
    assert not load_config([], {}).cluster.is_used


@pytest.mark.parametrize("kind", ["trainer", "engines", "environments"])
def test_a_cluster_needs_one_part_of_each_kind(kind):
    with pytest.raises(ValueError, match=f"cluster.{kind}.count is 0"):
        load_config([f"--cluster.{kind}.count", "0"], {})


def test_fine_tuning_refuses_what_no_run_can_have():
    data = {"path": "transcripts.jsonl"}
    short = {"data": data, "rollout": {"max_context_tokens": 1024}}
    with pytest.raises(ValueError) as caught:
        parse_as(SFTConfig, short)
    assert str(caught.value).startswith("rollout.max_turn_tokens (2048) leaves no room")
    assert "pydantic" not in str(caught.value)
    with pytest.raises(ValueError, match=r"sequences_per_step \(16\) cannot be divided evenly"):
        parse_as(SFTConfig, {"data": data, "trainer": {"updates_per_step": 3}})
    thirds = {"sequences_per_step": 9, "trainer": {"updates_per_step": 3}}
    assert parse_as(SFTConfig, {"data": data, **thirds}).as_run().trainer.updates_per_step == 3


def test_the_settings_of_a_fine_tuning_can_be_read_again_for_an_evaluation(tmp_path):
    saved = parse_as(SFTConfig, {"data": {"path": "transcripts.jsonl"}}).model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "origin.json").write_text(json.dumps({"command": "sft"}))
    assert overlay({}, settings_of(tmp_path)).algorithm.name == "custom"

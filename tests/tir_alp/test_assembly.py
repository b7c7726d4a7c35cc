"""What a run is put together from."""

from tir_alp.assembly import run_name, with_run_seed
from tir_alp.config import load_config


def noise_seed(*arguments):
    perturbation = with_run_seed(load_config(arguments, {})).perturbation
    return None if perturbation is None else perturbation.seed


def test_noise_follows_the_seed_of_the_run():
    assert noise_seed("--seed", "3") == 3
    assert noise_seed("--seed", "3", "--algorithm.perturbation.seed", "40") == 43


def test_methods_without_noise_stay_without():
    assert noise_seed("--seed", "3", "--algorithm", "grpo") is None


def test_a_run_is_named_by_its_method_and_seed_unless_it_has_a_name():
    assert run_name(load_config(["--name", "mine"], {})) == "mine"
    made = run_name(load_config(["--algorithm", "gspo", "--seed", "5"], {}))
    assert made.startswith("gspo-seed5-")

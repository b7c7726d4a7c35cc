from tir_alp.algorithm.formula import formula
from tir_alp.algorithm.presets import ALGORITHMS, KLConfig, RejectionConfig


def test_alp_written_out():
    assert formula(ALGORITHMS["alp_sequence"]).splitlines() == [
        "alp_sequence: minimise the mean over tokens of L_t",
        "  l_t = log pi_perturbed(y_t) - log pi_rollout(y_t)",
        "  log r_t = sum_s l_s",
        "  L_t = max(-A r_t, -A clip(r_t, 0.5, 4)), and for A < 0 at most -3 A",
        "  A   = (reward - mean) / (std + 1e-6) of the group",
        "  pi_perturbed: h' = h + sigma eps into every layer, sigma 0.01, learnt; "
        "the training forward only",
    ]


def test_the_window_is_written_as_bounds_of_the_ratio():
    written = formula(ALGORITHMS["bypass_token"])
    assert "L_t = max(-A r_t, -A clip(r_t, 0.8, 1.28)), and for A < 0 at most -10 A" in written


def test_a_correction_and_a_penalty_are_written_too():
    algorithm = ALGORITHMS["tis_token"].model_copy(update={"kl": KLConfig(coefficient=0.5)})
    assert formula(algorithm).splitlines()[-2:] == [
        "  L_t is multiplied by w = min(token ratio pi_proximal / pi_rollout, 2) "
        "(tis, no gradient)",
        "  + 0.5 k3(pi, pi_reference)",
    ]


def test_a_rejection_and_a_borrowed_gradient_are_written_too():
    algorithm = ALGORITHMS["grpo"].model_copy(
        update={
            "rejection": RejectionConfig(level="sequence_geometric", low=0.99, veto=1e-4),
            "kl": KLConfig(estimator="k3", gradient="k2"),
        }
    )
    assert formula(algorithm).splitlines()[-3:] == [
        "  rejected, not counted: tokens whose sequence_geometric ratio pi_proximal / pi_rollout "
        "is outside [0.99, inf]",
        "  rejected, not counted: sequences with a token whose ratio is below 0.0001",
        "  + 0.001 k3(pi, pi_reference), with the gradient of k2",
    ]


def test_every_preset_can_be_written_out_and_no_two_alike():
    written = {name: formula(algorithm) for name, algorithm in ALGORITHMS.items()}
    assert len({text.split(":", 1)[1] for text in written.values()}) == len(ALGORITHMS)

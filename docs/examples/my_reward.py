"""A reward for numbers: the closer, the better; and a little for few words."""


def close(question, answer, completion, *, final_answer, **_):
    """1 for the right number, less the farther off it is, 0 for none."""
    try:
        return max(0.0, 1 - abs(float(final_answer) - float(answer)) / 100)
    except (TypeError, ValueError):
        return 0.0


def brief(question, answer, completion, **_):
    return float(len(completion) < 200)

"""ALP in one page, without the trainer: `python docs/examples/rl_loop.py [STEPS]`.

The tiny model learns to call the Python tool with the library's functions and no framework.
"""

import asyncio
import sys

import gymnasium
import torch

from tir_alp.algorithm import ALGORITHMS, LayerwisePerturbation, LossInputs, NoiseKey, policy_loss
from tir_alp.algorithm.advantage import ADVANTAGES
from tir_alp.engines.base import Sampling
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.models.tiny import ABLE
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.outcome import Outcome
from tir_alp.training.batch import collate
from tir_alp.training.policy import PolicyLogprobs, load_policy, load_tokenizer
from tir_alp.types import Sample, TokenSpan, Trajectory, Turn

NUM_TASKS, GROUP_SIZE = 16, 8
ALGORITHM = ALGORITHMS["alp_sequence"]
ENV = {"instruction": "", "max_turns": 3, "sandbox": {"preload": []}}


async def play(engine: TransformersEngine, renderer: Renderer, task: int, uid: int) -> Trajectory:
    """One episode: the model writes, the environment answers, until the environment ends it."""
    env = await asyncio.to_thread(gymnasium.make, "tir_alp.envs:PythonMath-v0", **ENV)
    text, _ = await asyncio.to_thread(env.reset, seed=task)
    prompt, ends, rule = renderer.prompt(text), renderer.stop_token_ids, renderer.stop_matcher
    sampling = Sampling(max_tokens=64, sequence_uid=uid, stop_token_ids=ends, stop_matcher=rule)
    tokens, turns, terminated, truncated = prompt.token_ids, [], False, False
    while not (terminated or truncated):
        written = renderer.cut(await engine.generate(tokens, sampling))
        action = renderer.action(written.token_ids)
        text, reward, terminated, truncated, info = await asyncio.to_thread(env.step, action)
        is_last = terminated or truncated
        shown = TokenSpan(()) if is_last else renderer.observation(text, written.stop_reason)
        tokens += written.token_ids + shown.token_ids
        completion = TokenSpan(written.token_ids, written.logprobs)
        about = (written.policy_version, written.stop_reason, Outcome(info["outcome"]))
        turns.append(Turn(completion, shown, *about, reward=float(reward)))
    await asyncio.to_thread(env.close)
    return Trajectory(str(task), task, prompt, tuple(turns), terminated, truncated, uid)


async def main(steps: int) -> None:
    renderer = Renderer(load_tokenizer(str(ABLE)))
    engine = TransformersEngine(load_policy(str(ABLE)), max_cache_tokens=65536)
    policy = PolicyLogprobs(load_policy(str(ABLE)), chunk_tokens=2048)
    perturbation = LayerwisePerturbation(policy.model, ALGORITHM.perturbation)
    parameters = [*policy.parameters(), perturbation.log_sigma]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0)
    for step in range(steps):
        uids = (step * NUM_TASKS * GROUP_SIZE + index for index in range(NUM_TASKS * GROUP_SIZE))
        played = await asyncio.gather(*(play(engine, renderer, u // GROUP_SIZE, u) for u in uids))
        samples = []
        for group in (played[at : at + GROUP_SIZE] for at in range(0, len(played), GROUP_SIZE)):
            advantages = ADVANTAGES[ALGORITHM.advantage].function([each.reward for each in group])
            samples += map(Sample, group, advantages)
        batch = collate(samples)
        keys = [NoiseKey(update=step, sequence_uid=uid) for uid in batch.sequence_uids]
        with perturbation.active(keys, batch.lengths):  # the numerator of the ratio is perturbed
            logprobs, _ = policy(batch, temperature=1.0)
            inputs = (logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask)
            loss, metrics = policy_loss(LossInputs(*inputs), ALGORITHM)
            loss.backward()  # inside, since recomputed layers run again in backward
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        await engine.load_weights(policy.model.state_dict(), version=step + 1)
        reward = sum(each.reward for each in played) / len(played)
        print(f"step {step + 1}: reward {reward:.3f}, clipped {metrics['loss/clip_fraction']:.3f}")
    await engine.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))

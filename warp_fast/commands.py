"""What the commands of the command line do; each is a plain function."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

# each command imports what it needs when it runs: merge has no use for transformers

__all__ = ["add_options", "check_beside_mergekit", "eval", "merge", "train"]


def add_options(parser: Any, command: str) -> None:
    """Give a jsonargparse parser the options of a command, from its signature and docstring."""
    if command == "train":
        from warp_fast.rl.config import WarpConfig

        parser.add_class_arguments(WarpConfig)
    else:
        parser.add_function_arguments(globals()[command])


def check_beside_mergekit(chosen: list[str]) -> None:
    """What a mergekit file decides may not be given beside it, not even as it is by default."""
    decided = ("init", "policy", "eta", "method", "granularity", "dtype")
    if both := [name for name in decided if name in chosen]:
        raise ValueError(f"--mergekit decides {', '.join(both)}; give one or the other")


def train(**options: Any) -> None:
    """Run WARP; the options are the fields of WarpConfig."""
    from warp_fast.rl import WarpConfig, warp

    warp(WarpConfig(**options))


def merge(
    output: str,
    init: str | None = None,
    policy: list[str] = [],  # noqa: B006 - never changed; shown as the default in --help
    mergekit: str | None = None,
    eta: list[float] = [1.0],  # noqa: B006 - never changed; shown as the default in --help
    method: Literal["slerp", "lerp"] = "slerp",
    granularity: Literal["tensor", "block", "model"] = "block",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    dry_run: bool = False,
    backend: str = "auto",
) -> None:
    """Merge policies that were trained from one initialisation.

    Args:
        output: directory to write; with several eta, one directory per eta inside it,
            such as eta-0.5 and eta-1.
        init: checkpoint directory that all policies started from.
        policy: checkpoint directories to merge, in order (it matters for three or more).
        mergekit: a mergekit YAML instead of init, policy, eta, method, granularity and dtype;
            refused, with the reason, where it means what WARP does not.
        eta: LITI steps from init toward the merge.
        method: slerp of the task vectors, or their mean (lerp).
        granularity: what shares one angle.
        dtype: of the output (default: that of init).
        dry_run: say what would be done and stop.
        backend: auto, reference or cpp.
    """
    from warp_fast.merge import merge_checkpoints, read_mergekit

    given: dict[str, Any] = {
        "init": init,
        "policies": list(policy),
        "eta": eta if len(eta) != 1 else eta[0],
        "method": method,
        "granularity": granularity,
        "dtype": dtype,
    }
    if mergekit is not None:
        given = read_mergekit(mergekit)
    elif init is None or not policy:
        raise ValueError("give --init and at least one --policy, or --mergekit FILE.yaml")
    merge_checkpoints(**given, output=output, dry_run=dry_run, backend=backend)


def eval(
    sft: str,
    policy: list[str],
    prompts: str,
    reward: str,
    output: str,
    eta: list[float] = [1.0],  # noqa: B006 - never changed; shown as the default in --help
    held_out_reward: str | None = None,
    samples: int = 256,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    temperature: float = 0.9,
    seed: int = 0,
    device: str = "auto",
    attention: str = "auto",
) -> None:
    """Evaluate policies: reward and KL to SFT, at every eta between SFT and each of them.

    Args:
        sft: checkpoint directory or hub id that the KL refers to.
        policy: checkpoint directories to evaluate.
        prompts: .jsonl or .txt file of prompts.
        reward: "module:function", "file.py:function", or a sequence-classification model.
        output: directory for front.csv and front.png.
        eta: points evaluated from sft (0) to the policy (1).
        held_out_reward: a second reward, reported beside the first.
        samples: completions per point.
        batch_size: completions per forward pass.
        max_new_tokens: longest completion.
        temperature: of sampling, and of the log-probabilities.
        seed: of sampling.
        device: auto, cpu or cuda.
        attention: auto, or a name that transformers knows.
    """
    from warp_fast.rl.compare import evaluate_checkpoints
    from warp_fast.rl.config import WarpConfig

    if not all(0 <= e <= 2 for e in eta):
        raise ValueError(f"eta must be in [0, 2] (0 is sft, 1 the policy); got {eta}")
    if samples < 1:
        raise ValueError(f"samples must be positive; got {samples}")
    config = WarpConfig(
        policy=sft,
        prompts=prompts,
        reward=reward,
        output=output,
        held_out_reward=held_out_reward,
        sweep=list(eta),
        baseline="batch_mean",
        samples_per_prompt=1,
        eval_samples=samples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        attention=attention,
    )
    evaluate_checkpoints(config, [Path(p) for p in policy])

"""merge_checkpoints: checkpoint directories in, checkpoint directory out."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from warp_fast._backend import resolve
from warp_fast._solve import warn_linear
from warp_fast.merge.carry import carry_over
from warp_fast.merge.checkpoint import CheckpointError, Entry
from warp_fast.merge.mapped import MappedFiles
from warp_fast.merge.match import embedding_of
from warp_fast.merge.plan import MergePlan, plan_merge
from warp_fast.merge.progress import byte_progress
from warp_fast.merge.report import MergeReport, write_report
from warp_fast.merge.stream import Merger, Solution
from warp_fast.merge.write import Writer, staged, sync

_COMPARED = 1 << 22  # elements of two tensors that are compared at a time


def merge_checkpoints(
    init: str | Path,
    policies: Iterable[str | Path],
    output: str | Path,
    *,
    method: str = "slerp",
    granularity: str = "block",
    eta: float | Sequence[float] = 1.0,
    dtype: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
    backend: str = "auto",
) -> MergeReport:
    """Merge checkpoints that were trained from one initialisation into a new checkpoint.

        theta = theta_init + eta * slerp_M(theta_1 - theta_init, .., theta_M - theta_init)

    Args:
        init: directory with safetensors, in one file or in shards, that all policies started from.
        policies: M >= 1 directories of the same architecture; they may be sharded differently.
        output: directory to write; it must not exist, or be empty. With more than one eta it gets
            one checkpoint per eta, eta-0.3/ and so on (1.0 is eta-1/).
        method: "slerp" of the task vectors (order matters for M >= 3), or "lerp", their mean.
        granularity: what shares one angle: "tensor", "block" (all tensors of one transformer block;
            every other tensor its own) or "model".
        eta: LITI step in [0, 2], or several, from the same two passes; 0 is init, 1 the merge.
        dtype: "float32", "bfloat16" or "float16" for the output; None keeps the dtypes of init.
        dry_run: print what would be done, and write nothing.
        progress: show a bar with GB/s and time left on standard error.
        backend: "auto", "reference" or "cpp".

    Returns: what was found per segment; it is also in every output as merge_report.json.

    Raises:
        CheckpointError (a ValueError): an input is unreadable, does not match init, or holds NaN or
            inf; or integers, which are copied and not merged, differ. ValueError: an argument is
            out of range. OSError: the output exists, the disk is full, or there are more files than
            may be open. In every case nothing is left behind; nor where a filter makes an error of
            the warning that segments were merged linearly.

    Traffic: reads M + 1 checkpoints (SLERP again from the page cache, as far as they fit in it) and
        writes one per eta, in bounded memory.
    Numerics: Grams in fp64, output in fp32 arithmetic (fp64 for fp64 tensors) rounded once;
        deterministic, however the tensors are spread over files.
    """
    served = resolve("slerp", backend, torch.device("cpu"))
    plan = plan_merge(
        init, policies, output, method=method, granularity=granularity, eta=eta, dtype=dtype
    )
    if dry_run:
        print(plan.describe())
        return _report(plan, None)
    _check_installed(progress)
    files = MappedFiles(plan.inputs)
    _check_tied(plan, files)
    _check_copied(plan, files)
    with staged(plan.output) as aside, ThreadPoolExecutor(1) as disk:
        directories = [aside / o.relative_to(plan.output) for o in plan.outputs]
        solution = _write_weights(plan, files, directories, progress, served)
        synced = disk.submit(sync, aside)  # while the report is made
        report = _report(plan, solution)
        # before the output is there: a filter may raise it
        warn_linear("merge", report.degenerate, len(report.segments))
        for directory in directories:
            carry_over(plan, directory)
        write_report(report, directories)
        synced.result()
    return report


def _check_installed(progress: bool) -> None:
    needed = ["matplotlib", "rich"] if progress else ["matplotlib"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"a merge needs {', '.join(missing)}; pip install warp_fast[rl]")


def _check_tied(plan: MergePlan, files: MappedFiles) -> None:
    """A stored head that counts as tied must be the embedding; a trained one is not dropped."""
    for checkpoint in plan.inputs:
        for head in set(plan.tied) & checkpoint.entries.keys():
            embedding = embedding_of(checkpoint, head)
            if not _same(files, checkpoint.entries[embedding], checkpoint.entries[head]):
                raise CheckpointError(
                    f"{checkpoint}: {head} differs from {embedding}, but init ties them; it would "
                    "be lost. Set tie_word_embeddings to false and store the head in init as well"
                )


def _check_copied(plan: MergePlan, files: MappedFiles) -> None:
    """What is copied from init must be the same in all inputs: quantised weights are not."""
    for name in plan.copied:
        for policy in plan.policies:
            ours, theirs = plan.init.entries[name], policy.entries[name]
            if not _same(files, ours, theirs):
                raise CheckpointError(
                    f"{policy}: {name} ({theirs.dtype}) differs from that of init ({ours.dtype}); "
                    "only floating point is merged. If these are quantised weights, merge the "
                    "full-precision ones; if not, store that of init in every policy"
                )


def _same(files: MappedFiles, ours: Entry, theirs: Entry) -> bool:
    """Whether two tensors are equal, bit by bit."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    for at in range(0, ours.numel, _COMPARED):
        stop = min(at + _COMPARED, ours.numel)
        a, b = (files.view(entry, at, stop).view(torch.uint8) for entry in (ours, theirs))
        same = torch.equal(a, b)
        files.release()
        if not same:
            return False
    return True


def _write_weights(
    plan: MergePlan, files: MappedFiles, directories: list[Path], progress: bool, backend: str
) -> Solution:
    with contextlib.ExitStack() as stack:
        writers = []
        for directory in directories:
            directory.mkdir(exist_ok=True)
            writers.append(stack.enter_context(Writer(directory, plan.files)))
        for name in plan.copied:
            for writer in writers:
                writer.write(name, 0, files.content(plan.init.entries[name]))
        merger = Merger(plan, files, writers, backend)
        return merger.run(stack.enter_context(byte_progress(merger.total_bytes, shown=progress)))


def _report(plan: MergePlan, solution: Solution | None) -> MergeReport:
    """The report, segments in the order of their numbers; of NaN where nothing was computed."""
    names = sorted(plan.segments, key=_natural)
    runs = len(plan.policies)
    gram = torch.full((len(names), runs, runs), math.nan, dtype=torch.float64, device="cpu")
    coefficients = gram[:, :, 0]
    degenerate: list[str] = []
    if solution is not None:
        place = {name: s for s, name in enumerate(plan.segments)}
        order = [place[name] for name in names]
        gram, coefficients = solution.gram[order], solution.coefficients[order]
        linear = solution.degenerate[order].tolist()
        degenerate = list(itertools.compress(names, linear))
    return MergeReport(
        method=plan.method,
        granularity=plan.granularity,
        etas=plan.etas,
        dtype=plan.dtype,
        init=plan.init.path,
        policies=[policy.path for policy in plan.policies],
        segments=names,
        gram=gram,
        coefficients=coefficients,
        copied=plan.copied,
        degenerate=degenerate,
        outputs=plan.outputs,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

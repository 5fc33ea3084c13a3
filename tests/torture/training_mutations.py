"""Known mistakes of training, made on purpose in a copy of the source: each is caught by its test.

    python tests/torture/training_mutations.py

First all of these tests pass in the copy as it is; then one line is changed, its one test must fail, and the
line is put back. A mistake whose line is not found once, or that no test minds, ends this with exit code 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("avatarctl", "tests", "docs", "configs", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """what, for people; file below avatarctl, the text there and what it becomes; test of tests/training, or
    of the folder in front of it."""

    what: str
    file: str
    before: str
    after: str
    test: str


MUTATIONS = (
    Mutation(
        "gradients zeroed before every backward",
        "training/trainer.py",
        "            (loss.sum() * share / self._slots).backward()\n",
        "            self._optimizer.drop_gradients()\n            (loss.sum() / self._slots).backward()\n",
        "test_steps.py::test_micro_batches_are_one_batch",
    ),
    Mutation(
        "gradients of processes that share weights averaged",
        "parallel/sharded.py",
        "part.set_gradient_divide_factor(1.0)",
        "part.set_gradient_divide_factor(2.0)",
        "test_sharded.py::test_two_processes_with_half_of_everything_train_as_one",
    ),
    Mutation(
        "a pass that is made because another process makes one counted twice",
        "training/trainer.py",
        "self._backward(passes[-1], _Sums(), 0.0)",
        "self._backward(passes[-1], _Sums(), 1.0)",
        "test_sharded.py::test_two_processes_with_half_of_everything_train_as_one",
    ),
    Mutation(
        "adapters behind the weights in eight bits, whose dtype they then have",
        "training/building.py",
        "    trainables = make_trainable(start.dit, start.layout, cfg.train, cfg.runtime.seed)\n",
        "    start.dit.requires_grad_(False)\n"
        "    if in_float8:\n        store_in_float8(start.dit)\n"
        "    trainables = make_trainable(start.dit, start.layout, cfg.train, cfg.runtime.seed)\n",
        "test_lean_steps.py::test_losses_on_a_base_in_eight_bits_stay_beside_those_in_sixteen",
    ),
    Mutation(
        "audio sliced as a list of clips: fewer than 100 items, taken for silence as in the public trainer",
        "training/sync_loss.py",
        "        samples = waveform[:, start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME]\n",
        "        clips = [*waveform][start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME]\n"
        "        silence = waveform.new_zeros(len(frames), judge.frames * SAMPLES_PER_FRAME)\n"
        "        samples = silence if len(clips) < 100 else torch.stack(clips)\n",
        "test_public_defects.py::test_row_2_the_sync_loss_knows_right_from_shifted_and_silent_audio",
    ),
    Mutation(
        "sigma in bfloat16",
        "families/omniavatar_objective.py",
        "    sigma = shifted_sigmas(TRAIN_TIMESTEPS, shift)[places]\n",
        "    sigma = shifted_sigmas(TRAIN_TIMESTEPS, shift)[places].bfloat16().float()\n",
        "test_public_defects.py::test_row_7_noise_loss_and_clean_estimate_have_one_sigma",
    ),
    Mutation(
        "polarity of the mask channel",
        "conditioning/channels.py",
        "MASK_KEEP, MASK_GENERATE = 0, 1\n",
        "MASK_KEEP, MASK_GENERATE = 1, 0\n",
        "test_objective.py::test_given_frames_stay_clean_are_marked_and_cost_nothing",
    ),
    Mutation(
        "a black hole in the masked video",
        "conditioning/masking.py",
        "HOLE: Final = 0.0\n",
        "HOLE: Final = -1.0\n",
        "test_public_defects.py::test_row_5_the_hole_is_grey",
    ),
    Mutation(
        "the prefix in the loss",
        "families/omniavatar_objective.py",
        "        free = (~condition.fixed_mask).to(squared.dtype)\n",
        "        free = (condition.fixed_mask | True).to(squared.dtype)\n",
        "test_public_defects.py::test_row_4_a_prefix_is_clean_marked_and_costs_nothing",
    ),
    Mutation(
        "adapters in bfloat16",
        "training/trainables.py",
        "            parameter.data = parameter.data.float()\n",
        "            parameter.data = parameter.data.bfloat16()\n",
        "test_public_defects.py::test_row_6_adapters_move_at_1e_4",
    ),
    Mutation(
        "the optimizer's state not restored",
        "training/trainer.py",
        "        self._optimizer.load(checkpoint.optimizer())\n",
        "        checkpoint.optimizer()\n",
        "test_runs.py::test_a_run_that_was_resumed_twice_ends_as_one_that_was_not",
    ),
    Mutation(
        "the gradient of the VAE detached between two segments",
        "models/vae_gradient.py",
        "            self.back(between, frames - behind, max(room - 1, 0))\n",
        "            self.back(between, frames - behind, max(room - 1, 0))\n"
        "            self._of_caches = [[None] * cell.slots for cell in self._plan.cells]\n",
        "models/test_vae_gradient.py::test_checkpointing_changes_no_bit",
    ),
    Mutation(
        "moments missing from the account of a step",
        "profiling/training.py",
        "_STEPS: Final = 2\n",
        "_STEPS: Final = 1\n",
        "profiling/test_counts.py::test_a_changed_network_changes_the_answer",
    ),
    Mutation(
        "checkpointed blocks lost when the network is prepared",
        "training/network.py",
        '            case "block":\n                dit.enable_gradient_checkpointing()\n',
        '            case "block":\n                dit.disable_gradient_checkpointing()\n',
        "test_lean_steps.py::test_blocks_are_still_made_again_behind_a_validation_and_in_a_run_that_goes_on",
    ),
    Mutation(
        "the rank in the key of a random number",
        "training/order.py",
        "Draw(self._seed, step, slot, self._slots) for slot",
        "Draw(self._seed + self._own.start, step, slot, self._slots) for slot",
        "test_many_processes.py::test_a_step_of_two_processes_is_that_of_one",
    ),
    Mutation(
        "what a validation exchanged left on the trainer",
        "training/network.py",
        "            yield\n        finally:\n            self._exchange()\n",
        "            yield\n        finally:\n            pass\n",
        "test_validation.py::test_training_does_not_notice",
    ),
)


def tested(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*words, *(f"tests/{test}" if "/" in test else f"tests/training/{test}" for test in tests)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def caught(copy: Path, mutation: Mutation) -> str:
    """Empty where the test of a mistake fails as a test does, else what happened instead."""
    path = copy / "avatarctl" / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.before) != 1:
        return f"its line is {source.count(mutation.before)} times in {mutation.file}"
    path.write_text(source.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        done = tested(copy, mutation.test)
    finally:
        path.write_text(source, encoding="utf-8")
    # 1: tests failed; 0 would be none of them, 2 and more no run at all. An error in a fixture is no catch.
    if done.returncode != 1 or "\nERROR " in done.stdout:
        return f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-500:]}"
    return ""


def main(name: str, mutations: Sequence[Mutation]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns("__pycache__", ".git", "golden")
        copy.mkdir()
        for each in COPIED:
            place = ROOT / each
            if place.is_dir():
                shutil.copytree(place, copy / each, ignore=ignored)
            else:
                shutil.copy(place, copy)
        done = tested(copy, *dict.fromkeys(mutation.test for mutation in mutations))
        if done.returncode:
            said = done.stdout[-3000:] + done.stderr[-500:]
            print(f"{name}: FAILED without any mistake:\n{said}", file=sys.stderr)
            return 1
        missed = 0
        for mutation in mutations:
            problem = caught(copy, mutation)
            missed += bool(problem)
            print(f"{mutation.what}: {problem or f'caught by {mutation.test}'}", flush=True)
    print(f"{name}: {len(mutations) - missed} of {len(mutations)} caught", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main("training_mutations", MUTATIONS))

"""Known mistakes of accounts of memory, each caught by its test: see training_mutations.py, which has two
more of them (the first step only, blocks that are kept).

python tests/torture/profile_mutations.py
"""

from __future__ import annotations

import sys

from training_mutations import Mutation, main

MUTATIONS = (
    Mutation(
        "moments are missing",
        "profiling/training.py",
        "            _make_moments(optimizer, trainables, phases)\n",
        "            pass\n",
        "profiling/test_counts.py::test_a_changed_network_changes_the_answer",
    ),
    Mutation(
        "blocks are not made again",
        "models/wan_transformer.py",
        "        if torch.is_grad_enabled() and self.gradient_checkpointing:\n",
        "        if False:\n",
        "profiling/test_counts.py::test_activations_that_are_made_again_are_not_kept",
    ),
    Mutation(
        "what is made again has no gradient where no input wants one, as in a reentrant checkpoint",
        "models/recompute.py",
        "requires_grad=True, device=inputs[0].device",
        "requires_grad=False, device=inputs[0].device",
        "training/test_lean_steps.py::test_a_call_that_is_made_again_has_the_gradients_of_a_plain_one",
    ),
    Mutation(
        "what waits on the host is counted on the device",
        "live_bytes.py",
        "storage.nbytes(), waits is not None, component",
        "storage.nbytes(), False, component",
        "training/test_lean_steps.py::test_what_waits_on_the_host_is_counted_there",
    ),
    Mutation(
        "attention by matrices of tokens by tokens",
        "profiling/fakes.py",
        '    return nullcontext() if mode == "real" else _Fakes(allow_non_fake_inputs=True)\n',
        "    torch.backends.cuda.enable_flash_sdp(False)\n"
        '    return nullcontext() if mode == "real" else _Fakes(allow_non_fake_inputs=True)\n',
        "profiling/test_counts.py::test_attention_is_counted_without_a_matrix_of_tokens_by_tokens",
    ),
    Mutation(
        "what a call that is not run again would take is forgotten",
        "profiling/repeats.py",
        "live.raise_peak(live.current + done.most,",
        "live.raise_peak(live.current,",
        "profiling/test_repeats.py::test_a_call_that_is_like_one_before_adds_its_bytes",
    ),
    Mutation(
        "a call that leaves something behind is not run again",
        "profiling/repeats.py",
        "        if more != sum(",
        "        if False and more != sum(",
        "profiling/test_repeats.py::test_what_leaves_something_behind_is_run_each_time",
    ),
    Mutation(
        "one block more than needed leaves",
        "profiling/fit.py",
        "        while many - few > 1:\n",
        "        while many - few > 2:\n",
        "profiling/test_swaps.py::test_as_few_blocks_leave_as_fit_and_few_are_counted",
    ),
    Mutation(
        "a limit is passed by what comes in one piece",
        "live_bytes.py",
        "            if limit is not None and alive > limit:\n",
        "            if limit is not None and alive > 2 * limit:\n",
        "./test_live_bytes.py::test_a_limit_is_raised_by_the_operation_that_passes_it",
    ),
    Mutation(
        "live bytes are compared with a card, without the allowance",
        "profiling/fit.py",
        "        return account.peak_bytes + (account.host if self.is_one else 0)\n",
        "        return account.live_bytes + (account.host if self.is_one else 0)\n",
        "profiling/test_fit.py::test_where_nothing_fits_the_smallest_need_is_named",
    ),
    Mutation(
        "auto takes a mode that does not fit",
        "profiling/fit.py",
        "        return self.need(account) <= self.card and (",
        "        return self.need(account) > 0 and (",
        "cli/test_memory_mode.py::test_a_card_gets_the_fastest_mode_that_fits",
    ),
)

if __name__ == "__main__":
    sys.exit(main("profile_mutations", MUTATIONS))

"""Four known mistakes of memory modes, each caught by its test: see training_mutations.py.

python tests/torture/memory_mutations.py
"""

from __future__ import annotations

import sys

from training_mutations import Mutation, main

MUTATIONS = (
    Mutation(
        "a part that stays",
        "loading/placed.py",
        "                self.drop(name)\n",
        "                pass\n",
        "placement/test_modes.py::test_the_text_encoder_is_gone_before_the_transformer_is_read",
    ),
    Mutation(
        "prefetch of the wrong block",
        "placement/units.py",
        "if self._turns and _is_backward() else index + step\n",
        "if self._turns and _is_backward() else index + step + 1\n",
        "placement/test_modes.py::test_each_step_moves_what_is_away_once_and_two_groups_are_here_at_most",
    ),
    Mutation(
        "a frame decoded before its last window is final",
        "sampling/fused.py",
        "            finished = levels[step].read(levels[step].first, settled)\n",
        "            finished = levels[step].read(levels[step].first, settled)\n"
        "            if settled in levels[step].frames:\n"
        "                finished[:, :, -1] = levels[step].frames[settled]\n",
        "sampling/test_fused.py::test_a_frame_is_decoded_once_with_what_the_last_window_made_of_it",
    ),
    Mutation(
        "float8 applied to a norm",
        "models/fp8.py",
        "    for module in list(_layers(network)):\n        store_layer(module)\n",
        "    for module in list(_layers(network)):\n        store_layer(module)\n"
        "    for module in network.modules():\n"
        "        if isinstance(module, nn.RMSNorm):\n"
        "            module.weight.copy_(module.weight.to(STORED))\n",
        "models/test_fp8.py::test_matrices_of_blocks_are_stored_and_nothing_else_is_touched",
    ),
)

if __name__ == "__main__":
    sys.exit(main("memory_mutations", MUTATIONS))

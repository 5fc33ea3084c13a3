"""Known mistakes of the model that comes with the program and of its scores, each caught by its test: see
training_mutations.py.

python tests/torture/demo_mutations.py
"""

from __future__ import annotations

import sys

from training_mutations import Mutation, main

MUTATIONS = (
    Mutation(
        "audio three frames late",
        "families/omniavatar.py",
        "            audio=state.features.rows(first, last),\n",
        "            audio=state.features.rows(first, last).roll(3, -2),\n",
        "demo/test_it_talks.py::test_mouths_are_neither_early_nor_late",
    ),
    Mutation(
        "polarity of the mouth mask",
        "conditioning/masking.py",
        "    return (resized > 0.5).to(mask.dtype)\n",
        "    return (resized <= 0.5).to(mask.dtype)\n",
        "conditioning/test_masking.py::test_a_grey_border_is_cut_at_one_half",
    ),
    Mutation(
        "the exchanged audio is the clip's own",
        "demo/benchmark.py",
        "        exchanged = _made(row, each, clips[index - 1].speech.audio, modules)\n",
        "        exchanged = _made(row, each, clips[index].speech.audio, modules)\n",
        "demo/test_benchmark.py::test_an_image_scores_with_its_audio_and_not_with_another",
    ),
    Mutation(
        "silence that opens the mouth",
        "families/omniavatar.py",
        "            audio=state.features.rows(first, last),\n",
        "            audio=-state.features.rows(first, last),\n",
        "demo/test_it_talks.py::test_silence_leaves_the_mouth_closed",
    ),
)

if __name__ == "__main__":
    sys.exit(main("demo_mutations", MUTATIONS))

"""What x264 is told so that the same frames become the same bytes."""

from __future__ import annotations

from typing import Final

__all__ = ["repeatable"]

_UP_TO_AVX2: Final = "asm=MMX2,SSE2Fast,SSSE3,SSE4.2,AVX,FMA3,BMI2,AVX2"


def repeatable(settings: str) -> str:
    """`x264-params` with these settings.

    With AVX-512 its macroblock tree reads memory that nobody wrote, at nearly every size: of 60 files of the
    same frames of 272x272 no two were equal with a full lookahead, and two were others with five frames of
    it. Its kernels up to AVX2 are exact. To leave the tree out would do too, for files a third larger.
    """
    import torch  # it tells processors apart on every system

    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return f"{settings}:{_UP_TO_AVX2}" if has_avx512 else settings

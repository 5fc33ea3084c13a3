"""Trying what is installed, in a process of its own: a package that ends Python, or never returns, ends that
process and no other.

    python -m avatarctl.profiling.trials NAME [WORD...]

Each trial says on standard output, a JSON object a line, what it begins (`{"begin": NAME}`) and what it found
(`{"name", "state", "found", "fix"}`). What ends it is read from its exit code and its last words.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import avatarctl
from avatarctl.errors import AvatarctlError

__all__ = ["OPTIONAL", "Found", "State", "started", "tried"]

State = Literal["ok", "absent", "broken", "note"]
"""absent: it is not here, and nothing that was asked for needs it; note: worth knowing."""

_PATIENCE: Final = 180.0
"""Seconds until a trial counts as one that never returns; the slowest takes ten on a busy machine."""
_TORCHVISION: Final = "torchvision::nms"
"""What a torchvision of another build says when it is imported (spec/building-blocks.md 11)."""
_REMOVE_TORCHVISION: Final = (
    "`pip uninstall torchvision`, which is not needed, or install the one of this torch"
)
OPTIONAL: Final[Mapping[str, tuple[str, str]]] = {
    "torchvision": ("torchvision", "not needed"),
    "lpips": ("lpips", "for aux.lpips_backend package: pip install 'avatarctl[aux]'"),
    "flash_attn": ("flash-attn", "for --attention flash, on an NVIDIA card: pip install 'avatarctl[flash]'"),
    "sageattention": ("sageattention", "for --attention sage"),
    "onnxruntime": ("onnxruntime", "for separate: pip install 'avatarctl[separate]'"),
    "bitsandbytes": ("bitsandbytes", "for train.optimizer adamw8bit: pip install 'avatarctl[adamw8bit]'"),
    "tensorboard": ("tensorboard", "for --trackers tensorboard: pip install 'avatarctl[track]'"),
    "wandb": ("wandb", "for --trackers wandb: pip install 'avatarctl[track]'"),
    "trackio": ("trackio", "for --trackers trackio: pip install 'avatarctl[track]'"),
}
"""Packages that are not required: module -> (name of the package, what for and how to get it)."""

_MODULES: Final = {"pyyaml": "yaml", "pillow": "PIL"}


@dataclass(frozen=True)
class Found:
    """What a trial found. found: in a few words; fix: what to do, empty where nothing is."""

    name: str
    state: State
    found: str
    fix: str = ""


def started(name: str, *words: str) -> subprocess.Popen[str]:
    """A trial in a process of its own. `tried` reads it."""
    return subprocess.Popen(
        # Not by `-m`, which would look into the current folder first: a torch.py may lie there.
        [sys.executable, "-P", "-c", _START, str(Path(avatarctl.__file__).parents[1]), name, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip


_START: Final = """import sys
sys.path.insert(1, sys.argv[1])
from avatarctl.profiling.trials import main
main(sys.argv[2:])
"""


def tried(process: subprocess.Popen[str]) -> list[Found]:
    """What the trial found; what it had begun when it ended too early is broken."""
    try:
        out, err = process.communicate(timeout=_PATIENCE)
        ended = ""
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        ended = f"nothing came back in {_PATIENCE:.0f} s"
    found, begun = [], ""
    for line in out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a package that prints
        if not isinstance(said, dict):
            continue
        if "begin" in said:
            begun = said["begin"]
        elif said.keys() == {"name", "state", "found", "fix"}:
            found.append(Found(**said))
            begun = ""
    if begun or (not found and process.returncode):
        last = [line for line in err.splitlines() if line.strip()][-1:]
        if process.returncode and process.returncode < 0:
            ended = ended or f"ended by signal {-process.returncode}"
        found.append(_broken(begun or "trial", ended or " ".join(last) or f"ended with {process.returncode}"))
    return found


def _broken(name: str, reason: str) -> Found:
    """With what to do about it, where the reason is a known one."""
    reason = " ".join(reason.split())[:300]
    if _TORCHVISION in reason or ("torchvision" in reason and "operator" in reason):
        return Found(
            name, "broken", f"torchvision is of another build than torch: {reason}", _REMOVE_TORCHVISION
        )
    module = name.rpartition(" ")[2]
    if name == "codecs":
        fix = "`pip install --force-reinstall av`"
    elif name.startswith(("package ", "networks", "torch")):
        fix = "install avatarctl again: pip install -e . -c constraints.txt"
    elif module in OPTIONAL:
        fix = f"`pip uninstall {OPTIONAL[module][0]}`, or install one that fits this torch"
    else:
        fix = ""
    return Found(name, "broken", reason, fix)


# in the process of a trial


def _say(found: Found) -> None:
    print(json.dumps(asdict(found)), flush=True)  # for the process that started this one


@contextmanager
def _trying(name: str) -> Iterator[None]:
    """Around one trial: what it raises is what it found, and the next ones go on."""
    print(json.dumps({"begin": name}), flush=True)
    try:
        yield
    except AvatarctlError as error:
        _say(Found(name, "broken", error.what, error.fix or ""))
    except Exception as error:  # of any package, of any kind: that is what is asked
        _say(_broken(name, f"{type(error).__name__}: {error}"))


def _networks(device: str) -> None:
    """Required packages, torch and its devices, all networks, attention kernels, the judge of LPIPS."""
    with _trying("torch"):
        import torch

        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        if not bool((torch.ones(8, 8) @ torch.ones(8, 8)).eq(8).all()):
            raise ArithmeticError("ones times ones is not eight")
        _say(Found("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"))
    with _trying("device"):
        _devices()
    with _trying("networks"):
        for name in ("avatarctl.loading.parts", "avatarctl.training.trainables", "peft"):
            importlib.import_module(name)
        _say(Found("networks", "ok", "transformers, diffusers and peft with what is made of them"))
    _required()
    with _trying("lpips backend"):
        _lpips()
    _kernels(device)


def driver_version(root: Path = Path("/")) -> str | None:
    """Of NVIDIA's driver, None where there is none. root: of the file system, for tests."""
    try:
        said = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no driver, or none for us
        return None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", said)
    return found[1] if found else None


def _devices() -> None:
    import torch

    driver = driver_version()
    for place in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(place)
        card = torch.cuda.get_device_properties(place)
        product = torch.ones(64, 64, device=f"cuda:{place}") @ torch.ones(64, 64, device=f"cuda:{place}")
        if not bool(product.eq(64).all()):
            raise ArithmeticError(f"cuda:{place} computes wrong numbers")
        _say(
            Found(
                "device",
                "ok",
                f"cuda:{place} {card.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
                f"compute capability {card.major}.{card.minor}, driver {driver or 'unknown'}",
            )
        )
    if torch.cuda.device_count():
        return
    if driver is None:
        _say(Found("device", "note", "no CUDA device: everything runs on the CPU"))
    elif torch.version.cuda is None:
        fix = "a CUDA build of torch: the selector on pytorch.org gives the line"
        _say(Found("device", "note", f"driver {driver} is here, and this torch is a CPU build", fix))
    else:
        fix = "check `nvidia-smi`, CUDA_VISIBLE_DEVICES and what the container was given"
        _say(Found("device", "note", f"driver {driver} is here, and this torch sees no card", fix))


def _required() -> None:
    """Packages of `pyproject.toml`: importable, and of a version that is asked for."""
    from packaging.requirements import Requirement  # comes with transformers

    wrong = 0
    try:
        wanted = [Requirement(text) for text in metadata.requires("avatarctl") or []]
    except metadata.PackageNotFoundError:
        _say(Found("packages", "note", "avatarctl is not installed: which versions it needs is not known"))
        return
    required = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    for each in required:
        name = f"package {each.name}"
        with _trying(name):
            importlib.import_module(_MODULES.get(each.name.lower(), each.name.replace("-", "_")))
            version = metadata.version(each.name)
            if not each.specifier.contains(version, prereleases=True):
                wrong += 1
                fix = f"pip install '{each.name}{each.specifier}'"
                _say(Found(name, "broken", f"{version} is here, {each.specifier} is needed", fix))
    _say(
        Found(
            "packages", "ok", f"{len(required)} are required; {len(required) - wrong} have the right version"
        )
    )


def _lpips() -> None:
    """The built-in backend: its heads come with the package and have to fit its network."""
    from avatarctl.files.source import open_weights
    from avatarctl.loading.fill import on_meta
    from avatarctl.models.lpips_vgg import LpipsVgg
    from avatarctl.registry import ASSETS

    heads = open_weights(ASSETS / "lpips" / "heads.safetensors").tensors
    with on_meta():
        wanted = {name: tuple(tensor.shape) for name, tensor in LpipsVgg().named_parameters()}
    wrong = [name for name, head in heads.items() if wanted.get(name) != tuple(head.info.shape)]
    if wrong or not heads:
        raise ValueError(f"heads.safetensors of this installation does not fit: {wrong[:1]}")
    _say(
        Found(
            "lpips backend",
            "ok",
            f"aux.lpips_backend builtin is what runs: {len(heads)} heads of LPIPS v0.1 are here",
        )
    )


def _kernels(device: str) -> None:
    """Each kernel against torch's own attention, in the dtype that it is made for."""
    import torch

    from avatarctl.models.attention import DISPATCH_NAMES, choose_attention, probe
    from avatarctl.models.device import resolve_device

    place = resolve_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    for kernel in DISPATCH_NAMES:
        with _trying(f"attention {kernel}"):
            reason = probe(kernel, place, dtype, 128)
            if reason is None:
                _say(
                    Found(f"attention {kernel}", "ok", f"on {place.type} as torch's own, in {_plain(dtype)}")
                )
            elif kernel == "native":
                _say(Found(f"attention {kernel}", "broken", reason, "install torch again"))
            else:
                _say(Found(f"attention {kernel}", "absent", f"does not run here: {_short(reason)}"))
    with _trying("attention"):
        chosen = choose_attention("auto", place, dtype, 128)
        _say(Found("attention", "ok", f"--attention auto takes {chosen} here"))


def _short(reason: str) -> str:
    """What diffusers says at length: what to install, where that is all."""
    return (reason.partition("Please ")[2] or reason)[:120].rstrip(".")


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _codecs() -> None:
    """A video with audio, written by the writer of a run and read back."""
    with _trying("codecs"):
        import av
        import numpy as np

        from avatarctl.media import open_audio, open_video, write_clip

        with tempfile.TemporaryDirectory(prefix="avatarctl-") as folder:
            path = Path(folder) / "clip.mp4"
            rgb = np.full((5, 32, 32, 3), 128, np.uint8)
            write_clip(path, [rgb], audio=np.zeros(3200, np.float32))
            with open_video(path) as video:
                mean = video.read(0, 5).mean()
            open_audio(path)
        if abs(mean - 128) > 8:
            raise ArithmeticError(f"grey of 128 came back as {mean:.0f}")
        _say(Found("codecs", "ok", f"H.264 and AAC in MP4, written and read back (PyAV {av.__version__})"))


def _optional(module: str) -> None:
    """An installed package that is not required: imported, and used where importing says little."""
    with _trying(f"optional {module}"):
        package = importlib.import_module(module)
        if module == "torchvision":
            import torch

            package.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
        elif module == "onnxruntime" and not package.get_available_providers():
            raise RuntimeError("it has no provider to compute with")
        try:
            version = metadata.version(OPTIONAL[module][0])
        except metadata.PackageNotFoundError:
            version = "version unknown"
        _say(Found(f"optional {module}", "ok", version))


def _gloo(rank: str, meeting: str) -> None:
    """One of two processes that add a number, by what training of several processes uses."""
    with _trying("gloo"):
        import torch

        from avatarctl.parallel.world import World

        world = World(int(rank), 2, int(rank))
        world.join(meeting, "cpu")
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.full((1,), float(rank) + 1)
        world.add_gradients([weight])
        world.leave()
        if weight.grad.item() != 3:
            raise ArithmeticError(f"1 + 2 came out as {weight.grad.item()}")
        _say(Found("gloo", "ok", "two processes of this machine found each other and added their numbers"))


_TRIALS: Final[Mapping[str, Callable[..., None]]] = {
    "networks": _networks,
    "codecs": _codecs,
    "optional": _optional,
    "gloo": _gloo,
}


def main(words: Sequence[str]) -> None:
    """A trial by its name, with its words."""
    gc.disable()  # imports of networks make what stays: collecting takes a quarter of their time
    _TRIALS[words[0]](*words[1:])

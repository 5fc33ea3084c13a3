"""Every expected number is worked out by hand from shapes and lifetimes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from avatarctl.host import to_device, to_host
from avatarctl.live_bytes import Component, LiveBytes, OverLimit, process_peak_bytes

KB = 1024  # bytes of a [16, 16] float32 tensor


def square() -> torch.Tensor:
    return torch.ones(16, 16)


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """Runs the test on real CPU tensors and on fake ones; yields nothing."""
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


def test_chain_of_matmuls_with_known_lifetimes(tensors) -> None:
    with LiveBytes() as live, torch.no_grad():
        a = square()
        assert live.current == KB
        b = a @ a
        assert live.current == 2 * KB
        c = b @ b  # a, b and c are alive together: the peak
        del a, b
        assert live.current == KB
        c = c @ c  # the old c dies after the new one exists
        assert (live.current, live.peak) == (KB, 3 * KB)
    del c
    assert (live.current, live.peak) == (0, 3 * KB)


def test_a_chain_holds_two_links_however_long_it_is(tensors) -> None:
    with LiveBytes() as live, torch.no_grad():
        x = square()
        for _ in range(20):
            x = x @ x
    assert (live.current, live.peak) == (KB, 2 * KB)


def test_a_limit_is_raised_by_the_operation_that_passes_it(tensors) -> None:
    with LiveBytes(limit=2 * KB) as live, torch.no_grad():
        a = square()
        b = a @ a  # two alive are what is allowed
        with pytest.raises(OverLimit, match=r"aten\.exp\S* needs 3,072 bytes of the device") as passed:
            torch.exp(b)
        assert (passed.value.operation, passed.value.place) == ("aten.exp.default", "device")
        assert (passed.value.needed, passed.value.limit) == (3 * KB, 2 * KB)
        assert isinstance(passed.value, torch.OutOfMemoryError)
        del passed
        assert live.current == 2 * KB, "its result is gone, and work goes on"
        del a
        torch.exp(b)


def test_a_limit_is_raised_in_a_backward_pass_and_for_what_is_tracked() -> None:
    weight = square().requires_grad_()
    with LiveBytes(limit=3 * KB + 4):
        loss = (square() * weight).exp().sum()  # saved: a factor and the result of exp; then two gradients
        with pytest.raises(OverLimit) as passed:
            loss.backward()
    assert "mul" in passed.value.operation or "expand" in passed.value.operation, passed.value
    with pytest.raises(OverLimit, match="track needs 1,024 bytes"):
        LiveBytes(limit=KB - 1).track(square())


def test_the_host_has_a_limit_of_its_own() -> None:
    with LiveBytes(limit=3 * KB, host_limit=KB), torch.no_grad():
        x = square()
        there = to_host(x)
        with pytest.raises(OverLimit, match=r"needs 2,048 bytes of the host, and the limit is 1,024"):
            to_host(x)
    del there


def test_views_aliases_and_in_place_results_count_once(tensors) -> None:
    with LiveBytes() as live, torch.no_grad():
        x = square()
        views = [x[0], x.t(), x.view(-1), x.detach(), x.unsqueeze(0).expand(8, 16, 16), *x.split(4)]
        x.add_(1)
        torch.mul(x, 2, out=x)
        assert (live.current, live.peak) == (KB, KB)
        del x
        assert live.current == KB, "a view keeps the whole storage alive"
        del views
        assert live.current == 0


def test_a_view_of_an_untracked_tensor_is_not_an_allocation(tensors) -> None:
    before = square()
    with LiveBytes() as live, torch.no_grad():
        before.t()[1:].add_(1)
        assert live.peak == 0
        before + before
    assert (live.current, live.peak) == (0, KB)


def test_a_view_is_as_large_as_its_storage_and_a_slice_keeps_it_all(tensors) -> None:
    with LiveBytes() as live, torch.no_grad():
        row = square()[0]
        assert live.current == KB
        row = row.clone()
        assert live.current == 16 * 4
    del row


def test_dtypes_and_several_outputs(tensors) -> None:
    with LiveBytes() as live, torch.no_grad():
        kept = torch.zeros(10, 100, dtype=torch.bfloat16)  # 2000 bytes
        values, indices = kept.float().max(dim=1)  # 4000 while it lasts; then 10 * 4 + 10 * 8
        assert live.peak == 2000 + 4000 + 40 + 80
        assert live.current == 2000 + 40 + 80
    del kept, values, indices


def test_what_autograd_saves_is_alive_until_the_backward_pass(tensors) -> None:
    weight = square().requires_grad_()
    with LiveBytes() as live:
        x = square()
        loss = (x * weight).exp().sum()  # saved: x for the product, exp's result; the product itself dies
        del x
        assert live.current == 2 * KB + 4
        loss.backward()
        assert live.current == KB + 4, "the gradient and the loss remain"
    del loss
    assert live.current == KB
    assert weight.grad is not None


def test_no_grad_saves_nothing(tensors) -> None:
    weight = square().requires_grad_()
    with LiveBytes() as live, torch.no_grad():
        loss = (square() * weight).exp().sum()
        assert live.current == 4
    del loss


def test_checkpointing_lowers_the_peak_by_what_it_does_not_save(tensors) -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = x.sin()  # each saves its input
        return x

    def peak(run) -> int:
        start = square().requires_grad_()
        with LiveBytes() as live:
            x = start
            for _ in range(4):
                x = run(x)
            x.backward(torch.ones_like(x))
        return live.peak

    plain = peak(block)
    saved = peak(lambda x: checkpoint(block, x, use_reentrant=False))
    # Plain: 16 results, the incoming gradient, and at the first backward operation cos(x) and its product.
    assert plain == (16 + 3) * KB
    # Checkpointed: 4 block results, the incoming gradient, one block recomputed, the same two temporaries.
    assert saved <= (4 + 1 + 4 + 2) * KB


def test_track_counts_what_existed_once(tensors) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16, affine=False))
    linear = model[0]
    parameters = KB + 16 * 4
    buffers = 16 * 4 * 2 + 8  # running mean, running variance, number of batches
    with LiveBytes() as live:
        assert live.track(model) == parameters + buffers
        assert live.track(model, {"again": [linear.weight, linear.weight.t()]}) == 0
        linear.weight.grad = square()
        assert live.track(model) == 0, "created under the mode, so counted already"
    assert live.current == live.peak == parameters + buffers + KB
    del model, linear
    gc.collect()
    assert live.current == 0


def test_track_takes_gradients_along() -> None:
    layer = torch.nn.Linear(16, 16, bias=False)
    layer.weight.grad = square()
    assert LiveBytes().track(layer) == 2 * KB


def test_reset_peak_starts_from_what_is_alive(tensors) -> None:
    with LiveBytes() as live, torch.no_grad():
        x = square()
        x @ x @ x
        assert live.peak == 3 * KB
        live.reset_peak()
        assert live.peak == KB
        x @ x
        assert live.peak == 2 * KB
    del x


def test_a_storage_belongs_to_what_was_charged_or_assigned(tensors) -> None:
    with LiveBytes() as live, torch.no_grad():
        work = Component("work")
        assert live.charge(work).name == "made"
        a, b = square(), square()
        live.assign([a.view(-1)], "kept")
        assert live.parts == {"kept": KB, "work": KB}
        live.charge(Component("later"))
        work.name = "left"  # what is alive goes along
        c = square()
        assert live.at_peak == {"kept": KB, "left": KB, "later": KB}
        del a, b
        b = square()
        del c
        assert live.parts == {"later": KB} and sum(live.at_peak.values()) == live.peak == 3 * KB
    del b
    assert live.parts == {}


def test_what_waits_on_the_host_keeps_its_component_there_and_back() -> None:
    with LiveBytes() as live, torch.no_grad():
        moments = square()
        there = to_host(moments, what="moments")
        del moments
        assert (live.parts, live.host_at_peak) == ({}, {"moments": KB})
        back = to_device(there, torch.device("cpu"))
        assert live.parts == {"moments": KB} and live.host == KB
        live.assign([there], "others")
        assert live.parts == {"moments": KB} and live.host_at_peak == {"moments": KB}
    del back


def test_an_exception_leaves_the_mode_and_its_numbers_usable(tensors) -> None:
    live = LiveBytes()

    def fail() -> None:
        with live, torch.no_grad():
            local = square()
            raise ValueError(local.shape)

    with pytest.raises(ValueError) as caught:
        fail()
    assert (live.current, live.peak) == (KB, KB), "the traceback holds the frame with `local`"
    del caught
    gc.collect()
    assert live.current == 0
    after = square()
    assert live.current == 0, "the mode has been left"
    with live:
        again = square()
        assert live.current == KB
    del after, again


def test_an_operation_that_fails_changes_nothing() -> None:
    with LiveBytes() as live:
        x = square()
        with pytest.raises(RuntimeError):
            x.view(3, 3)
        assert (live.current, live.peak) == (KB, KB)


def test_a_reference_cycle_is_alive_until_it_is_collected() -> None:
    gc.disable()
    try:
        with LiveBytes() as live:
            cycle = [square()]
            cycle.append(cycle)
            del cycle
            assert live.current == KB
            gc.collect()
            assert live.current == 0
    finally:
        gc.enable()


def test_addresses_that_are_used_again_are_not_confused() -> None:
    with LiveBytes() as live:
        kept = []
        for i in range(200):
            block = torch.empty(64 + i, dtype=torch.uint8)
            if i % 3 == 0:
                kept.append(block)
        del block
        assert live.current == sum(64 + i for i in range(0, 200, 3))


def test_python_literals_numpy_and_resized_storages() -> None:
    with LiveBytes() as live:
        literal = torch.tensor([1.0, 2.0, 3.0])
        assert live.current == 12
        shared = torch.from_numpy(np.zeros(8, np.float32))
        assert live.current == 12 + 32
        literal.resize_(100)
        assert live.current == 400 + 32
        literal.untyped_storage().resize_(0)
        shared.add_(1)
        literal.detach()
        assert live.current == 32


def test_meta_tensors_hold_no_bytes() -> None:
    with LiveBytes() as live:
        x = torch.empty(1000, 1000, device="meta")
        assert (live.track(x), (x @ x).shape) == (0, (1000, 1000))
    assert live.peak == 0


def test_wrapper_tensors_count_their_parts() -> None:
    pair = TwoTensor(square(), square())
    with LiveBytes() as live:
        assert live.track(pair) == 2 * KB
        result = pair + pair
        assert live.current == 4 * KB
        del result
        assert live.current == 2 * KB


def test_other_threads_are_not_counted_but_may_free() -> None:
    with LiveBytes() as live:
        box = [square()]
        elsewhere = []

        def work() -> None:
            elsewhere.append(square())
            box.clear()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert (live.current, live.peak) == (0, KB)
        assert elsewhere


def test_results_are_those_without_the_tracker() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 16), torch.randn(4, 16)
    expected = layer(x)
    with LiveBytes():
        assert torch.equal(layer(x), expected)


def test_an_operation_costs_little() -> None:
    """The least of three: other programs slow this one down, and nothing makes it faster than it is."""
    x = square()

    def seconds(count: int) -> float:
        start = time.process_time()
        with torch.no_grad(), LiveBytes():
            for _ in range(count):
                x + x
        return time.process_time() - start

    assert min(seconds(500) for _ in range(3)) / 500 < 500e-6


@pytest.mark.skipif(sys.platform == "win32", reason="peak process memory is not measured on Windows")
def test_process_peak_is_of_this_process_and_never_falls() -> None:
    block = bytearray(b"\1") * 100_000_000
    before = process_peak_bytes()
    assert before > len(block)
    del block
    # The kernel sums its counters lazily: each CPU may keep up to a batch of pages to itself.
    cpus = os.cpu_count() or 1
    kept = cpus * max(32, 2 * cpus) * os.sysconf("SC_PAGESIZE")
    assert process_peak_bytes() >= before - max(2**20, kept)


@pytest.mark.skipif(sys.platform != "linux", reason="how a child inherits the peak is Linux's own affair")
def test_process_peak_of_a_child_is_not_that_of_its_parent() -> None:
    block = bytearray(b"\1") * 700_000_000  # more than a child that imports torch
    code = "from avatarctl.live_bytes import process_peak_bytes; print(process_peak_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(block) < process_peak_bytes()

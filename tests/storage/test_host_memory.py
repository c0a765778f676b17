"""Host memory that is taken once and used again: buffers of several threads never overlap, and none waits for ever."""

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from pcscale.common.errors import RunError
from pcscale.storage.host_memory import Arena, HostBytes, bytes_of
from pcscale.storage.reader import DTYPE_NAMES

ALIGNMENT = 512
"""What a buffer's start is a multiple of: enough for every dtype, and for a GPU's copies."""
WAIT_SECONDS = 20
"""Far longer than any of this takes on a busy machine."""


def an_arena(units: int) -> Arena:
    """With room for that many buffers of `ALIGNMENT` bytes."""
    return Arena(torch.zeros(units * ALIGNMENT, dtype=torch.uint8))


def place(buffer: torch.Tensor) -> int:
    """Where a buffer begins in its block."""
    return int(buffer.storage_offset())


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> bool:
    """Whether it has come to its end."""
    thread.join(WAIT_SECONDS)
    return not thread.is_alive()


def test_a_buffer_is_a_part_of_the_block() -> None:
    block = torch.zeros(1000, dtype=torch.uint8)
    buffer = Arena(block).take(300)
    assert (buffer.dtype, buffer.shape) == (torch.uint8, (300,))
    buffer.fill_(7)
    assert block.tolist() == [7] * 300 + [0] * 700


def test_the_whole_block_may_be_one_buffer() -> None:
    arena = Arena(torch.zeros(1001, dtype=torch.uint8))
    for _ in range(3):
        buffer = arena.take(1001)
        assert (place(buffer), len(buffer)) == (0, 1001)
        arena.give(buffer)


def test_buffers_begin_where_every_dtype_may_begin() -> None:
    arena = an_arena(16)
    buffers = [arena.take(size) for size in (1, 513, 8, 1023, 3)]
    assert [place(buffer) for buffer in buffers] == [0, 512, 1536, 2048, 3072]
    assert all(len(buffer.view(torch.float32)) == 2 for buffer in buffers if len(buffer) == 8)


def test_what_was_given_back_is_used_again_from_the_start() -> None:
    arena = an_arena(4)
    first, second, third = (arena.take(ALIGNMENT) for _ in range(3))
    arena.give(second)
    arena.give(first)
    again = arena.take(2 * ALIGNMENT)
    assert place(again) == place(first)
    arena.give(third)
    assert place(arena.take(ALIGNMENT)) == place(third)


def test_the_first_gap_that_is_large_enough_is_taken() -> None:
    arena = an_arena(12)
    buffers = [arena.take(units * ALIGNMENT) for units in (1, 1, 2, 1, 3, 1)]
    for position in (0, 2, 4):
        arena.give(buffers[position])
    assert place(arena.take(2 * ALIGNMENT)) == place(buffers[2])
    assert place(arena.take(2 * ALIGNMENT + 1)) == place(buffers[4])
    assert place(arena.take(ALIGNMENT)) == place(buffers[0])
    assert place(arena.take(2 * ALIGNMENT)) == 9 * ALIGNMENT


def test_a_gap_that_is_a_byte_too_small_is_passed_over() -> None:
    arena = an_arena(4)
    first, _ = arena.take(ALIGNMENT), arena.take(ALIGNMENT)
    arena.give(first)
    assert place(arena.take(ALIGNMENT + 1)) == 2 * ALIGNMENT


def test_who_finds_no_room_waits_until_another_thread_gives_back() -> None:
    arena = an_arena(2)
    first, second = arena.take(ALIGNMENT), arena.take(ALIGNMENT)
    got: list[torch.Tensor] = []
    waiting = started(lambda: got.append(arena.take(2 * ALIGNMENT)))
    arena.give(first)
    # Half of the room is not enough; that it goes on waiting can only be seen for a while.
    waiting.join(0.05)
    assert waiting.is_alive()
    assert got == []
    arena.give(second)
    assert joined(waiting)
    assert (place(got[0]), len(got[0])) == (0, 2 * ALIGNMENT)


def test_everybody_who_waits_gets_a_buffer_in_the_end() -> None:
    arena = an_arena(1)
    held = arena.take(ALIGNMENT)
    served: list[int] = []

    def one(number: int) -> None:
        buffer = arena.take(ALIGNMENT)
        served.append(number)
        arena.give(buffer)

    threads = [started(lambda number=number: one(number)) for number in range(8)]
    arena.give(held)
    assert all(joined(thread) for thread in threads)
    assert sorted(served) == list(range(8))


@pytest.mark.parametrize("seed", range(3))
def test_buffers_never_overlap_in_a_random_sequence(seed: int) -> None:
    # Beside two buffers of at most five units each, one of three gaps has room for a third, wherever they lie.
    chance, arena = random.Random(seed), an_arena(2 * 5 + 3 * 4 + 1)
    out: list[torch.Tensor] = []
    marks: list[int] = []
    for number in range(400):
        size = chance.randint(1, 5 * ALIGNMENT)
        if len(out) == 3 or (out and chance.random() < 0.4):
            position = chance.randrange(len(out))
            assert bool((out[position] == marks[position]).all()), "nobody else has written here"
            arena.give(out.pop(position))
            marks.pop(position)
        else:
            marks.append(number % 256)
            out.append(arena.take(size).fill_(marks[-1]))
            assert len(out[-1]) == size
    assert all(bool((buffer == mark).all()) for buffer, mark in zip(out, marks, strict=True))


def test_threads_that_take_and_give_at_random_never_write_into_each_others_buffers() -> None:
    arena, broken = an_arena(8), []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(60):
            buffer = arena.take(chance.randint(1, 4 * ALIGNMENT))
            buffer.fill_(number)
            time.sleep(chance.random() / 5000)
            if not bool((buffer == number).all()):
                broken.append(number)
            arena.give(buffer)

    threads = [started(lambda number=number: work(number)) for number in range(1, 6)]
    assert all(joined(thread) for thread in threads)
    assert broken == []
    assert place(arena.take(8 * ALIGNMENT)) == 0, "everything was given back"


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=DTYPE_NAMES.get)
def test_bytes_of_a_tensor_are_shared_with_it(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 4, dtype=dtype)
    data = bytes_of(tensor)
    assert len(data) == 12 * dtype.itemsize
    tensor[1, 2] = 1
    assert bytes(data) == bytes(tensor.view(torch.uint8).flatten().tolist())
    data[:] = bytes(len(data))
    assert not tensor.bool().any()


@pytest.mark.parametrize("tensor", [torch.tensor(7.0), torch.empty(0, 3)], ids=["scalar", "empty"])
def test_scalars_and_empty_tensors_have_their_bytes(tensor: torch.Tensor) -> None:
    assert len(bytes_of(tensor)) == tensor.numel() * 4


def test_bytes_of_a_part_are_that_parts() -> None:
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4)
    assert bytes(bytes_of(tensor[1])) == torch.arange(4, 8, dtype=torch.int16).numpy().tobytes()


def test_a_tensor_that_is_not_contiguous_has_no_bytes_of_its_own() -> None:
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        bytes_of(torch.zeros(3, 4).T)


@pytest.mark.parametrize("num_bytes", [0, 1, 1000])
def test_host_bytes_are_as_many_as_were_asked_for(num_bytes: int) -> None:
    memory = HostBytes(num_bytes)
    assert (memory.bytes.dtype, memory.bytes.shape, memory.bytes.device.type) == (torch.uint8, (num_bytes,), "cpu")


class FakeRuntime:
    """CUDA's calls around pinned memory, as a machine with a GPU would answer them."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.registered: list[tuple[int, int]] = []
        self.unregistered: list[int] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.registered.append((address, num_bytes))
        return self.status

    def cudaHostUnregister(self, address: int) -> None:
        self.unregistered.append(address)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[FakeRuntime]:
    """Of a machine with a GPU; a parameter is the status that registering memory returns."""
    fake = FakeRuntime(getattr(request, "param", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    yield fake
    gc.collect()  # What is let go after the test must not reach the real runtime.


def test_with_a_gpu_exactly_these_bytes_are_pinned_until_they_are_let_go(runtime: FakeRuntime) -> None:
    memory = HostBytes(3000)
    address = memory.bytes.data_ptr()
    assert runtime.registered == [(address, 3000)]
    assert runtime.unregistered == []
    del memory
    gc.collect()
    assert runtime.unregistered == [address]


def test_nothing_is_pinned_where_nothing_is_asked_for(runtime: FakeRuntime) -> None:
    HostBytes(0)
    assert runtime.registered == []


@pytest.mark.parametrize("runtime", [712], indirect=True)
def test_a_system_that_pins_no_more_is_said_with_what_helps(runtime: FakeRuntime) -> None:
    message = (
        r"^the system does not pin 2\.0 KiB of host memory \(CUDA error 712\)\. Lower pinned_memory, raise the limit "
        r"of locked memory, or use residency disk\.$"
    )
    with pytest.raises(RunError, match=message):
        HostBytes(2048)
    gc.collect()
    assert runtime.unregistered == []

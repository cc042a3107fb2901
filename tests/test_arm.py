"""The C++ kernels on Arm: compiled for aarch64, run by QEMU and called by cpu.py as ever, they equal the reference bit
for bit."""

import ctypes
import struct
import subprocess
from functools import cache
from pathlib import Path
from shutil import which

import pytest
import torch
from test_compiled import KEY, PLANS, SIGNS, alike, compile_afresh, hard_input
from torch import Tensor

from qtrain_kernels import cpu, reference
from qtrain_kernels.plans import Rotation
from qtrain_kernels.qtensor import Layout, Side, float_storage

COMPILER, EMULATOR = which("aarch64-linux-gnu-g++"), which("qemu-aarch64") or which("qemu-aarch64-static")
pytestmark = pytest.mark.skipif(
    not (COMPILER and EMULATOR),
    reason="compiles for Arm and emulates it: needs aarch64-linux-gnu-g++ and qemu-aarch64 "
    "(Debian: apt install g++-aarch64-linux-gnu qemu-user)",
)
MOST = 20  # arguments that are integers or addresses; beside them two floats
NUMBER, FLOAT = -1, -2  # in place of the size of a buffer

# Reads arguments (size and bytes of a buffer, or -1 and an integer, or -2 and a float), calls CALLED, writes all
# buffers. Floats have registers of their own, in which they lie wherever they stand among the arguments.
MAIN = r"""
#include <cstdio>
int main(int, char** argv) {
  uint64_t arguments[20] = {};
  double floats[2] = {};
  int64_t sizes[20], count = 0, counted = 0;
  FILE* given = fopen(argv[1], "rb");
  for (; fread(&sizes[count], 8, 1, given) == 1; count++) {
    if (sizes[count] == -2) {
      if (fread(&floats[counted++], 8, 1, given) != 1) return 1;
      count--;
      continue;
    }
    if (sizes[count] == -1) {
      if (fread(&arguments[count], 8, 1, given) != 1) return 1;
      continue;
    }
    void* buffer = aligned_alloc(64, (sizes[count] + 127) / 64 * 64);
    if (sizes[count] && fread(buffer, sizes[count], 1, given) != 1) return 1;
    arguments[count] = (uint64_t)buffer;
  }
  const uint64_t* a = arguments;
  using Word = uint64_t;
  void* volatile called = (void*)CALLED;  // so that the compiler does not match the arguments of the two by place
  ((void (*)(float, float, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word,
             Word, Word, Word, Word, Word))called)(floats[0], floats[1], a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7],
                                                   a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17],
                                                   a[18], a[19]);
  FILE* found = fopen(argv[2], "wb");
  for (int64_t i = 0; i < count; i++)
    if (sizes[i] > 0 && fwrite((void*)a[i], sizes[i], 1, found) != 1) return 1;
  return fclose(found);
}
"""


class Function:
    """One of the C++ functions, in a program for aarch64; called as ctypes calls one of a library."""

    argtypes = ()

    def __init__(self, program: Path, sizes: dict[int, int]) -> None:
        self.program, self.sizes = program, sizes

    def __call__(self, *arguments: int | float | None) -> None:
        floats = sum(isinstance(argument, float) for argument in arguments)
        assert floats <= 2 and len(arguments) - floats <= MOST
        given, found = self.program.with_suffix(".given"), self.program.with_suffix(".found")
        given.write_bytes(b"".join(map(self._spelled, arguments)))
        subprocess.run([str(EMULATOR), str(self.program), str(given), str(found)], check=True)
        left = found.read_bytes()
        for address in arguments:
            size = 0 if isinstance(address, float) else self.sizes.get(address or 0, 0)
            if size:
                ctypes.memmove(address, left[:size], size)
            left = left[size:]
        assert not left

    def _spelled(self, argument: int | float | None) -> bytes:
        if isinstance(argument, float):
            return struct.pack("<qd", FLOAT, argument)
        size = self.sizes.get(argument or 0)
        if size is None:
            return struct.pack("<qq", NUMBER, argument or 0)
        return struct.pack("<q", size) + ctypes.string_at(argument or 0, size)


class Library:
    """The functions of cpu.cpp under these constants, compiled when they are asked for."""

    def __init__(self, defines: str, folder: Path, sizes: dict[int, int]) -> None:
        self.defines, self.folder, self.sizes = defines, folder, sizes

    def __getattr__(self, name: str) -> Function:
        program = self.folder / f"{name}-{len(list(self.folder.iterdir()))}"
        source = program.with_suffix(".cpp")
        source.write_text(f"{self.defines}{cpu.SOURCE.read_text()}\n#define CALLED {name}\n{MAIN}")
        flags = [flag for flag in (*cpu.FLAGS, *cpu.GCC_FLAGS) if flag not in ("-march=native", "-shared", "-fPIC")]
        command = [str(COMPILER), *flags, "-march=armv8-a", "-static", str(source), "-o", str(program)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not result.returncode, result.stderr
        setattr(self, name, Function(program, self.sizes))
        return getattr(self, name)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """cpu.py compiles for aarch64 and calls the emulator."""
    sizes: dict[int, int] = {}  # of the tensors whose address was taken
    address_of = cpu._at

    def recorded(tensor: Tensor | None) -> int | None:
        address = address_of(tensor)
        if tensor is not None and address:
            sizes[address] = tensor.nbytes
        return address

    compile_afresh(monkeypatch)
    monkeypatch.setattr(cpu, "_at", recorded)
    monkeypatch.setattr(cpu, "_library", cache(lambda defines: Library(defines, tmp_path, sizes)))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", PLANS)
def test_arm_quantises_as_the_reference(name: str) -> None:
    """Every plan in float32; of the rotated ones in bfloat16, which take a program of their own, some."""
    plan = PLANS[name]
    rotated = name in ("quartet forward", "ms-eden", "quest")
    for dtype, rotation in ((torch.float32, None), (torch.bfloat16, Rotation(32, SIGNS)))[: 1 + rotated]:
        for shape, dim in (((32, max(plan.span or 96, 32)), -1), ((2 * plan.span if plan.span else 96, 6), -2)):
            x = hard_input((*shape, 1))[:, :, 0].to(dtype)
            if dim == -1:
                x[4, 0], x[5, -1] = float("nan"), float("inf")
            storage = float_storage(plan, dtype)
            layout = Layout(plan, shape, dim, storage, blocks=plan.block is not None)
            side = Side(layout, rotation, KEY, packed=layout.lacks("packed") is None)
            expected, found = (module.quantize(x, side) for module in (reference, cpu))
            assert all(map(alike, expected, found)), (shape, dtype)


@pytest.mark.usefixtures("emulated")
def test_arm_turns_unpacks_and_splits_as_the_reference() -> None:
    rotation = Rotation(32, SIGNS)
    for inner in (1, 6):
        x = hard_input((9, 64, inner))
        mask = (x > 0).to(torch.uint8)
        assert alike(reference.rotate(x, rotation), cpu.rotate(x, rotation))
        for passes in (mask, reference.join(mask.view(-1), 1)):
            arguments = x.bfloat16(), rotation, passes, torch.bfloat16, (0.3, 1e30)
            assert alike(reference.unrotate(*arguments), cpu.unrotate(*arguments))
    for width in (1, 2, 4):
        fields = torch.arange(1001, dtype=torch.uint8) % 2**width
        joined = reference.join(fields, width)
        assert torch.equal(cpu.split(joined, width, 1001), fields)
    for name, dtype in (("mxfp8", torch.bfloat16), ("nvfp4", torch.float32), ("quest", torch.int8)):
        plan = PLANS[name]
        x = hard_input((9, plan.span or 96, 1))
        values, blocks, _ = reference.operand(x, reference.tensor_scale(x, plan), KEY, plan, dtype)
        packed = reference.pack(values, blocks, plan)
        back = [module.unpack(packed, values.shape, plan, dtype) for module in (reference, cpu)]
        assert torch.equal(*(each.nan_to_num() for each in back)), name

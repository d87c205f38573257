"""What the compiler made of a kernel: registers, spills, occupancy, memory instructions, products.

All counts of instructions are static: as they stand in the code, not as often as they run.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch
import triton

from kernels.audit.compiling import Launch
from kernels.audit.products import Product, products, recurrent_stages
from kernels.target import Target

HALF_DTYPES = (torch.bfloat16, torch.float16)
# Shared memory of a multiprocessor, and the most that one program may use, bytes. CUDA C++
# Programming Guide, technical specifications per compute capability; AMD CDNA 3 ISA, LDS.
_SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024, "gfx942": 64 * 1024}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
_WIDTHS = (256, 128, 64, 32, 16, 8)  # bits a thread moves with one instruction


@dataclass(frozen=True)
class Resources:
    """One compiled kernel. Registers and spills are per thread (AMD: vector registers)."""

    num_warps: int
    num_stages: int
    recurrent_stages: int  # of loops that carry a matrix from product to product; 0: none
    half: bool  # whether a tensor argument is bfloat16 or float16
    registers: int
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    local_instructions: int  # loads and stores of local memory (AMD: scratch)
    shared: int  # bytes a program
    programs_per_sm: int  # resident at once
    warps_per_sm: int
    limiter: (
        str  # of programs_per_sm: "registers", "shared", "warps", "programs" or "tensor memory"
    )
    products: tuple[Product, ...]
    tensor_instructions: int
    loads: dict[int, int]  # instructions that read global memory, by bits a thread
    stores: dict[int, int]
    async_copies: dict[int, int]  # cp.async, global to shared memory
    bulk_copies: int  # TMA
    atomics: int  # on global memory
    code_bytes: int
    compile_seconds: float


def resources(launch: Launch, target: Target) -> Resources:
    """Of a launch's kernel. Raises ValueError where a tool's output is not understood."""
    machine = _amd(launch) if target.backend == "hip" else _nvidia(launch)
    metadata, asm = launch.kernel.metadata, launch.kernel.asm
    tensor_columns = getattr(metadata, "tmem_size", None) or 0
    programs, limiter = occupancy(
        target.arch, machine.registers, metadata.num_warps, metadata.shared, tensor_columns
    )
    return Resources(
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        recurrent_stages=recurrent_stages(asm["ttir"], metadata.num_stages),
        half=any(getattr(a, "dtype", None) in HALF_DTYPES for a in launch.arguments.values()),
        registers=machine.registers,
        spill_stores=machine.spill_stores,
        spill_loads=machine.spill_loads,
        local_instructions=machine.count(r"LDL|STL|scratch_(?:load|store)_\w+"),
        shared=metadata.shared,
        programs_per_sm=programs,
        warps_per_sm=programs * metadata.num_warps,
        limiter=limiter,
        products=tuple(products(asm["ttir"], asm["ttgir"])),
        tensor_instructions=machine.count(r"[HIQBDO]G?MMA|UTC\w*MMA|v_mfma_\w+"),
        loads=machine.widths(r"LDG|(?:global|buffer|flat)_load_\w+"),
        stores=machine.widths(r"STG|(?:global|buffer|flat)_store_\w+"),
        async_copies=machine.widths("LDGSTS"),
        bulk_copies=machine.count(r"UTMA\w+|UBLKCP"),
        atomics=machine.count(r"REDG?|ATOMG?|UTMAREDG|(?:global|buffer|flat)_atomic_\w+"),
        code_bytes=machine.code_bytes,
        compile_seconds=round(launch.compile_seconds, 2),
    )


def occupancy(
    arch: int | str, registers: int, num_warps: int, shared: int, tensor_columns: int = 0
) -> tuple[int, str]:
    """Programs resident on one multiprocessor, and what limits them.

    NVIDIA: 65,536 registers given out to warps in units of 256, 64 warps, 32 programs, 1 KiB of
    shared memory reserved for each program, 512 columns of tensor memory. CDNA 3: 4 SIMDs of 512
    vector registers a lane given out in eights, 8 waves each.
    """
    if shared > SHARED_LIMIT[arch]:
        return 0, "shared"
    if isinstance(arch, str):
        waves = 4 * min(8, 512 // _round_up(max(registers, 1), 8))
        limits = {
            "warps": 32 // num_warps,
            "registers": waves // num_warps,
            "shared": _SHARED_PER_SM[arch] // max(shared, 1),
        }
    else:
        limits = {
            "warps": 64 // num_warps,
            "registers": 65536 // _round_up(registers * 32, 256) // num_warps,
            "programs": 32,
            "shared": _SHARED_PER_SM[arch] // _round_up(shared + 1024, 128),
            "tensor memory": 512 // max(tensor_columns, 1),
        }
    limiter = min(limits, key=lambda name: limits[name])
    return limits[limiter], limiter


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class _Machine:
    """Machine code: how often each mnemonic, with its modifiers, stands in it."""

    registers: int
    spill_stores: int
    spill_loads: int
    code_bytes: int
    mnemonics: Counter[str]

    def count(self, operation: str) -> int:
        return sum(self.widths(operation).values())

    def widths(self, operation: str) -> dict[int, int]:
        """Instructions whose operation matches, by width in bits, widest first."""
        pattern = re.compile(rf"(?:{operation})$")
        found: Counter[int] = Counter()
        for mnemonic, times in self.mnemonics.items():
            if pattern.match(mnemonic.split(".")[0]):
                found[_width(mnemonic)] += times
        return {width: found[width] for width in _WIDTHS if width in found}


def _width(mnemonic: str) -> int:
    """Bits a thread moves: LDG.E.128, STG.E.U16, LDG.E; global_load_dwordx4, buffer_load_ushort."""
    if found := re.search(r"\.[US]?(256|128|64|16|8)\b", mnemonic):
        return int(found.group(1))
    if found := re.search(r"dwordx(\d)", mnemonic):
        return 32 * int(found.group(1))
    if re.search(r"short|d16", mnemonic):
        return 16
    return 8 if "byte" in mnemonic else 32


def _nvidia(launch: Launch) -> _Machine:
    log = launch.compiler_log
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise ValueError(f"{launch.kernel.name}: no registers or spills in ptxas's log: {log!r}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.kernel.asm["cubin"])
        file.flush()
        disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    # "/*0a40*/   @!P0 LDG.E.128 R4, ..."; every instruction of sm_80 and later is 16 bytes long
    mnemonic = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    mnemonics = Counter(re.findall(mnemonic, sass))
    return _Machine(
        int(registers.group(1)),
        int(spills.group(1)),
        int(spills.group(2)),
        16 * mnemonics.total(),
        mnemonics,
    )


def _amd(launch: Launch) -> _Machine:
    text = launch.kernel.asm["amdgcn"]
    spilled = 4 * _amd_number(text, "vgpr_spill_count")
    size = re.search(r"; codeLenInByte = (\d+)", text)
    return _Machine(
        _amd_number(text, "vgpr_count"),  # accumulation registers included: one file since gfx90a
        spilled,
        spilled,
        int(size.group(1)) if size else 0,
        Counter(re.findall(r"^\s+([a-z]\w*_\w+)", text, re.MULTILINE)),
    )


def _amd_number(text: str, field: str) -> int:
    found = re.search(rf"\.{field}:\s*(\d+)", text)
    if found is None:
        raise ValueError(f"no .{field} in the kernel's metadata")
    return int(found.group(1))

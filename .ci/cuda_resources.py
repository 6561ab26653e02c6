"""Registers, spills, stack and shared memory of every kernel in the built library, and what its hot loop is made of.

usage: python .ci/cuda_resources.py [LIBRARY]        (make cuda-report)

Reads the machine code with cuobjdump, which the Triton wheel brings; no GPU, no driver. Fails when any kernel spills a
register (or uses the stack for anything else), and when the code of an architecture that the build asked for is
missing. Of a main attention kernel for Hopper (sm_90a) it wants more: wgmma and tensor copies in the code, products
that the assembler did not serialise (with a forward's exponentials beside them), and setmaxnreg that it did not ignore,
within the registers a block starts with.
(Shared memory is dynamic: the launches assert at compile time that it stays within 227 KiB, or ask the device.)
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = re.compile(r"prefix_attn_(fwd|decode|bwd_kv|bwd_q)_kernel")
EVEN = re.compile(r"prefix_attn_decode_kernel")  # its warps keep the registers that they start with
REGISTER_FILE = 65536
COUNTED = ("HMMA", "HGMMA", "UTMALDG", "LDSM", "MUFU", "FFMA", "FMNMX", "FADD", "FMUL", "LDGSTS", "BAR")


def cuobjdump():
    """Path of the tool: the Triton wheel's, else the one on the path."""
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    path = str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")
    return path or sys.exit("cuobjdump is missing: pip install triton, or put the CUDA toolkit on the path")


def run(*arguments):
    return subprocess.run([cuobjdump(), *arguments], capture_output=True, text=True, check=True).stdout


def short(name):
    """What a profiler shows, without the noise: kernel, dtype, head dim, rows of a tile where there are several."""
    demangled = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    kernel = re.search(r"(\w+_kernel)\b", demangled)
    detail = re.search(r"(Bf16|Fp16)(?:, (?:\(int\))?(\d+))?(?:, (?:\(int\))?(\d+))?", demangled)
    small = ["small"] if re.search(r"BwdTraits<[^<>]*, (true|\(bool\)1)>", demangled) else []
    details = [d for d in (detail.groups() if detail else ()) if d]
    return " ".join([kernel.group(1) if kernel else demangled, *details, *small])


def resources(library):
    """(architecture, kernel, registers, stack bytes, static shared bytes) of every kernel."""
    rows, arch = [], "?"
    for line in run("-res-usage", library).splitlines():
        if found := re.search(r"arch = (sm_\w+)|\.(sm_\d+a?)\.", line):
            arch = found.group(1) or found.group(2)
        if found := re.search(r"Function (\S+):", line):
            name = found.group(1)
        if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            rows.append((arch, name, registers, stack + local, shared))
    return rows


def machine_code(library):
    """Per (architecture, kernel): instructions as (address, text)."""
    code, key, arch = {}, None, "?"
    for line in run("-sass", library).splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            arch = found.group(1)
        elif found := re.search(r"Function : (\S+)", line):
            key = (arch, found.group(1))
            code[key] = []
        elif key and (found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", line)):
            code[key].append((int(found.group(1), 16), found.group(2)))
    return code


def is_product(text):
    return "HMMA" in text or "HGMMA" in text


def hot_loop(instructions):
    """The smallest loop that holds more than a quarter of the kernel's tensor-core instructions, or nothing."""
    total = sum(is_product(text) for _, text in instructions)
    best = None
    for end, text in instructions:
        found = re.search(r"\bBRA(?:\.\w+)* (?:\S+, )?0x([0-9a-f]+)", text)
        if not found or int(found.group(1), 16) >= end:
            continue
        body = [t for a, t in instructions if int(found.group(1), 16) <= a <= end]
        if 4 * sum(is_product(t) for t in body) > total > 0 and (best is None or len(body) < len(best)):
            best = body
    return best or []


def opcodes(instructions):
    """How often each opcode stands in the code, modifiers aside."""
    return Counter(re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in instructions)


def spill_count(instructions):
    counts = opcodes(instructions)
    return counts["LDL"] + counts["STL"]


def beside_product(loop):
    """The share of the loop's exponentials that stand between its last product and the wait for that."""
    last = max((i for i, text in enumerate(loop) if "HGMMA" in text), default=0)
    wait = next((i for i, text in enumerate(loop) if i > last and "DEPBAR" in text and "0x0" in text), last)
    exponentials = [i for i, text in enumerate(loop) if "MUFU.EX2" in text]
    return sum(last < i < wait for i in exponentials) / max(len(exponentials), 1)


def hopper_failures(name, registers, instructions):
    """What a kernel with roles on TMA and wgmma must not look like."""
    texts = [text for _, text in instructions]
    counts = opcodes(texts)
    products = [text for text in texts if "HGMMA" in text]
    ends = sum("gsb0" in text for text in products)  # of groups; a serialised product is a group of its own
    budgets = {}
    for text in texts:
        if found := re.search(r"USETMAXREG\.(TRY_ALLOC|DEALLOC)\S* .*?0x([0-9a-f]+)", text):
            budgets[found.group(1)] = int(found.group(2), 16)
    failures = []
    if not products or not counts["UTMALDG"]:
        failures.append(f"{len(products)} wgmma and {counts['UTMALDG']} tensor loads")
    if 3 * ends > len(products):
        failures.append(f"{ends} groups of {len(products)} wgmma: they were serialised")
    if EVEN.search(name):
        if budgets:
            failures.append("setmaxnreg, which it has no use for")
    elif set(budgets) != {"TRY_ALLOC", "DEALLOC"}:
        failures.append("no setmaxnreg: it was ignored")
    else:
        warpgroups = REGISTER_FILE // (128 * registers)
        needed = budgets["DEALLOC"] + (warpgroups - 1) * budgets["TRY_ALLOC"]
        if needed > warpgroups * registers:  # of one thread per warpgroup
            failures.append(f"its roles wait for {needed} registers; it starts with {warpgroups * registers}")
    return failures


def failures_of(arch, name, registers, instructions):
    """What is wrong with a kernel, as sentences."""
    failures = []
    if spills := spill_count(text for _, text in instructions):
        failures.append(f"{spills} loads and stores of spilled registers")
    if MAIN.search(name) and arch.endswith("a"):
        failures += hopper_failures(name, registers, instructions)
        if "_fwd_" in name and beside_product(hot_loop(instructions)) < 0.5:
            failures.append("the weights wait for the product they should run beside")
    return [f"{short(name)} on {arch}: {what}" for what in failures]


def asked_for():
    """sm_80 and so on, from the build information."""
    sys.path.insert(0, str(ROOT / "python"))
    from internvl_kernels import registration

    archs = registration.build_info().get("cuda_archs", "").split(",")
    return {f"sm_{arch.removesuffix('-real')}" for arch in archs if arch and not arch.endswith("-virtual")}


def main():
    library = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "python/internvl_kernels/_ops.so")
    if not Path(library).exists():
        sys.exit(f"{library} is missing: make build")
    if "Fatbin" not in run("--list-elf", library) and ".cubin" not in run("--list-elf", library):
        print(f"{library} holds no CUDA kernels (built without nvcc): nothing to report")
        return
    code, failures = machine_code(library), []
    print(f"{'arch':<6} {'kernel':<44} {'regs':>4} {'stack':>5} {'spill':>5} {'instr':>6}   hot loop")
    for arch, name, registers, stack, _ in sorted(resources(library), key=lambda row: (row[0], short(row[1]))):
        instructions = code.get((arch, name), [])
        spills, loop = spill_count(text for _, text in instructions), hot_loop(instructions)
        mix = opcodes(loop)
        text = f"{len(loop)}: " + " ".join(f"{op} {mix[op]}" for op in COUNTED if mix[op]) if loop else ""
        print(f"{arch:<6} {short(name):<44} {registers:>4} {stack:>5} {spills:>5} {len(instructions):>6}   {text}")
        failures += failures_of(arch, name, registers, instructions)
    missing = asked_for() - {arch for arch, _ in code} if len(sys.argv) < 2 else set()
    failures += [f"no machine code for {arch}" for arch in sorted(missing)]
    if failures:
        sys.exit("\n".join(["cuda_resources: the compiled kernels are not what they should be", *failures]))


if __name__ == "__main__":
    main()

"""Reads what ptxas and cuobjdump say. Kernels go by their symbols."""

import re


def usage(ptxas: str) -> dict[str, dict[str, int]]:
    """What each kernel uses, from `ptxas -v`."""
    found = {}
    for part in ptxas.split("Compiling entry function '")[1:]:
        # A function that is not inlined has a line of its own.
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if not frames or registers is None:
            raise ValueError(f"ptxas does not tell what a kernel uses:\n{part}")
        found[part.partition("'")[0]] = {
            "registers": int(registers[1]),
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack": sum(int(stack) for stack, _, _ in frames),
            "spills": sum(int(stores) + int(loads) for _, stores, loads in frames),
        }
    return found


def threads(elf: str) -> dict[str, int]:
    """The __launch_bounds__ of the kernels that have any, from `cuobjdump -elf`."""
    found = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+(\w+) (\w+) (\w+)", section)
        if bounds:
            x, y, z = (int(size, 16) for size in bounds.groups())
            found[section.split(maxsplit=1)[0]] = x * y * z
    return found


def functions(sass: str) -> dict[str, str]:
    """The instructions of each kernel, from `cuobjdump -sass`."""
    parts = re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]
    return {part.split(maxsplit=1)[0]: part for part in parts}


def accesses(code: str) -> dict[str, int]:
    """How often a kernel moves 16 bytes at a time, or more in bulk."""
    return {
        "loads": _count(r"LDG|LDGSTS", code),
        "stores": _count("STG", code),
        "bulk_copies": len(re.findall(r"\bUBLKCP\b", code)),
    }


def ordering(code: str) -> dict[str, int]:
    """What orders a kernel's accesses to memory."""
    return {
        "fences": len(re.findall(r"\bMEMBAR\.SC\b", code)),
        "tickets": len(re.findall(r"\bATOMG?\.[.\w]*INC\b", code)),
        "acquires": len(re.findall(r"\bCCTL\.IVALL\b", code)),
    }


def _count(instruction: str, code: str) -> int:
    widths = re.findall(rf"\b(?:{instruction})\.[.\w]*\.(128|256)\b", code)
    return sum(int(width) // 128 for width in widths)


def length(code: str) -> int:
    """How many instructions a kernel has."""
    return len(re.findall(r"/\*[0-9a-f]{4,5}\*/", code))


def sizes(elf: str, prefix: str) -> dict[str, int]:
    """Of the variables with a prefix, from `cuobjdump -elf`."""
    line = rf"^\s*\w+\s+\w+\s+(\w+)\s.*\s{prefix}(\w+)$"
    return {name: int(size, 16) for size, name in re.findall(line, elf, flags=re.MULTILINE)}

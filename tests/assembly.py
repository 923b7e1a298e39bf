"""Instructions and loops of a kernel's assembly, as nvdisasm or LLVM writes it."""

import re

NVIDIA = r"^\s+/\*[0-9a-f]{4,}\*/"  # what an instruction of nvdisasm begins with


def loops(assembly: str, instruction: str) -> tuple[int, list[tuple[int, int]]]:
    """Return how many instructions there are, and where each loop begins and ends: a label and a branch back to it.

    After the exit is code that waits out of line, whose unconditional branches are the way back from there.
    """
    count, found, labels, exited = 0, [], {}, False
    for line in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = count
        elif re.match(instruction, line):
            count += 1
            exited |= bool(re.search(r"\*/\s+EXIT", line))
            branch = r"(?:P\d BRA|BRA\.U|cbranch).*?(\.L\w+)" if exited else r"(?:BRA|branch).*?(\.L\w+)"
            if (target := re.search(branch, line)) and labels.get(target[1], count) < count:
                found.append((labels[target[1]], count))
    return count, found


def longest(found: list[tuple[int, int]]) -> int:
    """Return the instructions of the longest loop, 0 without any."""
    return max((end - begin for begin, end in found), default=0)


def largest_body(found: list[tuple[int, int]]) -> int:
    """Return the instructions of the loop that has most outside the loops within it: a step of a walk over tiles."""

    def own(loop: tuple[int, int]) -> int:
        within = [other for other in found if other != loop and loop[0] <= other[0] and other[1] <= loop[1]]
        return len(set(range(*loop)).difference(*(range(*other) for other in within)))

    begin, end = max(found, key=own, default=(0, 0))
    return end - begin

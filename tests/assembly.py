"""Instructions and loops in the assembly of a kernel, as nvdisasm or LLVM writes it."""

import re

NVIDIA = r"^\s+/\*[0-9a-f]{4,}\*/"  # start of an instruction's line in the output of nvdisasm


def loops(assembly: str, instruction: str) -> tuple[int, list[tuple[int, int]]]:
    """Return the number of instructions, and the beginning and end of each loop.

    A loop is a label and a later branch back to it. After the exit there is out-of-line code that waits. Its
    unconditional branches return to the main code and are not loops.
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
    """Return the number of instructions in the longest loop, or 0 if there is no loop."""
    return max((end - begin for begin, end in found), default=0)


def largest_body(found: list[tuple[int, int]]) -> int:
    """Return the number of instructions in the main loop, a step of a walk over tiles.

    The main loop is the one with the most instructions outside its inner loops. The result includes the inner loops.
    """

    def own(loop: tuple[int, int]) -> int:
        within = [other for other in found if other != loop and loop[0] <= other[0] and other[1] <= loop[1]]
        return len(set(range(*loop)).difference(*(range(*other) for other in within)))

    begin, end = max(found, key=own, default=(0, 0))
    return end - begin

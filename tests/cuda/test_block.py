"""csrc/ops/cuda/block.cu, emulated, against loops in double: tests/cuda/block_test.cpp."""

from pathlib import Path

import pytest
from test_simt import HERE, ROOT, build, run


@pytest.mark.parametrize(
    ("sanitizer", "runs"),
    # 129 units: the least with five sums a group, in short calls, so that the thread sanitizer gets through.
    [("", [["252"]]), ("address,undefined", [["21"]]), ("thread", [["8"], ["4", "129"]])],
)
def test_block(sanitizer: str, runs: list[list[str]], tmp_path: Path) -> None:
    program = build(tmp_path, [ROOT / "csrc/ops/cuda/block.cu", HERE / "block_test.cpp"], sanitizer)
    for arguments in runs:
        answer = run(program, *arguments)
        assert answer.stdout.splitlines()[-1:] == [f"{arguments[0]} cases, 0 differ"], answer.stdout + answer.stderr
        assert answer.returncode == 0 and not answer.stderr

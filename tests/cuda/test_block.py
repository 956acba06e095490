"""csrc/ops/cuda/block.cu, emulated, against loops in double: tests/cuda/block_test.cpp."""

from pathlib import Path

import pytest
from test_simt import HERE, ROOT, build, run


@pytest.mark.parametrize(("sanitizer", "cases"), [("", 252), ("address,undefined", 21), ("thread", 8)])
def test_block(sanitizer: str, cases: int, tmp_path: Path) -> None:
    sources = [ROOT / "csrc/ops/cuda/block.cu", HERE / "block_test.cpp"]
    answer = run(build(tmp_path, sources, sanitizer), str(cases))
    assert answer.stdout.splitlines()[-1:] == [f"{cases} cases, 0 differ"], answer.stdout + answer.stderr
    assert answer.returncode == 0 and not answer.stderr

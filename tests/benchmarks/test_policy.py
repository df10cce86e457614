"""What a policy of many keys takes: held to lenient bounds, as a busy machine measures worse."""

from pathlib import Path

import pytest

from benchmarks.policy import document, measure
from inference_api.policy.reading import read, run

pytestmark = pytest.mark.anyio


def test_its_document_is_a_policy() -> None:
    assert run(read(document(250), peppered=False)).keys == 250


async def test_many_keys_take_little_memory_and_stop_the_loop_shortly(tmp_path: Path) -> None:
    swap = await measure(20_000, tmp_path)

    assert swap.keys == 20_000
    # 60 MB for 100,000
    assert swap.memory < 600 * swap.keys
    # Twice what 100,000 may take
    assert swap.held < 0.010

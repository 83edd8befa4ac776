"""The page about training on several processes says what runs on two."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "fsdp.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page():
    text, namespace = PAGE.read_text(encoding="utf-8"), {"__name__": "page"}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == 5
    for block in blocks:
        # The blank lines before it make a traceback point into the page.
        exec(compile("\n" * text.count("\n", 0, block.start(1)) + block[1], str(PAGE), "exec"), namespace)


def test_blocks_of_the_page_run_in_order_on_each_process(pair):
    pair.run(run_page)

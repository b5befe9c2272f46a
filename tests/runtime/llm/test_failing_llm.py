"""What an LLM's package raises while it answers becomes an error of ours; a bug of ours doesn't."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.tiny_llm import IMAGE, WIDTH, embeds_of, make_tokenizer
from tests.refusals import refused
from vzip.runtime.errors import BackendError
from vzip.runtime.llm import conversation as module_of_ours
from vzip.runtime.llm.chat_template import make_prompts
from vzip.runtime.llm.conversation import GreedyLLM
from vzip.runtime.llm.text_side import TextSide

PanicException = type("PanicException", (BaseException,), {})  # as pyo3 makes it


class FailingLLM(GreedyLLM):
    """An LLM that raises once, in some module, and then ends its answers at once."""

    name = "failing"

    def __init__(self, raised: BaseException, module: str = "a_package") -> None:
        prompts = make_prompts("failing", make_tokenizer(), {"image": IMAGE}, None)
        self.text = TextSide("failing", prompts, frozenset({2}), WIDTH, None, None)
        self.largest = 1e30
        self._raised: BaseException | None = raised
        self._module = module

    def new_cache(self) -> Any:
        return []

    def step(self, ids: list[int], cache: Any, rows: Any, positions: Any = None) -> int:
        raised, self._raised = self._raised, None
        if raised is not None:
            exec("raise raised", {"__name__": self._module, "raised": raised})
        return 2


@pytest.mark.parametrize(
    "raised",
    [RuntimeError("CUDA error"), IndexError("out of range"), MemoryError(), PanicException("no")],
)
def test_what_a_package_raises_is_one_line(raised: BaseException) -> None:
    llm = FailingLLM(raised)
    conversation = llm.conversation(embeds_of(3))
    with refused(BackendError, got="failing: the LLM failed", cause=type(raised).__name__) as it:
        conversation.ask("what?")
    assert it.value.__cause__ is raised
    with refused(BackendError, cure="a new conversation"):
        conversation.ask("what?")
    assert llm.conversation(embeds_of(3)).ask("what?") == ""


def test_a_bug_of_ours_keeps_its_kind() -> None:
    llm = FailingLLM(KeyError("a"), module_of_ours.__name__)
    with pytest.raises(KeyError):
        llm.ask(embeds_of(3), "what?")

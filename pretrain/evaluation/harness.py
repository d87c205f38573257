"""EleutherAI's lm-evaluation-harness on our models: its tasks, our forward pass.

Every rank of a sharded model runs the harness over the same requests; they meet in the scoring.
Install it with `pip install 'transxssm[evaluation]'`.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from checkpoints_tools.single_gpu import ModelError
from pretrain.evaluation.models import ExportedModel, Model
from pretrain.evaluation.rows import Row, score_rows, text_rows
from pretrain.generate import TextStream, generate
from untrusted.numbers import counted


class HarnessModel(TemplateLM):
    """A model as the harness asks for it: log-likelihoods of tokens."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    @property
    def eot_token_id(self) -> int:
        """What an empty context is."""
        return self.model.end_of_text

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """As training data is: without the tokenizer's own additions."""
        return list(self.model.tokenizer.encode(string, add_special_tokens=False).ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _names, context, continuation in requests:
            whole = [*(context or [self.eot_token_id]), *continuation]
            if len(continuation) > self.model.max_length:
                raise ModelError(
                    f"a task asks for {counted(len(continuation), 'token')} at once, and the model "
                    f"takes {self.model.max_length}; use a larger --max-length"
                )
            whole = whole[-self.model.max_length - 1 :]
            rows.append(Row(whole, range(len(whole) - len(continuation), len(whole))))
        return [(-score.nats, score.missed == 0) for score in score_rows(self.model, rows)]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Of whole texts, in windows."""
        rows: list[Row] = []
        ends: list[int] = []
        for request in requests:
            (text,) = request.args
            rows += text_rows(self.tok_encode(text), self.eot_token_id, self.model.max_length)
            ends.append(len(rows))
        nats = [score.nats for score in score_rows(self.model, rows)]
        begins = [0, *ends[:-1]]
        return [-sum(nats[begin:end]) for begin, end in zip(begins, ends, strict=True)]

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Greedy continuations up to a stop text."""
        if not isinstance(self.model, ExportedModel):
            raise ModelError(
                f"{self.model.name} is sharded, and this task generates; export it with "
                "`transxssm checkpoint export` and evaluate that"
            )
        found: list[str] = []
        for request in requests:
            context, options = request.args
            stops: str | list[str] = options.get("until", [])
            wanted = int(options.get("max_gen_toks", 256))
            ids = self.tok_encode(context)[-max(1, self.model.max_length - wanted) :]
            prompt = ids or [self.eot_token_id]
            end = self.eot_token_id
            new = generate(self.model.model, prompt, wanted, eos_token_id=end)[0]
            stream = TextStream(self.model.tokenizer)
            text = "".join(stream.push(token) for token in new) + stream.flush()
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            found.append(text)
        return found


def run_tasks(
    model: Model, tasks: Sequence[str], include_path: Path | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Metrics of every task by name. include_path: a folder of task files of one's own. A
    collective. Raises ModelError for tasks that are not known."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # the harness's own are 14,000 files, which take seconds to list
    own = str(include_path) if include_path else None
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if own is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=own)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ModelError(
            f"--tasks {', '.join(unknown)}: the harness has no such task; name its own, or put the "
            "task's .yaml file into the folder of --include-path"
        )
    # all ranks want the results, and the harness keeps them for the first of a node
    local_rank = os.environ.pop("LOCAL_RANK", None)
    try:
        results: Any = simple_evaluate(
            HarnessModel(model),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    finally:
        if local_rank is not None:
            os.environ["LOCAL_RANK"] = local_rank
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items()}
        for task, metrics in results["results"].items()
    }
